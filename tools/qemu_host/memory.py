# SPDX-License-Identifier: MIT
"""Where a QEMU's guest RAM lies: from guest-physical address to a file that another process can open.

QEMU says which of its RAM is at which address (``info mtree -f``), and where it has that mapped (``gpa2hva``). What
lies there, at which offset, and whether it is shared, is the kernel's word: ``/proc/PID/maps``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import HostError, UnsupportedError, errno_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tools.qemu_host.qmp import Qmp

HINT: Final = (
    "start QEMU with -object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram; "
    "--memory none saves without the guest's pages"
)
_FLAT_RANGE: Final = re.compile(
    r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:nv-)?(?:ram|rom)\): (\S+)(?: @[0-9a-f]{16})?(?: .*)?$"
)
_HVA: Final = re.compile(r"^Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]+)\s*$")
_MAPPING: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (?:...)([sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$")


class GuestRange(NamedTuple):
    """Guest-physical addresses at which the RAM called *name* is."""

    gpa: int
    size: int
    name: str


class Mapping(NamedTuple):
    """A line of ``/proc/PID/maps``."""

    start: int
    end: int
    shared: bool
    offset: int
    device: int
    inode: int
    path: str


class Piece(NamedTuple):
    """*size* bytes of the file behind *mapping*, from *offset* on, are the guest's from *gpa* on."""

    gpa: int
    size: int
    offset: int
    mapping: Mapping

    def follows(self, other: Piece) -> bool:
        """Tell whether it goes on where another ends, in the guest and in the file."""
        return (
            self.gpa == other.gpa + other.size
            and self.offset == other.offset + other.size
            and (self.mapping.device, self.mapping.inode) == (other.mapping.device, other.mapping.inode)
        )


def parse_flat_view(text: str, backends: Iterable[str]) -> list[GuestRange]:
    """Take from ``info mtree -f`` where the CPU sees the RAM of these memory backends, in order of address.

    What the chip set shadows (below 1 MiB, ``rom``) is RAM as well. Video memory and firmware are no backends.
    """
    wanted = {name: backend for backend in backends for name in (backend, f"/objects/{backend}")}
    for view in re.split(r"^FlatView #", text, flags=re.MULTILINE):
        if re.search(r'^ AS "memory",', view, re.MULTILINE):
            found = filter(None, map(_FLAT_RANGE.match, view.splitlines()))
            return [
                GuestRange(int(one[1], 16), int(one[2], 16) + 1 - int(one[1], 16), wanted[one[3]])
                for one in found
                if one[3] in wanted
            ]
    raise HostError("QEMU's 'info mtree -f' shows no address space called memory")


def parse_hva(text: str) -> int:
    """Take the address from the answer of ``gpa2hva``."""
    match = _HVA.match(text)
    if match is None:
        raise HostError(f"QEMU does not tell where it has the guest's RAM: {' '.join(text.split())[:200]}")
    return int(match[1], 16)


def parse_maps(text: str) -> list[Mapping]:
    """Parse ``/proc/PID/maps``."""
    return [
        Mapping(
            int(one[1], 16),
            int(one[2], 16),
            one[3] == "s",
            int(one[4], 16),
            os.makedev(int(one[5], 16), int(one[6], 16)),
            int(one[7]),
            one[8],
        )
        for one in filter(None, map(_MAPPING.match, text.splitlines()))
    ]


def locate(ranges: Iterable[tuple[GuestRange, int]], mappings: list[Mapping]) -> list[Piece]:
    """Find the file behind each range of guest RAM, given with its address in QEMU; neighbours become one piece.

    :raises UnsupportedError: it is no file that others can see.
    """
    pieces: list[Piece] = []
    for range_, hva in ranges:
        at, end = hva, hva + range_.size
        while at < end:
            mapping = next((one for one in mappings if one.start <= at < one.end), None)
            if mapping is None:
                raise HostError(f"QEMU's RAM {range_.name!r} at {range_.gpa:#x} is not mapped: is it being changed?")
            if not mapping.shared or not mapping.inode:
                raise UnsupportedError(f"QEMU's RAM {range_.name!r} is private to it (share=off)", hint=HINT)
            upto = min(end, mapping.end)
            piece = Piece(range_.gpa + at - hva, upto - at, mapping.offset + at - mapping.start, mapping)
            if pieces and piece.follows(pieces[-1]):
                piece = pieces[-1]._replace(size=pieces[-1].size + piece.size)
                pieces.pop()
            pieces.append(piece)
            at = upto
    return pieces


def path_of(pid: int, mapping: Mapping) -> str:
    """Return a path that opens the file behind a mapping: the process's fd of it, else its mapping itself."""
    for path in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name)):
        try:
            status = path.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (mapping.device, mapping.inode):
            return str(path)
    # e.g. the fd is closed, or the file system's numbers are not those of the mapping (overlayfs, btrfs)
    return f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def find_memory(qmp: Qmp, pid: int) -> list[str]:
    """Find all of a QEMU's guest RAM, as what ``--memory`` takes.

    :raises UnsupportedError: a part of it is not shared.
    """
    backends = {str(one.get("id", "")): bool(one["share"]) for one in qmp.execute("query-memdev")}
    ranges = parse_flat_view(qmp.monitor("info mtree -f"), backends)
    if not ranges:
        raise UnsupportedError("none of QEMU's memory backends is the guest's RAM", hint=HINT)
    for range_ in ranges:
        if not backends[range_.name]:
            raise UnsupportedError(f"QEMU's RAM {range_.name!r} is private to it (share=off)", hint=HINT)
    placed = [(range_, parse_hva(qmp.monitor(f"gpa2hva {range_.gpa:#x}"))) for range_ in ranges]
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
        pieces = locate(placed, parse_maps(maps))
        return [f"{path_of(pid, one.mapping)}@{one.gpa:#x}:{one.size:#x}+{one.offset:#x}" for one in pieces]
    except OSError as error:
        raise HostError(f"cannot look into PID {pid}: {errno_text(error.errno or 0)}", hint="run as root") from error
