# SPDX-License-Identifier: MIT
"""Reads an archive and verifies all of it; :mod:`vfio_mig.image.layout` specifies it."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from contextlib import ExitStack, suppress
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from vfio_mig.closing import Closing
from vfio_mig.errors import ImageError, excerpt
from vfio_mig.image import tar
from vfio_mig.image.files import host_error
from vfio_mig.image.forms import NO_IMAGE, require_image
from vfio_mig.image.layout import (
    ADDRESS_END,
    COUNT,
    ENTRY_MAX,
    FORMAT,
    HEADER_MAX,
    KINDS,
    MANIFEST_MAX,
    MEMBER_MAX,
    PAIR,
    VERSION,
    Buffer,
    DirtyBitmap,
    Member,
    canonical,
    dirty_problem,
)
from vfio_mig.interrupts import waiting
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vfio_mig.image.digests import Digests
    from vfio_mig.image.kept import Kept

_AT_WORK: Final = 2
"""Members whose digests are being taken while the next one is read."""


class Archive(Closing):
    """A whole archive: every member was there and matched its SHA-256 when :func:`read_archive` returned.

    Contents are read again from the file and, unless it is known to be the same, checked again (ImageError if it
    changed meanwhile), so the file must stay open; or from the copy that was made of a pipe. Several threads may read.
    A context manager, which owns that copy and not the file.
    """

    def __init__(
        self,
        source: BinaryIO,
        header: dict[str, Any],
        members: list[Member],
        manifest: dict[str, Any],
        kept: Kept | None = None,
    ) -> None:
        self._source = source
        self._kept = kept
        self._stack = ExitStack()
        self._position = Lock()
        self.header = header
        self.members = members
        self.manifest = manifest
        self.is_frozen: Callable[[], bool] = lambda: False
        """Whether nobody can have changed the file since the reader began; the reader sets it."""
        self.mtime = 0
        """The time in every member's tar header, seconds since 1970; the reader sets it."""

    def own(self, stack: ExitStack) -> None:
        """Have what belongs to the copy of a pipe closed with this."""
        self._stack = stack

    def close(self) -> None:
        """Remove the copy of a pipe; a second call does nothing. The file stays open."""
        self._stack.close()

    @property
    def statistics(self) -> dict[str, Any]:
        """What the saving job measured."""
        statistics: dict[str, Any] = self.manifest["statistics"]
        return statistics

    @property
    def state_size(self) -> int:
        """Bytes of device state."""
        return sum(member.size for member in self._of("state"))

    @property
    def has_memory(self) -> bool:
        """Whether it has guest memory."""
        return any(member.kind in ("pages", "zero") for member in self.members)

    def count_pages(self) -> int:
        """Count the pages of guest memory, by their indexes: one that comes in several rounds counts in each.

        :raises ImageError: as :meth:`index`.
        """
        members = (member for member in self.members if member.kind in ("pages", "zero"))
        return sum(size // PAGE for member in members for _, size in self.index(member))

    @property
    def is_at_hand(self) -> bool:
        """Whether all of the state is in memory, so that to read it takes no time."""
        return all(self._view(member) is not None for member in self._of("state"))

    def state_chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the device state, at most MEMBER_MAX bytes at a time."""
        return (self._view(member) or self._content(member) for member in self._of("state"))

    def state(self) -> bytes | memoryview:
        """Return the device state in one piece; compare :attr:`state_size` with what is reasonable first."""
        members = list(self._of("state"))
        if self._kept is not None and members:
            first, size = members[0].offset, self.state_size
            if members[-1].offset + members[-1].size == first + size:  # one behind the other, as a rule
                view = self._kept.view(first, size)
                if view is not None:
                    return view
        return b"".join(self.state_chunks())

    def dirty(self) -> Iterator[DirtyBitmap]:
        """Yield the dirty bitmaps in the order in which they were saved."""
        for member in self._of("dirty"):
            yield DirtyBitmap(member.extra["start_page"], member.extra["nr_pages"], self._content(member))

    def pages(self) -> Iterator[tuple[int, memoryview]]:
        """Yield guest memory with content: (guest-physical address, content)."""
        for gpa, _, content in self.memory():
            if content is not None:
                yield gpa, content

    def memory(self) -> Iterator[tuple[int, int, memoryview | None]]:
        """Yield guest memory: (guest-physical address, bytes, content, or None for zeros); the later one counts."""
        for member in self.members:
            yield from self.memory_of(member)

    def memory_of(self, member: Member) -> Iterator[tuple[int, int, memoryview | None]]:
        """Yield the guest memory of one member, as :meth:`memory` does; nothing of another kind of member."""
        if member.kind == "pages":
            for gpa, content in _split_pages(member.name, memoryview(self._content(member))):
                yield gpa, len(content), content
        elif member.kind == "zero":
            for gpa, size in _split_index(member.name, memoryview(self._content(member)))[0]:
                yield gpa, size, None

    def index(self, member: Member) -> list[tuple[int, int]]:
        """Return the ranges of a member with guest memory, (guest-physical address, bytes), without their content.

        Its content is not verified again, so it is for planning only.

        :raises ImageError: the file has changed meanwhile, and this is not an index any more.
        """
        head = self._peek(member, min(member.size, COUNT.size))
        if len(head) == COUNT.size:
            (count,) = COUNT.unpack(head)
            head = self._peek(member, min(member.size, COUNT.size + count * PAIR.size))
        return _split_index(member.name, memoryview(head))[0]

    def _peek(self, member: Member, size: int) -> bytes:
        """Read the beginning of a member as it is now."""
        return self._read(member.offset, size)

    def _read(self, at: int, size: int) -> bytes:
        if self._kept is not None:
            return self._kept.read(at, size, _read)
        with self._position:
            try:
                self._source.seek(at)
            except OSError as error:
                raise host_error("cannot read", _name_of(self._source), error) from error
            return _read(self._source, size)

    def _view(self, member: Member) -> memoryview | None:
        """Return a member that is in memory, None for one that is not."""
        return None if self._kept is None else self._kept.view(member.offset, member.size)

    def content(self, member: Member) -> bytes:
        """Return a member as it is, at most what the reader takes for one.

        :raises ImageError: the file has changed meanwhile.
        """
        return self._content(member)

    def _of(self, kind: str) -> Iterator[Member]:
        return (member for member in self.members if member.kind == kind)

    def _content(self, member: Member) -> bytes:
        content = self._read(member.offset, member.size)
        # A file may be changed by others meanwhile; the copy of a pipe has no name, and is nobody's but ours
        is_safe = self._kept is not None or self.is_frozen()
        if not is_safe and hashlib.sha256(content).hexdigest() != member.sha256:
            raise ImageError(f"{member.name}: the file has changed while it was used")
        return content


def read_archive(file: BinaryIO, *, alone: bool = True, is_frozen: Callable[[], bool] = lambda: False) -> Archive:
    """Read a whole archive and verify it: format, order, names, sizes, every member's SHA-256, nothing behind it.

    :param file: a file, read from where it stands, or a pipe, which is copied to an unnamed temporary file.
    :param alone: whether the file must end behind the archive; otherwise it is read exactly so far.
    :param is_frozen: asked after each later read: whether nobody can have changed the file since this function began.
    :raises ImageError: anything is wrong; the message names the member or the byte offset.
    :raises HostError: reading failed, or there is no room for the copy of a pipe.
    """
    if file.seekable():
        return _Reader(file, None, None, alone=alone, is_frozen=is_frozen).read()
    from vfio_mig.image.digests import Digests
    from vfio_mig.image.kept import Kept

    # Who writes more behind it waits for us, as a rule while a device stands still: so the archive ends the threads
    with ExitStack() as stack:
        kept = Kept(touched=not alone)
        stack.callback(_close, kept)
        digests = stack.enter_context(Digests(None))
        archive = _Reader(file, kept, digests, alone=alone, is_frozen=is_frozen).read()
        archive.own(stack.pop_all())
        return archive


def _close(kept: Kept) -> None:
    with suppress(OSError):  # what it could not write is not wanted any more
        kept.close()


def _name_of(file: BinaryIO) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "input"


@waiting  # for the writer of a pipe
def _read(file: BinaryIO, size: int) -> bytes:
    """Read *size* bytes, fewer at the end of the file only."""
    parts: list[bytes] = []
    while size:
        try:
            part = file.read(size)
        except OSError as error:
            raise host_error("cannot read", _name_of(file), error) from error
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@waiting  # for the writer of a pipe
def _read_into(file: BinaryIO, room: memoryview) -> int:
    """Fill memory; returns the bytes, fewer at the end of the file only."""
    done = 0
    while done < len(room):
        try:
            part = file.readinto(room[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise host_error("cannot read", _name_of(file), error) from error
        if not part:
            break
        done += part
    return done


class _Read(NamedTuple):
    """A member that was read, and what waits for its digest."""

    member: Member
    digest: Callable[[], str] | None

    def settled(self) -> _Read:
        """Wait for the digest."""
        return self if self.digest is None else _Read(self.member._replace(sha256=self.digest()), None)


def _cut_off(what: str, at: int) -> ImageError:
    """Return the error for an archive that ends too early."""
    return ImageError(f"{what}: cut off at byte {at}", hint="the file is incomplete; save it again")


class _Reader:
    """One pass over an archive."""

    def __init__(
        self,
        file: BinaryIO,
        kept: Kept | None,
        digests: Digests | None,
        *,
        alone: bool,
        is_frozen: Callable[[], bool],
    ) -> None:
        self.file = file
        self.is_frozen = is_frozen
        self.alone = alone
        self.kept = kept
        self.digests = digests
        self.base = file.tell() if kept is None else 0
        self.offset = 0
        self.mtime: int | None = None
        self.counts = dict.fromkeys(KINDS, 0)

    def read(self) -> Archive:
        name, content, first = self._member()
        members: list[_Read]
        if name != "header.json":
            raise ImageError(f"{NO_IMAGE}: it begins with {name!r} instead of header.json")
        header = _load_object(name, bytes(content))
        _check_version(name, header)
        members = [first]
        while True:
            if len(members) > _AT_WORK:  # else what cannot be kept in memory would be there until its digest is taken
                members[-_AT_WORK] = members[-_AT_WORK].settled()
            name, content, member = self._member()
            if name == "manifest.json":
                break
            self._check_name(name)
            _check_memory(member.member.kind, name, memoryview(content))
            members.append(member)
        manifest = _load_manifest(bytes(content))
        found = [member.settled().member for member in members]
        archive = Archive(self.file, header, _match(found, manifest["members"]), manifest, self.kept)
        archive.is_frozen = self.is_frozen
        archive.mtime = self.mtime or 0
        self._check_end()
        for bitmap in archive.dirty():
            if problem := dirty_problem(*bitmap):
                raise ImageError(f"dirty bitmap: {problem}")
        return archive

    def _member(self) -> tuple[str, Buffer, _Read]:
        """Read one member whole; its size is checked before anything of that size is allocated."""
        at = self.offset
        block = self._take(tar.BLOCK, f"member header at {at:#x}") if at else self._first()
        if not any(block):
            raise ImageError(f"ends at {at:#x} without manifest.json", hint="the save was not finished; save it again")
        name, size, mtime = tar.parse_header(block, at)
        if self.mtime not in (None, mtime):
            raise ImageError(f"member header at {at:#x} has another time than the first")
        self.mtime = mtime
        manifest_max = MANIFEST_MAX + ENTRY_MAX * (1 + sum(self.counts.values()))
        limit = {"header.json": HEADER_MAX, "manifest.json": manifest_max}.get(name, MEMBER_MAX)
        if size > limit:
            raise ImageError(f"{name}: {size} bytes are too many, at most {limit} are allowed")
        offset = self.base + self.offset
        content = self._content(size, name)
        if self.kept is not None:
            offset = self._keep(self.kept, memoryview(content))
        member = Member(name, size, "", offset, {})
        if self.digests is None:
            read = _Read(member._replace(sha256=hashlib.sha256(content).hexdigest()), None)
        else:
            read = _Read(member, self.digests.of_memory(memoryview(content)))
        if any(self._take(tar.padding(size), name)):
            raise ImageError(f"{name}: the padding behind it is damaged")
        return name, content, read

    def _content(self, size: int, name: str) -> Buffer:
        """Read a member's content; of a pipe, straight to where it is kept."""
        room = None if self.kept is None else self.kept.room(size)
        if room is None:
            return self._take(size, name)
        done = _read_into(self.file, room)
        self.offset += done
        if done < size:
            raise _cut_off(name, self.offset)
        return room

    def _first(self) -> bytes:
        """Read the first block, and tell what the file is if it is not an image."""
        block = _read(self.file, tar.BLOCK)
        self.offset += len(block)
        require_image(block)
        if len(block) < tar.BLOCK:
            raise _cut_off("member header at 0x0", self.offset)
        return block

    def _take(self, size: int, what: str) -> bytes:
        data = _read(self.file, size)
        self.offset += len(data)
        if len(data) < size:
            raise _cut_off(what, self.offset)
        return data

    @staticmethod
    def _keep(kept: Kept, content: memoryview) -> int:
        try:
            return kept.keep(content)
        except OSError as error:
            raise host_error("cannot copy the input to it", "temporary file", error) from error

    def _check_name(self, name: str) -> None:
        kind = name.partition("/")[0]
        if kind not in self.counts or name != f"{kind}/{self.counts[kind]:04d}":
            raise ImageError(f"member {name!r} has no place here")
        self.counts[kind] += 1

    def _check_end(self) -> None:
        if any(self._take(len(tar.END), "end of the archive")):
            raise ImageError(f"bytes behind manifest.json, before {self.offset:#x}")
        if self.alone and _read(self.file, 1):
            raise ImageError(f"bytes behind the end of the archive, at {self.offset:#x}")


def _load_object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{name}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ImageError(f"{name}: no JSON object")
    return value


def _check_version(name: str, value: Mapping[str, Any]) -> None:
    if value.get("format") != FORMAT:
        raise ImageError(f"{name}: format is {excerpt(value.get('format'))}, not {FORMAT!r}")
    if value.get("version") != VERSION:
        version = excerpt(value.get("version"))
        raise ImageError(f"{name}: format version {version}, this program reads {VERSION}")


def _load_manifest(content: bytes) -> dict[str, Any]:
    name = "manifest.json"
    manifest = _load_object(name, content)
    _check_version(name, manifest)
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    try:
        good = canonical(manifest) == content
        good = good and manifest.get("sha256") == hashlib.sha256(canonical(rest)).hexdigest()
    except (ValueError, RecursionError):  # NaN, lone surrogates
        good = False
    if not good or not isinstance(manifest.get("members"), list) or not isinstance(manifest.get("statistics"), dict):
        raise ImageError(f"{name}: damaged")
    return manifest


def _match(members: list[Member], entries: list[object]) -> list[Member]:
    """Compare what was read with what the manifest lists, and take the manifest's additions over."""
    if len(members) != len(entries):
        raise ImageError(f"manifest.json lists {len(entries)} members, {len(members)} are there")
    matched = []
    for member, entry in zip(members, entries, strict=True):
        keys = ("start_page", "nr_pages") if member.kind == "dirty" else ()
        if not isinstance(entry, dict) or entry.keys() != {"name", "size", "sha256", *keys}:
            raise ImageError(f"manifest.json: bad entry for {member.name}")
        extra = {key: entry[key] for key in keys}
        if not all(type(value) is int for value in extra.values()):
            raise ImageError(f"manifest.json: bad entry for {member.name}")
        matched.append(member._replace(extra=extra))
        if matched[-1].entry() != entry:
            raise ImageError(f"{member.name}: differs from what manifest.json says: damaged")
    return matched


def _check_memory(kind: str, name: str, member: memoryview) -> None:
    """Check the index of a member with guest memory."""
    if kind == "pages":
        for _ in _split_pages(name, member):
            pass
    elif kind == "zero" and _split_index(name, member)[1] != len(member):
        raise ImageError(f"{name}: bytes behind its ranges")


def _split_index(name: str, member: memoryview) -> tuple[list[tuple[int, int]], int]:
    """Return the ranges at the beginning of a member and where they end, every bound checked."""
    if len(member) < COUNT.size:
        raise ImageError(f"{name}: too short")
    (count,) = COUNT.unpack_from(member)
    content_at = COUNT.size + count * PAIR.size
    if content_at > len(member):
        raise ImageError(f"{name}: {count} ranges do not fit into {len(member)} bytes")
    ranges = list(PAIR.iter_unpack(member[COUNT.size : content_at]))
    end, rising = 0, True
    for gpa, size in ranges:
        if gpa % PAGE or size % PAGE or not size or gpa + size > ADDRESS_END:
            raise ImageError(f"{name}: impossible range: {size} bytes at {gpa:#x}")
        rising = rising and gpa >= end
        end = gpa + size
    if not rising:
        _require_apart(name, ranges)
    return ranges, content_at


def _require_apart(name: str, ranges: list[tuple[int, int]]) -> None:
    """Refuse ranges of one index that overlap: a small member could ask for any amount of work."""
    end = 0
    for gpa, size in sorted(ranges):
        if gpa < end:
            raise ImageError(f"{name}: ranges overlap at {gpa:#x}")
        end = gpa + size


def _split_pages(name: str, member: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the ranges of a pages member, every bound checked first."""
    ranges, content_at = _split_index(name, member)
    if sum(size for _, size in ranges) != len(member) - content_at:
        raise ImageError(f"{name}: its ranges do not add up to its size")
    for gpa, size in ranges:
        yield gpa, member[content_at : content_at + size]
        content_at += size


class StateSource:
    """The state of an archive; keeps one member of it in memory."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._members = [member for member in archive.members if member.kind == "state"]
        self._starts = [0, *accumulate(member.size for member in self._members)]
        self._loaded: tuple[int, bytes] = (-1, b"")
        self.size: int = self._starts[-1]

    def read(self, at: int, size: int) -> bytes:
        """Read a part of the state.

        :raises ImageError: the file has changed meanwhile.
        """
        parts: list[bytes] = []
        end = min(at + size, self.size)
        while at < end:
            number = bisect_right(self._starts, at) - 1
            if self._loaded[0] != number:
                self._loaded = (number, self._archive.content(self._members[number]))
            start = at - self._starts[number]
            parts.append(self._loaded[1][start : start + end - at])
            at += len(parts[-1])
        return b"".join(parts)
