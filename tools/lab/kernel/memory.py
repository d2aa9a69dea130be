# SPDX-License-Identifier: MIT
"""What the kernel has allocated: for tests that a module gives all of it back."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

SLAB_NOISE: Final = 200
"""Objects of a cache that the rest of the system may have taken meanwhile: it was up to 50."""
_SAMPLES: Final = 10


def _slab_sample() -> dict[str, int]:
    """Objects of each kmalloc cache, after the per-CPU leftovers have been given back.

    Never too few: from its next allocation on a CPU has a slab to itself again, whose free objects count as live (512
    for kmalloc-8).
    """
    for shrink in Path("/sys/kernel/slab").glob("kmalloc-*/shrink"):
        with contextlib.suppress(OSError):
            shrink.write_text("1")
    rows = (line.split() for line in Path("/proc/slabinfo").read_text().splitlines()[2:])
    return {row[0]: int(row[1]) for row in rows if row[0].startswith(("kmalloc-", "radix_tree_node"))}


def slab_objects() -> dict[str, int]:
    """Live objects of each kmalloc cache: of several samples the least, as none is too low.

    Names of files that the test run has looked at are in these caches too, hence are dropped first.
    """
    Path("/proc/sys/vm/drop_caches").write_text("2")
    samples = [_slab_sample() for _ in range(_SAMPLES)]
    return {name: min(sample[name] for sample in samples if name in sample) for name in samples[0]}


def slab_growth(before: dict[str, int]) -> dict[str, int]:
    """By how much each cache has grown for good: what RCU still holds back gets some seconds."""
    deadline = time.monotonic() + 5
    while True:
        growth = {name: count - before.get(name, 0) for name, count in slab_objects().items()}
        if max(growth.values()) <= SLAB_NOISE or time.monotonic() > deadline:
            return growth
        time.sleep(0.5)


def vmalloc_areas(caller: str) -> int:
    """Areas of the vmalloc space that a function with *caller* in its name has."""
    return sum(caller in line for line in Path("/proc/vmallocinfo").read_text().splitlines())


def kmemleak(function: str) -> list[str]:
    """Return kmemleak's lines with *function* in them; none where the kernel has no kmemleak."""
    file = Path("/sys/kernel/debug/kmemleak")
    if not file.exists():
        return []
    file.write_text("scan")
    return [line for line in file.read_text().splitlines() if function in line]
