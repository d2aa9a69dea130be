# SPDX-License-Identifier: MIT
"""Which pages are as they were."""

from __future__ import annotations

import tracemalloc

import pytest

from vfio_mig.dirty.changed import BLOCK, Fingerprints
from vfio_mig.ranges import PAGE

TIB = 1 << 40


def runs(known: Fingerprints, page: int, *contents: int) -> list[tuple[int, int]]:
    prints = known.of_pages([memoryview(bytes([byte]) * PAGE) for byte in contents])
    return list(known.changed(page * PAGE, prints))


def test_pages_are_new_once_and_then_when_their_content_is() -> None:
    known = Fingerprints()
    first = BLOCK - 2  # the digests of the last two are in another block
    assert runs(known, first, 0, 1, 2, 3) == [(0, 4)]
    assert runs(known, first, 0, 1, 2, 3) == []
    assert runs(known, first, 0, 9, 9, 3) == [(1, 2)]
    assert runs(known, first, 8, 9, 9, 8) == [(0, 1), (3, 1)]
    assert runs(known, first + 1, 9) == []


@pytest.mark.parametrize("at", [0, 1, PAGE // 2, PAGE - 1])
def test_any_byte_of_a_page_makes_it_new_and_none_of_its_neighbours_does(at: int) -> None:
    known = Fingerprints()
    pages = bytearray(3 * PAGE)

    def look() -> list[tuple[int, int]]:
        return list(known.changed(0, known.of_pages([memoryview(pages)])))

    assert look() == [(0, 3)]
    for number in range(3):
        pages[number * PAGE + at] ^= 1
        assert look() == [(number, 1)]


def test_what_is_kept_grows_with_the_pages_and_not_with_where_they_are() -> None:
    tracemalloc.start()
    try:
        known = Fingerprints()
        for page in (0, TIB // PAGE - 1):
            assert runs(known, page, 1) == [(0, 1)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
