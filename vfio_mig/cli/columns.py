# SPDX-License-Identifier: MIT
"""Text in columns for a terminal; elsewhere, one line for each thing, as scripts want it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def terminal_width() -> int | None:
    """Return how many columns the terminal has that standard output is, None if it is none."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def hanging(first: str, text: str, width: int | None) -> Iterator[str]:
    """Yield a text behind what stands before it, in lines of a width, each below the begin of the text.

    >>> list(hanging("v2.arc  ", "stop goes to running", 20))
    ['v2.arc  stop goes to', '        running']
    >>> list(hanging("v2.arc  ", "stop goes to running", None))
    ['v2.arc  stop goes to running']
    """
    line, indent = first, " " * len(first)
    for word in text.split():
        if width is not None and line.strip() != first.strip() and line != indent and len(line) + len(word) > width:
            yield line.rstrip()
            line = indent
        line += word + " "
    yield line.rstrip()


def folded(line: str, width: int | None) -> Iterator[str]:
    """Yield a line in pieces of a width, the later ones further in; where nobody has a width, as it is.

    >>> list(folded("  level 4  pdp 0x1000  root 0x2000", 20))
    ['  level 4  pdp', '      0x1000  root', '      0x2000']
    >>> list(folded("  level 4  pdp 0x1000", None))
    ['  level 4  pdp 0x1000']
    """
    if width is None or len(line) <= width:
        yield line
        return
    from textwrap import wrap

    text = line.lstrip(" ")
    first = line[: len(line) - len(text)]
    first = first if len(first) < width // 2 else ""
    yield from wrap(text, width, initial_indent=first, subsequent_indent=first + "    ", break_on_hyphens=False)


def fitting(rows: Sequence[Sequence[str]], order: Sequence[int], width: int) -> list[int]:
    """Choose the columns that fit side by side, the most wanted first; returned as they stand in the rows.

    >>> fitting([["name", "type", "x"], ["a" * 8, "b" * 8, "x"]], [0, 2, 1], 12)
    [0, 2]
    """
    chosen: list[int] = []
    left = width
    for column in order:
        needed = max(len(row[column]) for row in rows) + (1 if chosen else 0)
        if chosen and needed > left:
            break
        chosen.append(column)
        left -= needed
    return sorted(chosen)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines whose columns stand below each other.

    >>> list(aligned([["NAME", "STATE"], ["a", "stop"]]))
    ['NAME STATE', 'a    stop']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield " ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip()
