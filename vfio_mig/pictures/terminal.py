# SPDX-License-Identifier: MIT
"""Maps of dirty pages in characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vfio_mig.dirty.bitmap import Dirty

BLOCKS: Final = "▁▂▃▄▅▆▇█"
ASCII: Final = ".:-=+*#@"
COLUMNS: Final = 64
ROWS: Final = 16
_UNITS: Final = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size_text(size: int) -> str:
    """Write bytes in the largest unit that keeps them exact to two digits.

    >>> size_text(4096), size_text(3 << 30), size_text(100)
    ('4 KiB', '3 GiB', '100 bytes')
    """
    for unit, name in _UNITS:
        if size >= unit:
            return f"{round(size / unit, 2):g} {name}"
    return f"{size} bytes"


def cell_pages(chunks: Sequence[Dirty]) -> int:
    """Return how many pages one cell stands for, so that all fit into ROWS lines: a power of two."""
    pages = sum(chunk.nr_pages for chunk in chunks)
    cell = 1
    while cell * COLUMNS * ROWS < pages:
        cell *= 2
    return cell


def joined(chunks: Iterable[Dirty]) -> Iterator[tuple[int, list[Dirty]]]:
    """Put chunks that follow each other together: (first page, chunks)."""
    run: list[Dirty] = []
    for chunk in chunks:
        if run and run[-1].start_page + run[-1].nr_pages != chunk.start_page:
            yield run[0].start_page, run
            run = []
        run.append(chunk)
    if run:
        yield run[0].start_page, run


def cells(run: Sequence[Dirty], cell: int) -> list[float]:
    """Return the share of dirty pages, 0 to 1, of each *cell* pages of chunks that follow each other."""
    return [
        _share(chunk, first, min(cell, chunk.nr_pages - first))
        for chunk in run
        for first in range(0, chunk.nr_pages, cell)
    ]


def _share(chunk: Dirty, first: int, pages: int) -> float:
    bits = int.from_bytes(chunk.bitmap[first // 8 : (first + pages + 7) // 8], "little") >> first % 8
    return (bits & ((1 << pages) - 1)).bit_count() / pages


def _letter(share: float, letters: str) -> str:
    return " " if share <= 0 else letters[min(int(share * len(letters)), len(letters) - 1)]


def dirty_map(chunks: Sequence[Dirty], *, unicode: bool = True) -> list[str]:
    """Draw which pages are dirty, as lines of at most 80 characters below 1 TiB: address, cells, and what they mean.

    :param unicode: draw with block elements, else in ASCII.
    """
    letters = BLOCKS if unicode else ASCII
    edge = "│" if unicode else "|"
    cell = cell_pages(chunks)
    lines = []
    for first, run in joined(chunks):
        shares = cells(run, cell)
        for at in range(0, len(shares), COLUMNS):
            row = "".join(_letter(share, letters) for share in shares[at : at + COLUMNS])
            lines.append(f"{(first + at * cell) * PAGE:#012x} {edge}{row}{edge}")
    pages = "page" if cell == 1 else "pages"
    least, most = 100 // len(letters), 100 - 100 // len(letters)
    lines.append(f"one cell: {cell} {pages} ({size_text(cell * PAGE)})")
    lines.append(f"blank: none dirty, {letters[0]}: up to {least} %, {letters[-1]}: more than {most} %")
    return lines
