# SPDX-License-Identifier: MIT
"""Threads for what can be done beside a job: hashing and reading ahead. None where the process has one CPU only."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS_MAX: Final = 4
"""Threads of one job: more would wait for Python's lock most of the time."""


def spare_cpus() -> int:
    """Return how many CPUs this process has beside the one that it runs on."""
    return len(os.sched_getaffinity(0)) - 1


def submit(pool: ThreadPoolExecutor, work: Callable[[], T]) -> Callable[[], T]:
    """Have *work* done in a thread that gets no signal, as those are to interrupt the job itself; return its result."""
    # A new thread has the mask of the one that makes it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return pool.submit(work).result
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Workers:
    """As many threads as there are spare CPUs, at most WORKERS_MAX; they are there from now on until it is closed."""

    def __init__(self) -> None:
        self.count: Final = max(0, min(spare_cpus(), WORKERS_MAX))
        self._pool = ThreadPoolExecutor(self.count) if self.count else None
        if self._pool is not None:
            for wait in [submit(self._pool, os.getpid) for _ in range(self.count)]:
                wait()

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
                waiting.append((item, submit(self._pool, partial(work, item))))
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
    if spare_cpus() < 1:
        return source
    pool = ThreadPoolExecutor(1)  # its thread ends with the iterator
    return _ahead(source, pool, submit(pool, lambda: next(source, None)))


def _ahead(source: Iterator[T], pool: ThreadPoolExecutor, following: Callable[[], T | None]) -> Iterator[T]:
    with pool:
        while (item := following()) is not None:
            following = submit(pool, lambda: next(source, None))
            yield item
