# SPDX-License-Identifier: MIT
"""Dirty bitmaps: bit *i* of byte *j* is page 8*j* + *i*. A bitmap of *n* pages has ceil(n / 8) bytes or more; bits from
*n* on are ignored.

Counting needs no numpy, because every save counts; finding runs (:mod:`vfio_mig.dirty.runs`) does.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vfio_mig.dirty.popcount import popcount

Buffer = bytes | bytearray | memoryview


class Dirty(NamedTuple):
    """The dirty bits of *nr_pages* pages from page number *start_page* on, in exactly ceil(nr_pages / 8) bytes."""

    start_page: int
    nr_pages: int
    bitmap: bytes

    def total(self) -> int:
        """Return how many pages are dirty."""
        return count(self.bitmap, self.nr_pages)


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
    trimmed = bytes(bitmap[:length])  # no copy of bytes that have this length
    bits = nr_pages % 8
    if bits and trimmed[-1] >> bits:
        trimmed = trimmed[:-1] + bytes([trimmed[-1] & ((1 << bits) - 1)])
    return trimmed


def count(bitmap: Buffer, nr_pages: int) -> int:
    """Return how many of the first *nr_pages* bits are set.

    :raises ValueError: there are fewer bits.
    """
    if len(bitmap) < size(nr_pages):
        raise ValueError(f"{len(bitmap)} bytes are not a bitmap of {nr_pages} pages")
    whole, rest = divmod(nr_pages, 8)
    last = bitmap[whole] & ((1 << rest) - 1) if rest else 0
    return popcount(memoryview(bitmap)[:whole]) + last.bit_count()


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
