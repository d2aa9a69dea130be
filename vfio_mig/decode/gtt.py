# SPDX-License-Identifier: MIT
"""GVT-g's guest graphics addresses: entries of the GGTT (gen 8) as runs, and translation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.decode.section import LISTED_MAX
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vfio_mig.decode.gvt_image import GvtImage

PRESENT: Final = 1
ADDRESS: Final = 0x3FFFFFFFF000
"""Bits 45:12 of an entry: the guest-physical page. GVT-g masks 46 bits."""


class Aperture(NamedTuple):
    """A part of graphics memory: guest graphics address and bytes, and its first entry in the GTT record."""

    name: str
    base: int
    size: int
    first: int


class Table:
    """A guest's GGTT as an image has it."""

    def __init__(self, image: GvtImage) -> None:
        import numpy as np

        info = image.pvinfo
        low_entries = info.low_size // PAGE
        self.parts: Final = (
            Aperture("low", info.low_base, info.low_size, 0),
            Aperture("high", info.high_base, info.high_size, low_entries),
        )
        self.entries: Final[NDArray[np.uint64]] = np.frombuffer(image.records["GTT"].payload, "<u8")

    def of(self, part: Aperture) -> NDArray[np.uint64]:
        """Return the entries of a part."""
        return self.entries[part.first : part.first + part.size // PAGE]

    def translate(self, address: int) -> int | None:
        """Return the guest-physical address behind a graphics address; None where nothing is mapped."""
        for part in self.parts:
            if part.base <= address < part.base + part.size:
                entry = int(self.entries[part.first + (address - part.base) // PAGE])
                return entry & ADDRESS | address % PAGE if entry & PRESENT else None
        return None

    def summary(self) -> list[dict[str, Any]]:
        """Say of each part what is mapped where: runs of pages that follow each other on both sides."""
        found = []
        for part in self.parts:
            entries = self.of(part)
            starts, lengths = present_runs(entries)
            runs = [
                {
                    "gma": part.base + int(start) * PAGE,
                    "gpa": int(entries[start]) & ADDRESS,
                    "size": int(length) * PAGE,
                }
                for start, length in zip(starts[:LISTED_MAX], lengths[:LISTED_MAX], strict=True)
            ]
            found.append(
                {
                    "part": part.name,
                    "base": part.base,
                    "size": part.size,
                    "entries": len(entries),
                    "present": int(lengths.sum()),
                    "not_present": int(((entries & PRESENT == 0) & (entries != 0)).sum()),
                    "runs": {"count": len(starts), "listed": runs},
                }
            )
        return found


def present_runs(entries: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where runs of present entries with rising pages begin, and how many entries each has."""
    import numpy as np

    at = np.flatnonzero(entries & np.uint64(PRESENT))
    if not len(at):
        return at, at
    pages = (entries[at] & np.uint64(ADDRESS)) >> np.uint64(12)
    breaks = (np.diff(at) != 1) | (np.diff(pages.astype(np.int64)) != 1)
    first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return at[first], np.diff(np.append(first, len(at)))


def changed_runs(old: NDArray[np.uint64], new: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where runs of entries that differ begin, and how many entries each has.

    A run ends where on either side the pages do not rise by one, or what is there begins or ends to be present.
    """
    import numpy as np

    at = np.flatnonzero(old != new)
    if not len(at):
        return at, at
    breaks = np.diff(at) != 1
    for side in (old[at], new[at]):
        present = (side & np.uint64(PRESENT)).astype(bool)
        pages = ((side & np.uint64(ADDRESS)) >> np.uint64(12)).astype(np.int64)
        breaks |= present[1:] != present[:-1]
        breaks |= present[1:] & (np.diff(pages) != 1)
    first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return at[first], np.diff(np.append(first, len(at)))
