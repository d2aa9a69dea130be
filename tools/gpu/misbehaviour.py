# SPDX-License-Identifier: MIT
"""What the GPU does wrong when it is told to. Everything is off at the start."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final

from tools.gpu.errors import RefusedError

MAX_FAULTS: Final = 64
MAX_DELAY: Final = 60.0
"""Seconds."""
MAX_LOST: Final = 1 << 20
_ADDRESS_END: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses whose access faults: graphics addresses, or DMA addresses."""

    space: str  # "ggtt", "ppgtt", "dma"
    start: int
    end: int


@dataclass(slots=True)
class Misbehaviour:
    """The present settings."""

    hang: set[str] = field(default_factory=set)  # engines that execute nothing more, until they are reset
    delay: dict[str, float] = field(default_factory=dict)  # engine: seconds from the last command to its completion
    faults: list[Range] = field(default_factory=list)
    lost_interrupts: int = 0  # how many more

    def clear(self) -> None:
        """Behave."""
        self.hang.clear()
        self.delay.clear()
        self.faults.clear()
        self.lost_interrupts = 0

    def lose_interrupt(self) -> bool:
        """Tell whether the interrupt that is due is lost; it counts."""
        if not self.lost_interrupts:
            return False
        self.lost_interrupts -= 1
        return True

    def is_faulty(self, space: str, address: int) -> bool:
        """Tell whether an address is one that faults."""
        return any(one.space == space and one.start <= address < one.end for one in self.faults)

    def add_faults(self, ranges: list[tuple[str, int, int]]) -> None:
        """Let the accesses to some ranges (space, start, end) fault.

        :raises RefusedError: an unknown space, an empty range, or too many of them; then none is added.
        """
        for space, start, end in ranges:
            if space not in {"ggtt", "ppgtt", "dma"} or not 0 <= start < end <= _ADDRESS_END:
                raise RefusedError(errno.EINVAL, f"no such range: {space} {start:#x} to {end:#x}")
        if len(self.faults) + len(ranges) > MAX_FAULTS:
            raise RefusedError(errno.ENOSPC, f"there may be {MAX_FAULTS} ranges")
        self.faults.extend(Range(*each) for each in ranges)
