# SPDX-License-Identifier: MIT
"""A device's log of its writes: what is asked of the kernel, and what becomes of its answers."""

from __future__ import annotations

import ctypes
import errno
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.device import Device
from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.fetch import fetch
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.dirty.runs import find
from vfio_mig.errors import DeviceError, UnsupportedError
from vfio_mig.protocols.dma_logging import DmaLog, merge_closest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio_mig.uapi import Request
    from vfio_mig.uapi._generated import CData

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
PAGE = 4096
RANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=30)


class LoggingDevice(Device):
    """Remembers what it was asked for; its report sets one bit of each word."""

    def __init__(self) -> None:
        super().__init__("fake", -1)
        self.ranges: list[tuple[int, int]] = []
        self.reports: list[tuple[int, int, int]] = []
        self.stops = 0
        self.refuse: dict[int, int] = {}

    def call(self, request: Request, arg: CData | bytearray | int = 0) -> int:
        assert request.name == "VFIO_DEVICE_FEATURE"
        buffer: Any = arg
        argsz, flags = struct.unpack_from("=II", buffer)
        assert argsz == len(buffer)
        if number := self.refuse.get(flags & 0xFFFF):
            raise DeviceError("VFIO_DEVICE_FEATURE failed", device="fake", errno=number)
        if flags == SET | 6:
            page_size, count, reserved, pointer = struct.unpack_from("=QIIQ", buffer, 8)
            assert (page_size, reserved, argsz) == (PAGE, 0, 32)
            table = ctypes.string_at(pointer, count * 16)
            self.ranges = [struct.unpack_from("=QQ", table, at * 16) for at in range(count)]
            struct.pack_into("=Q", buffer, 8, 1 << 16)  # what the device can do
        elif flags == GET | 8:
            iova, length, page_size, pointer = struct.unpack_from("=QQQQ", buffer, 8)
            self.reports.append((iova, length, page_size))
            words = (length // page_size + 63) // 64
            assert ctypes.string_at(pointer, words * 8) == bytes(words * 8)
            ctypes.memmove(pointer, struct.pack("=Q", 2) * words, words * 8)
        elif flags == SET | 7:
            assert argsz == 8
            self.stops += 1
        return 0


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for start, length in ranges for at in range(start, start + length)}


@given(RANGES, st.integers(1, 40))
def test_merging_keeps_every_address_and_adds_only_the_smallest_gaps(ranges: list[tuple[int, int]], limit: int) -> None:
    merged = merge_closest(ranges, limit)
    assert len(merged) <= limit
    assert covered(ranges) <= covered(merged)
    assert all(start + length < following for (start, length), (following, _) in pairwise(merged))
    exact = merge_closest(ranges, 1 << 10)
    assert covered(exact) == covered(ranges)
    gaps = sorted(after[0] - sum(before) for before, after in pairwise(exact))
    assert len(covered(merged) - covered(ranges)) == sum(gaps[: max(len(exact) - limit, 0)])


def test_a_log_is_started_with_its_ranges_and_asked_once_at_once() -> None:
    device = LoggingDevice()
    log = DmaLog(device)
    log.start([(0x100000, 2 * PAGE), (0, PAGE)])
    assert device.ranges == [(0, PAGE), (0x100000, 2 * PAGE)]
    assert device.reports == [(0, PAGE, PAGE)]  # a kernel that cannot report accepts the start
    assert log.page_size == 1 << 16
    log.start([(number << 20, PAGE) for number in range(300)])
    assert len(device.ranges) == 256


@pytest.mark.parametrize("pages", [1, 64, 65, 130])
def test_a_report_is_a_bitmap_from_the_first_page_asked_for(pages: int) -> None:
    device = LoggingDevice()
    bitmap = DmaLog(device).report(16, pages)
    assert device.reports == [(16 * PAGE, pages * PAGE, PAGE)]
    assert bytes(bitmap) == (struct.pack("<Q", 2) * 3)[: (pages + 7) // 8]


def test_a_kernel_that_accepts_a_log_and_cannot_report_ends_it_and_is_refused() -> None:
    device = LoggingDevice()
    device.refuse[8] = errno.EOPNOTSUPP
    with pytest.raises(UnsupportedError, match="CONFIG_IOMMUFD_DRIVER"):
        DmaLog(device).start([(0, PAGE)])
    assert device.stops == 1
    device.refuse[8] = errno.EIO
    with pytest.raises(DeviceError, match="reading the log"):
        DmaLog(device).start([(0, PAGE)])
    assert device.stops == 2
    device.refuse[6] = errno.EINVAL
    with pytest.raises(DeviceError, match=r"starting the log .*somebody may be logging already"):
        DmaLog(device).start([(0, PAGE)])


class PagedDevice(Device):
    """Logs in pages of *unit* times 4 KiB, as hardware does: what is reported in part is forgotten as a whole.

    :param lazy: reports the first 4 KiB of a page for all of it.
    """

    def __init__(self, unit: int, *, lazy: bool = False) -> None:
        super().__init__("fake", -1)
        self.unit = unit
        self.lazy = lazy
        self.log: set[int] = set()

    def write(self, page: int) -> None:
        self.log.add(page // self.unit)

    def call(self, request: Request, arg: CData | bytearray | int = 0) -> int:
        assert request.name == "VFIO_DEVICE_FEATURE"
        buffer: Any = arg
        flags = struct.unpack_from("=II", buffer)[1]
        if flags == SET | 6:
            self.log.clear()
            struct.pack_into("=Q", buffer, 8, self.unit * PAGE)
        elif flags == GET | 8:
            iova, length, _, pointer = struct.unpack_from("=QQQQ", buffer, 8)
            start, end = iova // PAGE, (iova + length) // PAGE
            bits = 0
            for number in [number for number in self.log if start // self.unit <= number <= (end - 1) // self.unit]:
                self.log.discard(number)
                first = max(number * self.unit, start)
                last = first + 1 if self.lazy else min((number + 1) * self.unit, end)
                bits |= ((1 << last - first) - 1) << first - start
            room = (end - start + 63) // 64 * 8
            ctypes.memmove(pointer, bits.to_bytes(room, "little"), room)
        return 0


def reported(log: DmaLog, start: int, nr_pages: int) -> set[int]:
    return dirty_pages([Dirty(start, nr_pages, bytes(log.report(start, nr_pages)))])


def dirty_pages(pieces: Iterable[Dirty]) -> set[int]:
    return {page for runs in find(pieces) for one in runs.ranges() for page in range(one.start, one.end)}


@given(
    st.sampled_from([1, 2, 4, 8, 16, 64, 512]),
    st.booleans(),
    st.lists(st.tuples(st.sets(st.integers(0, 99), max_size=8), st.integers(0, 90), st.integers(1, 60)), max_size=12),
)
def test_a_log_in_larger_pages_loses_none_and_invents_none(
    unit: int, lazy: bool, turns: list[tuple[set[int], int, int]]
) -> None:
    """Ranges that begin and end anywhere, in any order, asked for again and again."""
    device = PagedDevice(unit, lazy=lazy)
    log = DmaLog(device)
    log.start([(0, 150 * PAGE)])
    assert log.page_size == unit * PAGE
    owed: set[int] = set()
    for written, start, nr_pages in turns:
        for page in written:
            device.write(page)
            owed |= set(range(page // unit * unit, (page // unit + 1) * unit))
        asked = set(range(start, start + nr_pages))
        assert reported(log, start, nr_pages) == owed & asked
        owed -= asked
    assert reported(log, 0, 1024) == {page for page in owed if page < 1024}
    assert reported(log, 0, 1024) == set()


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("chunk", [64, 100, 7])
def test_chunks_that_cut_the_device_s_pages_lose_none(unit: int, chunk: int) -> None:
    device = PagedDevice(unit)
    log = DmaLog(device)
    log.start([(3 * PAGE, 500 * PAGE)])
    for page in (3, 70, 99, 111, 500):
        device.write(page)
    got = dirty_pages(fetch(log.report, [PageRange(3, 90), PageRange(93, 410)], chunk))
    expected = {page for at in (3, 70, 99, 111, 500) for page in range(at // unit * unit, (at // unit + 1) * unit)}
    assert got == {page for page in expected if 3 <= page < 503}


def test_what_is_written_before_the_first_question_is_not_lost_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = PagedDevice(16)
    log = DmaLog(device)
    call = device.call

    def call_and_write(request: Request, arg: Any = 0) -> int:
        done = call(request, arg)
        if struct.unpack_from("=II", arg)[1] == SET | 6:
            device.write(33)
        return done

    monkeypatch.setattr(device, "call", call_and_write)
    log.start([(32 * PAGE, 16 * PAGE)])
    assert reported(log, 32, 16) == set(range(32, 48))


@pytest.mark.parametrize("size", [0, 1, 2048, 4097, 12288, 1 << 31, 1 << 63])
def test_a_page_size_that_is_none_is_refused_and_the_log_ended(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LoggingDevice()
    call = device.call

    def lie(request: Request, arg: Any = 0) -> int:
        done = call(request, arg)
        if struct.unpack_from("=II", arg)[1] == SET | 6:
            struct.pack_into("=Q", arg, 8, size)
        return done

    monkeypatch.setattr(device, "call", lie)
    with pytest.raises(UnsupportedError, match=f"in pages of {size} bytes, which is not a page size"):
        DmaLog(device).start([(0, PAGE)])
    assert device.stops == 1
