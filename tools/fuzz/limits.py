# SPDX-License-Identifier: MIT
"""What is asked of every run of a target: only our own errors come out, as one short line, and memory is bounded."""

from __future__ import annotations

import os
import resource
import time
import tracemalloc
from contextlib import contextmanager
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
GROWTH_MAX: Final = 64 << 20
"""Bytes by which a process may grow after its warm-up, however many inputs it is given."""
ADDRESS_ROOM: Final = 512 << 20
"""Bytes of address space that a process may take on top of what it starts with: any larger allocation fails."""
TRACED_FIRST: Final = 100
TRACE_EVERY: Final = 8
"""The first runs, the seeds among them, and every eighth later are traced by tracemalloc, which makes them slow."""
WARM_UP_RUNS: Final = 1000
WARM_UP_SECONDS: Final = 2.0
LOOK_EVERY: Final = 64
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
    require(len(text) <= MESSAGE_CONSTANT + MESSAGE_FACTOR * quoted, f"{len(text)} characters are no message")


@contextmanager
def bounded(size: int, *, quoted: int = 0) -> Iterator[None]:
    """Take an input of *size* bytes: let our own errors pass, and bound what is allocated on the way.

    Memory is measured when tracemalloc is on.

    :param quoted: bytes of input that a message may repeat.
    """
    traced = tracemalloc.is_tracing()
    before = 0
    if traced:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    except VfioMigError as error:
        require_line(str(error), quoted)
    if traced:
        used = tracemalloc.get_traced_memory()[1] - before
        require(used <= INPUT_CONSTANT + INPUT_FACTOR * size, f"{used} bytes allocated for {size} bytes of input")


def _pages(column: int) -> int:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 -- many times a second
        return int(file.read().split()[column]) * _PAGE


def resident() -> int:
    """Return this process's memory in RAM, bytes."""
    return _pages(1)


def limit_address_space() -> None:
    """Make allocations beyond ADDRESS_ROOM fail in this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + ADDRESS_ROOM, hard))


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
        if traced:
            tracemalloc.start()
        try:
            function(data)
        finally:
            if traced:
                tracemalloc.stop()
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
