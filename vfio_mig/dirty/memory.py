# SPDX-License-Identifier: MIT
"""Guest memory that lies in files: memfd, /dev/shm, hugetlbfs or plain, as ``FILE@GPA[:SIZE[+OFFSET]]``."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import suppress
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Final, Self

from vfio_mig.closing import Closing
from vfio_mig.dirty.lent import open_memory
from vfio_mig.dirty.ranges import PageRange, merge, parse_number
from vfio_mig.errors import HostError, UsageError, errno_text
from vfio_mig.ranges import ADDRESS_END, PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vfio_mig.dirty.runs import Runs

CHUNK: Final = 2 << 20
"""Bytes that are read from a file at a time."""
_CHUNK_PAGES: Final = CHUNK // PAGE
_GAP: Final = 4
"""Pages between two dirty runs that are read with them: cheaper than to ask the kernel once more."""
_SPAN_PAGES: Final = 64
"""Runs are read at once within so many pages, which stay in a CPU's cache until they are written."""
_MAP_HINTS: Final = {
    errno.ENOMEM: "there are too few free huge pages for it",
    errno.EPERM: "it is sealed against writing",
    errno.EACCES: "it may only be read",
}
_ALIGNMENT_END: Final = 1 << 40
"""No file asks for mappings at multiples of more than this; the largest pages of today's CPUs have 16 GiB."""


def data_extents(fd: int, start: int, end: int, largest: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of what is not a hole between two offsets, at most *largest* bytes at a time.

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


def has_write(fd: int) -> bool:
    """Tell whether a file that is open for writing can be written with write(2); on hugetlbfs it cannot."""
    try:
        os.pwrite(fd, b"", 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def map_file(fd: int, offset: int, size: int, protection: int) -> tuple[mmap.mmap, int]:
    """Map *size* bytes of a file from *offset* on, shared, whatever pages the file is made of.

    A file of huge pages can be mapped and unmapped in whole pages of its own only (mmap(2), "Huge page mappings"), and
    QEMU's pieces of memory begin between them. So the mapping begins earlier and ends later, at multiples of what the
    file calls its block size, which is the page size on hugetlbfs; a file that asks for more gets more.

    :returns: the mapping, and where in it *offset* is; size and offset count bytes.
    :raises OSError: it cannot be mapped, however aligned.
    """
    status = os.fstat(fd)
    alignment = mmap.ALLOCATIONGRANULARITY
    if status.st_blksize & (status.st_blksize - 1) == 0:  # a power of two
        alignment = max(alignment, status.st_blksize)
    while True:
        start = offset & -alignment
        end = min(-(-(offset + size) // alignment) * alignment, max(status.st_size, offset + size))
        try:
            return mmap.mmap(fd, end - start, mmap.MAP_SHARED, protection, offset=start), offset - start
        except OSError as error:
            if error.errno != errno.EINVAL or not start or alignment >= _ALIGNMENT_END:
                raise
        alignment <<= 1


class MemoryMap(Closing):
    """A piece of guest memory: *size* bytes of a file from *offset* on are the guest's from address *gpa* on.

    Before :meth:`open` the size may be 0: the rest of the file. Owns its fd and mapping.
    """

    __slots__ = ("_fd", "_mapping", "_staging", "_view", "gpa", "offset", "path", "size", "writable")

    def __init__(self, path: str, gpa: int, size: int = 0, offset: int = 0) -> None:
        self.path = path
        self.gpa = gpa
        self.size = size
        self.offset = offset
        self.writable = False
        self._fd = self._staging = -1
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None

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
            self._fd = open_memory(self.path, writable=writable)
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

    def make_writable(self) -> None:
        """Open the file for writing, too: for a device of ours, which is going to write there.

        :raises UsageError: it is another file by now.
        :raises HostError: it cannot be opened so.
        """
        if self.writable:
            return
        wider = MemoryMap(self.path, self.gpa, self.size, self.offset).open(writable=True)
        if not os.path.samestat(os.fstat(wider._fd), os.fstat(self._fd)):  # noqa: SLF001 -- of the same class
            wider.close()
            raise UsageError(f"{self.path} has become another file")
        self._release()
        os.close(self._fd)
        self._fd, wider._fd = wider._fd, -1  # noqa: SLF001 -- as above
        self.writable = True

    def map(self) -> memoryview:
        """Return the memory, mapped shared; the same view at each call, ours to release.

        It is for a kernel that is told its address. Who reads or writes it is killed (SIGBUS) when somebody shortens
        the file, and reading a hole of a memfd fills it. :meth:`read` and :meth:`write` do neither.

        :raises HostError: it cannot be mapped; for want of huge pages, too (ENOMEM).
        """
        if self._view is None:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            try:
                self._mapping, before = map_file(self._fd, self.offset, self.size, protection)
            except OSError as error:
                raise HostError(
                    f"{self.path}: cannot map guest memory: {errno_text(error.errno or 0)}",
                    hint=_MAP_HINTS.get(error.errno or 0),
                ) from error
            except ValueError as error:  # Python's own: it compares with the file's size
                raise HostError(f"{self.path}: cannot map guest memory: the file has become shorter") from error
            self._view = memoryview(self._mapping)[before : before + self.size]
        return self._view

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

        :raises HostError: the file cannot be written, or has become shorter.
        """
        if not self.gpa <= gpa <= gpa + len(view) <= self.gpa + self.size:
            raise ValueError(f"{len(view)} bytes at {gpa:#x} are not in {self}")
        offset = gpa - self.gpa + self.offset
        while view:
            try:
                done = os.pwrite(self._fd, view, offset)
            except OSError as error:
                if error.errno == errno.EINVAL and self.writable:  # hugetlbfs has no write(2)
                    self._write_mapped(offset, view)
                    return
                raise HostError(f"{self.path}: cannot write guest memory: {errno_text(error.errno or 0)}") from error
            view, offset = view[done:], offset + done

    def _write_mapped(self, offset: int, view: memoryview) -> None:
        """Store *view* at an offset of the file through its mapping.

        The kernel does so, as read(2) from a file of ours: it answers EFAULT where a store of ours would be a SIGBUS,
        because the file was shortened or there is no huge page left.
        """
        mapped = self.map()[offset - self.offset :]
        try:
            if self._staging < 0:
                self._staging = os.memfd_create("vfio-mig-pages")
            while view:
                staged = os.pwritev(self._staging, [view[:CHUNK]], 0)
                done = 0
                while done < staged:
                    done += os.preadv(self._staging, [mapped[done:staged]], done)
                view, mapped = view[staged:], mapped[staged:]
        except OSError as error:
            why = "it has become shorter, or no huge page is left" if error.errno == errno.EFAULT else None
            text = f"{self.path}: cannot write guest memory: {errno_text(error.errno or 0)}"
            raise HostError(text, hint=why) from error

    def clear(self, gpa: int, size: int) -> None:
        """Make guest memory zero where it is none already.

        Zeros are written over what is there, and no hole is punched: a page that a device has pinned must stay the
        guest's. And nothing is written where zeros are read, as that would fill a hole that the file system does not
        tell: hugetlbfs knows none, and would need a huge page for it.

        :raises HostError: the file cannot be read or written.
        """
        offset = gpa - self.gpa + self.offset
        try:
            extents = list(data_extents(self._fd, offset, offset + size))
        except OSError:  # a file system that knows of no holes
            extents = [(at, min(CHUNK, offset + size - at)) for at in range(offset, offset + size, CHUNK)]
        for at, length in extents:
            self._clear_data(at - self.offset + self.gpa, length)

    def _clear_data(self, gpa: int, size: int) -> None:
        zeros = bytes(size)
        content = bytearray(size)
        self.read(gpa, memoryview(content))
        if content == zeros:
            return
        start = None
        for at in range(0, size + 1, PAGE):
            if at < size and content[at : at + PAGE] != zeros[: min(PAGE, size - at)]:
                start = at if start is None else start
            elif start is not None:
                self.write(gpa + start, memoryview(zeros)[start:at])
                start = None

    def reserve(self, gpa: int, size: int) -> None:
        """Make the file system set room aside, so that writing there cannot fail for want of it; changes no content.

        Memory that can be opened for writing and yet not be written is told here, too: a memfd that was sealed after
        its owner had mapped it.

        :raises HostError: there is not enough room, or the memory cannot be written.
        """
        self._require_mapping()
        try:
            os.posix_fallocate(self._fd, gpa - self.gpa + self.offset, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):  # a file that cannot be asked
                raise HostError(f"{self.path}: no room for guest memory: {errno_text(error.errno or 0)}") from error

    def _require_mapping(self) -> None:
        """Map what can be written only so, which on hugetlbfs also keeps the huge pages for us; see what is sealed."""
        try:
            self.map()
        except HostError as error:
            reason = error.__cause__
            # A file system without shared mappings (ENODEV or EINVAL on some network ones) may well be written
            if not has_write(self._fd) or (isinstance(reason, OSError) and reason.errno == errno.EPERM):
                raise

    def close(self) -> None:
        """Close mapping and fd; a second call does nothing.

        A mapping that somebody still has a buffer of lives until that is gone.
        """
        fds = self._fd, self._staging
        self._fd = self._staging = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        self._release()

    def _release(self) -> None:
        mapping, self._mapping = self._mapping, None
        view, self._view = self._view, None
        if mapping is not None and view is not None:
            with suppress(BufferError):
                view.release()
                mapping.close()

    def _settle(self, status: os.stat_result) -> None:
        if _is_dax(status):
            raise UsageError(
                f"{self.path} is a DAX device, which can be neither read nor written",
                hint="put the guest's memory into a file of a file system on it (mount -o dax)",
            )
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{self.path} is not a regular file; guest memory must be one")
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


def _is_dax(status: os.stat_result) -> bool:
    """Tell whether it is memory as a device, /dev/daxN.M: one that can only be mapped."""
    if not stat.S_ISCHR(status.st_mode):
        return False
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return os.path.basename(os.path.realpath(f"/sys/dev/char/{number}/subsystem")) == "dax"


class Memory(Closing):
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
        """Store whole pages from address *gpa* on; what is not memory of ours is left out.

        :returns: how many pages were stored.
        """
        stored = 0
        for map_, range_ in self.find([PageRange(gpa // PAGE, len(view) // PAGE)]):
            at = range_.start * PAGE - gpa
            map_.write(range_.start * PAGE, view[at : at + range_.nr_pages * PAGE])
            stored += range_.nr_pages
        return stored

    def read(self, batches: Iterable[Runs], buffers: Buffers) -> Iterator[list[tuple[int, memoryview]]]:
        """Yield the pages that are guest memory in lists of (guest-physical address, content), CHUNK bytes at most.

        The contents of a list are in one buffer, which is used again after so many lists as there are buffers. Reads
        through the page cache, so it sees what a device and the guest's CPUs have stored; a page that is being written
        may be half old.

        :param batches: the runs of pages; those of one batch are in order.
        :raises HostError: a page cannot be read.
        """
        reader = _Reader(buffers)
        for runs in batches:
            for map_ in self.maps:
                yield from reader.read(map_, runs.within(map_.pages.start, map_.pages.end))
        if reader.pieces:
            yield reader.pieces


class Buffers:
    """Memory of CHUNK bytes each for what is read, every page of it touched: no stopped device waits for that.

    It is of huge pages where the kernel has some: to copy to and from them is up to a tenth faster.
    """

    def __init__(self, count: int) -> None:
        # One more on either side, as what lies there may be less than a huge page
        mapping = mmap.mmap(-1, (count + 2) * CHUNK)
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(mapping)[CHUNK:-CHUNK]
        whole[::PAGE] = bytes(len(whole) // PAGE)
        self.views: Final = [whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK)]


class _Reader:
    """Fills one buffer after the other with pages."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = cycle(buffers.views)
        self._left = next(self._buffers)
        self.pieces: list[tuple[int, memoryview]] = []
        """What is in the buffer."""

    def read(self, map_: MemoryMap, runs: Runs) -> Iterator[list[tuple[int, memoryview]]]:
        """Read runs that are in one map, those that are near each other at once; yield what fills a buffer."""
        starts, ends = runs.starts.tolist(), runs.ends.tolist()
        for first, behind in runs.spans(_GAP, _SPAN_PAGES):
            start, end = starts[first], ends[behind - 1]
            for at in range(start, end, _CHUNK_PAGES):
                size = min(_CHUNK_PAGES, end - at) * PAGE
                if size > len(self._left):
                    yield self._take()
                view, self._left = self._left[:size], self._left[size:]
                if behind - first == 1:
                    map_.read(at * PAGE, view)
                    self.pieces.append((at * PAGE, view))
                else:
                    self.pieces += _read_span(map_, view, starts[first:behind], ends[first:behind])

    def _take(self) -> list[tuple[int, memoryview]]:
        pieces, self.pieces = self.pieces, []
        self._left = next(self._buffers)
        return pieces


def _read_span(
    map_: MemoryMap, view: memoryview, starts: list[int], ends: list[int]
) -> Iterator[tuple[int, memoryview]]:
    """Read runs with small gaps between them, all at once if it can be."""
    is_read = _can_read(map_, starts[0] * PAGE, view)
    for start, end in zip(starts, ends, strict=True):
        part = view[(start - starts[0]) * PAGE : (end - starts[0]) * PAGE]
        if not is_read:
            map_.read(start * PAGE, part)
        yield start * PAGE, part


def _can_read(map_: MemoryMap, gpa: int, view: memoryview) -> bool:
    """Read pages of which some lie between those that are wanted, and may be unreadable."""
    try:
        map_.read(gpa, view)
    except HostError:
        return False
    return True
