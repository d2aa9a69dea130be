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

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vfio_mig.errors import ImageError, excerpt
from vfio_mig.image import tar
from vfio_mig.image.files import host_error
from vfio_mig.image.layout import (
    CHUNK,
    ENTRY_MAX,
    FORMAT,
    HEADER_MAX,
    MANIFEST_MAX,
    MEMBER_MAX,
    VERSION,
    Member,
    canonical,
)

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


class _Packer:
    """Writes members as the archive's writer does, but in the order and with the time of a layout."""

    def __init__(self, file: BinaryIO, directory: Directory, layout: _Layout) -> None:
        self._file = file
        self._directory = directory
        self._layout = layout
        self._members: list[dict[str, Any]] = []
        self._counts = {"state": 0, "dirty": 0, "pages": 0, "zero": 0}

    def pack(self) -> int:
        header = self._directory.read(HEADER, HEADER_MAX)
        statistics = _load(self._directory, STATISTICS, MANIFEST_MAX)
        self._put(HEADER, header)
        with self._directory.open(STATE) as state:
            self._pack_members(state)
        manifest = {"format": FORMAT, "version": VERSION, "members": self._members, "statistics": statistics}
        try:
            manifest["sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
            content = canonical(manifest)
        except (ValueError, RecursionError) as error:  # NaN, lone surrogates
            raise ImageError(f"{STATISTICS}: {error}") from None
        if len(content) > MANIFEST_MAX + ENTRY_MAX * len(self._members):
            raise ImageError(f"{STATISTICS}: too long for a manifest")
        self._write(tar.header("manifest.json", len(content), self._layout.mtime), content)
        self._write(bytes(tar.padding(len(content))), tar.END)
        return len(self._members)

    def _pack_members(self, state: BinaryIO) -> None:
        sizes = [member.size for member in self._layout.members if member.name.startswith("state/")]
        pieces = self._pieces(state, sizes)
        for member in self._layout.members:
            kind = member.name.partition("/")[0]
            if kind == "state":
                for piece in next(pieces, ()):
                    self._add(kind, piece, {})
            else:
                self._add(kind, self._directory.read(member.name, MEMBER_MAX), member.extra)
        for rest in pieces:
            for piece in rest:
                self._add("state", piece, {})

    def _pieces(self, state: BinaryIO, sizes: list[int]) -> Iterator[Iterator[bytes]]:
        """Yield the content of each state member, or of all at once, where their sum is not what is there now."""
        size = state.seek(0, 2)
        state.seek(0)
        if size == sum(sizes):
            for one in sizes:
                yield iter([self._read(state, one)])
        elif size:
            yield (self._read(state, CHUNK) for _ in range(-(-size // CHUNK)))

    @staticmethod
    def _read(state: BinaryIO, size: int) -> bytes:
        try:
            return state.read(size)
        except OSError as error:
            raise host_error("cannot read", STATE, error) from error

    def _add(self, kind: str, content: bytes, extra: dict[str, int]) -> None:
        self._put(f"{kind}/{self._counts[kind]:04d}", content, extra)
        self._counts[kind] += 1

    def _put(self, name: str, content: bytes, extra: dict[str, int] | None = None) -> None:
        self._write(tar.header(name, len(content), self._layout.mtime), content, bytes(tar.padding(len(content))))
        self._members.append(Member(name, len(content), hashlib.sha256(content).hexdigest(), 0, extra or {}).entry())

    def _write(self, *parts: bytes) -> None:
        for part in parts:
            self._file.write(part)


def pack(directory: Directory, file: BinaryIO) -> int:
    """Write an archive of a directory's parts; returns how many members it has, without the manifest.

    What is written is to be read by :func:`vfio_mig.image.archive.read_archive` before it counts.

    :param file: one whose failed writes are HostErrors.
    :raises ImageError: something is missing or impossible.
    """
    return _Packer(file, directory, _Layout(directory)).pack()
