# SPDX-License-Identifier: MIT
"""A device's own log of its DMA writes: VFIO_DEVICE_FEATURE_DMA_LOGGING_* (<linux/vfio.h>, since Linux 6.1).

The log counts from its start on, and reading it empties it. A device may keep it in larger pages than 4 KiB, and then
empties a whole page of its own when a part of that is asked for: what was not asked for is remembered here.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.errors import DeviceError, UnsupportedError
from vfio_mig.ranges import PAGE, merge, of_sizes
from vfio_mig.uapi.v2 import GET, LOG_REPORT, LOG_START, LOG_STOP, PROBE, SET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.device import Device

RANGES_MAX: Final = 256
"""Ranges of one log: vfio takes a page of them (drivers/vfio/vfio_main.c, LOG_MAX_RANGES)."""
PAGE_SIZE_MAX: Final = 1 << 30
"""Bytes of the largest page that a log is believed to be kept in."""
_BYTE: Final = 8
_HEAD: Final = struct.Struct("=II")  # vfio_device_feature
_CONTROL: Final = struct.Struct("=IIQIIQ")  # and vfio_device_feature_dma_logging_control
_CALL_REPORT: Final = struct.Struct("=IIQQQQ")  # and vfio_device_feature_dma_logging_report
_RANGE: Final = struct.Struct("=QQ")  # vfio_device_feature_dma_logging_range


def merge_closest(ranges: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Return at most *limit* ranges (IOVA, bytes) that cover all given, closing the smallest gaps first."""
    merged = merge(of_sizes(ranges))
    surplus = len(merged) - limit
    if surplus > 0:
        gaps = sorted(range(1, len(merged)), key=lambda at: merged[at][0] - merged[at - 1][1])
        for at in sorted(gaps[:surplus], reverse=True):
            _, end = merged.pop(at)
            merged[at - 1] = (merged[at - 1][0], end)
    return [(start, end - start) for start, end in merged]


def _spread(pages: int, unit: int, units: int) -> int:
    """Set all bits of each group of *unit* bits in which one is set; *unit* is a power of two."""
    shift = 1
    while shift < unit:
        pages |= pages >> shift  # in the end the lowest bit of a group has heard of each of its bits, and of no other
        shift <<= 1
    if unit < _BYTE:
        lowest = int.from_bytes(bytes([{1: 0xFF, 2: 0x55, 4: 0x11}[unit]]) * -(-units * unit // _BYTE), "little")
    else:
        lowest = int.from_bytes((b"\1" + bytes(unit // _BYTE - 1)) * units, "little")
    pages &= lowest
    return (pages << unit) - pages


class DmaLog:
    """The log of one device; it is the device's, so whoever else has it open sees the same one.

    :param device: stays the caller's.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.page_size = 0
        """Bytes of a page as the device logs it, from :meth:`start` on; 4096 or more, a power of two."""
        self._kept: dict[int, int] = {}
        """Of the device's pages that were asked for in part, by number: bit k is its k-th 4 KiB, still to be told."""

    @property
    def exists(self) -> bool:
        """Whether the device says that it has a log; only :meth:`start` shows whether the kernel lets it be read."""
        try:
            for flags in (SET | LOG_START, GET | LOG_REPORT):
                self._device.call(uapi.DEVICE_FEATURE, bytearray(_HEAD.pack(_HEAD.size, PROBE | flags)))
        except DeviceError:
            return False
        return True

    def start(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Begin to log writes to *ranges*: (IOVA, bytes), multiples of 4096; more than 256 are merged.

        :raises DeviceError: refused; EEXIST or EINVAL as a rule because somebody is logging already.
        :raises UnsupportedError: the kernel cannot report: Linux 6.7 or newer without CONFIG_IOMMUFD_DRIVER; or the
            device logs in pages of a size that is none.
        """
        self._kept.clear()
        merged = merge_closest(ranges, RANGES_MAX)
        table = bytearray(b"".join(_RANGE.pack(*range_) for range_ in merged))
        request = bytearray(_CONTROL.pack(_CONTROL.size, SET | LOG_START, PAGE, len(merged), 0, uapi.address_of(table)))
        try:
            self._device.call(uapi.DEVICE_FEATURE, request)
        except DeviceError as error:
            error.problem = f"starting the log of its writes: {error.problem}"
            error.hint = "somebody may be logging already: its owner, if that migrates the device"
            raise
        self.page_size = _CONTROL.unpack(request)[2]
        if not PAGE <= self.page_size <= PAGE_SIZE_MAX or self.page_size & (self.page_size - 1):
            size, self.page_size = self.page_size, PAGE
            self.stop()
            raise UnsupportedError(
                f"logs its writes in pages of {size} bytes, which is not a page size", device=self._device.name
            )
        try:
            page = merged[0][0] // PAGE
            if self.report(page, 1)[0] & 1:  # the question empties the log, and nobody has asked yet
                self._keep(page, 1)
        except DeviceError as error:
            self.stop()
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise UnsupportedError(
                "this kernel cannot report what a device has written",
                device=self._device.name,
                hint="it needs CONFIG_IOMMUFD_DRIVER",
            ) from error

    def report(self, start_page: int, nr_pages: int) -> memoryview:
        """Return the pages written since the start or the last report, and take them out of the log.

        All 4 KiB pages of a larger page of the device's count as written when that does, also those that are asked for
        later.

        :returns: ceil(nr_pages / 8) bytes, bit *i* of byte *j* is page 8*j* + *i* from *start_page*; 4096 bytes each.
        :raises DeviceError: the log is lost; every page has to be taken as written.
        """
        bitmap = bytearray((nr_pages + 63) // 64 * 8)  # the kernel sets bits and clears none
        request = bytearray(
            _CALL_REPORT.pack(
                _CALL_REPORT.size,
                GET | LOG_REPORT,
                start_page * PAGE,
                nr_pages * PAGE,
                PAGE,
                uapi.address_of(bitmap),
            )
        )
        try:
            self._device.call(uapi.DEVICE_FEATURE, request)
        except DeviceError as error:
            error.problem = f"reading the log of its writes: {error.problem}"
            raise
        if self._per_page > 1 or self._kept:
            return self._widen(bitmap, start_page, nr_pages)
        return memoryview(bitmap)[: (nr_pages + 7) // 8]

    @property
    def _per_page(self) -> int:
        """Pages of 4 KiB in one of the device's."""
        return max(self.page_size // PAGE, 1)

    def _widen(self, bitmap: bytearray, start_page: int, nr_pages: int) -> memoryview:
        """Take each page of the device's as written of which a part is, and remember what of it was not asked for."""
        unit = self._per_page
        first, before = divmod(start_page, unit)
        units = -(-(before + nr_pages) // unit)
        asked = ((1 << nr_pages) - 1) << before
        written = _spread(int.from_bytes(bitmap, "little") << before & asked, unit, units)
        owed = written | self._take_kept(first, units)
        for number in {0, units - 1}:  # what is between was asked for as a whole
            left = (owed & ~asked) >> number * unit & (1 << unit) - 1
            self._keep((first + number) * unit, left)
        answer = owed & asked
        return memoryview((answer >> before).to_bytes((nr_pages + 7) // 8, "little"))

    def _keep(self, page: int, pages: int) -> None:
        """Remember pages: bit k of *pages* is page *page* + k, all of them in one page of the device's."""
        number, at = divmod(page, self._per_page)
        if pages:
            self._kept[number] = self._kept.get(number, 0) | pages << at

    def _take_kept(self, first: int, units: int) -> int:
        """Return what is remembered of so many of the device's pages, bit 0 the first 4 KiB, and forget it."""
        pages = 0
        for number in [number for number in self._kept if first <= number < first + units]:
            pages |= self._kept.pop(number) << (number - first) * self._per_page
        return pages

    def stop(self) -> None:
        """End the log.

        :raises DeviceError: refused.
        """
        self._device.call(uapi.DEVICE_FEATURE, bytearray(_HEAD.pack(_HEAD.size, SET | LOG_STOP)))
