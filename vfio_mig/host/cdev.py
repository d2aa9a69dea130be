# SPDX-License-Identifier: MIT
"""Open a device through its own node, /dev/vfio/devices/vfioN, and an iommufd (since Linux 6.6).

Such a node may be opened any number of times, but only one open file of it can be bound to an iommufd, and until it is
bound nothing works on it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig import uapi
from vfio_mig.device import Device
from vfio_mig.errors import DeviceBusyError, OpenError, errno_text, right_hint
from vfio_mig.host.dma import IommufdDma
from vfio_mig.host.iommufd import NODE, Iommufd
from vfio_mig.host.kvm import NO_KVM_HINT, NoKvmError, open_with_kvm, reset_for_vm
from vfio_mig.host.kvm import attach as attach_vm
from vfio_mig.uapi import IoctlError, ffi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.host.devices import HostDevice
    from vfio_mig.host.guest import GuestMemory

_NODE_HINTS: Final = {
    errno.ENOENT: "is udev running?",
    errno.EACCES: "give this user the device's node",
}
_IOMMU_HINTS: Final = {
    errno.ENOENT: "load the module: modprobe iommufd",
    errno.EACCES: "give this user /dev/iommu",
}
_BIND_HINTS: Final = {
    errno.EPERM: "the IOMMU does not remap interrupts; iommufd's parameter allow_unsafe_interrupts lifts this",
    errno.ENOTTY: "this kernel has no VFIO device nodes: --via group",
}
_BUSY: Final = (errno.EINVAL, errno.EBUSY)
"""What BIND says of a device that another open file is bound to, and of one whose group is open."""


class Nodes(NamedTuple):
    """The two open files that a device is opened through; :meth:`close` is for when it is not."""

    device: int
    iommufd: Iommufd

    def close(self) -> None:
        """Close both."""
        os.close(self.device)
        self.iommufd.close()


def open_nodes(device: HostDevice, path: str) -> Nodes:
    """Open a device's node and ``/dev/iommu``; nothing is bound yet, and the device not touched.

    :raises OpenError: either cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_open(device, path, error, _NODE_HINTS) from error
    try:
        _require_same(device, path, fd)
        return Nodes(fd, Iommufd(NODE))
    except OSError as error:
        os.close(fd)
        raise _cannot_open(device, NODE, error, _IOMMU_HINTS) from error
    except BaseException:
        os.close(fd)
        raise


def _cannot_open(device: HostDevice, path: str, error: OSError, hints: dict[int, str]) -> OpenError:
    number = error.errno or 0
    hint = hints.get(number)
    if number == errno.EACCES:
        hint = right_hint(hint or "")
    return OpenError(f"cannot open {path}: {errno_text(number)}", device=device.name, hint=hint)


def _require_same(device: HostDevice, path: str, fd: int) -> None:
    """Refuse a node of an earlier device of this number, which nobody has removed."""
    if os.fstat(fd).st_rdev != device.cdev_number:
        raise OpenError(f"{path} is the node of another device", device=device.name, hint="is udev running?")


def bind(device: HostDevice, path: str, nodes: Nodes, memory: Sequence[GuestMemory], *, kvm: bool = False) -> Device:
    """Bind an open node to its iommufd and map guest memory; takes the two files over, also if it fails.

    :param kvm: give it a VM in any case; by default where its driver demands one.
    :raises DeviceBusyError: another process has the device.
    :raises OpenError: the kernel refused.
    """
    vm: list[int] = []
    try:
        devid, vm = open_with_kvm(
            lambda: _bind(device, path, nodes), lambda: attach_vm(device, nodes.device, memory), kvm=kvm
        )
        dma = _map(device, nodes, devid, memory) if memory else None
    except BaseException:
        nodes.close()
        for fd in vm:
            os.close(fd)
        raise
    opened = Device(device.name, nodes.device, how="cdev", node=path, dma=dma, owned=[nodes.iommufd, *vm])
    return reset_for_vm(opened) if vm else opened


def _bind(device: HostDevice, path: str, nodes: Nodes) -> int:
    request = ffi.new(
        "struct vfio_device_bind_iommufd *",
        {"argsz": ffi.sizeof("struct vfio_device_bind_iommufd"), "iommufd": nodes.iommufd.fileno()},
    )
    try:
        uapi.call(nodes.device, uapi.DEVICE_BIND_IOMMUFD, request)
    except IoctlError as error:
        if error.errno in _BUSY:
            where = path if error.errno == errno.EINVAL else device.node
            raise DeviceBusyError(f"{where} is open in another process: {error}", device=device.name) from error
        if error.errno == errno.ESRCH:
            raise NoKvmError(str(error), device=device.name, hint=NO_KVM_HINT) from error
        raise OpenError(str(error), device=device.name, hint=_BIND_HINTS.get(error.errno or 0)) from error
    return request.out_devid


def _map(device: HostDevice, nodes: Nodes, devid: int, memory: Sequence[GuestMemory]) -> IommufdDma:
    iommufd = nodes.iommufd
    try:
        ioas = iommufd.alloc_ioas()
    except IoctlError as error:
        raise OpenError(str(error), device=device.name) from error
    for piece in memory:
        try:
            iommufd.map(ioas, piece)
        except IoctlError as error:
            raise OpenError(f"guest memory {piece}: {error}", device=device.name) from error
    hwpt, why_not = _attach(device, nodes, devid, ioas)
    return IommufdDma(iommufd, hwpt, why_not, tuple((piece.gpa, piece.size) for piece in memory))


def _attach(device: HostDevice, nodes: Nodes, devid: int, ioas: int) -> tuple[int | None, str]:
    """Attach the device to page tables that can track writes, or, where there are none, to whatever the kernel makes.

    :returns: the former, None for the latter; and why.
    """
    why_not = "its IOMMU cannot track writes"
    try:
        if nodes.iommufd.can_track(devid):
            hwpt = nodes.iommufd.alloc_tracking(devid, ioas)
            attach(nodes.device, hwpt)
            return hwpt, ""
    except IoctlError as error:
        why_not = "there is no IOMMU in front of it" if error.errno == errno.ENOENT else f"its IOMMU: {error}"
    try:
        attach(nodes.device, ioas)
    except IoctlError as error:
        raise OpenError(f"guest memory: {error}", device=device.name) from error
    return None, why_not


def attach(fd: int, table: int) -> None:
    """Have a bound device use an address space, or page tables, of its iommufd; instead of those it used.

    :raises IoctlError: refused.
    """
    request = ffi.new(
        "struct vfio_device_attach_iommufd_pt *",
        {"argsz": ffi.sizeof("struct vfio_device_attach_iommufd_pt"), "pt_id": table},
    )
    uapi.call(fd, uapi.DEVICE_ATTACH_IOMMUFD_PT, request)
