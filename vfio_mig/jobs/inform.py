# SPDX-License-Identifier: MIT
"""Tell what devices there are and what one of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vfio_mig.errors import UnsupportedError
from vfio_mig.jobs.session import Settings, find, holder_of, load_numbers

if TYPE_CHECKING:
    from vfio_mig.device import Region
    from vfio_mig.protocols.detect import Check


class Listed(NamedTuple):
    """A device of this host; nothing was opened to find it.

    :param holder: command of the process that has it open; ``?`` where this user may not look into every process.
    """

    device: str
    kind: str
    type: str
    parent: str
    driver: str
    node: str | None
    holder_pid: int | None
    holder: str | None


class DeviceInfo(NamedTuple):
    """What an open device says of itself.

    :param how: ``group`` or ``borrowed``.
    :param flags: of VFIO_DEVICE_GET_INFO.
    :param protocol: the protocol it speaks, None when a check fails.
    """

    device: str
    kind: str
    type: str
    how: str
    flags: int
    regions: list[Region]
    checks: list[Check]
    protocol: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            **self._asdict(),
            "regions": [region._asdict() for region in self.regions],
            "checks": [check._asdict() for check in self.checks],
        }


def list_devices() -> list[Listed]:
    """Return all VFIO devices of this host with who has them open."""
    from vfio_mig.host.discover import Host
    from vfio_mig.host.holders import sees_all

    unseen = None if sees_all() else "?"
    listed = []
    for found in Host().devices():
        holder = holder_of(found)
        listed.append(
            Listed(
                found.name,
                found.kind,
                found.type,
                found.parent,
                found.driver,
                found.node,
                None if holder is None else holder.pid,
                unseen if holder is None else holder.command,
            )
        )
    return listed


def device_info(name: str, settings: Settings | None = None) -> DeviceInfo:
    """Open or borrow a device and ask it; sends no request of the RFC."""
    from vfio_mig.host.opening import open_device
    from vfio_mig.protocols.detect import Check, detect, explain

    settings = settings or Settings()
    profile = load_numbers(settings)
    found = find(name)
    with open_device(found, pid=settings.pid, fd=settings.fd) as device:
        checks = explain(device, profile)
        try:
            found_protocol = detect(device, profile)
            protocol = found_protocol.name
            if found_protocol.streams:  # the rest is the RFC's business
                checks = [Check("mainline-migration", True, found_protocol.describe())]
        except UnsupportedError:
            protocol = None
        return DeviceInfo(
            found.name,
            found.kind,
            found.type,
            device.how,
            device.info().flags,
            device.regions(),
            checks,
            protocol,
        )
