# SPDX-License-Identifier: MIT
"""Guest memory as a device that we opened ourselves sees it: what is mapped, and in whose page tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import mmap

    from vfio_mig.host.iommufd import Iommufd


class GuestMemory(Protocol):
    """A piece of guest memory: *size* bytes at guest-physical address *gpa*, mapped into this process by map()."""

    @property
    def gpa(self) -> int:
        """Address of its first byte."""

    @property
    def size(self) -> int:
        """Bytes."""

    def map(self) -> mmap.mmap | memoryview:
        """Return the memory, mapped shared and writable; stays the owner's."""


class ContainerDma(NamedTuple):
    """Memory mapped in a type1 container; its fd is the device's.

    :param pieces: (IOVA, bytes) of each mapping.
    """

    fd: int
    pieces: tuple[tuple[int, int], ...]


class IommufdDma(NamedTuple):
    """Memory mapped in an I/O address space of an iommufd, which is the device's.

    :param hwpt: the page tables the device is attached to that can track writes, None when they cannot.
    :param why_not: why they cannot, empty when they can.
    :param pieces: (IOVA, bytes) of each mapping.
    """

    iommufd: Iommufd
    hwpt: int | None
    why_not: str
    pieces: tuple[tuple[int, int], ...]


def address_of(mapping: mmap.mmap | memoryview) -> int:
    """Return where a mapping, or a part of one, is.

    It must stay mapped as long as a kernel that is told the address uses it.
    """
    import ctypes

    # A view would keep the mapping from being closed: it lives only as long as its address is asked for
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
