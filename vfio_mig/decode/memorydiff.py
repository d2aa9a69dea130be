# SPDX-License-Identifier: MIT
"""What differs between the dirty bitmaps and the guest memory of two archives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vfio_mig.decode.differences import Difference, Found
from vfio_mig.decode.pagemap import PageMap
from vfio_mig.decode.section import LISTED_MAX
from vfio_mig.ranges import PAGE, length, runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.archive import Archive
    from vfio_mig.image.layout import DirtyBitmap
    from vfio_mig.ranges import Range


def dirty_differences(first: Archive, second: Archive) -> Iterator[Found]:
    """Compare the dirty bitmaps one by one: pages that are set in only one of them."""
    found: list[Difference] = []
    count = 0
    pairs = [[member for member in archive.members if member.kind == "dirty"] for archive in (first, second)]
    if [member.extra for member in pairs[0]] != [member.extra for member in pairs[1]]:
        ranges = [[list(member.extra.values()) for member in one[:LISTED_MAX]] for one in pairs]
        yield Found("dirty", 1, [Difference("dirty", "ranges", 0, 0, *ranges)])
        return
    for old, new in zip(first.dirty(), second.dirty(), strict=True):
        if old.bitmap != new.bitmap:
            count += 1
            found.append(_bitmap_difference(old, new))
    if found:
        yield Found("dirty", count, found[:LISTED_MAX])


def _bitmap_difference(old: DirtyBitmap, new: DirtyBitmap) -> Difference:
    """Count and list the pages of one bitmap, those that are set in one only."""
    values: list[dict[str, Any]] = []
    for mine, its in ((old, new), (new, old)):
        bits = int.from_bytes(mine.bitmap, "little")
        only = bits & ~int.from_bytes(its.bitmap, "little")
        values.append(
            {"pages": bits.bit_count(), "only_here": only.bit_count(), "ranges": _listed(_bits(only, mine.start_page))}
        )
    at = old.start_page * PAGE
    return Difference("dirty", f"gpa {at:#x}", at, old.nr_pages * PAGE, *values)


def _bits(bits: int, start_page: int) -> list[Range]:
    """Return ranges of the pages whose bits are set, at most LISTED_MAX."""
    content = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    pages: list[int] = []
    for at, byte in enumerate(content):
        if byte:
            pages += [start_page + at * 8 + bit for bit in range(8) if byte >> bit & 1]
            if len(pages) > LISTED_MAX * 8:
                break
    return runs(pages)


def _listed(ranges: list[Range]) -> list[list[int]]:
    """Return ranges as address and bytes."""
    return [[start * PAGE, (end - start) * PAGE] for start, end in ranges[:LISTED_MAX]]


def page_differences(first: Archive, second: Archive) -> Iterator[Found]:
    """Compare guest memory: where only one has pages, and where their contents differ."""
    one, other = PageMap(first), PageMap(second)
    difference = one.difference(other)
    found = [
        *(_range(place, "there", None) for place in difference.only_first[:LISTED_MAX]),
        *(_range(place, None, "there") for place in difference.only_second[:LISTED_MAX]),
        *(_range(place, "content", "other content") for place in difference.changed[:LISTED_MAX]),
    ]
    count = length([*difference.only_first, *difference.only_second, *difference.changed])
    if count:
        yield Found("pages", count, found[:LISTED_MAX])


def _range(place: Range, old: str | None, new: str | None) -> Difference:
    start, end = place
    return Difference("pages", f"gpa {start * PAGE:#x}", start * PAGE, (end - start) * PAGE, old, new)
