# SPDX-License-Identifier: MIT
"""A device that speaks the 2017 RFC, driven request by request, with every errno as the kernel gave it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.conform.kit.v2_device import errno_name
from vfio_mig.conform.kit.verdict import Deviation
from vfio_mig.interrupts import protected

if TYPE_CHECKING:
    from vfio_mig.conform.kit.v2_device import Kernel
    from vfio_mig.device import Region
    from vfio_mig.uapi.profile import RfcProfile

STATUS: Final = struct.Struct("=II")  # struct vfio_pci_status_set
DIRTY: Final = struct.Struct("=QQ")  # struct vfio_pci_get_dirty_bitmap


class Rfc:
    """One open device.

    :param fd: the device's; stays the caller's.
    :param region: the state region.
    """

    def __init__(self, kernel: Kernel, fd: int, profile: RfcProfile, region: Region) -> None:
        self.kernel: Final = kernel
        self.fd = fd
        self.profile: Final = profile
        self.region: Final = region
        self._own: bytes | None = None
        self._altered = False

    def status(self, flags: int, argsz: int = STATUS.size) -> None:
        """Set the status."""
        self.kernel.ioctl(self.fd, self.profile.status_set, bytearray(STATUS.pack(argsz, flags)))

    def stop(self) -> None:
        """Stop the device."""
        self.status(self.profile.stop)

    def start(self) -> None:
        """Let it go on."""
        self.status(self.profile.start)

    def reset(self) -> None:
        """Reset it."""
        self.kernel.ioctl(self.fd, uapi.DEVICE_RESET)

    def dirty(self, address: int, pages: int, *, fill: int = 0, room: int = 0) -> bytes:
        """Ask for a bitmap; returns all of the buffer behind the request.

        :param fill: what every byte of it is before.
        :param room: bytes behind what the kernel writes at most.
        """
        size = ((pages + 63) // 64 + 1) * 8
        buffer = bytearray(DIRTY.pack(address, pages)) + bytes([fill]) * (size + room)
        result = self.kernel.ioctl(self.fd, self.profile.get_dirty, buffer)
        if result:
            self.kernel.close(result)  # GET_GFX_DMABUF, upstream's meaning of the number, returns an fd
            raise Deviation(f"it returned {result}: this is another ioctl")
        return bytes(buffer[DIRTY.size :])

    def dirty_into_read_only(self, pages: int) -> int:
        """Ask for a bitmap in memory that cannot be written; returns the ioctl's result."""
        request = DIRTY.pack(0, pages) + bytes(((pages + 63) // 64 + 1) * 8)
        return self.kernel.ioctl_read_only(self.fd, self.profile.get_dirty, request)

    def read(self, size: int | None = None, offset: int = 0) -> bytes:
        """Read the region, whole by default."""
        return self.kernel.pread(self.fd, self.region.size if size is None else size, self.region.offset + offset)

    def write(self, data: bytes) -> int:
        """Write the region in one call, padded with zeros to its size."""
        return self.write_at(data.ljust(self.region.size, b"\0"), 0)

    def write_at(self, data: bytes, offset: int) -> int:
        """Write at a place in the region in one call."""
        self._altered = True
        return self.kernel.pwrite(self.fd, data, self.region.offset + offset)

    def own(self) -> bytes:
        """Return the device's own state, read once for all checks: the whole region."""
        if self._own is None:
            self.stop()
            self._own = self.read()
            self.start()
        return self._own

    @protected
    def settle(self) -> None:
        """Have it run, with its own state where another may have been loaded.

        :raises Deviation: that fails.
        """
        try:
            if self._altered and self._own is not None:
                self.reset()
                self.stop()
                self.write(self._own)
            self.start()
        except OSError as error:
            raise Deviation(f"bringing it back to its own state failed: {errno_name(error)}") from error
        self._altered = False
