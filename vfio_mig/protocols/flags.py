# SPDX-License-Identifier: MIT
"""The flags of mainline's migration feature, which every family looks at before it believes in itself."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.errors import DeviceError
from vfio_mig.uapi.v2 import GET, MIGRATION

if TYPE_CHECKING:
    from vfio_mig.device import Device

_FEATURE: Final = struct.Struct("=IIQ")  # vfio_device_feature + vfio_device_feature_migration
_GET: Final = GET | MIGRATION


def mainline_flags(device: Device) -> int:
    """Return the flags of VFIO_DEVICE_FEATURE_MIGRATION, 0 when the device has none.

    The data starts zeroed and only a non-zero answer is believed: mid-2017 kvmgt returns 0 and writes nothing.
    """
    request = bytearray(_FEATURE.size)
    _FEATURE.pack_into(request, 0, _FEATURE.size, _GET, 0)
    try:
        device.call(uapi.DEVICE_FEATURE, request)
    except DeviceError:
        return 0
    flags: int = _FEATURE.unpack_from(request)[2]
    return flags
