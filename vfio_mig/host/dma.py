# SPDX-License-Identifier: MIT
"""Guest memory as a device that we opened ourselves sees it: what is mapped, and in whose page tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vfio_mig.host.iommufd import Iommufd


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
