# SPDX-License-Identifier: MIT
"""The VFIO devices in a QEMU migration stream, as ``migrate file:`` or ``exec:cat >`` writes it (QEMU 5.2 to 11.1).

Layout: QEMU's ``migration/savevm.c`` (sections) and ``hw/vfio/migration.c``; all big-endian. A section has no length.
Those of VFIO devices, of guest memory (``qemu_ram``) and disks (``qemu_disk``) are taken apart. How long the others are
is told by QEMU's description at the stream's end (``qemu_description``), by which the names are proved, too. Without
one, the end of a section is looked for by its footer, which repeats its number, where what follows it can begin a
section. That can be misled by a device's content, so it is said which sections were passed over so.

Guest memory is never searched: before `ram` has ended, what cannot be taken apart ends the walk. Behind it VFIO
sections are searched for by their headers and markers, where there is no going on.

The work is linear in the size of the stream: what was looked at is gone over a second time only from where it could not
be understood.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_mig.decode.cursor import Cursor, CutError
from vfio_mig.decode.qemu_description import PADDING_MAX, Comparison, find_description
from vfio_mig.decode.qemu_disk import pass_bitmaps, pass_block
from vfio_mig.decode.qemu_parts import QemuStream, SectionKind, VfioDevice, is_vfio
from vfio_mig.decode.qemu_ram import KNOWN_CAPABILITIES, MAPPED_RAM, VERSION, Ram
from vfio_mig.errors import ImageError, excerpt
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.image.bytesource import ByteSource

MAGIC: Final = b"QEVM"
_VERSION: Final = 3
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND = range(9)
_FOOTER: Final = 0x7E
_FOOTER_SIZE: Final = 5
_COMMAND_MAX: Final = 32
_ADVISE, _PACKAGED, _COLO = 3, 7, 8
_HEAD_MAX: Final = 6 + 255 + 8
"""Bytes of a section's head: type, number, name with its length, instance and version."""
_PAGE_BITS: Final = range(10, 17)
"""Sizes of a guest's pages as powers of two, of every machine that QEMU has."""

_MARK: Final = 0xFFFFFFFFEF100000
_MARK_PREFIX: Final = struct.pack(">Q", _MARK)[:7]
_STATE_END, _CONFIG, _SETUP, DATA_MARK, _INIT_SENT, _CONFIG_READY = (_MARK + number for number in range(1, 7))
_LAST_MARKS: Final = frozenset({_INIT_SENT, _CONFIG_READY})
"""Marks that end a part by themselves: no mark of the state's end follows."""

_DISKS: Final[dict[str, Callable[[Cursor], None]]] = {"block": pass_block, "dirty-bitmap": pass_bitmaps}

PROBLEMS_MAX: Final = 100
"""Problems that are listed."""
CONFIG_MAX: Final = 1 << 20
"""Bytes of a VFIO device's configuration record, at most: 2048 MSI-X vectors of 16 bytes are the largest part."""
SECTIONS_MAX: Final = 1 << 16
"""Numbers of sections in a stream, at most: each takes memory here. A large guest has some hundreds."""
FRAMES_MAX: Final = 1 << 22
"""Pieces of devices' states in a stream, at most, of which QEMU makes one for each MiB."""
CAPABILITIES_MAX: Final = 64
_UUID_SIZE: Final = 16


class _StopError(CutError):
    """There is no going on, and what follows may be guest memory, so nothing behind it is looked at."""


class _Reader:
    """One pass over a stream."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.cursor = Cursor(source)
        self.machine: str | None = None
        self.kinds: dict[int, SectionKind] = {}
        self.devices: dict[int, VfioDevice] = {}
        self.problems: list[str] = []
        self.complete = False
        self.at_end = False
        """Whether QEMU's mark of the end has come; whatever follows, nothing goes on behind it."""
        self.trusted = True
        """Whether nothing that could change the layout is unknown."""
        self.has_footers: bool | None = None
        self.capabilities: list[str] = []
        self.ram = Ram()
        self.ram_ended = False
        self.package_end = 0
        """Where a package of sections ends, in which there is no guest memory."""
        self.frames = 0
        self.ahead = Cursor(source)
        """Looks for that end, far from where the stream is read, so with a block of its own."""
        self.no_mark_before = 0
        """Where the search for the end of a configuration record need not begin again."""
        self.description = find_description(source)
        self.compared = Comparison(self.description)

    def read(self) -> QemuStream:
        if self.cursor.take(4) != MAGIC or self.cursor.number(4) != _VERSION:
            raise CutError("the first bytes are not of version 3")
        if self.description is not None and self.description.page_size is not None:
            self._page_size(self.description.page_size)
        safe = self.cursor.at
        try:
            while not self.at_end:
                safe = self.cursor.at
                self._section()
        except CutError as error:
            self._give_up(safe, error)
        ended = self.complete
        if ended:
            self.compared.end()
        if self.compared.problem is not None:
            self._note(self.compared.problem)
        self.complete = ended and self.trusted and self.compared.problem is None
        if self.ram.through_channels and MAPPED_RAM not in self.capabilities:
            self._note("guest memory went through other channels (multifd): it is not in this stream")
        return QemuStream(
            self.machine,
            self.complete,
            self.kinds,
            list(self.devices.values()),
            self.problems,
            ended and self.compared.proves,
            self.capabilities,
            self.ram.page_size,
            self.cursor.work
            + self.ahead.work
            + (0 if self.description is None else self.source.size - self.description.at),
            self.ram.mapped_end,
            self.package_end,
        )

    def _note(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)

    def _give_up(self, at: int, error: CutError) -> None:
        """Say why there is no going on, and search where no guest memory can be."""
        if self.ram_ended and not isinstance(error, _StopError):
            self._note(f"section at {at:#x}: {error}; behind it VFIO sections are only searched for")
            self._search(max(at, self.cursor.at))
        else:
            self._note(f"section at {at:#x}: {error}; nothing behind it is looked at, as guest memory may follow")

    def _page_size(self, size: int) -> None:
        """Take the size of the guest's pages: a description is no better proof than the configuration, and later."""
        if size.bit_length() - 1 in _PAGE_BITS and not size & (size - 1):
            self.ram.page_size = size

    def _section(self) -> None:
        cursor = self.cursor
        kind = cursor.number(1)
        if kind == _EOF:
            self._end()
        elif kind in {_START, _FULL}:
            number = cursor.number(4)
            name = cursor.name()
            self._begin(number, SectionKind(name, cursor.number(4), cursor.number(4)))
            self._content(number, kind)
        elif kind in {_PART, _END}:
            number = cursor.number(4)
            if number not in self.kinds:
                raise CutError(f"part of section {number}, which has not begun")
            self._content(number, kind)
        elif kind == _DESCRIPTION:
            cursor.skip(cursor.number(4))
        elif kind == _CONFIGURATION:
            self._configuration()
        elif kind == _COMMAND:
            self._command(cursor.number(2), cursor.number(2))
        else:
            raise CutError(f"type {kind:#x} is unknown")

    def _end(self) -> None:
        """See to it that the end is one: nothing follows but QEMU's description, and zeros that fill a block."""
        at, left = self.cursor.at, self.source.size - self.cursor.at
        self.at_end = self.complete = True
        if self.description is not None:
            if self.description.at != at:
                self.compared.problem = (
                    f"the stream's end is at {at:#x}, and its description at {self.description.at:#x}"
                )
            return
        head = self.cursor.look(at, 5)
        size = 5 + int.from_bytes(head[1:], "big") if head[:1] == bytes((_DESCRIPTION,)) else 0
        if size > left:
            self._note(f"the description at {at:#x} is cut off")
            self.complete = False
        elif size < left and (left - size > PADDING_MAX or any(self.cursor.look(at + size, left - size))):
            self._note(f"{left - size} bytes behind the end at {at + size:#x}")
            self.complete = False

    def _command(self, command: int, size: int) -> None:
        content_at = self.cursor.at
        self.cursor.skip(size)
        content = self.cursor.look(content_at, min(size, 16))
        if command == _ADVISE and size:
            self.ram.page_sizes = int.from_bytes(content[:8], "big")
        elif command == _PACKAGED:
            self.package_end = self.cursor.at + int.from_bytes(content[:4], "big")
        elif command == _COLO:
            self._distrust("it is one of COLO, whose layout is not known here")

    # The configuration -----------------------------------------------------------------------------------------------

    def _distrust(self, problem: str) -> None:
        self._note(problem)
        self.trusted = False

    def _configuration(self) -> None:
        """Take the machine's name, and the subsections, which say what the rest looks like."""
        cursor = self.cursor
        size = cursor.number(4)
        if size > PAGE:
            raise CutError(f"a machine's name of {size} bytes")
        self.machine = cursor.take(size).decode("ascii", "backslashreplace")
        while cursor.look(cursor.at, 1) == bytes((_SUBSECTION,)):
            cursor.skip(1)
            name, version = cursor.name(), cursor.number(4)
            take = {
                "configuration/target-page-bits": self._page_bits,
                "configuration/capabilities": self._take_capabilities,
                "configuration/uuid": self._pass_uuid,
            }.get(name)
            if take is not None and version == 1:
                take()
            else:
                self._unknown_subsection(name, version)

    def _page_bits(self) -> None:
        bits = self.cursor.number(4)
        if bits not in _PAGE_BITS:
            raise CutError(f"pages of 2^{bits} bytes")
        self._page_size(1 << bits)

    def _pass_uuid(self) -> None:
        self.cursor.skip(_UUID_SIZE)

    def _take_capabilities(self) -> None:
        count = self.cursor.number(4)
        if count > CAPABILITIES_MAX:
            raise CutError(f"{count} capabilities")
        self.capabilities = [self.cursor.name() for _ in range(count)]
        self.ram.capabilities = frozenset(self.capabilities)
        for name in sorted(self.ram.capabilities - KNOWN_CAPABILITIES):
            self._distrust(f"the capability {excerpt(name)} is not known here, so nothing behind it is certain")

    def _unknown_subsection(self, name: str, version: int) -> None:
        problem = f"the configuration has {excerpt(name)}, version {version}, which is not known here"
        size = None if self.description is None else self.description.subsections.get(name)
        if size is None:
            raise CutError(problem)
        self._distrust(f"{problem}, so nothing behind it is certain")
        self.cursor.skip(size)

    # Sections --------------------------------------------------------------------------------------------------------

    def _begin(self, number: int, kind: SectionKind) -> None:
        known = self.kinds.setdefault(number, kind)
        if (known.name, known.instance) != (kind.name, kind.instance):
            raise CutError(f"section {number} is {excerpt(kind.name)} and was {excerpt(known.name)} before")
        if len(self.kinds) > SECTIONS_MAX:
            raise CutError(f"more than {SECTIONS_MAX} sections")
        if is_vfio(kind.name):
            self.devices.setdefault(number, VfioDevice(kind.name, kind.instance, number))

    def _content(self, number: int, of_type: int) -> None:
        kind, start = self.kinds[number], self.cursor.at
        kind.parts += 1
        size = self.compared.next(kind.name, kind.instance) if of_type == _FULL else None
        if kind.name == "ram":
            self._guests(number, self._memory(number))
            self.ram_ended = self.ram_ended or of_type == _END
        elif is_vfio(kind.name):
            self._vfio_part(number, size)
            self.devices[number].ended |= of_type == _END
        elif kind.name in _DISKS and of_type != _FULL:
            self._guests(number, _DISKS[kind.name])
        else:
            self._unknown(number, size)
        kind.size += self.cursor.at - start - (_FOOTER_SIZE if self.has_footers else 0)

    def _guests(self, number: int, take: Callable[[Cursor], None]) -> None:
        """Pass over a part of what is the guest's own, memory or disks: taken as it must be, and never searched.

        :raises _StopError: it is not as it should be.
        """
        start = self.cursor.at
        try:
            take(self.cursor)
            self._require_footer(number)
        except CutError as error:
            raise _StopError(f"{excerpt(self.kinds[number].name)} at {start:#x}: {error}") from None

    def _memory(self, number: int) -> Callable[[Cursor], None]:
        version = self.kinds[number].version
        if version != VERSION:
            raise _StopError(f"'ram': version {version} is unknown")
        return self.ram.pass_part

    def _require_footer(self, number: int) -> None:
        if not self._footer(number):
            raise CutError(f"no footer behind it at {self.cursor.at:#x}")

    def _unknown(self, number: int, size: int | None) -> None:
        """Pass over a section whose layout is not known here."""
        kind = self.kinds[number]
        if size is not None and self._is_behind(number, self.cursor.at + size):
            kind.how = "described"
            self.cursor.skip(size)
            self._footer(number)
            return
        kind.how = "footer"
        self._pass_to_footer(number)

    def _is_behind(self, number: int, at: int) -> bool:
        """Tell whether a section's content ends here."""
        if at > self.source.size:
            return False
        if self.cursor.look(at, _FOOTER_SIZE) == struct.pack(">BI", _FOOTER, number):
            return True
        return not self.has_footers and self._plausible(at)

    def _pass_to_footer(self, number: int) -> None:
        """Go behind a section's footer: the first behind which something can follow."""
        name = excerpt(self.kinds[number].name)
        if self.has_footers is False:
            raise CutError(f"{name}: its length is not known, and the stream has no footers")
        end = self.source.size if self.ram_ended else self.package_end
        if self.cursor.at >= end:
            raise CutError(f"{name}: its length is not known")
        footer = struct.pack(">BI", _FOOTER, number)
        at = self.cursor.at
        while (at := self.cursor.find(footer, at, end)) >= 0:
            if self._plausible(at + _FOOTER_SIZE):
                self.has_footers = True
                self.cursor.at = at + _FOOTER_SIZE
                return
            at += 1
        raise CutError(f"{name}: no end found")

    def _footer(self, number: int) -> bool:
        """Pass over a section's footer; a stream of an old machine type has none at all."""
        at = self.cursor.at
        expected = struct.pack(">BI", _FOOTER, number)
        if self.cursor.look(at, _FOOTER_SIZE) == expected:
            self.has_footers = True
            self.cursor.at = at + len(expected)
            return True
        if self.has_footers is None and self._plausible(at):
            self.has_footers = False
        return self.has_footers is False and self._plausible(at)

    def _plausible(self, at: int) -> bool:
        """Tell whether a section may begin here."""
        head = self.cursor.look(at, _HEAD_MAX)
        if not head or head[0] == _DESCRIPTION:
            return True
        if head[0] == _EOF:  # with nothing behind it but a description, or zeros that fill a block
            return head[1:2] == bytes((_DESCRIPTION,)) or not any(head)
        if head[0] in {_START, _FULL}:
            length = head[5] if len(head) > 5 else 0  # noqa: PLR2004 -- behind type and number
            name = head[6 : 6 + length]
            return 0 < length == len(name) and all(0x20 < byte < 0x7F for byte in name)  # noqa: PLR2004 -- ASCII
        if head[0] in {_PART, _END}:
            return int.from_bytes(head[1:5], "big") in self.kinds
        return head[0] == _COMMAND and int.from_bytes(head[1:3], "big") < _COMMAND_MAX

    # VFIO devices ----------------------------------------------------------------------------------------------------

    def _vfio_part(self, number: int, size: int | None) -> None:
        """Take a VFIO device's part of the stream; one that cannot be taken is passed over, where that is safe."""
        kind, start = self.kinds[number], self.cursor.at
        try:
            self._vfio(number, None if size is None else start + size)
            if self._footer(number):
                return
            problem = "no footer behind it"
        except CutError as error:
            problem = str(error)
        problem = f"{excerpt(kind.name)} at {start:#x}: {problem}"
        if size is not None and self._is_behind(number, start + size):
            self.cursor.at = start + size
            self._footer(number)
        else:
            if not (self.ram_ended or self.cursor.at < self.package_end):
                raise CutError(problem)
            # What has been taken for pieces of state is not gone over again: that would be quadratic
            kind.how = "footer"
            try:
                self._pass_to_footer(number)
            except CutError as error:
                raise CutError(f"{problem}; {error}") from None
        self.devices[number].lost = "a part of its state could not be taken"
        self._note(f"{problem}; passed over up to its footer")

    def _vfio(self, number: int, end: int | None) -> None:
        """Take a VFIO device's part of the stream, up to the end of this section.

        :param end: of the section, where it is known.
        """
        cursor = self.cursor
        frames: list[tuple[int, int]] = []
        config: tuple[int, int] | None = None
        while (mark := cursor.number(8)) != _STATE_END:
            if mark == DATA_MARK:
                size = cursor.number(8)
                if size:
                    frames.append((cursor.at, size))
                    self.frames += 1
                if self.frames > FRAMES_MAX:
                    raise CutError(f"more than {FRAMES_MAX} pieces of device state")
                cursor.skip(size)
            elif mark == _CONFIG:
                config = self._vfio_config(number, end)
                break
            elif mark in _LAST_MARKS:
                break
            elif mark != _SETUP:
                raise CutError(f"marker {mark:#x} is unknown")
        device = self.devices[number]
        device.frames += frames
        device.config = config or device.config

    def _vfio_config(self, number: int, end: int | None) -> tuple[int, int]:
        """Take QEMU's own record of a device: its length depends on the device, so up to its end marker and footer."""
        start = self.cursor.at
        pattern = struct.pack(">Q", _STATE_END)
        if end is not None and end - len(pattern) >= start and self.cursor.look(end - 8, 8) == pattern:
            self.cursor.go(end)
            return start, end - len(pattern) - start
        # The first marker with a footer behind it must be of this device: looking on for another would be quadratic
        mark = pattern if self.has_footers is False else pattern + bytes((_FOOTER,))
        limit = start + CONFIG_MAX
        found = self.ahead.find(mark, max(start, self.no_mark_before), limit)
        if found < 0:
            self.no_mark_before = max(start, min(limit, self.source.size) - len(mark) + 1)
        if found < 0 or not self._is_behind(number, found + len(pattern)):
            self.cursor.at = start if found < 0 else found
            raise CutError("the configuration record has no end")
        self.cursor.at = found + len(pattern)
        return start, found - start

    def _search(self, at: int) -> None:
        """Find VFIO sections by their markers: what stands before one is the header of a section."""
        end = self.source.size
        while (at := self.cursor.find(_MARK_PREFIX, at, end)) >= 0:
            number = self._header_before(at)
            if number is None:
                at += 1
                continue
            self.cursor.at = at
            try:
                self._vfio(number, None)
            except CutError as error:
                self._note(f"VFIO section at {at:#x}: {error}")
                at = max(at + 1, self.cursor.at)
                continue
            kind = self.kinds[number]
            kind.parts, kind.size, kind.how = kind.parts + 1, kind.size + self.cursor.at - at, "searched"
            self.devices[number].lost = "parts of it were only searched for"
            at = self.cursor.at

    def _header_before(self, at: int) -> int | None:
        """Return the number of the VFIO section whose header ends here, None if there is none."""
        begin = max(0, at - _HEAD_MAX)
        before = self.cursor.look(begin, at - begin)
        if len(before) >= 5 and before[-5] in {_PART, _END}:  # noqa: PLR2004 -- type and number
            number = int.from_bytes(before[-4:], "big")
            if number in self.devices:
                return number
        place = len(before) - 8 - 4
        if place < 0 or before[place : place + 4] != b"vfio":
            return None
        for length in range(4, min(255, place + 4) + 1):  # the name's length stands before the name
            head = place + 4 - length - 6
            if head >= 0 and before[head + 5] == length and before[head] in {_START, _FULL}:
                return self._begin_searched(before[head + 1 :], length)
        return None

    def _begin_searched(self, head: bytes, length: int) -> int | None:
        """Take the header of a section that was found: number, name, instance and version."""
        name = head[5 : 5 + length].decode("ascii", "backslashreplace")
        number, (instance, version) = int.from_bytes(head[:4], "big"), struct.unpack(">II", head[5 + length :])
        if not is_vfio(name) or (number in self.kinds and number not in self.devices):
            return None
        try:
            self._begin(number, SectionKind(name, instance, version))
        except CutError as error:
            self._note(str(error))
            return None
        return number


def read_stream(source: ByteSource) -> QemuStream:
    """Take a stream apart.

    :raises ImageError: it is not a stream of version 3.
    """
    try:
        return _Reader(source).read()
    except CutError as error:
        raise ImageError(f"no QEMU migration stream: {error}") from None
