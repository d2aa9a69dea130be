# SPDX-License-Identifier: MIT
"""Threads for what can be done beside a job: hashing and reading ahead. None where the process has one CPU only."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


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
