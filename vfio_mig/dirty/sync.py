# SPDX-License-Identifier: MIT
"""Copy dirty guest pages to a destination, in rounds while the guest runs and once more when the device is stopped."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from errno import EFBIG, EINVAL
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

from vfio_mig import interrupts
from vfio_mig.closing import Closing
from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.changed import Fingerprints
from vfio_mig.dirty.memory import Buffers, Memory, data_extents, has_write
from vfio_mig.dirty.pagehash import SIZE
from vfio_mig.dirty.runs import Runs, find
from vfio_mig.errors import HostError, UsageError, errno_text
from vfio_mig.ranges import PAGE
from vfio_mig.threads import Workers

ROUNDS: Final = 3
"""Rounds before the device is stopped, at most, unless the caller says otherwise."""

_ZERO_PAGE: Final = bytes(PAGE)
_ZERO_WORD: Final = bytes(8)
_FEW: Final = 16 * PAGE


class Round(NamedTuple):
    """What one round did; pages of 4096 bytes, times in seconds.

    :param pages_dirty: of the bitmap: the device may have written them.
    :param pages_unchanged: dirty, but as they were in the round before; not written again.
    :param pages_outside: dirty, but not in the memory that we know.
    :param bitmap_time: fetching the bitmap.
    :param copy_time: reading, comparing and writing pages.
    """

    stopped: bool
    pages_dirty: int
    pages_written: int
    pages_zero: int
    pages_unchanged: int
    pages_outside: int
    bytes_written: int
    bitmap_time: float
    copy_time: float

    @property
    def pages_changed(self) -> int:
        """Pages whose content was new."""
        return self.pages_written + self.pages_zero

    @property
    def rate(self) -> float:
        """Bytes of guest memory dealt with per second."""
        pages = self.pages_dirty - self.pages_outside
        return pages * PAGE / self.copy_time if self.copy_time else 0.0

    @property
    def estimated_downtime(self) -> float:
        """Seconds that the last round would take if the device were stopped now: as long as this one did."""
        return self.bitmap_time + self.copy_time

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**self._asdict(), "rate": self.rate, "estimated_downtime": self.estimated_downtime}


class Sink(Protocol):
    """Where pages go."""

    def write(self, gpa: int, view: memoryview) -> int:
        """Store whole pages; returns how many of them were not all zero and therefore written, in pages.

        *view* is valid during the call only.
        """

    def end_round(self) -> None:
        """Take note that no page of this round comes any more; the same page may come again in the next."""


class SparseFile:
    """A file in which the guest's page at address *a* is at offset *a*; pages of zeros are holes where they can be.

    What stood in the file is replaced page by page: zeros are written over old content, and left out only where the
    file has a hole already. So the file is right after each round, and a file of an earlier run may be given again.

    :param fd: open for reading and writing; stays the caller's.
    :param path: for messages.
    :raises UsageError: it is on hugetlbfs, where nothing can be written at once.
    """

    def __init__(self, fd: int, path: str) -> None:
        if not has_write(fd):
            hint = "name another file, or use 'vfio-mig sync … - | vfio-mig pages - --memory …'"
            raise UsageError(f"{path} is on hugetlbfs, which has no write(2)", hint=hint)
        self._fd = fd
        self._path = path

    def write(self, gpa: int, view: memoryview) -> int:
        """Store whole pages at their address; returns how many were not all zero."""
        if len(view) <= _FEW and not _has_zero_page(view):
            self._write(gpa, view)
            return len(view) // PAGE
        written = 0
        for start, count, is_zero in zero_runs(view):
            at = gpa + start * PAGE
            if is_zero:
                self._clear(at, count * PAGE)
            else:
                self._write(at, view[start * PAGE : (start + count) * PAGE])
                written += count
        return written

    def end_round(self) -> None:
        """Nothing waits here."""

    def finish(self, end: int) -> None:
        """Make the file *end* bytes long if it is shorter, and sync it to disk."""
        try:
            if os.fstat(self._fd).st_size < end:
                os.ftruncate(self._fd, end)
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def _clear(self, start: int, size: int) -> None:
        """Write zeros wherever the file has data in this range."""
        try:
            for at, length in data_extents(self._fd, start, start + size):
                # A file system may find smaller units of data than pages; zeros over a part of a page do no harm.
                self._write(at, memoryview(bytes(length)))
        except OSError as error:
            raise self._failed(error) from error

    def _write(self, at: int, view: memoryview) -> None:
        try:
            while view:
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> HostError:
        hint = "this file system has no files so large" if error.errno in (EFBIG, EINVAL) else None
        return HostError(f"{self._path}: cannot write: {errno_text(error.errno or 0)}", hint=hint)


def zero_runs(view: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Yield the runs of whole pages that are all zero, or are not: (first page in *view*, pages, all zero)."""
    if len(view) <= _FEW:
        yield from _short_zero_runs(view)
        return

    import numpy as np

    pages = np.frombuffer(view, np.uint64).reshape(-1, PAGE // 8)
    zero = np.equal(pages[:, 0], 0)  # few pages begin with zeros and go on with others
    if zero.any():
        zero[zero] = pages[zero].max(axis=1) == 0
    edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), len(zero)]
    for start, end in pairwise(edges):
        if start < end:
            yield start, end - start, bool(zero[start])


def _has_zero_page(view: memoryview) -> bool:
    """Look at the first word of each page, and at the rest only where that is zero."""
    for at in range(0, len(view), PAGE):
        if bytes(view[at : at + 8]) == _ZERO_WORD and bytes(view[at : at + PAGE]) == _ZERO_PAGE:
            return True
    return False


def _short_zero_runs(view: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Do so page by page: scattered pages come in short runs, and numpy's set-up would cost more than the look."""
    begin, was_zero, end = 0, False, len(view) // PAGE
    for page in range(end):
        # memoryviews are compared item by item, bytes at once
        is_zero = bytes(view[page * PAGE : (page + 1) * PAGE]) == _ZERO_PAGE
        if page and is_zero != was_zero:
            yield begin, page - begin, was_zero
            begin = page
        was_zero = is_zero
    if end:
        yield begin, end - begin, was_zero


class Copy:
    """The copying of one round; with *known*, of the pages whose content is new.

    Counts pages: *dirty* ones, those *inside* the memory that we know, *changed* ones of these, and *written* ones,
    which are those changed that are not all zero.
    """

    def __init__(
        self,
        memory: Memory,
        sink: Sink,
        buffers: Buffers,
        known: Fingerprints | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._memory = memory
        self._sink = sink
        self._buffers = buffers
        self._known = known
        self._workers = workers
        self.dirty = self.inside = self.changed = self.written = 0

    def run(self, dirty: Iterable[Dirty]) -> None:
        """Write the dirty pages that have changed."""
        if self._known is not None:
            assert self._workers is not None  # noqa: S101 -- for the type checker
            self._write_changed(self._known, self._workers, self._runs(dirty))
            return
        for pieces in self._memory.read(self._runs(dirty), self._buffers):
            interrupts.check()
            for gpa, view in pieces:
                self.inside += len(view) // PAGE
                self._write(gpa, view)

    def _write(self, gpa: int, view: memoryview) -> None:
        self.changed += len(view) // PAGE
        self.written += self._sink.write(gpa, view)

    def _runs(self, dirty: Iterable[Dirty]) -> Iterator[Runs]:
        for runs in find(dirty):
            self.dirty += runs.total()
            yield runs

    def _write_changed(self, known: Fingerprints, workers: Workers, dirty: Iterable[Runs]) -> None:
        """Read pages, and write what is new of those before, while the fingerprints of those between are taken."""

        def take(pieces: _Pieces) -> bytes:
            return known.of_pages([view for _, view in pieces])

        lists = self._memory.read(dirty, self._buffers)
        for pieces, prints in workers.results(lists, take, _is_small):
            interrupts.check()
            at = 0
            for gpa, view in pieces:
                pages = len(view) // PAGE
                self.inside += pages
                for start, count in known.changed(gpa, prints[at : at + pages * SIZE]):
                    self._write(gpa + start * PAGE, view[start * PAGE : (start + count) * PAGE])
                at += pages * SIZE


_Pieces = list[tuple[int, memoryview]]


def _is_small(pieces: _Pieces) -> bool:
    return sum(len(view) for _, view in pieces) <= _FEW


def brings_nothing(done: list[Round]) -> bool:
    """Tell whether nothing has changed in the last round, or no less than in the one before."""
    return not done[-1].pages_changed or (len(done) > 1 and done[-1].pages_changed >= done[-2].pages_changed)


class LiveCopy(Closing):
    """Copies dirty pages in rounds while the device runs, and once more when it is stopped.

    :param fetch: the dirty bits of now, all of them.
    :param remember: write a page again only if its content has changed; False for a single round.
    """

    def __init__(
        self, memory: Memory, fetch: Callable[[], Iterable[Dirty]], sink: Sink, *, remember: bool = True
    ) -> None:
        self._memory = memory
        self._fetch = fetch
        self._sink = sink
        self._known = Fingerprints() if remember else None
        self._workers = Workers() if remember else None
        # One is read into while the fingerprints of the others are taken
        self._buffers = Buffers(1 if self._workers is None else self._workers.count + 1)

    def close(self) -> None:
        """End its threads."""
        if self._workers is not None:
            self._workers.close()

    def round(self) -> Round:
        """Copy once while the device runs."""
        return self._round(stopped=False)

    def last_round(self, fetched: Callable[[], object] = lambda: None) -> Round:
        """Copy what is left; the device is stopped.

        :param fetched: called when the bitmap is there.
        """
        return self._round(stopped=True, fetched=fetched)

    def _round(self, *, stopped: bool, fetched: Callable[[], object] = lambda: None) -> Round:
        began = time.monotonic()
        dirty = list(self._fetch())
        middle = time.monotonic()
        fetched()
        copy = Copy(self._memory, self._sink, self._buffers, self._known, self._workers)
        copy.run(dirty)
        self._sink.end_round()
        done = time.monotonic()
        return Round(
            stopped,
            pages_dirty=copy.dirty,
            pages_written=copy.written,
            pages_zero=copy.changed - copy.written,
            pages_unchanged=copy.inside - copy.changed,
            pages_outside=copy.dirty - copy.inside,
            bytes_written=copy.written * PAGE,
            bitmap_time=middle - began,
            copy_time=done - middle,
        )
