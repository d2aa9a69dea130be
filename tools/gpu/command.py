# SPDX-License-Identifier: MIT
"""A command that is being executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.record import Entry

_ADDRESS: Final = (1 << 48) - 1 & ~3


class HangError(Exception):
    """The engine cannot go on."""


@dataclass(slots=True)
class Command:
    """Its dwords as they are needed, and its entry in the record.

    :ivar length: dwords.
    """

    header: int
    length: int
    word: Callable[[int], int]
    entry: Entry

    def address(self, index: int) -> int:
        """Return the 48-bit address in two dwords, a multiple of 4."""
        return (self.word(index + 1) << 32 | self.word(index)) & _ADDRESS
