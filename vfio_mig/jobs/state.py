# SPDX-License-Identifier: MIT
"""Check that a device state is what its protocol says it must be, and that it fits a device."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfio_mig.image.gvt import GvtImage
    from vfio_mig.jobs.session import Session

GVT_RFC = "gvt-rfc"


def _parse(protocol: str, state: bytes) -> GvtImage | None:
    if protocol != GVT_RFC:
        return None
    from vfio_mig.image.gvt import parse

    return parse(memoryview(state))


def check_state(protocol: str, state: bytes) -> None:
    """Parse a device state strictly, where its layout is known.

    :param protocol: name of the protocol it was read with.
    :raises ImageError: it is broken; the message has the byte offset.
    """
    _parse(protocol, state)


def check_state_fits(session: Session, state: bytes) -> list[str]:
    """Parse a state and compare it with the device that is to take it.

    :returns: what is unusual, for the user; empty when nothing is.
    :raises ImageError: it is broken.
    :raises MismatchError: it is of another PCI device or vGPU type.
    """
    image = _parse(session.protocol.name, state)
    if image is None:
        return []
    from vfio_mig.errors import MismatchError
    from vfio_mig.image.gvt import check_target

    vendor, device = struct.unpack("<HH", session.device.config(0, 4))
    name = session.device.name
    try:
        check_target(image, vendor=vendor, device=device)
    except MismatchError as error:
        raise MismatchError(error.problem, device=name, hint=error.hint) from error
    number = session.found.type.rpartition("_")[2]
    if "GVTg_V" in session.found.type and image.type_number != number:
        raise MismatchError(
            f"the state is of a vGPU type _{image.type_number}, the device is {session.found.type}",
            device=name,
            hint="restore into a vGPU of the same type",
        )
    return list(image.warnings)
