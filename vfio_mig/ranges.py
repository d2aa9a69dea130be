# SPDX-License-Identifier: MIT
"""Ranges of addresses or of pages, as pairs of the first and the one behind the last, and what is done with them.

Lists are in order, and their ranges do not overlap, unless it says otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PAGE: Final = 4096
"""Bytes of a page: of guest memory, of a dirty bitmap's bit, of GVT-g's tables; also where the host has larger ones."""
ADDRESS_END: Final = 1 << 64

Range = tuple[int, int]
"""The first, and the one behind the last."""


def length(ranges: Iterable[Range]) -> int:
    """Return how many addresses, or pages, there are."""
    return sum(end - start for start, end in ranges)


def of_sizes(pairs: Iterable[tuple[int, int]]) -> Iterator[Range]:
    """Yield the ranges of (first, how many) each; they may come in any order."""
    return ((start, start + size) for start, size in pairs)


def runs(numbers: Iterable[int]) -> list[Range]:
    """Return rising numbers as ranges."""
    found: list[Range] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges that come in any order, and may overlap, as few as possible."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def intersect(one: Sequence[Range], other: Sequence[Range]) -> Iterator[Range]:
    """Yield what is in both."""
    first = second = 0
    while first < len(one) and second < len(other):
        start = max(one[first][0], other[second][0])
        end = min(one[first][1], other[second][1])
        if start < end:
            yield start, end
        if one[first][1] < other[second][1]:
            first += 1
        else:
            second += 1


def subtract(one: Sequence[Range], other: Sequence[Range]) -> list[Range]:
    """Return what is in *one* and not in *other*."""
    found: list[Range] = []
    at = 0
    for begin, end in one:
        start = begin
        while at < len(other) and other[at][1] <= start:
            at += 1
        number = at
        while number < len(other) and other[number][0] < end:
            if other[number][0] > start:
                found.append((start, other[number][0]))
            start = max(start, other[number][1])
            number += 1
        if start < end:
            found.append((start, end))
    return found


class Covered:
    """A set of addresses that grows range by range."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, start: int, end: int) -> list[Range]:
        """Add a range; returns the parts of it that were not there."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        free = subtract([(start, end)], list(zip(self._starts[first:last], self._ends[first:last], strict=True)))
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        return free

    def ranges(self) -> list[Range]:
        """Return what is in it."""
        return list(zip(self._starts, self._ends, strict=True))
