# SPDX-License-Identifier: MIT
"""Pairs of figures, ours and the C reference's, taken alternately; medians, a goal for each, and whether it is met."""

from __future__ import annotations

import json
import statistics
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS: Final = 5


class Row(NamedTuple):
    """One comparison; medians, in *unit*.

    :param figure: what is compared with the goal: the ratio of both, or their difference.
    :param goal: in words.
    :param met: None where there is no goal.
    :param note: what stands beside it.
    """

    name: str
    unit: str
    ours: float
    reference: float
    figure: float
    goal: str
    met: bool | None
    note: str = ""


def ratio(name: str, unit: str, pairs: list[tuple[float, float]], most: float | None = None, note: str = "") -> Row:
    """Compare times or sizes: less is better, *most* times the reference's is the goal."""
    ours, reference = (statistics.median(column) for column in zip(*pairs, strict=True))
    figure = ours / reference if reference else float("inf")
    goal = "" if most is None else f"at most {most:g} times"
    return Row(name, unit, ours, reference, figure, goal, None if most is None else figure <= most, note)


def excess(name: str, pairs: list[tuple[float, float]], most: float, note: str = "") -> Row:
    """Compare times in ms: at most *most* ms more than the reference is the goal."""
    ours, reference = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    figure = ours - reference
    return Row(name, "ms", ours, reference, figure, f"at most {most:g} ms more", figure <= most, note)


def alternate(one: Callable[[], float], other: Callable[[], float], runs: int = RUNS) -> list[tuple[float, float]]:
    """Run both in turn, once unmeasured; each is the first one every other time."""
    one()
    other()
    pairs = []
    for number in range(runs):
        if number % 2:
            second = other()
            pairs.append((one(), second))
        else:
            first = one()
            pairs.append((first, other()))
    return pairs


def show(rows: list[Row], title: str) -> None:
    """Print a table."""
    print(f"\n{title}; medians of up to {RUNS} alternating runs")
    print(f"{'':<46} {'ours':>10} {'C':>10} {'':>9}  goal")
    for row in rows:
        sign = "x" if "times" in row.goal or not row.goal else row.unit
        met = "" if row.met is None else ("  met" if row.met else "  MISSED")
        print(
            f"{row.name + ', ' + row.unit:<46} {row.ours:>10.2f} {row.reference:>10.2f} {row.figure:>8.2f} {sign:<2}"
            f"  {row.goal}{met}{'; ' + row.note if row.note else ''}"
        )
    sys.stdout.flush()


def as_json(rows: list[Row]) -> str:
    """Return rows as JSON has them, a line each."""
    return "".join(json.dumps(row._asdict()) + "\n" for row in rows)
