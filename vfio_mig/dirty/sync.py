# SPDX-License-Identifier: MIT
"""Copy dirty guest pages to a destination, in rounds while the guest runs and once more when the device is stopped."""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.memory import Memory
from vfio_mig.dirty.ranges import PAGE, PageRange
from vfio_mig.errors import HostError, errno_text

ROUNDS: Final = 3
"""Rounds before the device is stopped, at most, unless the caller says otherwise."""


_ZERO_PAGE: Final = bytes(PAGE)


class Round(NamedTuple):
    """What one round did; pages of 4096 bytes, times in seconds."""

    stopped: bool
    pages_dirty: int
    pages_written: int
    pages_zero: int
    pages_outside: int
    bytes_written: int
    bitmap_time: float
    copy_time: float


class Sink(Protocol):
    """Where pages go."""

    def write(self, gpa: int, view: memoryview) -> int:
        """Store whole pages; returns how many of them were not all zero and therefore written, in pages.

        *view* is valid during the call only.
        """


class SparseFile:
    """A file in which the guest's page at address *a* is at offset *a*; pages of zeros are holes where they can be.

    What stood in the file is replaced page by page: zeros are written over old content, and left out only where the
    file has a hole already. So the file is right after each round, and a file of an earlier run may be given again.

    :param fd: open for reading and writing; stays the caller's.
    :param path: for messages.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path

    def write(self, gpa: int, view: memoryview) -> int:
        """Store whole pages at their address; returns how many were not all zero."""
        written = 0
        for start, count, is_zero in zero_runs(view):
            at = gpa + start * PAGE
            if is_zero:
                self._clear(at, count * PAGE)
            else:
                self._write(at, view[start * PAGE : (start + count) * PAGE])
                written += count
        return written

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
        end = start + size
        while start < end:
            data = self._seek(start, os.SEEK_DATA)
            if data is None or data >= end:
                return
            hole = self._seek(data, os.SEEK_HOLE)
            hole = end if hole is None else min(hole, end)
            # A file system may find smaller units of data than pages; zeros over a part of a page do no harm.
            self._write(data, memoryview(bytes(hole - data)))
            start = hole

    def _seek(self, offset: int, what: int) -> int | None:
        try:
            return os.lseek(self._fd, offset, what)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but hole until the end, or behind it
                return None
            raise self._failed(error) from error

    def _write(self, at: int, view: memoryview) -> None:
        try:
            while view:
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> HostError:
        hint = "this file system has no files so large" if error.errno in (errno.EFBIG, errno.EINVAL) else None
        return HostError(f"{self._path}: cannot write: {errno_text(error.errno or 0)}", hint=hint)


def zero_runs(view: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Yield the runs of whole pages that are all zero, or are not: (first page in *view*, pages, all zero)."""
    if len(view) == PAGE:  # scattered pages come one by one, and numpy's set-up would cost more than the look
        yield 0, 1, bytes(view) == _ZERO_PAGE
        return

    import numpy as np

    pages = np.frombuffer(view, np.uint64).reshape(-1, PAGE // 8)
    zero = np.equal(pages.max(axis=1, initial=0), 0)
    edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), len(zero)]
    for start, end in pairwise(edges):
        if start < end:
            yield start, end - start, bool(zero[start])


def copy(memory: Memory, dirty: Iterable[Dirty], sink: Sink) -> tuple[int, int, int]:
    """Copy the dirty pages to *sink*: (pages dirty, pages written, pages outside the memory that we know)."""
    pages_dirty = pages_copied = pages_written = 0

    def ranges() -> Iterator[PageRange]:
        nonlocal pages_dirty
        for chunk in dirty:
            for range_ in chunk.ranges():
                pages_dirty += range_.nr_pages
                yield range_

    for gpa, view in memory.read(ranges()):
        pages_copied += len(view) // PAGE
        pages_written += sink.write(gpa, view)
    return pages_dirty, pages_written, pages_dirty - pages_copied


def run_round(memory: Memory, fetch: Callable[[], Iterable[Dirty]], sink: Sink, *, stopped: bool) -> Round:
    """Fetch the bitmap, then copy: one round."""
    began = time.monotonic()
    dirty = list(fetch())
    fetched = time.monotonic()
    pages_dirty, written, outside = copy(memory, dirty, sink)
    zero = pages_dirty - outside - written
    done = time.monotonic()
    return Round(stopped, pages_dirty, written, zero, outside, written * PAGE, fetched - began, done - fetched)


def sync(
    memory: Memory,
    fetch: Callable[[], Iterable[Dirty]],
    sink: Sink,
    stop: Callable[[], object],
    *,
    rounds: int = ROUNDS,
    progress: Callable[[Round], object] = lambda _: None,
) -> list[Round]:
    """Copy in rounds until the dirty set stops shrinking or *rounds* are done, then stop the device and copy once more.

    The RFC's bitmap says "may be written" and is never cleared: its set does not shrink, so two rounds run before
    the stop. With ``rounds=0`` the device is stopped at once.

    :param fetch: the dirty bits of now, all of them.
    :param stop: stops the device.
    :param progress: called after each round.
    :returns: the rounds; the last one ran with the device stopped.
    """
    done: list[Round] = []
    for _ in range(rounds):
        done.append(run_round(memory, fetch, sink, stopped=False))
        progress(done[-1])
        if len(done) > 1 and done[-1].pages_dirty >= done[-2].pages_dirty:
            break
    stop()
    done.append(run_round(memory, fetch, sink, stopped=True))
    progress(done[-1])
    return done
