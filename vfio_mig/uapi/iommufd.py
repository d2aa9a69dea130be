# SPDX-License-Identifier: MIT
"""Requests of ``/dev/iommu``: ``_IO`` numbers from ``<linux/iommufd.h>``; IOMMUFD_TYPE is ``;``, as VFIO's."""

from __future__ import annotations

from typing import Final

import ioctl_opt

from vfio_mig.uapi import Request

IOMMUFD_TYPE: Final = ord(";")


def iommufd_request(name: str, nr: int) -> Request:
    """Return the request whose number is ``_IO(IOMMUFD_TYPE, nr)``."""
    return Request(name, ioctl_opt.IO(IOMMUFD_TYPE, nr))


IOAS_ALLOC: Final = iommufd_request("IOMMU_IOAS_ALLOC", 0x81)
IOAS_MAP: Final = iommufd_request("IOMMU_IOAS_MAP", 0x85)
HWPT_ALLOC: Final = iommufd_request("IOMMU_HWPT_ALLOC", 0x89)
GET_HW_INFO: Final = iommufd_request("IOMMU_GET_HW_INFO", 0x8A)
HWPT_SET_DIRTY_TRACKING: Final = iommufd_request("IOMMU_HWPT_SET_DIRTY_TRACKING", 0x8B)
HWPT_GET_DIRTY_BITMAP: Final = iommufd_request("IOMMU_HWPT_GET_DIRTY_BITMAP", 0x8C)
