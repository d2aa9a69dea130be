# SPDX-License-Identifier: MIT
"""How a check says that a rule is broken, only recommended, or has nothing to hold for."""

from __future__ import annotations


class Deviation(Exception):  # noqa: N818 -- not an error of this program
    """The device breaks the rule.

    :param seen: what it did instead.
    """

    def __init__(self, seen: str, note: str = "") -> None:
        super().__init__(seen)
        self.seen = seen
        self.note = note


class Weakness(Deviation):
    """The device does otherwise than recommended, or than every other does.

    :param note: why that is not a failure.
    """


class NotApplicable(Exception):  # noqa: N818 -- nor is this
    """There is nothing to check on this device; says why."""


def require(holds: object, seen: str) -> None:
    """Break the check off where the rule does not hold."""
    if not holds:
        raise Deviation(seen)


def recommend(holds: object, seen: str, note: str) -> None:
    """Make the check a warning where it does not hold."""
    if not holds:
        raise Weakness(seen, note)
