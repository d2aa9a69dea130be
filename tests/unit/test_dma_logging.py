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
from vfio_mig.errors import DeviceError, UnsupportedError
from vfio_mig.protocols.dma_logging import DmaLog, merge_closest

if TYPE_CHECKING:
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
