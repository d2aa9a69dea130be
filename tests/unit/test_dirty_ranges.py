# SPDX-License-Identifier: MIT
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.dirty.ranges import PageRange, merge, parse_number, parse_range, total
from vfio_mig.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("010", 10),
        ("0x1000", 0x1000),
        ("0XfF", 0xFF),
        ("4K", 4096),
        ("64m", 64 << 20),
        ("0x10G", 16 << 30),
        ("1T", 1 << 40),
        ("0xffffffffffffffff", (1 << 64) - 1),
    ],
)
def test_numbers_are_read(text: str, value: int) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "K", "0x", "0xK", "-1", "+1", " 1", "1 ", "1_000", "1.5G", "4KB", "0b1", "1e3", "\u0664", "x", "٣K", "²"],
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number; write 4096, 0x1000, 64M or 0x10G"):
        parse_number(text)


@pytest.mark.parametrize("text", ["0x10000000000000001", "99999999999T", "9" * 5000, "0x" + "f" * 5000])
def test_what_needs_more_than_64_bits_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_number(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", (0, 1)),
        ("0x1000", (1, 1)),
        ("0x1000+8K", (1, 2)),
        ("4K-0x10000", (1, 15)),
        ("0-4G", (0, 1 << 20)),
        ("0xfffffffffffff000", ((1 << 52) - 1, 1)),
        ("0+0x10000000000000000", (0, 1 << 52)),
    ],
)
def test_ranges_are_read(text: str, expected: tuple[int, int]) -> None:
    assert parse_range(text) == PageRange(*expected)


@pytest.mark.parametrize(
    "text",
    [
        *["", "-", "+", "1", "0+1", "0-1", "4K-", "-4K", "4K+", "+4K", "4K-4K", "8K-4K", "0+0", "4K-8K-12K"],
        *["4K+4K+4K", "16T+0xfffffffffffff000", "0x10000000000000000", "4K--8K", "a-b"],
    ],
)
def test_bad_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_range(text)


@given(st.text(alphabet="0123456789abcdefxKMGT+- _", max_size=12))
def test_any_text_is_a_range_of_whole_pages_or_a_usage_error(text: str) -> None:
    try:
        start, nr_pages = parse_range(text)
    except UsageError:
        return
    assert start >= 0
    assert nr_pages > 0
    assert start + nr_pages <= 1 << 52


page_ranges = st.lists(st.builds(PageRange, st.integers(0, 60), st.integers(0, 12)), max_size=10)


@given(page_ranges)
def test_merged_ranges_are_the_same_pages_in_order_and_apart(ranges: list[PageRange]) -> None:
    merged = merge(ranges)
    assert {p for r in merged for p in range(r.start, r.end)} == {p for r in ranges for p in range(r.start, r.end)}
    assert all(one.end < other.start for one, other in pairwise(merged))
    assert all(r.nr_pages > 0 for r in merged)
    assert total(merged) == len({p for r in ranges for p in range(r.start, r.end)})
