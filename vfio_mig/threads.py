# SPDX-License-Identifier: MIT
"""Threads for what can be done beside a job: hashing and reading ahead. None where the process has one CPU only."""

import errno
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Barrier, Thread
from typing import Final, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS_MAX: Final = 4
"""Threads of one job: more would wait for Python's lock most of the time."""


def spare_cpus() -> int:
    """Return how many CPUs this process has beside the one that it runs on."""
    return len(os.sched_getaffinity(0)) - 1


def start(thread: Thread) -> None:
    """Start a thread of which more depends than time.

    :raises OSError: EAGAIN, there may be no more threads: RLIMIT_NPROC, or a cgroup's pids.max.
    """
    with _told():
        thread.start()


@contextmanager
def _told() -> Iterator[None]:
    """Make an error of the host of what Python says."""
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), "a new thread") from error


def need_pool(count: int) -> ThreadPoolExecutor:
    """Make a pool whose threads are all there: none is made later, while a device stands still.

    They get no signal, as those are to interrupt the job itself.

    :raises OSError: as :func:`start`.
    """
    pool = ThreadPoolExecutor(count)
    together = Barrier(count)  # else the first one would do the others' work
    # A new thread has the mask of the one that makes it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with _told():
            waiting = [pool.submit(together.wait) for _ in range(count)]
    except OSError:
        together.abort()
        pool.shutdown()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for one in waiting:
        one.result()
    return pool


def make_pool(count: int) -> ThreadPoolExecutor | None:
    """Make a pool as :func:`need_pool`.

    :returns: None where there is to be no thread, or may be none: what they would do is then done without.
    """
    if count < 1:
        return None
    try:
        return need_pool(count)
    except OSError:
        return None


class Workers:
    """As many threads as there are spare CPUs, at most WORKERS_MAX, or none; they are there until it is closed."""

    def __init__(self) -> None:
        count = min(spare_cpus(), WORKERS_MAX)
        self._pool = make_pool(count)
        self.count: Final = 0 if self._pool is None else count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def results(
        self, items: Iterable[T], work: Callable[[T], R], is_small: Callable[[T], bool]
    ) -> Iterator[tuple[T, R]]:
        """Yield each item and what *work* makes of it, in order.

        The next *count* items are taken, and worked on in the threads, before an item is yielded.

        :param is_small: to work on such an item takes no longer than to hand it to a thread.
        """
        waiting: deque[tuple[T, Callable[[], R]]] = deque()
        for item in items:
            if self._pool is None or is_small(item):
                waiting.append((item, partial(_same, work(item))))
            else:
                waiting.append((item, self._pool.submit(work, item).result))
            if len(waiting) > self.count:
                first, wait = waiting.popleft()
                yield first, wait()
        for item, wait in waiting:
            yield item, wait()

    def close(self) -> None:
        """End the threads; what they have not begun is not done."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _same(result: R) -> R:
    return result


def ahead(source: Iterator[T]) -> Iterator[T]:
    """Yield what *source* does, the next one already being made meanwhile, the first from now on; None ends it."""
    pool = make_pool(min(spare_cpus(), 1))  # its thread ends with the iterator
    if pool is None:
        return source
    return _ahead(source, pool, pool.submit(next, source, None))


def _ahead(source: Iterator[T], pool: ThreadPoolExecutor, following: Future[T | None]) -> Iterator[T]:
    with pool:
        while (item := following.result()) is not None:
            following = pool.submit(next, source, None)
            yield item
