# SPDX-License-Identifier: MIT
"""The hardware's own view: what was executed, by which engine, for which context, with which DMA addresses."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

KEPT: Final = 1 << 14
MAX_ACCESSES: Final = 8
"""Of one command in the record: a blit has more, and only their number is kept."""


@dataclass(slots=True)
class Entry:
    """A command, or an event of an engine.

    :ivar number: counts from 1, without holes.
    :ivar lrca: the context, as the address of its image in the GGTT.
    :ivar name: the command's name, or the event's in lower case.
    :ivar header: a command's first dword; an event's detail.
    :ivar at: graphics address of a command.
    :ivar batch: whether it was in a batch, else in the ring.
    :ivar reads: (DMA address, value) of each dword that was read as data.
    :ivar writes: the same for what was written.
    :ivar accesses: how many there were, of which the lists have the first.
    """

    number: int
    engine: str
    lrca: int
    name: str
    header: int
    at: int = 0
    batch: bool = False
    reads: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)
    accesses: int = 0

    def read(self, address: int, value: int) -> None:
        """Note a dword that was read."""
        self.accesses += 1
        if len(self.reads) < MAX_ACCESSES:
            self.reads.append((address, value))

    def wrote(self, address: int, value: int) -> None:
        """Note a dword that was written."""
        self.accesses += 1
        if len(self.writes) < MAX_ACCESSES:
            self.writes.append((address, value))


class Record:
    """The last entries."""

    def __init__(self, kept: int = KEPT) -> None:
        self._entries: Final[deque[Entry]] = deque(maxlen=kept)
        self.last = 0

    def add(self, engine: str, lrca: int, name: str, header: int, *, at: int = 0, batch: bool = False) -> Entry:
        """Make and keep an entry; the oldest one goes if there are too many."""
        self.last += 1
        entry = Entry(self.last, engine, lrca, name, header, at, batch)
        self._entries.append(entry)
        return entry

    def since(self, number: int) -> Iterator[Entry]:
        """Yield the entries after a number that are still kept, in order."""
        first = self.first
        yield from islice(self._entries, max(0, number + 1 - first), None)

    @property
    def first(self) -> int:
        """The number of the oldest entry that is kept; one after the last if there is none."""
        return self._entries[0].number if self._entries else self.last + 1
