# SPDX-License-Identifier: MIT
"""Create and remove mdevs."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    DeviceNotFoundError,
    OpenError,
    UsageError,
    errno_text,
    right_hint,
)
from vfio_mig.host.discover import UUID, Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.host.devices import HostDevice
    from vfio_mig.host.discover import Snapshot
    from vfio_mig.host.holders import Unseen

_HINTS: Final = {
    errno.EEXIST: "an mdev with this UUID exists",
    errno.ENOSPC: "the parent has no room for another; 'vfio-mig mdev types' shows how many fit",
    errno.EUSERS: "the parent has no room for another; 'vfio-mig mdev types' shows how many fit",
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
    roomy = [one for one in matching if not _is_full(one, host)]
    if len(roomy) > 1:
        where = ", ".join(f"{one.parent}/{one.type}" for one in roomy)
        raise UsageError(f"{type_name!r} is ambiguous: {where}", hint="say which with --parent")
    if not roomy and len(matching) > 1:
        raise DeviceError(
            f"none of the {len(matching)} parents of {type_name!r} has room for another",
            hint="'vfio-mig mdev types' shows how many fit",
            errno=errno.ENOSPC,
        )
    return (roomy or matching)[0]


def _is_full(one: MdevType, host: Host) -> bool:
    """Tell whether a parent says that no more of a type can be created; what it does not say is not known."""
    directory = f"sys/class/mdev_bus/{one.parent}/mdev_supported_types"
    return host.read(directory, one.type, "available_instances") == "0"


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
            raise OpenError(problem, hint=right_hint()) from error
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
        raise UsageError(f"{uuid!r} is not a UUID")
    chosen = _choose(type_name, parent, host)
    path = host.path("sys/class/mdev_bus", chosen.parent, "mdev_supported_types", chosen.type, "create")
    _write(path, uuid, f"creating a {chosen.type} on {chosen.parent}")
    return uuid


def remove(uuid: str, *, host: Host | None = None, seen: Snapshot | None = None) -> None:
    """Remove an mdev that nobody has open: else the kernel would keep us waiting, and nothing could end that.

    What cannot be seen, an fd on its way in a socket for example, is found by opening the group; it stays open until
    the mdev is gone, so that nobody else opens it meanwhile.

    :param seen: the device and who has it open, where that is known already.
    :raises DeviceBusyError: a process has it open, or may have it open where that cannot be seen.
    """
    host = host or Host()
    seen = seen or host.snapshot([uuid])
    device = seen.find(uuid)
    if device.kind != "mdev":
        raise UsageError("is not an mdev", device=device.name)
    holder = seen.holder_of(device)
    if holder is not None:
        raise DeviceBusyError(f"it is open in {holder}", device=device.name, hint="end that process first")
    with _kept_free(device, host, seen.unseen):
        _write(os.path.join(device.sysfs, "remove"), "1", f"removing {device.name}")


@contextmanager
def _kept_free(device: HostDevice, host: Host, unseen: Unseen | None) -> Iterator[None]:
    """Keep others from opening a device, which is proved not to be open.

    A group can be open once, and is open as long as its device is. The device's own node may be open any number of
    times, and be waited for too, without being in use: that only /proc tells.

    :raises DeviceBusyError: it is open, or nothing proves that it is not.
    """
    if unseen is not None and (device.node is None or device.cdev is not None):
        raise DeviceBusyError(
            f"it may be open: {unseen.reason}; the kernel would wait for that process to close it",
            device=device.name,
            hint=unseen.hint,
        )
    fd = -1 if device.node is None else _open_alone(device, host.path(device.node.lstrip("/")), unseen)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _open_alone(device: HostDevice, path: str, unseen: Unseen | None) -> int:
    """Open a group that nobody else has open; -1 where it has no node here, and every process can be seen."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        number = error.errno or 0
        if number == errno.ENOENT and unseen is None:
            return -1
        if number == errno.EBUSY:
            hint = "end the process that has sent its fd away in a socket, or has it in io_uring only"
            if unseen is not None:
                hint = f"{unseen.reason}; {unseen.hint}"
            raise DeviceBusyError(
                f"{device.node} is open in a process that cannot be seen: {errno_text(number)}",
                device=device.name,
                hint=hint,
            ) from error
        raise OpenError(
            f"cannot open {device.node}, to see that nobody else has: {errno_text(number)}",
            device=device.name,
            hint={errno.ENOENT: "is udev running?", errno.EACCES: right_hint(), errno.EPERM: right_hint()}.get(number),
        ) from error
