# SPDX-License-Identifier: MIT
"""Time, as the GPU's timestamps count it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

TICKS_PER_SECOND: Final = 12_000_000
"""Of gen9's timestamps: gt/intel_gt_clock_utils.c."""


class Clock:
    """A monotonic clock that begins with zero."""

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds: Final = seconds
        self._zero: Final = seconds()

    def now(self) -> float:
        """Return seconds."""
        return self._seconds() - self._zero

    def ticks(self) -> int:
        """Return the timestamp."""
        return int(self.now() * TICKS_PER_SECOND)
