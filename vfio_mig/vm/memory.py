# SPDX-License-Identifier: MIT
"""Where a QEMU's guest RAM lies: from guest-physical address to a file that another process can open.

QEMU says which of its RAM is at which address (``info mtree -f``), and where it has that mapped (``gpa2hva``). What
lies there, at which offset, and whether it is shared and may be written, is the kernel's word: ``/proc/PID/maps``.
"""

from __future__ import annotations

import bisect
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import HostError, UnsupportedError, errno_text, excerpt
from vfio_mig.ranges import PAGE
from vfio_mig.vm.monitor import LIST_MAX, QMP_WORDS, entries_of, flag_of, text_of, unknown_answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfio_mig.vm.monitor import Monitor, Words

_MTREE: Final = "info mtree -f"
_MAPS_MAX: Final = 256 << 20
"""Bytes of /proc/PID/maps: the most mappings that vm.max_map_count allows by default have 10 MB."""
_SPACE: Final = re.compile(r'^ AS "(.*)", root: (.*?)(?:, alias .*)?$', re.MULTILINE)
_FLAT_RANGE: Final = re.compile(
    r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:nv-)?(?:ram|rom)\): (\S+)(?: @([0-9a-f]{16}))?(?: .*)?$",
    re.MULTILINE,
)
_HVA: Final = re.compile(r"^Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]{1,16})\s*$")
_MAPPING: Final = re.compile(
    r"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) .(.).([sp]) ([0-9a-f]{1,16}) ([0-9a-f]+):([0-9a-f]+) (\d{1,20}) *(.*)$"
)


class FlatView(NamedTuple):
    """One of the views in ``info mtree -f``.

    :param spaces: names of the address spaces that have it, and *roots* those of their root regions.
    :param text: its lines.
    """

    spaces: list[str]
    roots: list[str]
    text: str


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
    writable: bool = True


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


def flat_views(text: str) -> list[FlatView]:
    """Take ``info mtree -f`` apart."""
    views = []
    for view in re.split(r"^FlatView #", text, flags=re.MULTILINE)[1:]:
        found = _SPACE.findall(view)
        views.append(FlatView([name for name, _ in found], [root for _, root in found], view))
    return views


def ram_of(view: FlatView) -> list[tuple[str, ...]]:
    """Return the RAM and ROM that a view shows, as QEMU prints it: first and last address, region, offset in that."""
    return _FLAT_RANGE.findall(view.text)


def parse_flat_view(text: str, backends: Iterable[str]) -> list[GuestRange]:
    """Take from ``info mtree -f`` where the CPU sees the RAM of these memory backends, in order of address.

    What the chip set shadows (below 1 MiB, ``rom``) is RAM as well. Video memory and firmware are not backends.

    :raises HostError: there is no such view, or its RAM is not made of whole pages.
    """
    wanted = {name: backend for backend in backends for name in (backend, f"/objects/{backend}")}
    view = next((one for one in flat_views(text) if "memory" in one.spaces), None)
    if view is None:
        raise HostError("QEMU's 'info mtree -f' shows no address space called memory")
    found = []
    for first, last, region, _ in ram_of(view):
        if region in wanted:
            start, end = int(first, 16), int(last, 16) + 1
            if start % PAGE or end % PAGE or start >= end:
                raise unknown_answer(_MTREE, f"RAM {excerpt(region)} at {first}-{last}")
            found.append(GuestRange(start, end - start, wanted[region]))
    if len(found) > LIST_MAX:
        raise unknown_answer(_MTREE, f"it has {len(found)} pieces of RAM")
    return found


def parse_hva(text: str) -> int:
    """Take the address from the answer of ``gpa2hva``."""
    match = _HVA.match(text)
    if match is None:
        raise HostError(f"QEMU does not tell where it has the guest's RAM: {' '.join(text.split())[:200]}")
    return int(match[1], 16)


def parse_maps(text: str) -> list[Mapping]:
    """Parse ``/proc/PID/maps``, which is in order of address."""
    return [
        Mapping(
            int(one[1], 16),
            int(one[2], 16),
            one[4] == "s",
            int(one[5], 16),
            os.makedev(int(one[6], 16), int(one[7], 16)),
            int(one[8]),
            one[9],
            one[3] == "w",
        )
        for one in filter(None, map(_MAPPING.match, text.splitlines()))
    ]


def not_shared(name: str, words: Words) -> UnsupportedError:
    """Return the error of guest RAM that no other process can have."""
    return UnsupportedError(f"QEMU's RAM {name!r} is private to it (share=off)", hint=_hint(words))


def _hint(words: Words) -> str:
    return f"{words.share}; --memory none saves without the guest's pages"


def locate(ranges: Iterable[tuple[GuestRange, int]], mappings: list[Mapping], words: Words = QMP_WORDS) -> list[Piece]:
    """Find the file behind each range of guest RAM, given with its address in QEMU; neighbours become one piece.

    What QEMU itself cannot write (``readonly=on``) no device of its has written, and it is left out.

    :raises UnsupportedError: it is not a file that others can see.
    """
    pieces: list[Piece] = []
    for range_, hva in ranges:
        for piece in _pieces(range_, hva, mappings, words):
            if pieces and piece.follows(pieces[-1]):
                last = pieces.pop()
                pieces.append(last._replace(size=last.size + piece.size))
            else:
                pieces.append(piece)
    return pieces


def _pieces(range_: GuestRange, hva: int, mappings: list[Mapping], words: Words) -> Iterator[Piece]:
    """Yield what lies behind one range, mapping by mapping."""
    at, end = hva, hva + range_.size
    number = bisect.bisect_right(mappings, at, key=lambda one: one.start) - 1
    while at < end:
        mapping = mappings[number] if 0 <= number < len(mappings) else None
        if mapping is None or not mapping.start <= at < mapping.end:
            raise HostError(f"QEMU's RAM {range_.name!r} at {range_.gpa:#x} is not mapped: is it being changed?")
        if not mapping.shared or not mapping.inode:
            raise not_shared(range_.name, words)
        upto = min(end, mapping.end)
        if mapping.writable:
            yield Piece(range_.gpa + at - hva, upto - at, mapping.offset + at - mapping.start, mapping)
        at = upto
        number += 1


def path_of(pid: int, mapping: Mapping) -> str:
    """Return a path that opens the file behind a mapping: the process's fd of it, else its mapping itself."""
    directory = f"/proc/{pid}/fd"
    for name in sorted(filter(str.isdigit, os.listdir(directory)), key=int):
        path = f"{directory}/{name}"
        try:
            # By its name first: to ask for the status of a file on FUSE or NFS may take for ever
            if os.readlink(path) != mapping.path:
                continue
            status = os.stat(path)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (mapping.device, mapping.inode):
            return path
    # e.g. the fd is closed, or the file system's numbers are not those of the mapping (overlayfs, btrfs)
    return f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def read_maps(pid: int) -> str:
    """Return ``/proc/PID/maps``.

    :raises OSError: the process has gone, or we may not look.
    """
    with open(f"/proc/{pid}/maps", "rb") as file:
        content = file.read(_MAPS_MAX + 1)
    if len(content) > _MAPS_MAX:
        raise HostError(f"PID {pid} has more mappings than /proc/{pid}/maps should ever tell")
    return os.fsdecode(content)


def find_memory(qmp: Monitor, pid: int) -> list[str]:
    """Find all of a QEMU's guest RAM, as what ``--memory`` takes.

    :raises UnsupportedError: a part of it is not shared.
    :raises HostError: QEMU answers what is not understood, or cannot be looked into.
    """
    command = "query-memdev"
    # QEMU before 6.1 does not tell 'share': then the kernel does, as it does in any case
    backends = {
        text_of(one, "id", command): flag_of(one, "share", command)
        for one in entries_of(qmp.execute(command), command)
        if "id" in one
    }
    ranges = parse_flat_view(qmp.monitor(_MTREE), backends)
    if not ranges:
        raise UnsupportedError("none of QEMU's memory backends is the guest's RAM", hint=_hint(qmp.words))
    for range_ in ranges:
        if backends[range_.name] is False:
            raise not_shared(range_.name, qmp.words)
    placed = [(range_, parse_hva(qmp.monitor(f"gpa2hva {range_.gpa:#x}"))) for range_ in ranges]
    try:
        pieces = locate(placed, parse_maps(read_maps(pid)), qmp.words)
        paths: dict[Mapping, str] = {}
        for one in pieces:
            if one.mapping not in paths:
                paths[one.mapping] = path_of(pid, one.mapping)
        return [f"{paths[one.mapping]}@{one.gpa:#x}:{one.size:#x}+{one.offset:#x}" for one in pieces]
    except OSError as error:
        raise HostError(f"cannot look into PID {pid}: {errno_text(error.errno or 0)}", hint="run as root") from error
