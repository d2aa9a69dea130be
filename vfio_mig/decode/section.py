# SPDX-License-Identifier: MIT
"""A decoded part of a state, and values from a file that are safe to show."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, Final, NamedTuple

from vfio_mig.errors import excerpt

LISTED_MAX: Final = 1000
"""Entries of one list in a report; how many there are is always said."""
_DEPTH_MAX: Final = 8
_TEXT_MAX: Final = 1000
_WORD_BITS: Final = 64


class Section(NamedTuple):
    """A part of a state.

    :param name: what ``--section`` takes.
    :param offset: of its bytes in the state.
    :param size: of its bytes; 0 for one that has none of its own.
    :param values: what they say: numbers, strings, lists and objects, as JSON has them; addresses are integers.
    """

    name: str
    offset: int
    size: int
    values: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return self._asdict()


class Decoded(NamedTuple):
    """A state in words.

    :param layout: its name, or ``unknown``.
    :param problems: what is broken or could not be decoded.
    """

    layout: str
    sections: list[Section]
    problems: list[str]


def listed(values: list[Any], total: int | None = None) -> dict[str, Any]:
    """Return a list that is cut at LISTED_MAX, with how many there are in all."""
    count = len(values) if total is None else total
    return {"count": count, "listed": values[:LISTED_MAX]}


def plain(value: object, depth: int = 0) -> Any:
    """Return something from a JSON file as it can be printed as JSON again: not too deep, not too long, no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or (isinstance(value, int) and value.bit_length() <= _WORD_BITS):
        return value
    if isinstance(value, str) and len(value) <= _TEXT_MAX:
        return value
    if depth < _DEPTH_MAX and isinstance(value, list):
        cut = [f"… {len(value) - LISTED_MAX} more"] if len(value) > LISTED_MAX else []
        return [plain(one, depth + 1) for one in value[:LISTED_MAX]] + cut
    if depth < _DEPTH_MAX and isinstance(value, dict):
        # An object stays one: reports promise it
        more = {"…": f"{len(value) - LISTED_MAX} more"} if len(value) > LISTED_MAX else {}
        kept = {plain(str(key)): plain(one, depth + 1) for key, one in islice(value.items(), LISTED_MAX)}
        return {**kept, **more}
    return excerpt(value)
