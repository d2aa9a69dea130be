# SPDX-License-Identifier: MIT
"""Address ranges as users write them, and ranges of 4 KiB pages."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from vfio_mig import ranges as spans
from vfio_mig.errors import UsageError
from vfio_mig.ranges import ADDRESS_END, PAGE

_UNITS: Final = {"k": 10, "m": 20, "g": 30, "t": 40}


class PageRange(NamedTuple):
    """*nr_pages* pages of 4096 bytes from page number *start* on."""

    start: int
    nr_pages: int

    @property
    def end(self) -> int:
        """The page number behind the last."""
        return self.start + self.nr_pages


def parse_number(text: str) -> int:
    """Return a number of bytes: decimal or 0x…, with K, M, G, T for powers of 1024.

    :raises UsageError: it is none, or needs more than 64 bits.
    """
    digits, shift = text, _UNITS.get(text[-1:].lower(), 0)
    if shift:
        digits = text[:-1]
    # int() also takes signs, blanks, underscores and other alphabets' digits.
    plain = digits if digits.isascii() and digits.isalnum() else ""
    try:
        value = int(plain, 16 if plain[:2].lower() == "0x" else 10)
    except ValueError:
        raise UsageError(f"{text!r} is not a number", hint="write 4096, 0x1000, 64M or 0x10G") from None
    if value << shift > ADDRESS_END:
        raise UsageError(f"{text!r} is beyond 64 bits")
    return value << shift


def parse_range(text: str) -> PageRange:
    """Return the pages of START (one page), START+LENGTH or START-END; END is the first byte behind the range.

    :raises UsageError: bad syntax, empty, beyond 64 bits, or not whole pages.
    """
    if "+" in text:
        start_text, _, length_text = text.partition("+")
        start = parse_number(start_text)
        end = start + parse_number(length_text)
    elif "-" in text:
        start_text, _, end_text = text.partition("-")
        start, end = parse_number(start_text), parse_number(end_text)
    else:
        start = parse_number(text)
        end = start + PAGE
    if start % PAGE or end % PAGE:
        raise UsageError(f"range {text!r} is not made of whole pages of {PAGE} bytes")
    if not start < end <= ADDRESS_END:
        raise UsageError(f"range {text!r} is empty or beyond 64 bits")
    return PageRange(start // PAGE, (end - start) // PAGE)


def merge(ranges: Iterable[PageRange]) -> list[PageRange]:
    """Return the same pages as few ranges, in order, without overlap; empty ranges are gone."""
    return _pages(spans.merge((one.start, one.end) for one in ranges if one.nr_pages > 0))


def complement(ranges: Iterable[PageRange], end: int) -> list[PageRange]:
    """Return the pages below page number *end* that are in none of the ranges."""
    taken = [(one.start, one.end) for one in merge(ranges)]
    return _pages(spans.subtract([(0, end)], taken) if end > 0 else [])


def _pages(ranges: Iterable[spans.Range]) -> list[PageRange]:
    return [PageRange(start, end - start) for start, end in ranges]


def total(ranges: Sequence[PageRange]) -> int:
    """Return how many pages the ranges have together, a page in two ranges counted twice."""
    return sum(range_.nr_pages for range_ in ranges)
