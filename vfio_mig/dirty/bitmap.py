# SPDX-License-Identifier: MIT
"""Dirty bitmaps: bit *i* of byte *j* is page 8*j* + *i*. A bitmap of *n* pages has ceil(n / 8) bytes or more; bits from
*n* on are ignored.

Counting needs no numpy, because every save counts; the rest loads it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vfio_mig.dirty.popcount import popcount
from vfio_mig.dirty.ranges import PageRange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

_SPARSE = 8
"""Where fewer than one word in so many has a dirty page, the others are passed over."""


class Dirty(NamedTuple):
    """The dirty bits of *nr_pages* pages from page number *start_page* on, in exactly ceil(nr_pages / 8) bytes."""

    start_page: int
    nr_pages: int
    bitmap: bytes

    def total(self) -> int:
        """Return how many pages are dirty."""
        return count(self.bitmap, self.nr_pages)

    def ranges(self) -> Iterator[PageRange]:
        """Yield the dirty pages in order."""
        return ranges(self.bitmap, self.start_page, self.nr_pages)


def preload() -> None:
    """Load numpy and GMP now: that takes longer than what follows, and no stopped device may wait for it."""
    import numpy as np  # noqa: F401

    count(bytes(8), 64)


def size(nr_pages: int) -> int:
    """Return the bytes that the bitmap of *nr_pages* pages has."""
    return (nr_pages + 7) // 8


def trim(bitmap: Buffer, nr_pages: int) -> bytes:
    """Return exactly the bitmap of *nr_pages* pages, bits behind the last page cleared.

    :raises ValueError: it is too short.
    """
    length = size(nr_pages)
    if len(bitmap) < length:
        raise ValueError(f"{len(bitmap)} bytes are not a bitmap of {nr_pages} pages")
    trimmed = bytearray(bitmap[:length])
    if nr_pages % 8:
        trimmed[-1] &= (1 << nr_pages % 8) - 1
    return bytes(trimmed)


def count(bitmap: Buffer, nr_pages: int) -> int:
    """Return how many of the first *nr_pages* bits are set.

    :raises ValueError: there are fewer bits.
    """
    if len(bitmap) < size(nr_pages):
        raise ValueError(f"{len(bitmap)} bytes are not a bitmap of {nr_pages} pages")
    whole, rest = divmod(nr_pages, 8)
    last = bitmap[whole] & ((1 << rest) - 1) if rest else 0
    return popcount(memoryview(bitmap)[:whole]) + last.bit_count()


def ranges(bitmap: Buffer, start_page: int, nr_pages: int) -> Iterator[PageRange]:
    """Yield the set bits as page ranges, in order, as few as possible; bit 0 is page *start_page*.

    Costs as much as there are dirty pages, but for a look at each 64-bit word.
    """
    import numpy as np

    words = _words(bitmap, nr_pages)
    used = np.flatnonzero(words)
    if len(used) * _SPARSE > len(words):
        edges = _edges(np.unpackbits(words.view(np.uint8), bitorder="little"))
        firsts, ends = edges[::2], edges[1::2]
    elif not len(used):
        return
    else:
        bits = np.unpackbits(words[used].view(np.uint8), bitorder="little").reshape(-1, 64)
        row, column = np.nonzero(bits)
        pages = used[row] * 64 + column
        last = np.flatnonzero(np.diff(pages) != 1)  # of each run but the very last
        firsts = pages[np.concatenate(([0], last + 1))]
        ends = pages[np.append(last, len(pages) - 1)] + 1
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        yield PageRange(start_page + first, end - first)


def union(bitmaps: Sequence[Sequence[Dirty]]) -> list[Dirty]:
    """Return the pages that are dirty in any of several bitmaps, in order of address.

    :param bitmaps: each with its pieces in order and without overlap; the pieces of two may be cut differently.
    """
    with_pieces = [list(one) for one in bitmaps if one]
    if len(with_pieces) < 2:  # noqa: PLR2004 -- nothing to join
        return with_pieces[0] if with_pieces else []
    joined: list[tuple[int, bytearray, int]] = []
    for piece in sorted(
        (piece for one in with_pieces for piece in one), key=lambda one: (one.start_page, one.nr_pages)
    ):
        end = piece.start_page + piece.nr_pages
        if joined and piece.start_page < joined[-1][2]:
            start, bits, last = joined.pop()
            last = max(last, end)
            bits.extend(bytes(size(last - start) - len(bits)))
        else:
            start, bits, last = piece.start_page, bytearray(size(piece.nr_pages)), end
        _or_into(bits, piece.start_page - start, piece.bitmap)
        joined.append((start, bits, last))
    return [Dirty(start, last - start, trim(bits, last - start)) for start, bits, last in joined]


def _or_into(bits: bytearray, at: int, bitmap: Buffer) -> None:
    """Set the bits of a bitmap from bit *at* on."""
    value = int.from_bytes(bitmap, "little") << at % 8
    place = slice(at // 8, at // 8 + (value.bit_length() + 7) // 8)
    there = bits[place]
    bits[place] = (int.from_bytes(there, "little") | value).to_bytes(len(there), "little")


def _edges(bits: "NDArray[np.uint8]") -> "NDArray[np.int64]":
    """Return where a bit differs from the one before it; outside of the bitmap all bits are 0."""
    import numpy as np

    return np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0)))


def _words(bitmap: Buffer, nr_pages: int) -> "NDArray[np.uint64]":
    """Return the bitmap of *nr_pages* pages as 64-bit words, bits behind the last page cleared."""
    import numpy as np

    trimmed = trim(bitmap, nr_pages)
    return np.frombuffer(trimmed + bytes(-len(trimmed) % 8), "<u8")
