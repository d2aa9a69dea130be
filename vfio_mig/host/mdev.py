# SPDX-License-Identifier: MIT
"""Create and remove mdevs."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

from vfio_mig.errors import DeviceBusyError, DeviceError, DeviceNotFoundError, OpenError, UsageError, errno_text
from vfio_mig.host.discover import UUID, Host
from vfio_mig.host.holders import find_holder

_HINTS: Final = {
    errno.EEXIST: "an mdev with this UUID exists",
    errno.ENOSPC: "the parent has no room for another; 'vfio-mig mdev types' shows how many fit",
    errno.EUSERS: "the parent has no room for another; 'vfio-mig mdev types' shows how many fit",
    errno.EACCES: "run as root",
    errno.EPERM: "run as root",
}


class MdevType(NamedTuple):
    """A type that a parent offers.

    :param type: with its prefix, as the directory is called.
    :param available: how many more can be created.
    :param description: the driver's words, empty when it has none.
    """

    parent: str
    type: str
    name: str
    available: int
    description: str


def types(host: Host | None = None) -> list[MdevType]:
    """Return every type of every parent."""
    host = host or Host()
    found = []
    for parent in host.names("sys/class/mdev_bus"):
        directory = f"sys/class/mdev_bus/{parent}/mdev_supported_types"
        for name in host.names(directory):
            available = host.read(directory, name, "available_instances")
            found.append(
                MdevType(
                    parent,
                    name,
                    host.read(directory, name, "name") or name.partition("-")[2],
                    int(available) if available.isdigit() else 0,
                    host.read(directory, name, "description"),
                )
            )
    return found


def _choose(type_name: str, parent: str | None, host: Host) -> MdevType:
    matching = [one for one in types(host) if type_name in (one.type, one.name) and parent in (None, one.parent)]
    if not matching:
        raise DeviceNotFoundError(f"no parent offers mdev type {type_name!r}", hint="see 'vfio-mig mdev types'")
    if len(matching) > 1:
        where = ", ".join(f"{one.parent}/{one.type}" for one in matching)
        raise UsageError(f"{type_name!r} is ambiguous: {where}", hint="say which with --parent")
    return matching[0]


def _write(path: str, text: str, what: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        number = error.errno or 0
        problem = f"{what} failed: {errno_text(number)}"
        if number in (errno.EACCES, errno.EPERM):
            raise OpenError(problem, hint=_HINTS[number]) from error
        raise DeviceError(problem, hint=_HINTS.get(number), errno=number) from error


def create(type_name: str, *, parent: str | None = None, uuid: str | None = None, host: Host | None = None) -> str:
    """Create an mdev and return its UUID, lower-case.

    :param type_name: with or without the parent driver's prefix.
    :param uuid: a new random one by default.
    :raises DeviceNotFoundError: no parent has this type.
    :raises DeviceError: the kernel refused.
    """
    host = host or Host()
    if uuid is None:
        from uuid import uuid4

        uuid = str(uuid4())
    uuid = uuid.lower()
    if not UUID.fullmatch(uuid):
        raise UsageError(f"{uuid!r} is no UUID")
    chosen = _choose(type_name, parent, host)
    path = host.path("sys/class/mdev_bus", chosen.parent, "mdev_supported_types", chosen.type, "create")
    _write(path, uuid, f"creating a {chosen.type} on {chosen.parent}")
    return uuid


def remove(uuid: str, *, host: Host | None = None) -> None:
    """Remove an mdev.

    :raises DeviceBusyError: a process has it open; the kernel would keep us waiting until that ends.
    """
    host = host or Host()
    device = host.find(uuid)
    if device.kind != "mdev":
        raise UsageError("is no mdev", device=device.name)
    holder = find_holder(device)
    if holder is not None:
        raise DeviceBusyError(f"it is open in {holder}", device=device.name, hint="end that process first")
    _write(os.path.join(device.sysfs, "remove"), "1", f"removing {device.name}")
