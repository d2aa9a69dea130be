# SPDX-License-Identifier: MIT
"""Runs of dirty pages, against sets of page numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.dirty import runs as module
from vfio_mig.dirty.bitmap import Dirty, size
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.dirty.runs import Runs, find


@st.composite
def pieces(draw: st.DrawFn) -> list[Dirty]:
    """Bitmaps in order, next to each other or apart, of any size, full, empty, sparse or random."""
    found = []
    at = draw(st.one_of(st.integers(0, 200), st.integers(0, 1 << 52)))
    for _ in range(draw(st.integers(0, 5))):
        nr_pages = draw(st.one_of(st.integers(0, 300), st.sampled_from([64, 128, 640])))
        length = size(nr_pages)
        bits = draw(
            st.one_of(
                st.binary(min_size=length, max_size=length),
                st.sampled_from([bytes(length), b"\xff" * length]),
                st.builds(_with, st.lists(st.integers(0, max(nr_pages - 1, 0)), max_size=4), st.just(length)),
            )
        )
        found.append(Dirty(at, nr_pages, bits))
        at += nr_pages + draw(st.sampled_from([0, 0, 1, 64, 1000]))
    return found


def _with(ones: list[int], length: int) -> bytes:
    bits = bytearray(length)
    for one in ones:
        if length:
            bits[one // 8] |= 1 << one % 8
    return bytes(bits)


def pages(found: list[Dirty]) -> list[int]:
    """The slow reference: one bit at a time, as the header's comment says it."""
    return [
        one.start_page + page for one in found for page in range(one.nr_pages) if one.bitmap[page // 8] >> page % 8 & 1
    ]


@pytest.mark.parametrize("words", [0, 2, 1 << 16])
@given(found=pieces())
def test_runs_are_the_dirty_pages_in_order(words: int, found: list[Dirty]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORDS", words)
        batches = list(find(found))
    ranges = [one for runs in batches for one in runs.ranges()]
    assert [page for one in ranges for page in range(one.start, one.end)] == pages(found)
    assert sum(runs.total() for runs in batches) == len(pages(found))
    assert all(len(runs) for runs in batches)


@given(st.sets(st.integers(0, 6399), max_size=200), st.integers(0, 1 << 40))
def test_they_are_as_few_as_possible_across_bitmaps_of_whole_words(dirty: set[int], start: int) -> None:
    found = [
        Dirty(start + at, 640, _with([page - at for page in dirty if at <= page < at + 640], 80))
        for at in range(0, 6400, 640)
    ]
    ranges = [one for runs in find(found) for one in runs.ranges()]
    assert all(one.end < other.start for one, other in pairwise(ranges))
    assert [page for one in ranges for page in range(one.start, one.end)] == sorted(start + page for page in dirty)


def test_bits_behind_the_last_page_are_ignored() -> None:
    (runs,) = find([Dirty(10, 3, b"\xff")])
    assert list(runs.ranges()) == [PageRange(10, 3)]


def test_bitmaps_that_are_not_in_order_do_not_share_a_batch() -> None:
    batches = list(find([Dirty(640, 64, b"\x01" * 8), Dirty(0, 64, b"\x80" * 8)]))
    assert [next(runs.ranges()).start for runs in batches] == [640, 7]


def runs_of(*ranges: tuple[int, int]) -> Runs:
    starts, ends = np.array(ranges, np.int64).reshape(-1, 2).T
    return Runs(starts, ends)


def test_runs_are_cut_at_the_edges_of_a_map() -> None:
    runs = runs_of((0, 5), (7, 9), (20, 30))
    assert list(runs.within(3, 25).ranges()) == [PageRange(3, 2), PageRange(7, 2), PageRange(20, 5)]
    assert list(runs.within(8, 9).ranges()) == [PageRange(8, 1)]
    assert not len(runs.within(9, 20))
    assert not len(runs.within(30, 40))
    assert list(runs.within(0, 100).ranges()) == list(runs.ranges())


def test_what_is_near_and_in_one_block_is_one_span() -> None:
    assert list(runs_of().spans(4, 64)) == []
    assert list(runs_of((0, 1), (5, 6), (11, 12)).spans(4, 64)) == [(0, 2), (2, 3)]
    assert list(runs_of((60, 62), (63, 65), (66, 67), (127, 128), (128, 129)).spans(4, 64)) == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),
    ]
    assert list(runs_of((0, 200), (201, 202), (203, 204)).spans(4, 64)) == [(0, 1), (1, 3)]
