# SPDX-License-Identifier: MIT
"""What an archive's guest memory is in the end, page by page, as digests: so that two of any size can be compared."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.ranges import PAGE, intersect, length, merge, runs, subtract

if TYPE_CHECKING:
    from vfio_mig.image.archive import Archive
    from vfio_mig.ranges import Range

_DIGEST: Final = 16


class PageDifference(NamedTuple):
    """How the guest memory of two archives differs, as ranges of page numbers."""

    only_first: list[Range]
    only_second: list[Range]
    changed: list[Range]


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


_ZERO: Final = _digest(bytes(PAGE))


class PageMap:
    """The pages that an archive has: those with content by digest, those that are zero as ranges.

    It takes about 150 bytes for each page with content.
    """

    def __init__(self, archive: Archive) -> None:
        self._content: dict[int, bytes] = {}
        zero: list[Range] = []
        waiting: list[Range] = []
        for gpa, size, content in archive.memory():
            first = gpa // PAGE
            if content is None:
                waiting.append((first, first + size // PAGE))
                continue
            if waiting:
                self._drop(waiting)
                zero += waiting
                waiting = []
            for number in range(size // PAGE):
                self._content[first + number] = _digest(content[number * PAGE : (number + 1) * PAGE])
        self._drop(waiting)
        written = sorted(self._content)
        empty = [page for page in written if self._content[page] == _ZERO]
        zero_left = subtract(merge([*zero, *waiting]), runs(written))
        self.zero: Final = merge([*zero_left, *((page, page + 1) for page in empty)])
        for page in empty:
            del self._content[page]
        self.written: Final = runs(sorted(self._content))

    def _drop(self, ranges: list[Range]) -> None:
        """Forget the content of pages that are zero from now on."""
        merged = merge(ranges)
        if length(merged) <= len(self._content):
            for start, end in merged:
                for page in range(start, end):
                    self._content.pop(page, None)
            return
        starts = [start for start, _ in merged]
        for page in list(self._content):
            at = bisect_left(starts, page + 1) - 1
            if at >= 0 and page < merged[at][1]:
                del self._content[page]

    @property
    def ranges(self) -> list[Range]:
        """All pages that the archive has."""
        return merge([*self.written, *self.zero])

    def difference(self, other: PageMap) -> PageDifference:
        """Compare with another archive's."""
        mine, its = self.ranges, other.ranges
        both = [page for page, digest in self._content.items() if other._content.get(page, digest) != digest]
        became_zero = intersect(self.written, other.zero)
        was_zero = intersect(self.zero, other.written)
        changed = merge([*runs(sorted(both)), *became_zero, *was_zero])
        return PageDifference(subtract(mine, its), subtract(its, mine), changed)
