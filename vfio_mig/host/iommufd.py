# SPDX-License-Identifier: MIT
"""``/dev/iommu``: I/O address spaces, guest memory in them, and the IOMMU's own dirty bits (<linux/iommufd.h>).

An object of an iommufd is a number that means something there alone. Every method raises
:class:`~vfio_mig.uapi.IoctlError`, which does not know the device: its caller does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.uapi import ffi, iommufd

if TYPE_CHECKING:
    from vfio_mig.host.guest import GuestMemory

NODE: Final = "/dev/iommu"
_MAP_FLAGS: Final = (
    ffi.integer_const("IOMMU_IOAS_MAP_FIXED_IOVA")
    | ffi.integer_const("IOMMU_IOAS_MAP_WRITEABLE")
    | ffi.integer_const("IOMMU_IOAS_MAP_READABLE")
)
_TRACKING: Final = ffi.integer_const("IOMMU_HWPT_ALLOC_DIRTY_TRACKING")
_CAN_TRACK: Final = ffi.integer_const("IOMMU_HW_CAP_DIRTY_TRACKING")
_ENABLE: Final = ffi.integer_const("IOMMU_HWPT_DIRTY_TRACKING_ENABLE")


class Iommufd:
    """An open ``/dev/iommu``; owns its fd. What is made in it goes with the last fd of it.

    :raises OSError: there is none (Linux before 6.2, or without CONFIG_IOMMUFD), or this user may not open it.
    """

    def __init__(self, path: str = NODE) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Return the open fd.

        :raises ValueError: it has been closed.
        """
        if self._fd < 0:
            raise ValueError("the iommufd is closed")
        return self._fd

    def close(self) -> None:
        """Close it; a second call does nothing. A device that is bound keeps its address space."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def alloc_ioas(self) -> int:
        """Make an empty I/O address space and return its number."""
        request = ffi.new("struct iommu_ioas_alloc *", {"size": ffi.sizeof("struct iommu_ioas_alloc")})
        uapi.call(self.fileno(), iommufd.IOAS_ALLOC, request)
        return request.out_ioas_id

    def map(self, ioas: int, piece: GuestMemory) -> None:
        """Map guest memory for reading and writing at its guest-physical address."""
        request = ffi.new(
            "struct iommu_ioas_map *",
            {
                "size": ffi.sizeof("struct iommu_ioas_map"),
                "flags": _MAP_FLAGS,
                "ioas_id": ioas,
                "user_va": uapi.address_of(piece.map()),
                "length": piece.size,
                "iova": piece.gpa,
            },
        )
        uapi.call(self.fileno(), iommufd.IOAS_MAP, request)

    def can_track(self, device: int) -> bool:
        """Tell whether the IOMMU in front of a bound device can say which pages were written (since Linux 6.7).

        :raises IoctlError: ENOENT for a device without an IOMMU: an mdev.
        """
        request = ffi.new("struct iommu_hw_info *", {"size": ffi.sizeof("struct iommu_hw_info"), "dev_id": device})
        uapi.call(self.fileno(), iommufd.GET_HW_INFO, request)
        return bool(request.out_capabilities & _CAN_TRACK)

    def alloc_tracking(self, device: int, ioas: int) -> int:
        """Make page tables of an address space that can track writes, for one device to be attached to."""
        request = ffi.new(
            "struct iommu_hwpt_alloc *",
            {"size": ffi.sizeof("struct iommu_hwpt_alloc"), "flags": _TRACKING, "dev_id": device, "pt_id": ioas},
        )
        uapi.call(self.fileno(), iommufd.HWPT_ALLOC, request)
        return request.out_hwpt_id

    def set_tracking(self, hwpt: int, *, enabled: bool) -> None:
        """Begin or end to track; to begin a second time drops what was collected (Linux 6.12)."""
        request = ffi.new(
            "struct iommu_hwpt_set_dirty_tracking *",
            {
                "size": ffi.sizeof("struct iommu_hwpt_set_dirty_tracking"),
                "flags": _ENABLE if enabled else 0,
                "hwpt_id": hwpt,
            },
        )
        uapi.call(self.fileno(), iommufd.HWPT_SET_DIRTY_TRACKING, request)

    def take_dirty(self, hwpt: int, iova: int, length: int, page_size: int) -> bytearray:
        """Return the pages written since they were last asked for: bit *k* is the page at *iova* + *k* * *page_size*.

        The kernel answers 0 and reports nothing where tracking was not begun or nothing is mapped, and where it cannot
        write the answer (Linux 6.12): so the answer's memory is touched before.

        :returns: whole 64-bit words.
        """
        words = (length // page_size + 63) // 64
        bitmap = bytearray(bytes(words * 8))  # copied, hence present; and zero, as the kernel only sets bits
        request = ffi.new(
            "struct iommu_hwpt_get_dirty_bitmap *",
            {
                "size": ffi.sizeof("struct iommu_hwpt_get_dirty_bitmap"),
                "hwpt_id": hwpt,
                "iova": iova,
                "length": length,
                "page_size": page_size,
                "data": uapi.address_of(bitmap),
            },
        )
        uapi.call(self.fileno(), iommufd.HWPT_GET_DIRTY_BITMAP, request)
        return bitmap
