# SPDX-License-Identifier: MIT
"""The 2017 GVT-g migration RFC: a status ioctl, a dirty bitmap ioctl, a state region."""

from __future__ import annotations

import os
import struct
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from vfio_mig.device import READ, WRITE
from vfio_mig.errors import DeviceError, UsageError
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.protocols.family import Condition, Family
from vfio_mig.protocols.flags import mainline_flags
from vfio_mig.protocols.states import Compared
from vfio_mig.ranges import PAGE
from vfio_mig.uapi import ffi
from vfio_mig.uapi.v2 import STOP_COPY_FLAG as STOP_COPY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vfio_mig.decode.gvt_image import GvtImage
    from vfio_mig.device import Device, Region
    from vfio_mig.uapi.profile import RfcProfile

# gvt_region and the first fields of gvt_image_header, cdefs/gvt_image.h: type, size, version, data_size
_HEAD: Final = struct.Struct("<IIii")
_HEAD_TYPE: Final = ffi.integer_const("GVT_MIGRATION_HEAD")
_HEAD_PAYLOAD: Final = ffi.sizeof("struct gvt_image_header")
_HEAD_BYTES: Final = ffi.sizeof("struct gvt_region") + _HEAD_PAYLOAD
_DIRTY_HEAD: Final = ffi.sizeof("struct vfio_pci_get_dirty_bitmap")
DIRTY_PAGES_MAX: Final = 1 << 20
"""Pages of one request; the RFC's kernel allocates unchecked and counts in a signed 32-bit number."""


_PCI: Final = ffi.integer_const("VFIO_DEVICE_FLAGS_PCI")
_BAR0: Final = 0
_IDS: Final = struct.Struct("<HH")  # of the configuration space: vendor, device
_PVINFO_GM: Final = struct.Struct("<IIII")  # low base and size, high base and size
_PVINFO_GM_AT: Final = 0x78040  # cdefs/gvt_pvinfo.h
_SIBLINGS: Final = {
    (0x80008086, 4): "the January 2018 form of GVT-g's migration",
    (1 << 30, 1): "the May 2018 form of GVT-g's migration",
    (2, 1): "the February 2019 form of GVT-g's migration",
    (3, 1): "mainline's migration protocol v1",
    (0x80008086, 1): "an OpRegion: a GVT-g without the RFC",
}


class GvtRfc(MigrationProtocol):
    """One GVT-g vGPU.

    The dirty bitmap means "may be written": reading clears nothing, and it never becomes empty.
    """

    name: ClassVar[str] = "gvt-rfc"
    is_bare: ClassVar[bool] = True
    knows_states: ClassVar[bool] = True

    def __init__(self, device: Device, profile: RfcProfile, region: Region) -> None:
        super().__init__(device)
        self.profile = profile
        self._region = region
        self._buffer: bytearray | None = None
        self._request = bytearray()  # of the last bitmap: new memory for each would be page faults
        self._clear = b""

    @property
    def state_size_max(self) -> int:
        """Bytes: an image must be shorter than the region."""
        return self._region.size - 1

    @classmethod
    def parse_state(cls, state: memoryview) -> _GvtState:
        """Parse an image strictly. How large it may be is a device's to say, by its region; here it is only plausible.

        :raises ImageError: it is broken; the message has the byte offset.
        """
        from vfio_mig.decode.gvt_image import parse
        from vfio_mig.uapi.profile import IMAGE_LARGEST

        return _GvtState(parse(state, image_max=IMAGE_LARGEST))

    def describe(self) -> str:
        """Name the header that the ioctl numbers are from."""
        return f"{self.name} (numbers {self.profile.source})"

    def stop(self) -> None:
        """Send STOP; returns once the running workload has finished."""
        self._set_status(self.profile.stop)

    def start(self) -> None:
        """Send START."""
        self._set_status(self.profile.start)

    def _set_status(self, flags: int) -> None:
        size = ffi.sizeof("struct vfio_pci_status_set")
        self.device.call(
            self.profile.status_set, ffi.new("struct vfio_pci_status_set *", {"argsz": size, "flags": flags})
        )

    def prepare(self) -> None:
        """Have memory for the region and for a bitmap, every page of it touched: page faults would prolong the stop."""
        if self._buffer is None:
            self._buffer = bytearray(self._region.size)
        if not self._request:
            self._clear = bytes((DIRTY_PAGES_MAX // 64 + 1) * 8)
            self._request = bytearray(_DIRTY_HEAD) + self._clear

    def _take_buffer(self) -> bytearray:
        """Return the prepared memory, all zeros: each state has its own."""
        self.prepare()
        buffer, self._buffer = self._buffer, None
        assert buffer is not None  # noqa: S101 -- for the type checker
        return buffer

    def read_state(self) -> memoryview:
        """Read the whole region in one call, as each call is a snapshot of its own, and cut it at its data_size."""
        buffer = self._take_buffer()
        whole = memoryview(buffer)
        try:
            self.device.pread_into(self._region, 0, buffer)
        except DeviceError as error:
            error.hint = "a vGPU of type _1 does not fit into the region and cannot be saved" if error.errno else None
            raise
        kind, size, _, data_size = _HEAD.unpack_from(whole)
        if (kind, size) != (_HEAD_TYPE, _HEAD_PAYLOAD) or not _HEAD_BYTES <= data_size < len(whole):
            raise DeviceError(
                f"the state region holds no image: record type {kind}, {size} bytes, data_size {data_size}",
                device=self.device.name,
            )
        return whole[:data_size]

    def stage(self, chunks: Iterable[bytes | memoryview]) -> Callable[[], None]:
        """Lay out the whole region, which is written in one call; zeros behind the state, where the kernel stops.

        What lies behind the state's data_size, as in a dump of a region, is not written: the kernel would read it.
        """
        whole = memoryview(self._take_buffer())
        length = 0
        for chunk in chunks:
            behind = length + len(chunk)
            if behind > self.state_size_max:
                raise ValueError(f"{behind} bytes do not fit into {self._region.size}")
            whole[length:behind] = chunk  # a bytearray's slice would take a copy first
            length = behind
        kind, size, _, data_size = _HEAD.unpack_from(whole)
        if (kind, size) == (_HEAD_TYPE, _HEAD_PAYLOAD) and _HEAD_BYTES <= data_size < length:
            whole[data_size:length] = bytes(length - data_size)
        return partial(self.device.pwrite, self._region, 0, whole)

    def write_state(self, state: memoryview) -> None:
        """Write the whole region in one call, as :meth:`stage` lays it out."""
        self.stage([state])()

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        """Ask for at most DIRTY_PAGES_MAX pages."""
        if not 0 < nr_pages <= DIRTY_PAGES_MAX:
            raise UsageError(f"{nr_pages} pages in one dirty bitmap request")
        # The kernel copies back one u64 more than the bitmap needs
        tail = ((nr_pages + 63) // 64 + 1) * 8
        request = self._request
        if len(request) == _DIRTY_HEAD + tail:
            memoryview(request)[_DIRTY_HEAD:] = self._clear if len(self._clear) == tail else bytes(tail)
        else:
            request = self._request = bytearray(_DIRTY_HEAD + tail)
        struct.pack_into("=QQ", request, 0, start_page * PAGE, nr_pages)
        result = self.device.call(self.profile.get_dirty, request)
        if result != 0:
            # GET_GFX_DMABUF, upstream's meaning of the number, returns a new fd
            os.close(result)
            raise DeviceError(
                "the dirty bitmap request returned a file: not a device of the RFC", device=self.device.name
            )
        return memoryview(request)[_DIRTY_HEAD : _DIRTY_HEAD + (nr_pages + 7) // 8]


def _state_region(device: Device, profile: RfcProfile) -> Region | None:
    try:
        return device.region(profile.state_index)
    except DeviceError:
        return None


def _of_device(device: Device, profile: RfcProfile) -> RfcProfile:
    """Return which of the built-in profiles a device's state region has the size of; *profile* if a header gave it.

    Nothing but GET_INFO and GET_REGION_INFO is sent, and all conditions are still to be tried.
    """
    from vfio_mig.uapi.profile import BUILT_IN

    if profile not in BUILT_IN or device.info().num_regions <= profile.state_index:
        return profile
    region = _state_region(device, profile)
    same = [one for one in BUILT_IN if region is not None and region.size == one.image_max]
    return same[0] if same else profile


def _region_conditions(region: Region | None, profile: RfcProfile) -> Iterator[Condition]:
    if region is None:
        yield Condition("state-region", False, f"region {profile.state_index} cannot be asked for")
        return
    whole = region.size == profile.image_max and region.flags & READ and region.flags & WRITE
    yield Condition(
        "state-region", bool(whole), f"{region.size} bytes, {region.access}; {profile.image_max} rw- expected"
    )
    if region.type is None:
        yield Condition("no-region-type", True, "no type capability")
    else:
        known = _SIBLINGS.get((region.type, region.subtype or 0), "something this program does not know")
        yield Condition("no-region-type", False, f"type {region.type:#x} subtype {region.subtype}: {known}")


class _GvtState:
    """A vGPU's state, parsed; what of it must be the same on a target can be compared with one."""

    def __init__(self, image: GvtImage) -> None:
        self._image = image
        self.summary: Final = f"{len(image.records)} records, numbered as in {image.dialect}"
        self.warnings: Final = tuple(image.warnings)
        # The GPU reads both where the guest has them. They are not dirty, as nobody but the guest's CPUs writes them.
        self.relies_on: Final = " and ".join(
            f"{len(there)} {name}{'s' if len(there) > 1 else ''}"
            for there, name in ((image.ppgtt, "page table"), (image.workloads, "queued workload"))
            if there
        )

    def compare(self, device: Device) -> Iterator[Compared]:
        """Compare the PCI IDs and the sizes of graphics memory; reads configuration space and PVINFO."""
        from vfio_mig.decode.gvt_image import compare_target

        vendor, number = _IDS.unpack(device.config(0, _IDS.size))
        for one in compare_target(self._image, vendor=vendor, device=number, gm=_graphics_memory(device)):
            yield Compared(*one)


def _graphics_memory(device: Device) -> tuple[int, int] | None:
    """Read the sizes of low and high graphics memory from a vGPU's PVINFO: bytes; None where it cannot be read."""
    try:
        gm = _PVINFO_GM.unpack(device.pread(device.region(_BAR0), _PVINFO_GM_AT, _PVINFO_GM.size))
    except DeviceError:
        return None
    return gm[1], gm[3]


class _GvtRfcFamily(Family):
    """Intel's vGPUs on a kernel that carries the RFC."""

    protocol: ClassVar[type[MigrationProtocol]] = GvtRfc

    def conditions(self, device: Device, profile: RfcProfile) -> list[Condition]:
        """Try every condition of the RFC's rule."""
        profile = _of_device(device, profile)
        info = device.info()
        flag = profile.migratable_flag
        conditions = [
            Condition("pci", bool(info.flags & _PCI), f"device flags {info.flags:#x}"),
            Condition("migratable", bool(info.flags & flag), f"flag {flag:#x} in {info.flags:#x}"),
            Condition(
                "regions",
                info.num_regions >= profile.num_regions,
                f"{info.num_regions} regions, {profile.num_regions} expected",
            ),
        ]
        # A device without such a region is not asked for it: the index may mean nothing there
        if info.num_regions > profile.state_index:
            conditions += _region_conditions(_state_region(device, profile), profile)
        else:
            conditions.append(Condition("state-region", False, f"no region {profile.state_index}"))
        mainline = mainline_flags(device)
        # A driver may have both interfaces; flags without STOP_COPY are of something that nobody knows
        known = not mainline or bool(mainline & STOP_COPY)
        conditions.append(Condition("no-mainline-migration", known, f"mainline migration flags {mainline:#x}"))
        return conditions

    def open(self, device: Device, profile: RfcProfile) -> GvtRfc:
        """Return what drives the vGPU."""
        profile = _of_device(device, profile)
        return GvtRfc(device, profile, device.region(profile.state_index))


FAMILY: Final = _GvtRfcFamily()
