# SPDX-License-Identifier: MIT
"""The families of devices that can be driven, and which of them an open device is of.

A family's module is imported when it is asked for, as each command needs one of them. The RFC's two numbers are other
requests on other kernels, and mid-2017 kvmgt answers 0 to every unknown one; so flags and regions decide, and nothing
is tried.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from vfio_mig.errors import UnsupportedError

if TYPE_CHECKING:
    from vfio_mig.device import Device
    from vfio_mig.protocols.base import MigrationProtocol
    from vfio_mig.protocols.family import Condition, Family
    from vfio_mig.protocols.states import KnownState
    from vfio_mig.uapi.profile import RfcProfile

AUTO: Final = "auto"
MODULES: Final = {
    "mainline-v2": "vfio_mig.protocols.mainline_v2",
    "gvt-rfc": "vfio_mig.protocols.gvt_rfc",
}
"""A family's name: the module that has it as ``FAMILY``. A device that speaks several is driven by the first."""


def family(name: str) -> Family | None:
    """Return a family by its name, None if there is none of that name."""
    module = MODULES.get(name)
    if module is None:
        return None
    found: Family = import_module(module).FAMILY
    return found


def families() -> list[Family]:
    """Return all families, the one that is preferred first."""
    return [one for one in map(family, MODULES) if one is not None]


def spoken(device: Device, profile: RfcProfile) -> list[str]:
    """Name the families that an open device is of, the one that is preferred first."""
    return [one.name for one in families() if all(condition.ok for condition in one.conditions(device, profile))]


def explain(device: Device, profile: RfcProfile) -> list[Condition]:
    """Return what speaks for and against the family that comes nearest: one that the device is of, else the last."""
    conditions: list[Condition] = []
    for one in families():
        conditions = one.conditions(device, profile)
        if all(condition.ok for condition in conditions):
            break
    return conditions


def detect(device: Device, profile: RfcProfile, abi: str = AUTO) -> MigrationProtocol:
    """Choose what drives an open device.

    :param abi: the one family to accept, ``auto`` for whichever it is of.
    :raises UnsupportedError: it is of none, or not of that one; the message has the first reason.
    """
    known = families()
    failed: list[Condition] = []
    for one in known:
        if abi not in {AUTO, one.name}:
            continue
        failed = [condition for condition in one.conditions(device, profile) if not condition.ok]
        if not failed:
            return one.open(device, profile)
    others = [] if abi == AUTO else spoken(device, profile)
    if others:
        raise UnsupportedError(f"it speaks {' and '.join(others)}, not {abi}", device=device.name)
    raise UnsupportedError(
        f"cannot be migrated: {failed[0].name}: {failed[0].text}",
        device=device.name,
        hint=f"'vfio-mig info {'' if device.borrowed else '--open '}{device.name}' shows every check",
    )


def parse_state(protocol: str | None, state: bytes | memoryview) -> KnownState | None:
    """Parse the device state of a file strictly where its layout is known; None where it is not.

    :param protocol: name of the protocol it was read with, as the file has it; None for a bare state.
    :raises ImageError: it is broken; the message has the byte offset.
    """
    for one in families():
        if one.protocol.is_bare if protocol is None else one.name == protocol:
            return one.protocol.parse_state(memoryview(state))
    return None
