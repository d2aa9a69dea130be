# SPDX-License-Identifier: MIT
"""Which protocol does an open device speak? Found out without any ioctl that could mean something else there.

The RFC's two numbers are other requests on other kernels, and mid-2017 kvmgt answers 0 to every unknown one; so flags
and regions decide, and nothing is tried.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig import uapi
from vfio_mig.device import READ, WRITE
from vfio_mig.errors import DeviceError, UnsupportedError
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.protocols.mainline_v2 import MainlineV2
from vfio_mig.uapi import ffi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.device import Device, Region
    from vfio_mig.protocols.base import MigrationProtocol
    from vfio_mig.uapi.profile import RfcProfile

MAINLINE: Final = "no-mainline-migration"
_STOP_COPY: Final = ffi.integer_const("VFIO_MIGRATION_STOP_COPY")
_PCI: Final = ffi.integer_const("VFIO_DEVICE_FLAGS_PCI")
_FEATURE: Final = struct.Struct("=IIQ")  # vfio_device_feature + vfio_device_feature_migration
_GET_MIGRATION: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_GET") | ffi.integer_const(
    "VFIO_DEVICE_FEATURE_MIGRATION"
)
_SIBLINGS: Final = {
    (0x80008086, 4): "the January 2018 form of GVT-g's migration",
    (1 << 30, 1): "the May 2018 form of GVT-g's migration",
    (2, 1): "the February 2019 form of GVT-g's migration",
    (3, 1): "mainline's migration protocol v1",
    (0x80008086, 1): "an OpRegion: a GVT-g without the RFC",
}


class Check(NamedTuple):
    """One condition of the rule: does it hold, and what was found."""

    name: str
    ok: bool
    text: str


def mainline_flags(device: Device) -> int:
    """Return the flags of mainline's migration feature, 0 when the device has none.

    The data starts zeroed and only a non-zero answer is believed: mid-2017 kvmgt returns 0 and writes nothing.
    """
    request = bytearray(_FEATURE.size)
    _FEATURE.pack_into(request, 0, _FEATURE.size, _GET_MIGRATION, 0)
    try:
        device.call(uapi.DEVICE_FEATURE, request)
    except DeviceError:
        return 0
    flags: int = _FEATURE.unpack_from(request)[2]
    return flags


def _state_region(device: Device, profile: RfcProfile) -> Region | None:
    try:
        return device.region(profile.state_index)
    except DeviceError:
        return None


def _region_checks(region: Region | None, profile: RfcProfile) -> Iterator[Check]:
    if region is None:
        yield Check("state-region", False, f"region {profile.state_index} cannot be asked for")
        return
    whole = region.size == profile.image_max and region.flags & READ and region.flags & WRITE
    yield Check("state-region", bool(whole), f"{region.size} bytes, {region.access}; {profile.image_max} rw- expected")
    if region.type is None:
        yield Check("no-region-type", True, "no type capability")
    else:
        known = _SIBLINGS.get((region.type, region.subtype or 0), "something this program does not know")
        yield Check("no-region-type", False, f"type {region.type:#x} subtype {region.subtype}: {known}")


def explain(device: Device, profile: RfcProfile) -> list[Check]:
    """Try every condition of the RFC's rule; the device speaks the RFC if all hold."""
    info = device.info()
    flag = profile.migratable_flag
    checks = [
        Check("pci", bool(info.flags & _PCI), f"device flags {info.flags:#x}"),
        Check("migratable", bool(info.flags & flag), f"flag {flag:#x} in {info.flags:#x}"),
        Check(
            "regions",
            info.num_regions >= profile.num_regions,
            f"{info.num_regions} regions, {profile.num_regions} expected",
        ),
    ]
    # A device without such a region is not asked for it: the index may mean nothing there
    if info.num_regions > profile.state_index:
        checks += _region_checks(_state_region(device, profile), profile)
    else:
        checks.append(Check("state-region", False, f"no region {profile.state_index}"))
    mainline = mainline_flags(device)
    checks.append(Check(MAINLINE, not mainline, f"mainline migration flags {mainline:#x}"))
    return checks


def detect(device: Device, profile: RfcProfile) -> MigrationProtocol:
    """Choose the protocol of an open device: mainline's where it has that, else the RFC's.

    :raises UnsupportedError: it speaks none of ours; the message has the first reason.
    """
    checks = explain(device, profile)
    failed = [check for check in checks if not check.ok]
    mainline = mainline_flags(device) if any(check.name == MAINLINE for check in failed) else 0
    if mainline & _STOP_COPY:
        return MainlineV2(device, mainline)
    if failed:
        raise UnsupportedError(
            f"cannot be migrated: {failed[0].name}: {failed[0].text}",
            device=device.name,
            hint=f"'vfio-mig info {'' if device.borrowed else '--open '}{device.name}' shows every check",
        )
    return GvtRfc(device, profile, device.region(profile.state_index))
