# SPDX-License-Identifier: MIT
"""The 2017 GVT-g migration RFC: a status ioctl, a dirty bitmap ioctl, a state region."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from vfio_mig.errors import DeviceError, UsageError
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.uapi import ffi

if TYPE_CHECKING:
    from vfio_mig.device import Device, Region
    from vfio_mig.uapi.profile import RfcProfile

# gvt_region and the first fields of gvt_image_header, cdefs/gvt_image.h: type, size, version, data_size
_HEAD: Final = struct.Struct("<IIii")
_HEAD_TYPE: Final = ffi.integer_const("GVT_MIGRATION_HEAD")
_HEAD_PAYLOAD: Final = ffi.sizeof("struct gvt_image_header")
_HEAD_BYTES: Final = ffi.sizeof("struct gvt_region") + _HEAD_PAYLOAD
_DIRTY_HEAD: Final = ffi.sizeof("struct vfio_pci_get_dirty_bitmap")
_PAGE: Final = 4096
DIRTY_PAGES_MAX: Final = 1 << 20
"""Pages of one request; the RFC's kernel allocates unchecked and counts in a signed 32-bit number."""


class GvtRfc(MigrationProtocol):
    """One GVT-g vGPU.

    The dirty bitmap means "may be written": reading clears nothing, and it never becomes empty.
    """

    name: ClassVar[str] = "gvt-rfc"

    def __init__(self, device: Device, profile: RfcProfile, region: Region) -> None:
        super().__init__(device)
        self.profile = profile
        self._region = region
        self._buffer: bytearray | None = None

    @property
    def state_size_max(self) -> int:
        """Bytes: an image must be shorter than the region."""
        return self._region.size - 1

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
        """Have memory for the region, every page of it touched: page faults would prolong the stop."""
        if self._buffer is None:
            self._buffer = bytearray(self._region.size)

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

    def write_state(self, state: memoryview) -> None:
        """Write the whole region in one call; zeros behind the state, as the kernel reads on until it finds some."""
        if len(state) > self.state_size_max:
            raise ValueError(f"{len(state)} bytes do not fit into {self._region.size}")
        whole = memoryview(self._take_buffer())
        whole[: len(state)] = state  # a bytearray's slice would take a copy first
        self.device.pwrite(self._region, 0, whole)

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        """Ask for at most DIRTY_PAGES_MAX pages."""
        if not 0 < nr_pages <= DIRTY_PAGES_MAX:
            raise UsageError(f"{nr_pages} pages in one dirty bitmap request")
        # The kernel copies back one u64 more than the bitmap needs
        tail = ((nr_pages + 63) // 64 + 1) * 8
        request = bytearray(_DIRTY_HEAD + tail)
        struct.pack_into("=QQ", request, 0, start_page * _PAGE, nr_pages)
        result = self.device.call(self.profile.get_dirty, request)
        if result != 0:
            # GET_GFX_DMABUF, upstream's meaning of the number, returns a new fd
            os.close(result)
            raise DeviceError(
                "the dirty bitmap request returned a file: not a device of the RFC", device=self.device.name
            )
        return memoryview(request)[_DIRTY_HEAD : _DIRTY_HEAD + (nr_pages + 7) // 8]
