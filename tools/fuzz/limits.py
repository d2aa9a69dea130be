# SPDX-License-Identifier: MIT
"""What is asked of every run of a target: only our own errors come out, as one short line, and memory is bounded."""

from __future__ import annotations

import ctypes
import os
import resource
import time
import tracemalloc
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from vfio_mig.errors import VfioMigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INPUT_CONSTANT: Final = 24 << 20
"""Bytes that any input may make us allocate: one member of an archive, and what we need ourselves."""
INPUT_FACTOR: Final = 64
"""Bytes more for each byte of input: JSON's `{},` is 3 bytes and a Python dict of 64."""
MESSAGE_CONSTANT: Final = 4096
MESSAGE_FACTOR: Final = 12
"""Characters of a message for each byte that it may quote: one character can become `\\U0001f600`."""
WORK_FACTOR: Final = 100
WORK_CONSTANT: Final = 1 << 18
"""A decoder that counts its work may look at WORK_FACTOR bytes for each byte of input, and this many more."""
GROWTH_MAX: Final = 64 << 20
"""Bytes by which a process may grow after its warm-up, however many inputs it is given."""
ADDRESS_SLACK: Final = 16 << 20
"""Bytes of address space that a run may take beside, as allocators take more than they are asked for."""
TRACED_FIRST: Final = 100
TRACE_EVERY: Final = 1000
"""Runs that tracemalloc looks at: slow, and CPython 3.11 loses 500 bytes whenever it is started and stopped."""
WARM_UP_RUNS: Final = 1000
WARM_UP_SECONDS: Final = 2.0
LOOK_EVERY: Final = 256
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class BrokenPromiseError(Exception):
    """A target did something else than refuse an input or take it."""


def require(kept: object, promise: str) -> None:
    """Raise unless a promise was kept."""
    if not kept:
        raise BrokenPromiseError(promise)


def require_line(text: str, quoted: int = 0) -> None:
    """Raise unless *text* can be shown to a user as one line.

    :param quoted: bytes of input that it may repeat.
    """
    require(text and text.isprintable(), f"not one printable line: {text!r}")
    require(len(text) <= MESSAGE_CONSTANT + MESSAGE_FACTOR * quoted, f"{len(text)} characters are not a message")


def _allowed(size: int) -> int:
    return INPUT_CONSTANT + INPUT_FACTOR * size


@contextmanager
def _measured(size: int) -> Iterator[None]:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    yield
    used = tracemalloc.get_traced_memory()[1] - before
    require(used <= _allowed(size), f"{used} bytes allocated for {size} bytes of input")


@contextmanager
def _narrow(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + _allowed(size) + ADDRESS_SLACK, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def require_linear(work: int, size: int) -> None:
    """See to it that what an input of *size* bytes took grows with its size alone.

    :param work: bytes that were looked at, some of them more than once.
    """
    require(work <= WORK_FACTOR * size + WORK_CONSTANT, f"{size} bytes take bounded work, not {work}")


@contextmanager
def bounded(size: int, *, quoted: int = 0) -> Iterator[None]:
    """Take an input of *size* bytes: let our own errors pass, and bound what is allocated on the way.

    :param quoted: bytes of input that a message may repeat.
    :raises MemoryError: it took too much, and tracemalloc is off; where it is on, a BrokenPromiseError says how much.
    """
    with _measured(size) if tracemalloc.is_tracing() else _narrow(size):
        try:
            yield
        except VfioMigError as error:
            require_line(str(error), quoted)


def _pages(column: int) -> int:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 -- many times a second
        return int(file.read().split()[column]) * _PAGE


def resident() -> int:
    """Return this process's memory in RAM, bytes, without what the C library holds back though it is free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    return _pages(1)


@contextmanager
def _traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


class Watch:
    """Counts runs and sees to it that the process does not grow."""

    def __init__(self) -> None:
        self.runs = 0
        self.growth = 0
        self._start = time.monotonic()
        self._warm: int | None = None

    def run(self, function: Callable[[bytes], None], data: bytes) -> None:
        """Run a target on one input, and look from time to time."""
        self.runs += 1
        traced = self.runs <= TRACED_FIRST or self.runs % TRACE_EVERY == 0
        with _traced() if traced else nullcontext():
            function(data)
        if self.runs % LOOK_EVERY == 0:
            self._look()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start

    def _look(self) -> None:
        """Compare with the size after the warm-up.

        :raises BrokenPromiseError: the process has grown too much.
        """
        if self._warm is None:
            if self.runs >= WARM_UP_RUNS and self.seconds >= WARM_UP_SECONDS:
                self._warm = resident()
            return
        self.growth = max(self.growth, resident() - self._warm)
        require(self.growth <= GROWTH_MAX, f"the process has grown by {self.growth} bytes in {self.runs} runs")
