# SPDX-License-Identifier: MIT
"""The runs of dirty pages as arrays: from bitmaps to what is read at once, without a Python object for each.

It takes numpy, which :func:`preload` loads before a device is stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from vfio_mig.dirty.bitmap import Dirty, trim
from vfio_mig.dirty.popcount import popcount
from vfio_mig.dirty.ranges import PageRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    Pages = NDArray[np.int64]
    Words = NDArray[np.uint64]

_BITS: Final = 64
"""Pages of one word of a bitmap."""
_SHIFT: Final = 6
_WORDS: Final = 1 << 16
"""Words with a dirty page that are taken apart at once, or somewhat more: their arrays stay in a CPU's cache."""
_FEW: Final = 3
"""Bits set in a word, on average, up to which it is cheaper to take one after the other."""
_MANTISSA: Final = 52
_BIAS: Final = 1023
"""Of a double (IEEE 754): the exponent of a power of two is the number of its bit."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of pages, in order and without overlap: page numbers *starts*, and *ends* behind the last of each."""

    starts: Pages
    ends: Pages

    def __len__(self) -> int:
        """Return how many runs there are."""
        return len(self.starts)

    def total(self) -> int:
        """Return how many pages there are."""
        return int((self.ends - self.starts).sum())

    def within(self, start: int, end: int) -> Runs:
        """Return the parts of the runs from page number *start* to before *end*."""
        import numpy as np

        first = int(np.searchsorted(self.ends, start, "right"))
        behind = max(first, int(np.searchsorted(self.starts, end, "left")))
        return Runs(np.maximum(self.starts[first:behind], start), np.minimum(self.ends[first:behind], end))

    def spans(self, gap: int, block: int) -> Iterator[tuple[int, int]]:
        """Yield what is read at once: the numbers of the first run, and of the one behind the last.

        :param gap: pages between two runs, at most; *block*: both are in the same aligned block of so many pages.
        """
        import numpy as np

        if not len(self):
            return
        blocks = self.starts // block
        last_blocks = (self.ends - 1) // block
        apart = (blocks[1:] != last_blocks[:-1]) | (blocks[:-1] != last_blocks[1:])
        apart |= self.starts[1:] - self.ends[:-1] > gap
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(self)]
        yield from pairwise(edges)

    def ranges(self) -> Iterator[PageRange]:
        """Yield one object each."""
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield PageRange(start, end - start)


def preload() -> None:
    """Load numpy and GMP, and use them once: that takes longer than what follows, and no stopped device may wait."""
    for runs in find([Dirty(0, _BITS, b"\x05" * (_BITS // 8))]):
        runs.total()


def find(pieces: Iterable[Dirty]) -> Iterator[Runs]:
    """Yield the runs of dirty pages of bitmaps, in batches.

    Runs are as long as they can be, but where a batch or a bitmap ends that is no multiple of 64 pages. A batch is in
    order; pieces that are in order give batches that are.
    """
    import numpy as np

    bases: list[Pages] = []
    words: list[Words] = []
    waiting = end = 0
    for piece in pieces:
        if waiting > _WORDS or (waiting and piece.start_page < end):
            yield _take_apart(np.concatenate(bases), np.concatenate(words))
            bases, words, waiting = [], [], 0
        all_words = _words(piece)
        used = np.flatnonzero(all_words != 0)
        end = piece.start_page + piece.nr_pages
        if len(used):
            bases.append(used * _BITS + piece.start_page)
            words.append(all_words[used])
            waiting += len(used)
    if waiting:
        yield _take_apart(np.concatenate(bases), np.concatenate(words))


def _words(piece: Dirty) -> Words:
    import numpy as np

    bitmap = trim(piece.bitmap, piece.nr_pages)
    return np.frombuffer(bitmap + bytes(-len(bitmap) % (_BITS // 8)), "<u8")


def _take_apart(bases: Pages, words: Words) -> Runs:
    """Find the runs of words that are not zero.

    :param bases: the page number of each word's first bit.
    """
    import numpy as np

    one, top = np.uint64(1), np.uint64(_BITS - 1)
    follows = np.diff(bases) == _BITS
    before, after = np.zeros_like(words), np.zeros_like(words)
    before[1:] = (words[:-1] >> top) * follows
    after[:-1] = (words[1:] << top) * follows
    # A run begins where a bit is set and the one before is not, and ends where the one behind is not
    starts = _bits_set(words & ~(words << one | before), bases)
    ends = _bits_set(words & ~(words >> one | after), bases)
    return Runs(starts, ends + 1)


def _bits_set(words: Words, bases: Pages) -> Pages:
    """Return the page numbers of the bits that are set, in order."""
    import numpy as np

    if popcount(words.data.cast("B")) > _FEW * len(words):
        at = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_))
        pages: Pages = bases[at >> _SHIFT] + (at & (_BITS - 1))
        return pages
    found = []
    while len(bases := bases[words != 0]):
        words = words[words != 0]
        lowest = words & (~words + np.uint64(1))
        found.append(bases + ((lowest.astype(np.float64).view(np.int64) >> _MANTISSA) - _BIAS))
        words = words ^ lowest
    if len(found) == 1:
        return found[0]
    pages = np.concatenate(found)
    pages.sort(kind="stable")
    return pages
