# SPDX-License-Identifier: MIT
"""Guest memory that lies in files: memfd, /dev/shm, hugetlbfs or plain, as ``FILE@GPA[:SIZE[+OFFSET]]``."""

import errno
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Final, Self

from vfio_mig.dirty.ranges import ADDRESS_END, PAGE, PageRange, merge, parse_number
from vfio_mig.errors import HostError, UsageError, errno_text

CHUNK: Final = 4 << 20
"""Bytes that are read from a file at a time."""
_CHUNK_PAGES: Final = CHUNK // PAGE
_GAP: Final = 4
"""Pages between two dirty runs that are read with them: cheaper than to ask the kernel once more."""
_SPAN_PAGES: Final = 64
"""Pages that are read at once with gaps between: they stay in a CPU's cache until they are written."""


def data_extents(fd: int, start: int, end: int, largest: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of what is no hole between two offsets, at most *largest* bytes at a time.

    :raises OSError: the file cannot be asked.
    """
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
            hole = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but hole until the end, or behind it
                return
            raise
        while start < hole:
            size = min(largest, hole - start)
            yield start, size
            start += size


class MemoryMap:
    """A piece of guest memory: *size* bytes of a file from *offset* on are the guest's from address *gpa* on.

    Before :meth:`open` the size may be 0: the rest of the file. Owns its fd and mapping.
    """

    __slots__ = ("_fd", "_mapping", "gpa", "offset", "path", "size", "writable")

    def __init__(self, path: str, gpa: int, size: int = 0, offset: int = 0) -> None:
        self.path = path
        self.gpa = gpa
        self.size = size
        self.offset = offset
        self.writable = False
        self._fd = -1
        self._mapping: mmap.mmap | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take ``FILE@GPA[:SIZE[+OFFSET]]`` apart; FILE may contain @ and colons, the last @ counts.

        :raises UsageError: bad syntax, or not whole pages. The file is not looked at yet.
        """
        path, at, place = text.rpartition("@")
        gpa_text, colon, size_text = place.partition(":")
        size_text, plus, offset_text = size_text.partition("+")
        if not path or "\0" in path or not at or (colon and not size_text) or (plus and not offset_text):
            raise UsageError(f"memory {text!r} is not FILE@GPA[:SIZE[+OFFSET]]")
        new = cls(
            path,
            parse_number(gpa_text),
            parse_number(size_text) if colon else 0,
            parse_number(offset_text) if plus else 0,
        )
        if colon and not new.size:
            raise UsageError(f"memory {text!r} has no size")
        new._check_pages()
        return new

    def __str__(self) -> str:
        return f"{self.path}@{self.gpa:#x}:{self.size:#x}" + (f"+{self.offset:#x}" if self.offset else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pages(self) -> PageRange:
        """The guest pages that this is."""
        return PageRange(self.gpa // PAGE, self.size // PAGE)

    def open(self, *, writable: bool = False) -> Self:
        """Open the file and settle the size.

        :param writable: for a container that is to let a device write there.
        :raises UsageError: no regular file, or shorter than said.
        :raises HostError: it cannot be opened.
        """
        try:
            # Without O_NONBLOCK a FIFO would keep us waiting. Links are followed: /proc/PID/fd/N is a memfd's path.
            flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            self._fd = os.open(self.path, flags)
            status = os.fstat(self._fd)
        except OSError as error:
            raise HostError(f"{self.path}: cannot open guest memory: {errno_text(error.errno or 0)}") from error
        self.writable = writable
        try:
            self._settle(status)
        except BaseException:
            self.close()
            raise
        return self

    def map(self) -> mmap.mmap:
        """Return the memory, mapped shared; the same mapping at each call, ours to close.

        Reading through it is for who must: a file that somebody shortens then kills the process (SIGBUS), and
        reading a hole of a memfd fills it. :meth:`read` does neither.
        """
        if self._mapping is None:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            try:
                self._mapping = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED, protection, offset=self.offset)
            except OSError as error:
                raise HostError(f"{self.path}: cannot map guest memory: {errno_text(error.errno or 0)}") from error
        return self._mapping

    def read(self, gpa: int, view: memoryview) -> None:
        """Fill *view* with guest memory from address *gpa* on, all of it inside this map.

        :raises HostError: the file cannot be read or has become shorter.
        """
        if not self.gpa <= gpa <= gpa + len(view) <= self.gpa + self.size:
            raise ValueError(f"{len(view)} bytes at {gpa:#x} are not in {self}")
        offset = gpa - self.gpa + self.offset
        while view:
            try:
                got = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise HostError(f"{self.path}: cannot read guest memory: {errno_text(error.errno or 0)}") from error
            if not got:
                raise HostError(f"{self.path}: guest memory ends at {offset:#x}: the file has become shorter")
            view, offset = view[got:], offset + got

    def write(self, gpa: int, view: memoryview) -> None:
        """Store *view* as guest memory from address *gpa* on, all of it inside this map.

        :raises HostError: the file cannot be written.
        """
        if not self.gpa <= gpa <= gpa + len(view) <= self.gpa + self.size:
            raise ValueError(f"{len(view)} bytes at {gpa:#x} are not in {self}")
        offset = gpa - self.gpa + self.offset
        while view:
            try:
                done = os.pwrite(self._fd, view, offset)
            except OSError as error:
                if error.errno == errno.EINVAL and self.writable:  # hugetlbfs has no write(2)
                    at = offset - self.offset
                    self.map()[at : at + len(view)] = view
                    return
                raise HostError(f"{self.path}: cannot write guest memory: {errno_text(error.errno or 0)}") from error
            view, offset = view[done:], offset + done

    def clear(self, gpa: int, size: int) -> None:
        """Make guest memory zero where it is none already.

        :raises HostError: the file cannot be written.
        """
        offset = gpa - self.gpa + self.offset
        try:
            extents = list(data_extents(self._fd, offset, offset + size))
        except OSError:  # a file system that knows of no holes
            extents = [(at, min(CHUNK, offset + size - at)) for at in range(offset, offset + size, CHUNK)]
        for at, length in extents:
            self.write(at - self.offset + self.gpa, memoryview(bytes(length)))

    def reserve(self, gpa: int, size: int) -> None:
        """Make the file system set room aside, so that writing there cannot fail for want of it; changes no content.

        :raises HostError: there is not enough.
        """
        try:
            os.posix_fallocate(self._fd, gpa - self.gpa + self.offset, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):  # a file that cannot be asked
                raise HostError(f"{self.path}: no room for guest memory: {errno_text(error.errno or 0)}") from error

    def close(self) -> None:
        """Close mapping and fd; a second call does nothing.

        A mapping that somebody still has a buffer of lives until that is gone.
        """
        mapping, self._mapping = self._mapping, None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if mapping is not None:
            with suppress(BufferError):
                mapping.close()

    def _settle(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{self.path} is no regular file; guest memory must be one")
        left = status.st_size - self.offset
        if left <= 0 or left < self.size:
            raise UsageError(f"{self.path} has {status.st_size} bytes, memory {self} needs more")
        self.size = self.size or left
        self._check_pages()

    def _check_pages(self) -> None:
        if self.gpa % PAGE or self.size % PAGE or self.offset % PAGE:
            raise UsageError(f"memory {self} is not made of whole pages of {PAGE} bytes")
        if self.gpa + max(self.size, PAGE) > ADDRESS_END:
            raise UsageError(f"memory {self} is beyond 64 bits")


class Memory:
    """All of a guest's memory that we were told of, in order of address; a context manager that owns its maps."""

    def __init__(self, maps: Sequence[MemoryMap], *, writable: bool = False) -> None:
        """Open the maps; if one fails, the others are closed.

        :raises UsageError: two of them overlap, or as :meth:`MemoryMap.open`.
        """
        self.maps: list[MemoryMap] = []
        try:
            for map_ in maps:
                self.maps.append(map_.open(writable=writable))
            self.maps.sort(key=lambda map_: map_.gpa)
            self._check_overlaps()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all maps."""
        for map_ in self.maps:
            map_.close()

    def _check_overlaps(self) -> None:
        for one, other in pairwise(self.maps):
            if one.pages.end > other.pages.start:
                raise UsageError(f"memory {one} and {other} overlap")

    @property
    def ranges(self) -> list[PageRange]:
        """The guest's pages, as few ranges as possible."""
        return merge(map_.pages for map_ in self.maps)

    @property
    def end(self) -> int:
        """The address behind the guest's last byte."""
        return max((map_.gpa + map_.size for map_ in self.maps), default=0)

    def find(self, page_ranges: Iterable[PageRange]) -> Iterator[tuple[MemoryMap, PageRange]]:
        """Yield the parts of *page_ranges* that are guest memory, each within one map."""
        places = [(map_, map_.pages.start, map_.pages.end) for map_ in self.maps]
        for range_ in page_ranges:
            start, end = range_.start, range_.end
            for map_, first, behind in places:
                if start < behind and first < end:
                    if first <= start and end <= behind:
                        yield map_, range_
                    else:
                        yield map_, PageRange(max(start, first), min(end, behind) - max(start, first))

    def clear(self, gpa: int, size: int) -> int:
        """Make whole pages from address *gpa* on zero.

        :returns: how many pages.
        """
        cleared = 0
        for map_, range_ in self.find([PageRange(gpa // PAGE, size // PAGE)]):
            map_.clear(range_.start * PAGE, range_.nr_pages * PAGE)
            cleared += range_.nr_pages
        return cleared

    def reserve(self, gpa: int, size: int) -> None:
        """Set room aside for *size* bytes, whole pages, from address *gpa* on.

        :raises HostError: there is not enough.
        """
        for map_, range_ in self.find([PageRange(gpa // PAGE, size // PAGE)]):
            map_.reserve(range_.start * PAGE, range_.nr_pages * PAGE)

    def write(self, gpa: int, view: memoryview) -> int:
        """Store whole pages from address *gpa* on; what is no memory of ours is left out.

        :returns: how many pages were stored.
        """
        stored = 0
        for map_, range_ in self.find([PageRange(gpa // PAGE, len(view) // PAGE)]):
            at = range_.start * PAGE - gpa
            map_.write(range_.start * PAGE, view[at : at + range_.nr_pages * PAGE])
            stored += range_.nr_pages
        return stored

    def read(self, page_ranges: Iterable[PageRange]) -> Iterator[tuple[int, memoryview]]:
        """Yield (guest-physical address, content) of the pages that are guest memory, at most CHUNK bytes at a time.

        All contents are in one buffer that later steps overwrite. Reads through the page cache, so it sees what a
        device and the guest's CPUs have stored; a page that is being written may be half old.
        """
        buffer = memoryview(bytearray(CHUNK))
        for map_, runs in _spans(self.find(page_ranges)):
            first = runs[0].start
            for run in _read_span(map_, runs, buffer):
                at = (run.start - first) * PAGE
                yield run.start * PAGE, buffer[at : at + run.nr_pages * PAGE]


def _spans(found: Iterable[tuple[MemoryMap, PageRange]]) -> Iterator[tuple[MemoryMap, list[PageRange]]]:
    """Yield what is to be read at once: runs of one map with small gaps between them, or a part of a long run."""
    runs: list[PageRange] = []
    map_ = None
    end = limit = 0
    for in_map, run in found:
        start, nr_pages = run
        if in_map is map_ and end <= start <= end + _GAP and start + nr_pages <= limit:
            runs.append(run)
        else:
            if map_ is not None:
                yield map_, runs
            for part in range(start, start + nr_pages - _CHUNK_PAGES, _CHUNK_PAGES):
                yield in_map, [PageRange(part, _CHUNK_PAGES)]
                start = part + _CHUNK_PAGES
            runs = [PageRange(start, run.end - start)]
            map_, limit = in_map, start + _SPAN_PAGES
        end = run.end
    if map_ is not None:
        yield map_, runs


def _read_span(map_: MemoryMap, runs: list[PageRange], buffer: memoryview) -> Iterator[PageRange]:
    """Read a span to the begin of *buffer*, and yield its runs; a page between them may be unreadable."""
    first, end = runs[0].start, runs[-1].end
    try:
        map_.read(first * PAGE, buffer[: (end - first) * PAGE])
    except HostError:
        if len(runs) == 1:
            raise
    else:
        yield from runs
        return
    for run in runs:
        at = (run.start - first) * PAGE
        map_.read(run.start * PAGE, buffer[at : at + run.nr_pages * PAGE])
        yield run
