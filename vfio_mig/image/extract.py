# SPDX-License-Identifier: MIT
"""An archive taken apart into files, and put together again: the same bytes, if nothing was changed.

======================  ==============================================================================
``header.json``         the member as it is
``state.bin``           the ``state`` members, joined
``dirty/0000``, …       each as it is, as are ``pages/0000``, … and ``zero/0000``, …
``statistics.json``     what the manifest has of them
``layout.json``         ``format`` ("vfio-mig-parts"), ``version`` (1), ``mtime`` of the tar headers, and ``members``:
                        ``name`` and ``size`` of each in order, of a dirty bitmap also its range. Written last.
======================  ==============================================================================

What is changed in these files is in the archive that is made of them: checksums are computed again, and state of
another size is cut into members anew, in the place of the first of them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vfio_mig.errors import ImageError, excerpt
from vfio_mig.image import tar
from vfio_mig.image.files import host_error
from vfio_mig.image.layout import (
    CHUNK,
    HEADER_MAX,
    MANIFEST_MAX,
    MEMBER_MAX,
    Member,
)
from vfio_mig.image.writer import ArchiveWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.archive import Archive
    from vfio_mig.image.directory import Directory, NewDirectory

PARTS_FORMAT: Final = "vfio-mig-parts"
PARTS_VERSION: Final = 1
HEADER: Final = "header.json"
STATE: Final = "state.bin"
STATISTICS: Final = "statistics.json"
LAYOUT: Final = "layout.json"
_NAME: Final = re.compile(r"(state|dirty|pages|zero)/[0-9]{4,10}", re.ASCII)
_LAYOUT_MAX: Final = 64 << 20
_RANGE: Final = ("start_page", "nr_pages")


def extract(archive: Archive, into: NewDirectory) -> list[str]:
    """Write an archive's parts; returns the names of the files.

    :raises HostError: the directory cannot be written.
    :raises ImageError: the archive has changed meanwhile.
    """
    names = [HEADER, STATE]
    into.write(HEADER, [archive.content(archive.members[0])])
    into.write(STATE, archive.state_chunks())
    for member in archive.members[1:]:
        if member.kind != "state":
            into.write(member.name, [archive.content(member)])
            names.append(member.name)
    into.write(STATISTICS, [_pretty(archive.statistics)])
    layout = {
        "format": PARTS_FORMAT,
        "version": PARTS_VERSION,
        "mtime": archive.mtime,
        "members": [{"name": member.name, "size": member.size, **member.extra} for member in archive.members[1:]],
    }
    into.write(LAYOUT, [_pretty(layout)])
    return [*names, STATISTICS, LAYOUT]


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _load(directory: Directory, name: str, limit: int) -> dict[str, Any]:
    try:
        value = json.loads(directory.read(name, limit))
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{name}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ImageError(f"{name}: no JSON object")
    return value


class _Layout:
    """What ``layout.json`` says, checked."""

    def __init__(self, directory: Directory) -> None:
        value = _load(directory, LAYOUT, _LAYOUT_MAX)
        if value.get("format") != PARTS_FORMAT or value.get("version") != PARTS_VERSION:
            found = f"{excerpt(value.get('format'))}, version {excerpt(value.get('version'))}"
            raise ImageError(f"{LAYOUT}: format is {found}: not made by 'vfio-mig extract' of an image")
        mtime = value.get("mtime")
        if type(mtime) is not int or not 0 <= mtime <= tar.SIZE_MAX:
            raise ImageError(f"{LAYOUT}: impossible mtime {excerpt(mtime)}")
        self.mtime: int = mtime
        entries = value.get("members")
        if not isinstance(entries, list):
            raise ImageError(f"{LAYOUT}: no list of members")
        self.members = [_entry(entry) for entry in entries]


def _entry(entry: object) -> Member:
    if not isinstance(entry, dict):
        raise ImageError(f"{LAYOUT}: bad member {excerpt(entry)}")
    name, size = entry.get("name"), entry.get("size")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or type(size) is not int or not 0 <= size <= MEMBER_MAX:
        raise ImageError(f"{LAYOUT}: bad member {excerpt(entry)}")
    extra = {key: entry.get(key) for key in (_RANGE if name.startswith("dirty/") else ())}
    if not all(type(number) is int for number in extra.values()):
        raise ImageError(f"{LAYOUT}: bad member {excerpt(entry)}")
    return Member(name, size, "", 0, {key: int(number or 0) for key, number in extra.items()})


def _pack_members(directory: Directory, layout: _Layout, writer: ArchiveWriter) -> None:
    """Write members in the order of a layout; state of another size in the place of its first."""
    with directory.open(STATE) as state:
        pieces = _pieces(state, [member.size for member in layout.members if member.kind == "state"])
        for member in layout.members:
            if member.kind == "state":
                for piece in next(pieces, ()):
                    writer.add_member("state", [piece])
            else:
                writer.add_member(member.kind, [directory.read(member.name, MEMBER_MAX)], **member.extra)
        for rest in pieces:
            for piece in rest:
                writer.add_member("state", [piece])


def _pieces(state: BinaryIO, sizes: list[int]) -> Iterator[Iterator[bytes]]:
    """Yield the content of each state member, or of all at once, where their sum is not what is there now."""
    size = state.seek(0, 2)
    state.seek(0)
    if size == sum(sizes):
        for one in sizes:
            yield iter([_read(state, one)])
    elif size:
        yield (_read(state, CHUNK) for _ in range(-(-size // CHUNK)))


def _read(state: BinaryIO, size: int) -> bytes:
    try:
        return state.read(size)
    except OSError as error:
        raise host_error("cannot read", STATE, error) from error


def pack(directory: Directory, file: BinaryIO) -> int:
    """Write an archive of a directory's parts; returns how many members it has, without the manifest.

    What is written is to be read by :func:`vfio_mig.image.archive.read_archive` before it counts.

    :param file: one whose failed writes are HostErrors.
    :raises ImageError: something is missing or impossible.
    """
    layout = _Layout(directory)
    header = directory.read(HEADER, HEADER_MAX)
    statistics = _load(directory, STATISTICS, MANIFEST_MAX)
    writer = ArchiveWriter(file, header, mtime=layout.mtime)
    _pack_members(directory, layout, writer)
    try:
        return len(writer.finish(statistics)["members"])
    except (ValueError, RecursionError) as error:  # NaN, lone surrogates
        raise ImageError(f"{STATISTICS}: {error}") from None
