# SPDX-License-Identifier: MIT
"""Waiting for what a driver or a program does in its own time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Poll; TimeoutError says what did not happen."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.005)


def slowness(seconds: float = 1.0) -> float:
    """How many times slower than if they were alone programs are here now: other work on the machine shares its CPUs.

    The same small work is done again and again: the shortest time is that of undisturbed work, the mean one is not.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        sum(range(2000))
        times.append(time.perf_counter() - began)
    return sum(times) / len(times) / min(times)
