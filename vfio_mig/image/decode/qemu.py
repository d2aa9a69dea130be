# SPDX-License-Identifier: MIT
"""The VFIO devices in a QEMU migration stream, as ``migrate file:`` or ``exec:cat >`` writes it (QEMU 7.2 to 10).

Layout: QEMU's ``migration/savevm.c`` (sections), ``migration/ram.c`` and ``hw/vfio/migration.c``; all big-endian.
A section has no length. Those of ``ram`` and of VFIO devices are taken apart here; the end of any other is found by
its footer, which repeats its number, where what follows it can begin a section. So a device whose content looks like
that can mislead this; it is said which sections were passed over so. Where there is no going on, the rest is searched
for VFIO sections by their headers and markers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.errors import ImageError
from vfio_mig.image.decode import pci
from vfio_mig.image.decode.section import Section, listed
from vfio_mig.image.window import find

if TYPE_CHECKING:
    from vfio_mig.image.window import Window

MAGIC: Final = b"QEVM"
_VERSION: Final = 3
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND = range(9)
_FOOTER: Final = 0x7E
_COMMAND_MAX: Final = 32

_MARK: Final = 0xFFFFFFFFEF100000
_MARK_PREFIX: Final = struct.pack(">Q", _MARK)[:7]
_STATE_END, _CONFIG, _SETUP, _DATA, _INIT_SENT, _CONFIG_READY = (_MARK + number for number in range(1, 7))

_RAM_ZERO, _RAM_SIZE, _RAM_PAGE, _RAM_EOS, _RAM_CONTINUE, _RAM_XBZRLE = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
_RAM_HOOK, _RAM_COMPRESSED, _RAM_FLUSH = 0x80, 0x100, 0x200
_PAGE: Final = 4096
_BUFFER: Final = 1 << 16
_VERSION_SIZE: Final = 4
_IRQ_STATE_SIZE: Final = 16
PROBLEMS_MAX: Final = 100
"""Problems that are listed."""
CONFIG_MAX: Final = 1 << 20
"""Bytes of a VFIO device's configuration record, at most: 2048 MSI-X vectors of 16 bytes are the largest part."""


class _CutError(Exception):
    """The stream ends where more is needed, or is not what was expected: the text says it."""


class _Cursor:
    """Reads big-endian numbers front to back."""

    def __init__(self, window: Window, at: int) -> None:
        self.window = window
        self.at = at
        self._buffer = b""
        self._start = at

    def take(self, size: int) -> bytes:
        """Return the next bytes, all of them: few."""
        inside = self.at - self._start
        if inside < 0 or inside + size > len(self._buffer):
            self._buffer = self.window.read(self.at, max(size, _BUFFER))
            self._start, inside = self.at, 0
        found = self._buffer[inside : inside + size]
        if len(found) < size:
            raise _CutError(f"cut off at {self.at + len(found):#x}")
        self.at += size
        return found

    def number(self, size: int) -> int:
        """Return the next number."""
        return int.from_bytes(self.take(size), "big")

    def skip(self, size: int) -> None:
        """Pass over bytes.

        :raises _CutError: there are not so many.
        """
        if size > self.window.size - self.at:
            raise _CutError(f"{size} bytes promised at {self.at:#x}, {self.window.size - self.at} left")
        self.at += size

    def name(self) -> str:
        """Return a name with its length in front."""
        return self.take(self.number(1)).decode("ascii", "backslashreplace")


@dataclass
class SectionKind:
    """What a section number stands for, and how much of the stream it has.

    :param how: ``parsed``; ``footer`` where an end was found by the footer alone.
    """

    name: str
    instance: int
    version: int
    parts: int = 0
    size: int = 0
    how: str = "parsed"


@dataclass
class VfioDevice:
    """A VFIO device in the stream.

    :param frames: (offset, bytes) of the pieces of its state, in order.
    :param config: (offset, bytes) of QEMU's own record of it: configuration space, interrupts.
    """

    name: str
    instance: int
    section: int
    frames: list[tuple[int, int]] = field(default_factory=list)
    config: tuple[int, int] | None = None

    @property
    def state_size(self) -> int:
        """Bytes of device state."""
        return sum(size for _, size in self.frames)


class QemuStream(NamedTuple):
    """What is in a stream.

    :param problems: why not all of it could be taken apart.
    """

    machine: str | None
    complete: bool
    kinds: dict[int, SectionKind]
    devices: list[VfioDevice]
    problems: list[str]

    def sections(self) -> list[Section]:
        """Return it in words, without the devices' states."""
        kinds = [
            {
                "number": number,
                "name": kind.name,
                "instance": kind.instance,
                "version": kind.version,
                "parts": kind.parts,
                "size": kind.size,
                "how": kind.how,
            }
            for number, kind in self.kinds.items()
        ]
        values = {"machine": self.machine, "complete": self.complete, "sections": listed(kinds)}
        return [Section("stream", 0, 8, values)]


def is_vfio(name: str) -> bool:
    """Tell whether a section is a VFIO device's: QEMU calls it ``PATH/vfio``, or ``vfio`` without a path."""
    return name == "vfio" or name.endswith("/vfio")


class _Reader:
    """One pass over a stream."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.cursor = _Cursor(window, 0)
        self.machine: str | None = None
        self.kinds: dict[int, SectionKind] = {}
        self.devices: dict[int, VfioDevice] = {}
        self.problems: list[str] = []
        self.complete = False
        self.has_footers: bool | None = None

    def read(self) -> QemuStream:
        if self.cursor.take(4) != MAGIC or self.cursor.number(4) != _VERSION:
            raise _CutError("the first bytes are not of version 3")
        safe = self.cursor.at
        try:
            while not self.complete:
                safe = self.cursor.at
                self._section()
        except _CutError as error:
            self._note(f"section at {safe:#x}: {error}; behind it VFIO sections are only searched for")
            self._search(safe)
        return QemuStream(self.machine, self.complete, self.kinds, list(self.devices.values()), self.problems)

    def _note(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

    def _section(self) -> None:
        cursor = self.cursor
        kind = cursor.number(1)
        if kind == _EOF:
            self.complete = True
        elif kind in {_START, _FULL}:
            number = cursor.number(4)
            name = cursor.name()
            self._begin(number, SectionKind(name, cursor.number(4), cursor.number(4)))
            self._content(number)
        elif kind in {_PART, _END}:
            number = cursor.number(4)
            if number not in self.kinds:
                raise _CutError(f"part of section {number}, which has not begun")
            self._content(number)
        elif kind == _DESCRIPTION:
            cursor.skip(cursor.number(4))
        elif kind == _CONFIGURATION:
            self.machine = cursor.take(min(cursor.number(4), _PAGE)).decode("ascii", "backslashreplace")
        elif kind == _SUBSECTION:  # of the configuration: no length
            self._pass_subsection()
        elif kind == _COMMAND:
            cursor.skip(2)
            cursor.skip(cursor.number(2))
        else:
            raise _CutError(f"type {kind:#x} is unknown")

    def _begin(self, number: int, kind: SectionKind) -> None:
        self.kinds.setdefault(number, kind)
        if is_vfio(kind.name):
            self.devices.setdefault(number, VfioDevice(kind.name, kind.instance, number))

    def _pass_subsection(self) -> None:
        """Pass over one of the configuration's subsections to where the first section begins."""
        at = self.cursor.at
        for place in range(at, min(at + _PAGE, self.window.size)):
            if self.window.read(place, 1)[0] in {_START, _SUBSECTION} and self._plausible(place):
                self.cursor.at = place
                return
        raise _CutError("no section behind the configuration")

    def _content(self, number: int) -> None:
        kind = self.kinds[number]
        start = self.cursor.at
        kind.parts += 1
        known = self._vfio if is_vfio(kind.name) else self._ram if kind.name == "ram" else None
        if known is not None:
            try:
                known(number)
                end = self.cursor.at
                if self._footer(number):
                    kind.size += end - start
                    return
                problem = "no footer behind it"
            except _CutError as error:
                problem = str(error)
            self._note(f"{kind.name!r} at {start:#x}: {problem}; passed over up to its footer")
            self.cursor.at = start
        if self.has_footers is False:
            raise _CutError(f"{kind.name!r}: its length is not known, and the stream has no footers")
        kind.how = "footer"
        end = self._find_footer(number, start)
        kind.size += end - start
        self.cursor.at = end + 5

    def _footer(self, number: int) -> bool:
        """Pass over a section's footer; a stream of an old machine type has none at all."""
        at = self.cursor.at
        expected = struct.pack(">BI", _FOOTER, number)
        if self.window.read(at, len(expected)) == expected:
            self.has_footers = True
            self.cursor.at = at + len(expected)
            return True
        if self.has_footers is None and self._plausible(at):
            self.has_footers = False
        return self.has_footers is False and self._plausible(at)

    def _find_footer(self, number: int, at: int) -> int:
        """Return where a section's footer is: the first behind which something can follow."""
        footer = struct.pack(">BI", _FOOTER, number)
        while (at := find(self.window, footer, at)) >= 0:
            if self._plausible(at + len(footer)):
                self.has_footers = True
                return at
            at += 1
        raise _CutError(f"{self.kinds[number].name!r}: no end found")

    def _plausible(self, at: int) -> bool:
        """Tell whether a section may begin here."""
        head = self.window.read(at, 6 + 255 + 8)
        if not head or head[0] in {_EOF, _DESCRIPTION}:
            return True
        if head[0] in {_START, _FULL, _SUBSECTION}:
            at_name = 1 if head[0] == _SUBSECTION else 5
            length = head[at_name] if len(head) > at_name else 0
            name = head[at_name + 1 : at_name + 1 + length]
            return 0 < length == len(name) and all(0x20 < byte < 0x7F for byte in name)  # noqa: PLR2004 -- ASCII
        if head[0] in {_PART, _END}:
            return int.from_bytes(head[1:5], "big") in self.kinds
        return head[0] == _COMMAND and int.from_bytes(head[1:3], "big") < _COMMAND_MAX

    def _ram(self, _: int) -> None:
        """Pass over guest memory, up to the end of this part of it."""
        cursor = self.cursor
        while True:
            word = cursor.number(8)
            flags = word & (_PAGE - 1)
            if flags == _RAM_EOS:
                return
            if flags == _RAM_SIZE:
                self._ram_blocks(word - flags)
                continue
            if flags & (_RAM_ZERO | _RAM_PAGE | _RAM_XBZRLE | _RAM_COMPRESSED) and not flags & _RAM_CONTINUE:
                cursor.skip(cursor.number(1))
            what = flags & ~_RAM_CONTINUE
            if what == _RAM_ZERO:
                cursor.skip(1)
            elif what == _RAM_PAGE:
                cursor.skip(_PAGE)
            elif what == _RAM_XBZRLE:
                cursor.skip(1)
                cursor.skip(cursor.number(2))
            elif what == _RAM_COMPRESSED:
                cursor.skip(cursor.number(4))
            elif what not in {_RAM_HOOK, _RAM_FLUSH}:
                raise _CutError(f"memory with flags {flags:#x}")

    def _ram_blocks(self, total: int) -> None:
        while total > 0:
            self.cursor.skip(self.cursor.number(1))
            size = self.cursor.number(8)
            if not 0 < size <= total:
                raise _CutError("memory blocks do not add up")
            total -= size

    def _vfio(self, number: int) -> None:
        """Take a VFIO device's part of the stream, up to the end of this section."""
        cursor = self.cursor
        frames: list[tuple[int, int]] = []
        config: tuple[int, int] | None = None
        while (mark := cursor.number(8)) != _STATE_END:
            if mark == _DATA:
                size = cursor.number(8)
                frames.append((cursor.at, size))
                cursor.skip(size)
            elif mark == _CONFIG:
                config = self._vfio_config(number)
                break
            elif mark not in {_SETUP, _INIT_SENT, _CONFIG_READY}:
                raise _CutError(f"marker {mark:#x} is unknown")
        device = self.devices[number]
        device.frames += frames
        device.config = config or device.config

    def _vfio_config(self, number: int) -> tuple[int, int]:
        """Take QEMU's own record of a device: its length depends on the device, so up to its end marker and footer."""
        start = self.cursor.at
        pattern = struct.pack(">Q", _STATE_END)
        limit = start + CONFIG_MAX
        end = start
        while (end := find(self.window, pattern, end, limit)) >= 0:
            behind = end + len(pattern)
            footer = struct.pack(">BI", _FOOTER, number)
            if self.window.read(behind, 5) == footer or (self.has_footers is False and self._plausible(behind)):
                self.cursor.at = behind
                return start, end - start
            end += 1
        raise _CutError("the configuration record has no end")

    def _search(self, at: int) -> None:
        """Find VFIO sections by their markers: what stands before one is the header of a section."""
        while (at := find(self.window, _MARK_PREFIX, at)) >= 0:
            number = self._header_before(at)
            self.cursor = _Cursor(self.window, at)
            at += 1
            if number is None:
                continue
            try:
                self._vfio(number)
            except _CutError as error:
                self._note(f"VFIO section at {at - 1:#x}: {error}")
                continue
            kind = self.kinds[number]
            kind.parts, kind.size, kind.how = kind.parts + 1, kind.size + self.cursor.at - at + 1, "searched"
            at = self.cursor.at

    def _header_before(self, at: int) -> int | None:
        """Return the number of the VFIO section whose header ends here, None if there is none."""
        begin = max(0, at - (6 + 255 + 8))
        before = self.window.read(begin, at - begin)
        if len(before) >= 5 and before[-5] in {_PART, _END}:  # noqa: PLR2004 -- type and number
            number = int.from_bytes(before[-4:], "big")
            if number in self.devices:
                return number
        place = before.rfind(b"vfio", 0, len(before) - 8 + 1)
        if place < 0 or place + 4 + 8 != len(before):
            return None
        for length in range(4, min(255, place + 4) + 1):  # the name's length stands before the name
            head = place + 4 - length - 6
            if head >= 0 and before[head + 5] == length and before[head] in {_START, _FULL}:
                name = before[head + 6 : place + 4].decode("ascii", "backslashreplace")
                if is_vfio(name):
                    number = int.from_bytes(before[head + 1 : head + 5], "big")
                    instance, version = struct.unpack(">II", before[-8:])
                    self._begin(number, SectionKind(name, instance, version))
                    return number if number in self.devices else None
        return None


def read_stream(window: Window) -> QemuStream:
    """Take a stream apart.

    :raises ImageError: it is no stream of version 3.
    """
    try:
        return _Reader(window).read()
    except _CutError as error:
        raise ImageError(f"no QEMU migration stream: {error}") from None


def device_config(content: bytes) -> dict[str, Any]:
    """Decode QEMU's record of a VFIO PCI device: its configuration space; interrupts behind it are left as they are."""
    wide = len(content) >= _VERSION_SIZE + pci.EXTENDED_SIZE + _IRQ_STATE_SIZE
    size = pci.EXTENDED_SIZE if wide else pci.SIZE
    if len(content) < _VERSION_SIZE + size:
        return {"size": len(content)}
    config = content[_VERSION_SIZE : _VERSION_SIZE + size]
    rest = len(content) - _VERSION_SIZE - size
    version = int.from_bytes(content[:_VERSION_SIZE], "big")
    return {"size": len(content), "version": version, "bytes_behind": rest, **pci.decode(config)}
