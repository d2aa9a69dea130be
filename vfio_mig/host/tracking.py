# SPDX-License-Identifier: MIT
"""Which pages did a device write that keeps no log of its own? What the IOMMU, or the container, knows of it.

Only of a device that we opened and mapped guest memory for ourselves, or that a `vfio-mig hold` has: whoever else has
mapped it may be tracking, and what is read here would be missing there; that is asked for the pages that are pinned, if
at all, while it stands still. All other kinds count from :meth:`DmaTracker.start` on, and tell a page once.
"""

from __future__ import annotations

import errno
import struct
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.errors import DeviceBusyError, DeviceError, UnsupportedError, UsageError
from vfio_mig.host.dma import ContainerDma, IommufdDma
from vfio_mig.host.holders import duplicate_container
from vfio_mig.ranges import PAGE
from vfio_mig.uapi import IoctlError, ffi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.device import Device, Holder

_BYTE: Final = 8
_REACH: Final = (1 << 32, 1 << 43)
"""Bytes of a holder's container, from 0 on, that are asked for first and at most (DIRTY_BITMAP_SIZE_MAX of type1)."""
_NOWHERE: Final = (1 << 64) - 2 * PAGE
"""An address that no IOMMU has, and so no mapping."""
_START: Final = ffi.integer_const("VFIO_IOMMU_DIRTY_PAGES_FLAG_START")
_STOP: Final = ffi.integer_const("VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP")
_GET: Final = ffi.integer_const("VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP")
_HEAD: Final = struct.Struct("=II")  # vfio_iommu_type1_dirty_bitmap
_GET_BITMAP: Final = struct.Struct("=IIQQQQQ")  # and vfio_iommu_type1_dirty_bitmap_get with its vfio_bitmap


class DmaTracker(ABC):
    """The pages that one device has written of the guest memory that we mapped for it.

    What collects the writes is read for whole mappings only, and forgets what it has told: a container answers nothing
    else, and an IOMMU clears a whole entry of its page table (2 MiB, 1 GiB, on AMD any power of two) when a part of it
    is asked for. What was not asked for is kept here.

    :param name: the device's, for errors.
    :param pieces: (IOVA, bytes) of each mapping; pages elsewhere the device cannot reach, and they are never dirty.
    """

    caution: str = ""
    """What a user must know of the answers, empty for nothing."""

    def __init__(self, name: str, pieces: Sequence[tuple[int, int]]) -> None:
        self._name = name
        self._set_pieces(pieces)
        self._is_on = False

    def _set_pieces(self, pieces: Sequence[tuple[int, int]]) -> None:
        self._pieces = tuple(pieces)
        self._kept = [bytearray((size // PAGE + _BYTE - 1) // _BYTE) for _, size in self._pieces]

    def start(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        """Track writes from now on, to all that is mapped; a second call changes nothing.

        :param ranges: (IOVA, bytes) that will be asked for; as :meth:`MigrationProtocol.start_log` has it.
        :raises DeviceError: refused.
        """
        del ranges
        if not self._is_on:  # to enable it twice would drop what the IOMMU has collected
            self._switch(on=True)
            self._is_on = True

    def stop(self) -> None:
        """End that; a second call does nothing.

        :raises DeviceError: refused.
        """
        if self._is_on:
            self._is_on = False
            self._switch(on=False)

    def collect(self) -> None:
        """Read what was written up to now, for :meth:`take`.

        :raises DeviceError: refused; what was written is not known any more.
        :raises ValueError: it was not started.
        """
        if not self._is_on:
            raise ValueError("tracking was not started: every page would seem clean")
        self._read_all()

    def _read_all(self) -> None:
        for number, kept in enumerate(self._kept):
            told = self._read(number)
            if any(kept):
                both = int.from_bytes(kept, "little") | int.from_bytes(told[: len(kept)], "little")
                told = bytearray(both.to_bytes(len(kept), "little"))
            kept[:] = told[: len(kept)]

    def take(self, start_page: int, nr_pages: int) -> memoryview:
        """Return which of these pages were written when :meth:`collect` was last called, and forget that.

        :returns: ceil(nr_pages / 8) bytes, bit *i* of byte *j* is page 8*j* + *i* from *start_page*; 4096 bytes each.
        """
        bits = 0
        for kept, (iova, size) in zip(self._kept, self._pieces, strict=True):
            first = max(start_page, iova // PAGE)
            end = min(start_page + nr_pages, (iova + size) // PAGE)
            if first < end:
                bits |= _cut_out(kept, first - iova // PAGE, end - first) << (first - start_page)
        return memoryview(bits.to_bytes((nr_pages + _BYTE - 1) // _BYTE, "little"))

    def fetch(self, start_page: int, nr_pages: int) -> memoryview:
        """Return which of these pages were written since the start or since they were last asked for.

        :returns: as :meth:`take`. For many ranges call :meth:`collect` once and :meth:`take` for each of them.
        :raises DeviceError: refused; what was written is not known any more.
        :raises ValueError: it was not started.
        """
        self.collect()
        return self.take(start_page, nr_pages)

    @abstractmethod
    def _switch(self, *, on: bool) -> None:
        """Begin or end to track."""

    @abstractmethod
    def _read(self, number: int) -> bytearray:
        """Return the written pages of a whole mapping, at least a bit for each page; the kernel forgets them."""

    def _failed(self, error: IoctlError) -> DeviceError:
        return DeviceError(f"tracking its writes: {error}", device=self._name, errno=error.errno or 0)


def _cut_out(bitmap: bytearray, first: int, number: int) -> int:
    """Return so many bits of a bitmap from one on as a number, and clear them."""
    begin, end = first // _BYTE, (first + number + _BYTE - 1) // _BYTE
    bits = int.from_bytes(bitmap[begin:end], "little")
    shift, mask = first - begin * _BYTE, (1 << number) - 1
    bitmap[begin:end] = (bits & ~(mask << shift)).to_bytes(end - begin, "little")
    return bits >> shift & mask


class IommuTracker(DmaTracker):
    """Dirty bits in the IOMMU's page tables (IOMMU_HWPT_*_DIRTY_*, since Linux 6.7)."""

    def __init__(self, name: str, dma: IommufdDma, hwpt: int) -> None:
        super().__init__(name, dma.pieces)
        self._iommufd = dma.iommufd
        self._hwpt = hwpt

    def _switch(self, *, on: bool) -> None:
        try:
            self._iommufd.set_tracking(self._hwpt, enabled=on)
        except IoctlError as error:
            raise self._failed(error) from error

    def _read(self, number: int) -> bytearray:
        iova, size = self._pieces[number]
        try:
            return self._iommufd.take_dirty(self._hwpt, iova, size, PAGE)
        except IoctlError as error:
            raise self._failed(error) from error


class ContainerTracker(DmaTracker):
    """The pages a type1 container takes for dirty (VFIO_IOMMU_DIRTY_PAGES, since Linux 5.8): those that are pinned."""

    caution = (
        "a type1 container cannot tell writes: of a device behind an IOMMU every mapped page counts as dirty each time"
    )

    def __init__(self, name: str, dma: ContainerDma) -> None:
        super().__init__(name, dma.pieces)
        self._fd = dma.fd

    def _switch(self, *, on: bool) -> None:
        self._call(bytearray(_HEAD.pack(_HEAD.size, _START if on else _STOP)))

    def _call(self, request: bytearray) -> None:
        try:
            uapi.call(self._fd, uapi.IOMMU_DIRTY_PAGES, request)
        except IoctlError as error:
            raise self._failed(error) from error

    def _read(self, number: int) -> bytearray:
        iova, size = self._pieces[number]
        bitmap = bytearray((size // PAGE + 63) // 64 * 8)
        where = uapi.address_of(bitmap)
        self._call(bytearray(_GET_BITMAP.pack(_GET_BITMAP.size, _GET, iova, size, PAGE, len(bitmap), where)))
        return bitmap


class HeldTracker(ContainerTracker):
    """The same of a container that a `vfio-mig hold` has made; which mappings are in there, nobody tells.

    A question may span many mappings and what lies between them, and may not end inside of one: so its reach is doubled
    until the kernel has no objection.

    :param container: its fd, the caller's.
    """

    def __init__(self, name: str, container: int) -> None:
        super().__init__(name, ContainerDma(container, ()))

    def start(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        """Track writes from now on, to all that is mapped; a second call changes nothing.

        :raises DeviceError: refused.
        """
        if self._is_on:
            return
        super().start()
        try:
            self._find_reach(max((iova + size for iova, size in ranges), default=0))
        except BaseException:
            self.stop()
            raise

    def _find_reach(self, end: int) -> None:
        reach, most = _REACH
        while True:
            if reach >= end:
                self._set_pieces([(0, reach)])
                try:
                    self._read_all()
                except DeviceError as error:
                    if error.errno != errno.EINVAL or reach >= most:
                        raise
                else:
                    return
            elif reach >= most:
                raise DeviceError(
                    f"tracking its writes: memory up to {end:#x} is more than a container can be asked for",
                    device=self._name,
                    errno=errno.EINVAL,
                )
            reach *= 2


class OwnersTracker(HeldTracker):
    """The pages that are pinned now in the container of a process that may begin to migrate at any time.

    To begin a log that has begun already is no error, and to end it ends it for everybody. So all of it (is there no
    log? begin one, read it, end it) is done while no thread of that process runs: before and after it, its container is
    as it was. A log that was begun by somebody is left alone.

    :param holder: who has the container.
    """

    caution = (
        "the pages are those that are pinned now, by every device in its owner's container; what was written and let "
        "go of before is not among them"
    )

    def __init__(self, name: str, container: int, holder: Holder) -> None:
        super().__init__(name, container)
        self._holder = holder
        self._end = 0

    def start(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        """Note how far is to be asked; nothing goes on between two questions."""
        self._end = max((iova + size for iova, size in ranges), default=0)

    def stop(self) -> None:
        """Nothing goes on between two questions."""

    def collect(self) -> None:
        """Read what is pinned now, for :meth:`take`.

        :raises DeviceBusyError: the holder migrates, or has a log of its own begun, or cannot be made to stand still.
        :raises DeviceError: refused.
        """
        from vfio_mig.host.frozen import while_still

        while_still(self._name, self._holder, self._look)

    def _look(self) -> None:
        from vfio_mig.host.migrating import is_migrating

        if is_migrating(self._holder.pid) or self._is_logged():
            raise DeviceBusyError(
                f"{self._holder} has a log of its own of what is written, as for a migration, and what is read here "
                "would be missing there",
                device=self._name,
                hint="wait until that has ended",
            )
        self._switch(on=True)
        try:
            self._find_reach(self._end)
        finally:
            self._switch(on=False)

    def _is_logged(self) -> bool:
        """Tell whether a log has begun: only then a question is answered, and this one is of no mapping's pages."""
        request = _GET_BITMAP.pack(_GET_BITMAP.size, _GET, _NOWHERE, PAGE, PAGE, 8, uapi.address_of(bytearray(8)))
        try:
            uapi.call(self._fd, uapi.IOMMU_DIRTY_PAGES, bytearray(request))
        except IoctlError as error:
            if error.errno == errno.EINVAL:
                return False
            raise self._failed(error) from error
        return True


def find_owners_tracker(device: Device) -> OwnersTracker:
    """Return what can tell the pages that are pinned in the container of whoever has a device open.

    :raises UsageError: nobody else has it.
    :raises UnsupportedError: it has no container.
    :raises DeviceBusyError: it has several, or may not be looked into.
    """
    holder = device.holder
    if not device.borrowed:
        raise UsageError(f"{device.name}: no other process has it open", hint="leave out --pinned")
    if holder is None:
        raise UsageError(f"{device.name}: nothing tells whose container an inherited fd has", hint="leave out --fd")
    container = duplicate_container(device.name, holder)
    if container is None:
        raise UnsupportedError(
            f"cannot be asked for its pinned pages: {holder} has it without a container (an iommufd has none)",
            device=device.name,
            hint="leave out --memory",
        )
    device.own(container)
    return OwnersTracker(device.name, container, holder)


def find_tracker(device: Device, *, of_holder: bool = False) -> DmaTracker:
    """Return what can tell the writes of a device that has no log of its own: its IOMMU, else its container.

    :param of_holder: ask the container of a `vfio-mig hold`, too. It is borrowed, as the device is, and belongs to
        *device* from then on.

    :raises UnsupportedError: nothing can; says what was looked at.
    """
    dma = device.dma
    if isinstance(dma, IommufdDma) and dma.hwpt is not None:
        return IommuTracker(device.name, dma, dma.hwpt)
    if isinstance(dma, ContainerDma):
        return ContainerTracker(device.name, dma)
    if isinstance(dma, IommufdDma):
        why, hint = (
            dma.why_not,
            "leave out --memory, or open it with --via group: all that is mapped counts as dirty then",
        )
    elif of_holder and device.holder is not None and device.holder.is_hold:
        container = duplicate_container(device.name, device.holder)
        if container is not None:
            device.own(container)
            return HeldTracker(device.name, container)
        why, hint = f"{device.holder} has it without a container", "hold it with --via group"
    elif device.borrowed:
        why = "what was mapped by another process is left alone, as that may be tracking it"
        hint = "ask that process, or leave out --memory"
        if device.holder is not None:
            hint = "'dirty' and 'save' ask that process with --pinned; or leave out --memory"
    else:
        why, hint = "no memory was mapped for it", "name the guest's memory with --memory"
    raise UnsupportedError(
        f"cannot be asked for its dirty pages: it keeps no log of its writes, and {why}",
        device=device.name,
        hint=hint,
    )
