# SPDX-License-Identifier: MIT
"""BAR 0: registers kept in memory that the client maps, and what some of them do besides keeping a value."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SIZE: Final = 16 << 20
REGISTERS_END: Final = 2 << 20
GGTT: Final = 8 << 20
"""Where the global GTT's entries begin; they fill the rest of the BAR."""
PAGE: Final = 4096
_DWORD: Final = 4
_ALL: Final = 0xFFFF_FFFF
_HIGH: Final = 16


class Behaviour:
    """What a register does. This one keeps its value, and is not trapped."""

    traps: ClassVar[bool] = False
    by_command: ClassVar[bool] = True
    """Whether a command (MI_LOAD_REGISTER_IMM and its like) may write it."""

    def read(self, mmio: Mmio, offset: int) -> int:
        """Return what the client reads."""
        return mmio.get(offset)

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Do what a write of the client's does."""
        mmio.put(offset, value)


class _Trapped(Behaviour):
    traps = True
    by_command = False


class Constant(_Trapped):
    """Writes change nothing."""

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Drop it."""


class WriteOneToClear(_Trapped):
    """A bit written as one becomes zero: interrupt identities."""

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Clear bits."""
        mmio.put(offset, mmio.get(offset) & ~value)


class Masked(_Trapped):
    """The upper half says which bits of the lower one change."""

    by_command = True

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Change the bits that the mask chooses."""
        mmio.put(offset, masked(mmio.get(offset), value))


class Acknowledged(Masked):
    """A masked request, which another register acknowledges at once."""

    by_command = False

    def __init__(self, by: int) -> None:
        self._by: Final = by

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Change the request and its acknowledgement."""
        super().write(mmio, offset, value)
        mmio.put(self._by, mmio.get(offset))


class ResetControl(Masked):
    """RESET_CTL: an engine is ready for reset as soon as it is asked for."""

    by_command = False
    _REQUEST: Final = 1 << 0
    _READY: Final = 1 << 1

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Change the request; ready follows it."""
        new = masked(mmio.get(offset), value)
        mmio.put(offset, new & ~self._READY | (self._READY if new & self._REQUEST else 0))


class SelfClearing(_Trapped):
    """Bits that start something, which is done at once."""

    def __init__(self, bits: int) -> None:
        self._bits: Final = bits

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Keep the rest."""
        mmio.put(offset, value & ~self._bits)


class Follows(_Trapped):
    """A state bit follows its request bit; so does, where one is given, a bit of another register."""

    def __init__(self, request: int, state: int, also: tuple[int, int] | None = None) -> None:
        self._request: Final = request
        self._state: Final = state
        self._also: Final = also

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Change request and state."""
        on = bool(value & self._request)
        mmio.put(offset, value & ~self._state | (self._state if on else 0))
        if self._also is not None:
            other, bit = self._also
            mmio.put(other, mmio.get(other) & ~bit | (bit if on else 0))


class PowerWells(_Trapped):
    """Each of several registers requests power wells; all of them show the state that comes of it."""

    _REQUESTS: Final = 0xAAAA_AAAA

    def __init__(self, first: int, last: int) -> None:
        self._all: Final = range(first, last + _DWORD, _DWORD)

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Change one's requests and everybody's state."""
        mmio.put(offset, value)
        state = 0
        for each in self._all:
            state |= (mmio.get(each) & self._REQUESTS) >> 1
        for each in self._all:
            mmio.put(each, mmio.get(each) & self._REQUESTS | state)


class AuxChannel(_Trapped):
    """DP_AUX_CH_CTL: no display answers, every transfer ends in a time-out."""

    _BUSY: Final = 1 << 31
    _DONE: Final = 1 << 30
    _TIMEOUT: Final = 1 << 28
    _RECEIVE_ERROR: Final = 1 << 25

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """End a transfer that is started; done and the errors are cleared by writing ones."""
        kept = value & ~(self._BUSY | self._DONE | self._TIMEOUT | self._RECEIVE_ERROR)
        mmio.put(offset, kept | (self._DONE | self._TIMEOUT if value & self._BUSY else 0))


class PowerController(_Trapped):
    """GEN6_PCODE_MAILBOX: commands to the power controller are answered at once, with success."""

    _READY: Final = 1 << 31
    _COMMAND: Final = 0xFF
    _DATA, _DATA1 = 0x138128, 0x13812C
    _ANSWERS: Final[Mapping[int, int]] = {
        0x07: 1,  # SKL_PCODE_CDCLK_CONTROL: ready for the change
        0x21: 1,  # GEN9_PCODE_SAGV_CONTROL: is disabled
    }

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Answer; the lower byte becomes the error, none."""
        if not value & self._READY:
            mmio.put(offset, value)
            return
        mmio.put(self._DATA, self._ANSWERS.get(value & self._COMMAND, 0))
        mmio.put(self._DATA1, 0)
        mmio.put(offset, value & ~(self._READY | self._COMMAND))


class Hook(_Trapped):
    """What a register does is done by another part of the GPU, which registers itself under this name."""

    def __init__(self, name: str) -> None:
        self.name: Final = name

    def read(self, mmio: Mmio, offset: int) -> int:
        """Ask that part, if it answers reads."""
        reader = mmio.readers.get((self.name, offset))
        return mmio.get(offset) if reader is None else reader() & _ALL

    def write(self, mmio: Mmio, offset: int, value: int) -> None:
        """Tell that part, if it takes writes."""
        writer = mmio.writers.get((self.name, offset))
        if writer is None:
            mmio.put(offset, value)
        else:
            writer(value)


def masked(old: int, value: int) -> int:
    """Return what a masked register of value *old* holds after a write.

    >>> hex(masked(0x0305, 0x00FF0042))
    '0x342'
    """
    mask = value >> _HIGH
    return (old & ~mask | value & mask) & 0xFFFF


class Register(NamedTuple):
    """A row: an offset into BAR 0 (of an engine: from its base), what it does, and who would miss it."""

    offset: int
    name: str
    behaviour: Behaviour
    seen_in: str
    initial: int = 0


class Mmio:
    """The BAR's 16 MiB. Owns the memory behind it."""

    def __init__(self, table: Sequence[Register]) -> None:
        self._table: Final = table
        self._behaviours: Final = {row.offset: row.behaviour for row in table}
        self.fd: Final = os.memfd_create("gen9-bar0", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        # The client gets this file, too: who made it shorter would end us with SIGBUS.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._memory: Final = mmap.mmap(self.fd, SIZE)
        self._bytes: Final = memoryview(self._memory)
        self._dwords: Final = self._bytes.cast("I")
        self.ggtt: Final = self._bytes[GGTT:].cast("Q")
        self.readers: Final[dict[tuple[str, int], Callable[[], int]]] = {}
        self.writers: Final[dict[tuple[str, int], Callable[[int], None]]] = {}
        self.reset()

    def close(self) -> None:
        """Free the memory."""
        for view in (self.ggtt, self._dwords, self._bytes):
            view.release()
        self._memory.close()
        os.close(self.fd)

    def reset(self) -> None:
        """Bring all registers and the GGTT to the values after power-on."""
        self._memory.madvise(mmap.MADV_REMOVE)  # reads as zeros, and takes no memory
        for row in self._table:
            self.put(row.offset, row.initial)

    def areas(self) -> list[tuple[int, int]]:
        """Return what the client may map (offset, size): all pages without a register that is trapped."""
        trapped = sorted({row.offset & -PAGE for row in self._table if row.behaviour.traps})
        found, start = [], 0
        for page in [*trapped, SIZE]:
            if page > start:
                found.append((start, page - start))
            start = page + PAGE
        return found

    def get(self, offset: int) -> int:
        """Return a register's value, without what reading it does."""
        return int(self._dwords[offset >> 2])

    def put(self, offset: int, value: int) -> None:
        """Set a register's value, without what writing it does."""
        self._dwords[offset >> 2] = value & _ALL

    def read(self, offset: int) -> int:
        """Read a register as the CPU does; *offset* is a multiple of 4."""
        behaviour = self._behaviours.get(offset)
        return self.get(offset) if behaviour is None else behaviour.read(self, offset)

    def write(self, offset: int, value: int) -> None:
        """Write a register as the CPU does; *offset* is a multiple of 4."""
        behaviour = self._behaviours.get(offset)
        if behaviour is None:
            self.put(offset, value)
        else:
            behaviour.write(self, offset, value)

    def write_by_command(self, offset: int, value: int) -> bool:
        """Write a register as a command does; False where the command is not obeyed."""
        behaviour = self._behaviours.get(offset)
        if offset >= REGISTERS_END or (behaviour is not None and not behaviour.by_command):
            return False
        self.write(offset, value)
        return True

    def read_bytes(self, offset: int, size: int) -> bytes:
        """Read as much as a client asks for. Only whole dwords have side effects."""
        if offset >= REGISTERS_END or (offset | size) % _DWORD or size > 2 * _DWORD:
            return bytes(self._bytes[offset : offset + size])
        dwords = range(offset, offset + size, _DWORD)
        return b"".join(self.read(each).to_bytes(_DWORD, "little") for each in dwords)

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write what a client writes. Only whole dwords have side effects."""
        size = len(data)
        if offset >= REGISTERS_END or (offset | size) % _DWORD or size > 2 * _DWORD:
            if size == 2 * _DWORD and offset % size == 0:
                self.ggtt_or_plain(offset, int.from_bytes(data, "little"))
            else:
                self._bytes[offset : offset + size] = data
            return
        for position in range(0, size, _DWORD):
            self.write(offset + position, int.from_bytes(data[position : position + _DWORD], "little"))

    def ggtt_or_plain(self, offset: int, value: int) -> None:
        """Store a qword at once, so that no engine sees half of a GGTT entry."""
        if offset >= GGTT:
            self.ggtt[(offset - GGTT) >> 3] = value
        else:
            self._bytes[offset : offset + 8] = value.to_bytes(8, "little")
