# SPDX-License-Identifier: MIT
"""The command interpreter. What is not executed is skipped by its length; README.md lists what that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tools.gpu import blit
from tools.gpu.command import Command, HangError
from tools.gpu.context import MAX_LEVELS, Batch
from tools.gpu.registers import RING_IPEHR

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.access import Access
    from tools.gpu.context import Context
    from tools.gpu.mmio import Mmio
    from tools.gpu.record import Entry, Record
    from tools.gpu.registers import EngineLayout

_MI, _BLIT, _RENDER = 0, 2, 3  # types, bits 31:29
_TYPE_SHIFT: Final = 29
_MI_SHIFT, _MI_MASK = 23, 0x3F
_MI_LONG: Final = 0x10  # opcodes from here on have a length
_LENGTH: Final = 0xFF
_MI_LENGTHS: Final = {
    0x23: 0x3FF,  # MI_UPDATE_GTT
    0x26: 0x3F,  # MI_FLUSH_DW, which has flags from bit 7 on
}
_BLIT_SHIFT, _BLIT_MASK = 22, 0x7F
_VIDEO_LENGTH: Final = 0xFFF
_MEDIA_LENGTH: Final = 0xFFFF
_SEMAPHORE_WAIT: Final = "MI_SEMAPHORE_WAIT"
_BATCH_IN_PPGTT: Final = 1 << 8
_SECOND_LEVEL: Final = 1 << 22
_COPY_SOURCE_GGTT: Final = 1 << 21
_PIPE_CONTROL_DWORDS: Final = 6
_REGISTER: Final = 0x7F_FFFC
_USE_GGTT: Final = 1 << 22
_STORE_QWORD: Final = 1 << 21
_INDEX: Final = 0xFF8  # of a qword relative to the status page
_INDEX_DWORD: Final = 0xFFC
_DWORD: Final = 0xFFFF_FFFF

_PIPE_CONTROL: Final = 0x7A00
_PIPELINE_SELECT_OLD: Final = 0x6104
_VF_STATISTICS: Final = 0x780B

_POST_SYNC_SHIFT, _POST_SYNC_MASK = 14, 3
_WRITE_DATA, _WRITE_DEPTH_COUNT, _WRITE_TIMESTAMP = 1, 2, 3
_NOTIFY: Final = 1 << 8
_STORE_INDEX: Final = 1 << 21
_PIPE_USE_GGTT: Final = 1 << 24
_PIPE_WRITE_REGISTER: Final = 1 << 23
_FLUSH_USE_GGTT: Final = 1 << 2  # in the address

_COMPARE: Final[tuple[Callable[[int, int], bool], ...]] = (
    lambda memory, data: memory > data,
    lambda memory, data: memory >= data,
    lambda memory, data: memory < data,
    lambda memory, data: memory <= data,
    lambda memory, data: memory == data,
    lambda memory, data: memory != data,
)


class BlockedError(Exception):
    """A semaphore is not signalled; the command is to be tried again."""


_Known = tuple[str, "Callable[[Context, Command], None]"]
"""A command's name, and what executes it."""


class Interpreter:
    """Executes an engine's commands, one at a time."""

    def __init__(
        self,
        layout: EngineLayout,
        mmio: Mmio,
        access: Access,
        record: Record,
        *,
        user_interrupt: Callable[[], None],
        status_page: Callable[[], int],
        ticks: Callable[[], int],
    ) -> None:
        """Take what the engine consists of.

        :param status_page: gives the graphics address of the hardware status page.
        :param ticks: gives the timestamp.
        """
        self._layout: Final = layout
        self._mmio: Final = mmio
        self._access: Final = access
        self._record: Final = record
        self._user_interrupt: Final = user_interrupt
        self._status_page: Final = status_page
        self._ticks: Final = ticks
        self._waiting: tuple[int, int, Entry] | None = None  # context, address, entry: a semaphore that is waited for
        self._mi: Final[dict[int, _Known]] = {
            0x02: ("MI_USER_INTERRUPT", lambda _context, _command: self._user_interrupt()),
            0x0A: ("MI_BATCH_BUFFER_END", _batch_end),
            0x1C: (_SEMAPHORE_WAIT, self._semaphore_wait),
            0x20: ("MI_STORE_DATA_IMM", self._store_data_imm),
            0x21: ("MI_STORE_DATA_INDEX", self._store_data_index),
            0x22: ("MI_LOAD_REGISTER_IMM", self._load_register_imm),
            0x23: ("MI_UPDATE_GTT", self._update_gtt),
            0x24: ("MI_STORE_REGISTER_MEM", self._store_register_mem),
            0x26: ("MI_FLUSH_DW", self._flush_dw),
            0x29: ("MI_LOAD_REGISTER_MEM", self._load_register_mem),
            0x2A: ("MI_LOAD_REGISTER_REG", self._load_register_reg),
            0x2E: ("MI_COPY_MEM_MEM", self._copy_mem_mem),
            0x31: ("MI_BATCH_BUFFER_START", self._batch_start),
            0x36: ("MI_CONDITIONAL_BATCH_BUFFER_END", self._conditional_batch_end),
        }
        self._blits: Final[dict[int, _Known]] = {
            0x42: ("XY_FAST_COPY_BLT", lambda _context, command: self._copy(command, blit.fast_copy)),
            0x50: ("XY_COLOR_BLT", lambda _context, command: self._fill(command)),
            0x53: ("XY_SRC_COPY_BLT", lambda _context, command: self._copy(command, blit.source_copy)),
        }

    def step(self, context: Context) -> int:
        """Execute the next command; afterwards the context stands behind it.

        Returns what it counts: 1, and for a blit 1 more for each row and page that it touched.

        :raises BlockedError: it waits; the context stands before it.
        :raises HangError: it is none, or cannot be obeyed; the context stands before it or behind it.
        :raises FaultError: it leads to an address that leads nowhere.
        """
        batch = context.batches[-1] if context.batches else None
        at = batch.address if batch else context.start + context.head
        word = self._words(context, batch)
        header = word(0)
        self._mmio.put(self._layout.base + RING_IPEHR, header)
        if not header:
            context.follow(1)  # MI_NOOP: there are many, and they do nothing
            return 1
        length, (name, execute) = self._decode(header)
        command = Command(header, length, word, self._entry(context, name, header, at, batch is not None))
        if name == _SEMAPHORE_WAIT:
            execute(context, command)
            context.follow(length)
        else:
            context.follow(length)
            execute(context, command)
        return 1 + command.entry.accesses if header >> _TYPE_SHIFT == _BLIT else 1

    def _words(self, context: Context, batch: Batch | None) -> Callable[[int], int]:
        """Return what reads the dwords from here on; in the ring they go round."""
        fetch = self._access.fetch
        if batch is None:
            start, head, size = context.start, context.head, context.size
            return lambda index: fetch(start + (head + 4 * index) % size, ggtt=True)
        address, ggtt = batch.address, not batch.ppgtt
        return lambda index: fetch(address + 4 * index, ggtt=ggtt)

    def _decode(self, header: int) -> tuple[int, _Known]:
        """Return a command's length, name and executor."""
        kind = header >> _TYPE_SHIFT
        if kind == _MI:
            opcode = header >> _MI_SHIFT & _MI_MASK
            return _mi_length(opcode, header), self._mi.get(opcode, (f"MI {opcode:#04x}", _skip))
        if kind == _BLIT:
            opcode = header >> _BLIT_SHIFT & _BLIT_MASK
            return (header & _LENGTH) + 2, self._blits.get(opcode, (f"2D {opcode:#04x}", _skip))
        if kind == _RENDER:
            opcode = header >> 16
            if opcode == _PIPE_CONTROL:
                return (header & _LENGTH) + 2, ("PIPE_CONTROL", self._pipe_control)
            return self._render_length(opcode, header), (f"3D {opcode:#06x}", _skip)
        raise HangError(f"no command: {header:#010x}")

    def _render_length(self, opcode: int, header: int) -> int:
        """Return the length of a command of the render or media pipelines."""
        subtype, group = opcode >> 11 & 3, opcode >> 8 & 7
        if subtype == 1 or opcode in {_PIPELINE_SELECT_OLD, _VF_STATISTICS}:
            return 1
        if subtype == 2:  # noqa: PLR2004 -- media
            # The video engines' commands have 12 bits, the render engine's media commands up to 16.
            wide = _VIDEO_LENGTH if self._layout.name != "rcs0" else _MEDIA_LENGTH if group else _LENGTH
            return (header & wide) + 2
        return (header & _LENGTH) + 2

    def _entry(self, context: Context, name: str, header: int, at: int, in_batch: bool) -> Entry:
        """Make the entry; a semaphore that is looked at again keeps its own."""
        if name == _SEMAPHORE_WAIT:
            if self._waiting is not None and self._waiting[:2] == (context.lrca, at):
                return self._waiting[2]
            entry = self._record.add(self._layout.name, context.lrca, name, header, at=at, batch=in_batch)
            self._waiting = (context.lrca, at, entry)
            return entry
        self._waiting = None
        return self._record.add(self._layout.name, context.lrca, name, header, at=at, batch=in_batch)

    def _semaphore_wait(self, _context: Context, command: Command) -> None:
        operation = command.header >> 12 & 7
        if operation >= len(_COMPARE):
            raise HangError(f"MI_SEMAPHORE_WAIT compares by {operation}")
        where = self._access.translate(command.address(2), ggtt=bool(command.header & _USE_GGTT))
        value = self._access.dma.read32(where)
        command.entry.reads[:] = [(where, value)]
        command.entry.accesses = 1
        if not _COMPARE[operation](value, command.word(1)):
            raise BlockedError
        self._waiting = None

    def _store_data_imm(self, _context: Context, command: Command) -> None:
        ggtt = bool(command.header & _USE_GGTT)
        if command.header & _STORE_QWORD:
            self._put(command, command.address(1), command.word(3), command.word(4), ggtt=ggtt)
        else:
            self._access.write(command.address(1), command.word(3), command.entry, ggtt=ggtt)

    def _store_data_index(self, _context: Context, command: Command) -> None:
        where = self._status_page() + (command.word(1) & _INDEX_DWORD)
        self._access.write(where, command.word(2), command.entry, ggtt=True)

    def _load_register_imm(self, _context: Context, command: Command) -> None:
        for index in range(1, command.length - 1, 2):
            self._mmio.write_by_command(command.word(index) & _REGISTER, command.word(index + 1))

    def _store_register_mem(self, _context: Context, command: Command) -> None:
        value = self._mmio.read(command.word(1) & _REGISTER)
        self._access.write(command.address(2), value, command.entry, ggtt=bool(command.header & _USE_GGTT))

    def _load_register_mem(self, _context: Context, command: Command) -> None:
        value = self._access.read(command.address(2), command.entry, ggtt=bool(command.header & _USE_GGTT))
        self._mmio.write_by_command(command.word(1) & _REGISTER, value)

    def _load_register_reg(self, _context: Context, command: Command) -> None:
        value = self._mmio.read(command.word(1) & _REGISTER)
        self._mmio.write_by_command(command.word(2) & _REGISTER, value)

    def _copy_mem_mem(self, _context: Context, command: Command) -> None:
        value = self._access.read(command.address(3), command.entry, ggtt=bool(command.header & _COPY_SOURCE_GGTT))
        self._access.write(command.address(1), value, command.entry, ggtt=bool(command.header & _USE_GGTT))

    def _update_gtt(self, _context: Context, command: Command) -> None:
        """Write GGTT entries: a first one's page, then qwords."""
        first = command.word(1) >> 12
        for index in range(2, command.length - 1, 2):
            entry = first + (index - 2) // 2
            if entry < len(self._access.ggtt.entries):
                self._access.ggtt.entries[entry] = command.word(index + 1) << 32 | command.word(index)
        self._access.invalidate()

    def _flush_dw(self, _context: Context, command: Command) -> None:
        self._access.invalidate()
        low = command.word(1)
        ggtt = bool(low & _FLUSH_USE_GGTT)
        address = command.address(1) & ~0b111
        if command.header & _STORE_INDEX:
            address, ggtt = self._status_page() + (low & _INDEX), True
        # With only four dwords the upper half of what is stored is missing: a dword is stored.
        high = command.word(4) if command.length > 4 else None  # noqa: PLR2004
        self._post_sync(command, command.header, address, (command.word(3), high), ggtt=ggtt)
        if command.header & _NOTIFY:
            self._user_interrupt()

    def _pipe_control(self, _context: Context, command: Command) -> None:
        if command.length < _PIPE_CONTROL_DWORDS:
            raise HangError(f"PIPE_CONTROL of {command.length} dwords")
        self._access.invalidate()
        flags = command.word(1)
        address, ggtt = command.address(2), bool(flags & _PIPE_USE_GGTT)
        if flags & _STORE_INDEX:
            address, ggtt = self._status_page() + (command.word(2) & _INDEX), True
        if flags & _PIPE_WRITE_REGISTER:
            self._mmio.write_by_command(address & _REGISTER, command.word(4))
        else:
            self._post_sync(command, flags, address, (command.word(4), command.word(5)), ggtt=ggtt)
        if flags & _NOTIFY:
            self._user_interrupt()

    def _post_sync(
        self, command: Command, flags: int, address: int, data: tuple[int, int | None], *, ggtt: bool
    ) -> None:
        operation = flags >> _POST_SYNC_SHIFT & _POST_SYNC_MASK
        low, high = data
        if operation == _WRITE_DEPTH_COUNT:
            self._put(command, address, 0, 0, ggtt=ggtt)  # nothing is drawn
        elif operation == _WRITE_TIMESTAMP:
            now = self._ticks()
            self._put(command, address, now & _DWORD, now >> 32, ggtt=ggtt)
        elif operation == _WRITE_DATA and high is None:
            self._access.write(address, low, command.entry, ggtt=ggtt)
        elif operation == _WRITE_DATA and high is not None:
            self._put(command, address, low, high, ggtt=ggtt)

    def _put(self, command: Command, address: int, low: int, high: int, *, ggtt: bool) -> None:
        """Store a qword, at once where it is aligned."""
        if address % 8:
            self._access.write(address, low, command.entry, ggtt=ggtt)
            self._access.write(address + 4, high, command.entry, ggtt=ggtt)
        else:
            self._access.write64(address, high << 32 | low, command.entry, ggtt=ggtt)

    def _fill(self, command: Command) -> None:
        rectangle, colour = blit.fill(command)
        for address in rectangle.rows():
            self._access.write_bytes(address, colour * rectangle.width, command.entry)

    def _copy(self, command: Command, parse: Callable[[Command], tuple[blit.Rectangle, blit.Rectangle]]) -> None:
        target, source = parse(command)
        for to, origin in zip(target.rows(), source.rows(), strict=True):
            data = self._access.read_bytes(origin, source.width * source.pixel, command.entry)
            self._access.write_bytes(to, data, command.entry)

    def _batch_start(self, context: Context, command: Command) -> None:
        """Start a batch, a second-level batch, or go on in another one; each has a level of its own."""
        target = Batch(command.address(1), bool(command.header & _BATCH_IN_PPGTT))
        where = self._access.translate(target.address, ggtt=not target.ppgtt)
        command.entry.read(where, self._access.dma.read32(where))
        if not context.batches:
            context.batches.append(target)
        elif not command.header & _SECOND_LEVEL:
            context.batches[-1] = target
        elif len(context.batches) < MAX_LEVELS:
            context.batches.append(target)
        else:
            raise HangError("MI_BATCH_BUFFER_START of a third level")

    def _conditional_batch_end(self, context: Context, command: Command) -> None:
        """End the batch unless the dword in memory is greater than the command's."""
        value = self._access.read(command.address(2), command.entry, ggtt=bool(command.header & _USE_GGTT))
        if value <= command.word(1):
            _batch_end(context, command)


def _batch_end(context: Context, _command: Command) -> None:
    """End the innermost batch; in the ring there is none to end."""
    if context.batches:
        context.batches.pop()


def _skip(_context: Context, _command: Command) -> None:
    """Do nothing."""


def _mi_length(opcode: int, header: int) -> int:
    """Return an MI command's length in dwords."""
    if opcode < _MI_LONG:
        return 1
    return (header & _MI_LENGTHS.get(opcode, _LENGTH)) + 2
