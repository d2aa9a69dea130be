# SPDX-License-Identifier: MIT
"""The kernel's words: structs, constants, ioctl numbers, and one way to call. Knows nothing else of ours.

Requests are ``_IO`` numbers from ``<linux/vfio.h>``: VFIO_TYPE is ``;``, VFIO_BASE is 100. The 2017 RFC's own two are
in :mod:`vfio_mig.uapi.profile`, because they differ between trees; those of ``<linux/iommufd.h>`` in
:mod:`vfio_mig.uapi.iommufd`, those of ``<linux/kvm.h>`` in :mod:`vfio_mig.uapi.kvm`; the numbers and names of
the migration protocol v2 in :mod:`vfio_mig.uapi.v2`.
"""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING, Final, NamedTuple

import ioctl_opt

from vfio_mig.errors import errno_text
from vfio_mig.interrupts import check_cut
from vfio_mig.uapi._generated import ffi as ffi

if TYPE_CHECKING:
    import mmap

    from vfio_mig.uapi._generated import CData

VFIO_TYPE: Final = ord(";")
VFIO_BASE: Final = 100


class Request(NamedTuple):
    """An ioctl: the header's name for it, and its number on the wire."""

    name: str
    number: int


class IoctlError(OSError):
    """The kernel refused an ioctl; knows which one, not on which device."""

    def __init__(self, number: int, request: Request) -> None:
        super().__init__(number, f"{request.name} failed: {errno_text(number)}")
        self.request = request

    def __str__(self) -> str:
        return self.strerror or ""


def vfio_request(name: str, nr: int) -> Request:
    """Return the request whose number is ``_IO(VFIO_TYPE, VFIO_BASE + nr)``."""
    return Request(name, ioctl_opt.IO(VFIO_TYPE, VFIO_BASE + nr))


SET_IOMMU: Final = vfio_request("VFIO_SET_IOMMU", 2)
GROUP_GET_STATUS: Final = vfio_request("VFIO_GROUP_GET_STATUS", 3)
GROUP_SET_CONTAINER: Final = vfio_request("VFIO_GROUP_SET_CONTAINER", 4)
GROUP_GET_DEVICE_FD: Final = vfio_request("VFIO_GROUP_GET_DEVICE_FD", 6)
DEVICE_GET_INFO: Final = vfio_request("VFIO_DEVICE_GET_INFO", 7)
DEVICE_GET_REGION_INFO: Final = vfio_request("VFIO_DEVICE_GET_REGION_INFO", 8)
DEVICE_RESET: Final = vfio_request("VFIO_DEVICE_RESET", 11)
IOMMU_MAP_DMA: Final = vfio_request("VFIO_IOMMU_MAP_DMA", 13)
DEVICE_FEATURE: Final = vfio_request("VFIO_DEVICE_FEATURE", 17)
IOMMU_DIRTY_PAGES: Final = vfio_request("VFIO_IOMMU_DIRTY_PAGES", 17)
"""Of a container; a device's file takes the same number for VFIO_DEVICE_FEATURE."""
DEVICE_BIND_IOMMUFD: Final = vfio_request("VFIO_DEVICE_BIND_IOMMUFD", 18)
DEVICE_ATTACH_IOMMUFD_PT: Final = vfio_request("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 19)
MIG_GET_PRECOPY_INFO: Final = vfio_request("VFIO_MIG_GET_PRECOPY_INFO", 21)


def address_of(buffer: bytearray | memoryview | mmap.mmap) -> int:
    """Return where bytes are, for a request that points there; true until they are resized, unmapped or gone."""
    import ctypes

    # A view would keep a mapping from being closed: this one lives only as long as its address is asked for
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def call(fd: int, request: Request, arg: CData | bytearray | int = 0) -> int:
    """Issue one ioctl and return the kernel's result.

    A positive result may be a new file descriptor (VFIO_GROUP_GET_DEVICE_FD); the caller then owns it. An
    interrupted call is repeated once Python's signal handlers have run.

    :param fd: open group, container or device; stays open.
    :param arg: struct from ``ffi.new`` or bytes, as long as the kernel may write, changed in place; or a number.
    :raises IoctlError: any errno but EINTR.
    :raises KeyboardInterrupt: a signal that ends a job has cut it short.
    """
    # A writable buffer, hence ioctl() returns the kernel's int and not bytes
    buffer = arg if isinstance(arg, int | bytearray) else ffi.buffer(arg)
    while True:
        try:
            result: int = fcntl.ioctl(fd, request.number, buffer)
        except InterruptedError:
            check_cut()
            continue
        except OSError as error:
            raise IoctlError(error.errno or 0, request) from None
        return result
