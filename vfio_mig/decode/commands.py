# SPDX-License-Identifier: MIT
"""Gen 8 submissions in words: context descriptors, context images, rings, commands (i915: ``intel_gpu_commands.h``).

Only what the image holds can be followed: a ring is in guest memory, behind the GGTT.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.decode.gtt import Table

    PageReader = Callable[[int], bytes | None]
    """Takes the guest-physical address of a page, gives its content, None where the image has none."""

_MODES: Final = {1: "32-bit", 3: "48-bit"}
_MI: Final = 0
_PIPE_CONTROL: Final = 0x7A00
_GGTT: Final = 1 << 22
_ADDRESS_HIGH: Final = 0xFFFF
COMMANDS_MAX: Final = 256
"""Commands that are listed of one ring or batch."""
WORDS_MAX: Final = 1 << 16
"""Words that are looked at in all rings and batches of one image."""
_WORDS_EACH: Final = 64
"""What one look costs at least: it may have to read a member of the archive."""
_CONTEXT_AT: Final = PAGE  # registers are one page behind LRCA
_CONTEXT: Final = {"head": 0x14, "tail": 0x1C, "start": 0x24, "ctl": 0x2C}
_RING_SIZE: Final = 0x1FF000
_HEAD: Final = 0x1FFFFC
_TAIL: Final = 0x1FFFF8


class _Op(NamedTuple):
    """A command: name, bits of its length field (0: one word), and where its address is, if any."""

    name: str
    length_bits: int
    address_at: int = 0


_OPS: Final = {  # MI opcode
    0x00: _Op("MI_NOOP", 0),
    0x02: _Op("MI_USER_INTERRUPT", 0),
    0x05: _Op("MI_ARB_CHECK", 0),
    0x08: _Op("MI_ARB_ON_OFF", 0),
    0x0A: _Op("MI_BATCH_BUFFER_END", 0),
    0x1C: _Op("MI_SEMAPHORE_WAIT", 8, 2),
    0x20: _Op("MI_STORE_DATA_IMM", 10, 1),
    0x22: _Op("MI_LOAD_REGISTER_IMM", 8),
    0x24: _Op("MI_STORE_REGISTER_MEM", 8, 2),
    0x26: _Op("MI_FLUSH_DW", 6, 1),
    0x29: _Op("MI_LOAD_REGISTER_MEM", 8, 2),
    0x2A: _Op("MI_LOAD_REGISTER_REG", 8),
    0x2F: _Op("MI_ATOMIC", 8, 1),
    0x31: _Op("MI_BATCH_BUFFER_START", 8, 1),
}
_FLUSH: Final = 0x26
_BATCH_START: Final = 0x31


def descriptor(high: int, low: int) -> dict[str, Any]:
    """Decode a context descriptor: *lrca* is the graphics address of the context image."""
    return {
        "valid": bool(low & 1),
        "mode": _MODES.get(low >> 3 & 3, f"reserved-{low >> 3 & 3}"),
        "privileged": bool(low >> 8 & 1),
        "lrca": low & 0xFFFFF000,
        "context_id": high,
    }


def elements(elsp: tuple[int, ...]) -> list[dict[str, Any]]:
    """Decode the four words of a submission, in the guest's order: element 1 high, low, element 0 high, low.

    All zero is an entry that the one before it stands for.
    """
    return [descriptor(high, low) for high, low in ((elsp[2], elsp[3]), (elsp[0], elsp[1])) if low & 1]


def _space(op: int, words: tuple[int, ...]) -> str:
    """Say which addresses a command uses."""
    if op == _FLUSH:
        return "ggtt" if words[1] & 4 else "ppgtt"
    if op == _BATCH_START:
        return "ppgtt" if words[0] & 0x100 else "ggtt"
    return "ggtt" if words[0] & _GGTT else "ppgtt"


def command(words: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
    """Decode the command at the beginning of *words*: how many words it has, 0 if that is not known, and what it is.

    One that is cut off has fewer words than it says.
    """
    first = words[0]
    if first >> 16 == _PIPE_CONTROL:
        return _pipe_control(words)
    op = _OPS.get(first >> 23 & 0x3F) if first >> 29 == _MI else None
    if op is None:
        return 0, {"name": "unknown", "words": [first]}
    length = (first & (1 << op.length_bits) - 1) + 2 if op.length_bits else 1
    used = words[:length]
    found: dict[str, Any] = {"name": op.name, "words": list(used)}
    if op.address_at and len(used) > op.address_at:
        high = used[op.address_at + 1] & _ADDRESS_HIGH if len(used) > op.address_at + 1 else 0
        mask = ~7 if first >> 23 & 0x3F == _FLUSH else ~3
        found["space"] = _space(first >> 23 & 0x3F, used)
        found["address"] = used[op.address_at] & mask | high << 32
    return length, found


def _pipe_control(words: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
    length = (words[0] & 0xFF) + 2
    used = words[:length]
    found: dict[str, Any] = {"name": "PIPE_CONTROL", "words": list(used)}
    if len(used) > 3 and used[1] >> 14 & 3:  # noqa: PLR2004 -- the address is in words 2 and 3
        found["space"] = "ggtt" if used[1] >> 24 & 1 else "ppgtt"
        found["address"] = used[2] & ~3 | (used[3] & _ADDRESS_HIGH) << 32
    return length, found


def listing(words: tuple[int, ...]) -> tuple[list[dict[str, Any]], str | None]:
    """Decode commands to the end, to MI_BATCH_BUFFER_END, or COMMANDS_MAX of them; and say why it ended early."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(words):
        if len(found) == COMMANDS_MAX:
            return found, f"more than {COMMANDS_MAX} commands"
        length, one = command(words[at : at + 1026])
        found.append(one)
        if not length:
            return found, f"unknown command {words[at]:#x}, whose length is not known"
        if len(one["words"]) < length:
            return found, f"{one['name']} is cut off"
        at += length
        if one["name"] == "MI_BATCH_BUFFER_END":
            break
    return found, None


class Memory:
    """Guest memory by graphics address, as far as an image has it."""

    def __init__(self, table: Table, read_page: PageReader) -> None:
        self._table = table
        self._read_page = read_page
        self._left = WORDS_MAX

    def words(self, address: int, number: int) -> tuple[int, ...] | str:
        """Return 32-bit words, or say which page is missing."""
        cost = max(number, _WORDS_EACH)
        if cost > self._left:
            return f"more than {WORDS_MAX} words in all, which is where this stops"
        self._left -= cost
        parts: list[bytes] = []
        left = number * 4
        while left:
            size = min(left, PAGE - address % PAGE)
            gpa = self._table.translate(address)
            if gpa is None:
                return f"graphics address {address:#x} is not mapped"
            page = self._read_page(gpa - gpa % PAGE)
            if page is None:
                return f"the image has no page {gpa - gpa % PAGE:#x}"
            parts.append(page[address % PAGE : address % PAGE + size])
            address, left = address + size, left - size
        return struct.unpack(f"<{number}I", b"".join(parts))


def ring(memory: Memory, lrca: int) -> dict[str, Any]:
    """Decode what waits in the ring of a context: its registers, then the commands from HEAD to TAIL, and batches."""
    registers: dict[str, int] = {}
    for name, at in _CONTEXT.items():
        words = memory.words(lrca + _CONTEXT_AT + at, 1)
        if isinstance(words, str):
            return {"problem": f"context image: {words}"}
        registers[name] = words[0]
    size = (registers["ctl"] & _RING_SIZE) + PAGE
    start = registers["start"] & ~(PAGE - 1)
    head, tail = registers["head"] & _HEAD, registers["tail"] & _TAIL
    values: dict[str, Any] = {"ring": {**registers, "size": size}, "commands": []}
    if head >= size or tail >= size:
        return {**values, "problem": f"head {head:#x} or tail {tail:#x} is outside the ring"}
    spans = [(head, tail)] if head <= tail else [(head, size), (0, tail)]
    words_found: tuple[int, ...] = ()
    for begin, end in spans:
        part = memory.words(start + begin, (end - begin) // 4)
        if isinstance(part, str):
            return {**values, "problem": f"ring: {part}"}
        words_found += part
    values["commands"], problem = listing(words_found)
    if problem:
        values["problem"] = f"ring: {problem}"
    for one in values["commands"]:
        if one["name"] == "MI_BATCH_BUFFER_START" and one.get("space") == "ggtt":
            one["batch"] = _batch(memory, one["address"])
    return values


def _batch(memory: Memory, address: int) -> dict[str, Any]:
    """Decode a batch up to the end of its page; a batch that goes on behind it is cut off there."""
    words = memory.words(address, (PAGE - address % PAGE) // 4)
    if isinstance(words, str):
        return {"problem": words}
    commands, problem = listing(words)
    return {"commands": commands, **({"problem": problem} if problem else {})}
