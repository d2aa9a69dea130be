# SPDX-License-Identifier: MIT
"""Writes an archive, front to back; :mod:`vfio_mig.image.layout` specifies it."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vfio_mig.image import tar
from vfio_mig.image.files import host_error
from vfio_mig.image.layout import (
    ADDRESS_END,
    CHUNK,
    ENTRY_MAX,
    FORMAT,
    KINDS,
    MANIFEST_MAX,
    VERSION,
    ZERO_RANGES,
    Buffer,
    Member,
    canonical,
    dirty_problem,
    index,
)
from vfio_mig.ranges import PAGE, merge, of_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vfio_mig.errors import HostError
    from vfio_mig.image.digests import Digests


AWAITED: Final = 1 << 20
"""Bytes of a state member, at most, for whoever waits for the end of an image; a large state's are larger."""


class ArchiveWriter:
    """Write an archive to a file or pipe, front to back. Not complete before :meth:`finish`; never closes the file.

    :param file: where to; nothing is read back.
    :param header: what ``header.json`` says beside format and version, values that JSON can carry; or its bytes.
    :param digests: takes the digests of state and guest memory beside the job; if it can read *file*, which is empty
        then, nothing of a streamed state is kept in memory, and its digests are not waited for before :meth:`finish`.
    :param mtime: of every member, seconds since 1970; now, if it is not said.
    :param first: bytes of the first state member, at most CHUNK; each has twice as much as the one before, up to
        AWAITED, and later a sixteenth of what came before it. Small ones give whoever reads the archive from a pipe
        something to do while the rest is gathered, and little to do when the last one has come.
    :raises HostError: a write failed; what is in the file is not an archive.
    """

    def __init__(
        self,
        file: BinaryIO,
        header: Mapping[str, Any] | bytes,
        digests: Digests | None = None,
        *,
        mtime: int | None = None,
        first: int = CHUNK,
    ) -> None:
        self._file = file
        self._first = first
        self._digests = digests
        self._at = 0
        self._mtime = int(time.time()) if mtime is None else mtime
        self._members: list[tuple[Member, Callable[[], str] | None]] = []
        self._counts = dict.fromkeys(KINDS, 0)
        self._finished = False
        self._ranges: list[list[int]] = []
        self._buffers: list[memoryview] = []
        self._filled = 0
        self._hashed: list[int] = []
        """Numbers of the members whose content is in one of the buffers."""
        self._end = 0
        """Behind all ranges that wait: pages mostly rise, so that there is nothing to compare."""
        self._for_state: list[memoryview] = []
        if digests is not None and digests.fd is None:
            # Who gives digests to a pipe has somebody wait for it: the pages are there before the first is needed
            self._for_state = [_touched(first) for _ in range(2)]
        if not isinstance(header, bytes):
            header = canonical({**header, "format": FORMAT, "version": VERSION})
        self._put("header.json", [header])

    def add_state(self, chunks: Buffer | Iterable[Buffer]) -> int:
        """Append device state, in pieces of any size; may be called again. Returns the bytes added.

        A piece is done with before the next one is asked for, so its buffer may be used again.
        """
        if isinstance(chunks, bytes | bytearray | memoryview):
            return self._add_whole(memoryview(chunks).cast("B"))
        views = (memoryview(chunk).cast("B") for chunk in chunks)
        return self._gather(views) if self._digests is None or self._digests.fd is None else self._stream(views)

    def _add_whole(self, state: memoryview) -> int:
        """Write a state that is in memory, and stays there."""
        size, at = self._first, 0
        while at < len(state):
            self._put_state(state[at : at + size])
            at, size = at + size, _following(size, at + size)
        return len(state)

    def _gather(self, chunks: Iterable[memoryview]) -> int:
        """Gather members in memory, as a member's size stands in front of it: what a pipe needs."""
        total = filled = 0
        size = self._first
        for number, (member, _) in enumerate(self._members):  # an earlier part of the state was in the same buffers
            if member.kind == "state":
                self._settle(number)
        buffers = self._for_state or self._make_buffers()
        for chunk in chunks:
            view = chunk
            total += len(view)
            while view:
                piece = view[: size - filled]
                buffers[0][filled : filled + len(piece)] = piece
                filled, view = filled + len(piece), view[len(piece) :]
                if filled == size:
                    self._put_state(buffers[0][:filled])
                    buffers.reverse()
                    self._settle(len(self._members) - len(buffers))  # whose buffer is to be filled again
                    filled, size = 0, _following(size, total - len(view))
        if filled:
            self._put_state(buffers[0][:filled])
        return total

    def _put_state(self, content: memoryview) -> None:
        self._put_beside(self._next("state"), [content])

    def _put_beside(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write a member whose content stays as it is for now: its digest is taken meanwhile, if there are threads."""
        if self._digests is None:
            self._put(name, parts)
            return
        size = sum(map(len, parts))
        self._begin(name, size)
        digest = self._digests.of_memory(*parts)
        for part in parts:
            self._write(part)
        self._pad()
        self._members.append((Member(name, size, "", 0, {}), digest))

    def _settle(self, number: int) -> None:
        """Wait for the digest of a member."""
        member, digest = self._members[number]
        if digest is not None:
            self._members[number] = (member._replace(sha256=digest()), None)

    def _stream(self, chunks: Iterable[memoryview]) -> int:
        """Write members as they come: a size is put right, and a digest taken, when they are in the file."""
        total = filled = start = 0
        name = ""
        for chunk in chunks:
            view = chunk
            total += len(view)
            while view:
                if not filled:
                    name, start = self._next("state"), self._at
                    self._begin(name, CHUNK)
                piece = view[: CHUNK - filled]
                self._write(piece)
                filled, view = filled + len(piece), view[len(piece) :]
                if filled == CHUNK:
                    self._end_streamed(name, start, filled)
                    filled = 0
        if filled:
            self._end_streamed(name, start, filled)
        return total

    def _end_streamed(self, name: str, start: int, size: int) -> None:
        assert self._digests is not None  # noqa: S101 -- for the type checker
        assert self._digests.fd is not None  # noqa: S101 -- for the type checker
        self._pad()
        try:
            self._file.flush()
            if size < CHUNK:
                os.pwrite(self._digests.fd, tar.header(name, size, self._mtime), start)
        except OSError as error:
            raise self._failed(error) from error
        self._members.append((Member(name, size, "", 0, {}), self._digests.of_file(start + tar.BLOCK, size)))

    def add_dirty(self, start_page: int, nr_pages: int, bitmap: Buffer) -> None:
        """Append the dirty bitmap of *nr_pages* pages from *start_page* on: ceil(nr_pages / 8) bytes."""
        problem = dirty_problem(start_page, nr_pages, bitmap)
        if problem:
            raise ValueError(problem)
        self.add_member("dirty", [bitmap], start_page=start_page, nr_pages=nr_pages)

    def add_pages(self, pages: Iterable[tuple[int, Buffer]]) -> int:
        """Append guest memory: (guest-physical address, content), both whole pages. Returns the bytes added.

        A buffer is copied before the next one is asked for, so it may be used again.
        """
        total = sum(self.put_pages(gpa, buffer) for gpa, buffer in pages)
        self.flush_pages()
        return total

    def put_pages(self, gpa: int, buffer: Buffer) -> int:
        """Append one piece of guest memory; it may wait for more until :meth:`flush_pages`. Returns its bytes."""
        view = memoryview(buffer).cast("B")
        size = len(view)
        if gpa % PAGE or size % PAGE or not 0 <= gpa <= ADDRESS_END - size:
            raise ValueError(f"no whole pages: {size} bytes at {gpa:#x}")
        if gpa < self._end and any(start < gpa + size and gpa < start + length for start, length in self._ranges):
            self.flush_pages()  # a page comes in one index once
        self._end = max(self._end, gpa + size)
        while view:
            piece = view[: CHUNK - self._filled]
            if self._ranges and sum(self._ranges[-1]) == gpa:
                self._ranges[-1][1] += len(piece)
            else:
                self._ranges.append([gpa, len(piece)])
            self._gather_pages(piece)
            gpa, view = gpa + len(piece), view[len(piece) :]
            if self._filled == CHUNK:
                self.flush_pages()
        return size

    def _gather_pages(self, piece: memoryview) -> None:
        if not self._buffers:
            self._buffers = self._make_buffers()
        self._buffers[0][self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)

    def _make_buffers(self) -> list[memoryview]:
        """Return buffers to gather members in: one is filled while the digest of the other is taken.

        No page of them is touched before it is needed.
        """
        return [memoryview(mmap.mmap(-1, CHUNK)) for _ in range(1 if self._digests is None else 2)]

    def flush_pages(self) -> None:
        """Write the guest memory that waits."""
        if not self._ranges:
            return
        self._put_beside(self._next("pages"), [index(self._ranges), self._buffers[0][: self._filled]])
        self._ranges, self._filled, self._end = [], 0, 0
        self._hashed.append(len(self._members) - 1)
        self._buffers.reverse()
        if len(self._hashed) == len(self._buffers):
            self._settle(self._hashed.pop(0))

    def add_zero(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Append guest memory that is all zero: (guest-physical address, bytes), whole pages, in any order.

        Returns the bytes, each page counted once.
        """
        given = []
        for gpa, size in ranges:
            if gpa % PAGE or size % PAGE or size <= 0 or not 0 <= gpa <= ADDRESS_END - size:
                raise ValueError(f"no whole pages: {size} bytes at {gpa:#x}")
            given.append((gpa, size))
        merged = [[start, end - start] for start, end in merge(of_sizes(given))]
        for first in range(0, len(merged), ZERO_RANGES):
            self.add_member("zero", [index(merged[first : first + ZERO_RANGES])])
        return sum(size for _, size in merged)

    def finish(self, statistics: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write manifest and end, and return the manifest. After this the archive is whole (flush is the caller's).

        :raises ValueError: JSON cannot carry the statistics, or they are too long for a manifest.
        """
        self.flush_pages()
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "members": [_entry(*member) for member in self._members],
            "statistics": dict(statistics or {}),
        }
        manifest["sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
        content = canonical(manifest)
        if len(content) > MANIFEST_MAX + ENTRY_MAX * len(self._members):
            raise ValueError("too long for a manifest")
        self._put("manifest.json", [content])
        self._write(tar.END)
        self._finished = True
        return manifest

    def add_member(self, kind: str, parts: Sequence[Buffer], **extra: int) -> None:
        """Append a member of a kind as it is, for who knows what one has to be.

        :param extra: what the manifest says of it beside name, size and digest.
        """
        self._put(self._next(kind), parts, **extra)

    def _next(self, kind: str) -> str:
        """Return the name of a kind's next member."""
        number = self._counts[kind]
        self._counts[kind] += 1
        return f"{kind}/{number:04d}"

    def _put(self, name: str, parts: Sequence[Buffer], **extra: int) -> None:
        size = sum(len(part) for part in parts)
        digest = hashlib.sha256()
        self._begin(name, size)
        for part in parts:
            self._write(part)
            digest.update(part)
        self._pad()
        self._members.append((Member(name, size, digest.hexdigest(), 0, extra), None))

    def _begin(self, name: str, size: int) -> None:
        if self._finished:
            raise ValueError("the archive is finished")
        self._write(tar.header(name, size, self._mtime))

    def _pad(self) -> None:
        self._write(bytes(tar.padding(self._at)))

    def _write(self, data: Buffer) -> None:
        try:
            view = memoryview(data)
            self._at += len(view)
            while view:
                # A raw (unbuffered) stream may take a part, or None when it would block.
                written = self._file.write(view) or 0
                view = view[written:]
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> HostError:
        return host_error("cannot write", str(getattr(self._file, "name", "output")), error)


def _following(size: int, total: int) -> int:
    """Return the bytes of the next state member, behind one of *size* and *total* bytes of state."""
    return min(max(size if size > AWAITED else min(2 * size, AWAITED), total // 16), CHUNK)


def _touched(first: int) -> memoryview:
    """Return memory for a member, of which there are pages for the first members."""
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    touched = max(first, AWAITED)
    buffer[:touched:PAGE] = bytes(len(range(0, touched, PAGE)))
    return buffer


def _entry(member: Member, digest: Callable[[], str] | None) -> dict[str, Any]:
    """Return the manifest's words for a member, whose digest may have to be waited for."""
    return (member if digest is None else member._replace(sha256=digest())).entry()
