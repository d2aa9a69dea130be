# SPDX-License-Identifier: MIT
"""Open a device, through its own node or through its group, or borrow it from the process that has it open."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.device import Device
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    DeviceNotFoundError,
    OpenError,
    UnsupportedError,
    errno_text,
    right_hint,
)
from vfio_mig.host.dma import ContainerDma
from vfio_mig.host.holders import duplicate_fd, look, mark_borrower, may_look_into, to_see_more
from vfio_mig.host.kvm import NO_KVM_HINT, NoKvmError, attach, open_with_kvm, reset_for_vm
from vfio_mig.uapi import IoctlError, ffi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.device import Holder
    from vfio_mig.host.devices import HostDevice
    from vfio_mig.host.guest import GuestMemory
    from vfio_mig.host.holders import Unseen, View
    from vfio_mig.words import Via

AUTO: Final = "auto"
GROUP: Final = "group"
CDEV: Final = "cdev"
CONTAINER: Final = "/dev/vfio/vfio"
_TYPE1V2: Final = ffi.integer_const("VFIO_TYPE1v2_IOMMU")
_NOIOMMU: Final = 8  # VFIO_NOIOMMU_IOMMU
_VIABLE: Final = ffi.integer_const("VFIO_GROUP_FLAGS_VIABLE")
_READ_WRITE: Final = ffi.integer_const("VFIO_DMA_MAP_FLAG_READ") | ffi.integer_const("VFIO_DMA_MAP_FLAG_WRITE")

_GROUP_HINTS: Final = {
    errno.ENOENT: "is the device bound to a VFIO driver, and udev running?",
    errno.EACCES: "give this user the group's node",
    errno.EPERM: "a no-IOMMU group needs CAP_SYS_RAWIO, and in a container the device cgroup must allow the node",
}
_CONTAINER_HINTS: Final = {
    errno.ENOENT: "load the module: modprobe vfio",
    errno.ENODEV: "load the module: modprobe vfio_iommu_type1",
    errno.EPERM: "another device of its group belongs to a host driver",
    errno.EACCES: "give this user /dev/vfio/vfio",
}
_UNSAFE: Final = "the IOMMU does not remap interrupts; vfio_iommu_type1's parameter allow_unsafe_interrupts lifts this"


def open_device(
    device: HostDevice,
    *,
    memory: Sequence[GuestMemory] = (),
    pid: int | None = None,
    fd: int | None = None,
    via: Via = AUTO,
    kvm: bool = False,
    view: View | None = None,
) -> Device:
    """Open a device; when a process has it, borrow it there: another one, or this one.

    :param memory: mapped for the device's DMA at its guest-physical addresses, when it is opened and not borrowed.
    :param pid: borrow from this process and no other.
    :param fd: a group's fd, or one of the device's own node, that this process has inherited; stays the caller's.
    :param via: for a device that is opened: ``group``, ``cdev``, or ``auto``, its own node where that and
        ``/dev/iommu`` can be opened, else its group.
    :param kvm: give a device that is opened a VM in any case; by default where its driver demands one.
    :param view: who has it open, where that is known already.
    :raises DeviceBusyError: another process has it and it cannot be borrowed.
    :raises OpenError: it cannot be opened; the message has the errno and what to do.
    """
    if device.node is None and device.cdev is None:
        raise OpenError("it has neither a group nor a node", device=device.name, hint="is its VFIO driver loaded?")
    if fd is not None:
        return _open_inherited(device, fd)
    if pid == 0:
        raise DeviceBusyError(
            "PID 0 is what a process of another PID namespace is called here",
            device=device.name,
            hint="name it by its number in this namespace, from a namespace that shows it",
        )
    view = look([device], pid) if view is None else view
    holders = view.of(device, pid)
    if holders:
        return _borrow(device, holders)
    if pid is not None:
        raise _has_it_not(device, pid)
    try:
        return _open(device, memory, via, kvm=kvm)
    except DeviceBusyError as error:
        error.hint = _why_busy(view.unseen)
        raise


def _has_it_not(device: HostDevice, pid: int) -> DeviceBusyError:
    """Say why nothing can be borrowed from a process: that it does not have the device, or that it does not show it."""
    view = look([device], pid)
    if not os.path.isdir(f"/proc/{pid}"):
        return DeviceBusyError(
            f"there is no PID {pid} here", device=device.name, hint=view.unseen.hint if view.unseen else None
        )
    if may_look_into(pid):
        return DeviceBusyError(f"PID {pid} does not have it open", device=device.name, hint="leave out --pid")
    return DeviceBusyError(
        f"PID {pid} cannot be looked into: {errno_text(errno.EACCES)}", device=device.name, hint=to_see_more()
    )


def _why_busy(unseen: Unseen | None) -> str:
    """Say where a process is that has the device and was not seen."""
    if unseen is not None:
        return f"{unseen.reason}; {unseen.hint}"
    return "no process shows it, so its fd is on its way in a socket, or only io_uring has it; end who opened it"


def _open(device: HostDevice, memory: Sequence[GuestMemory], via: Via, *, kvm: bool) -> Device:
    """Open a device that nobody has, by its node or by its group."""
    path = None if via == GROUP else device.cdev
    if path is not None:
        from vfio_mig.host.cdev import bind, open_nodes

        try:
            nodes = open_nodes(device, path)
        except OpenError:
            if via == CDEV or device.node is None:
                raise
        else:
            return bind(device, path, nodes, memory, kvm=kvm)
    if via == CDEV:
        raise OpenError("it has no node of its own", device=device.name, hint="that takes CONFIG_VFIO_DEVICE_CDEV")
    if device.node is None:
        raise OpenError("it has no group", device=device.name, hint="leave out --via group")
    return _open_group(device, device.node, memory, kvm=kvm)


def _open_inherited(device: HostDevice, fd: int) -> Device:
    """Get the device from a group's fd that we were given, or from one of its own node.

    What a bare fd of a device from a group is, nothing would prove.
    """
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        raise OpenError(f"fd {fd} is not open: {errno_text(error.errno or 0)}", device=device.name) from error
    if device.cdev is not None and os.fstat(fd).st_rdev == device.cdev_number:
        return _require_bound(
            Device(device.name, os.dup(fd), how="inherited", node=device.cdev),
            OpenError(f"fd {fd}, {target}, is not bound to an iommufd", device=device.name, hint="bind it first"),
        )
    try:
        return Device(device.name, _get_device_fd(device, fd), how="inherited", node=device.node)
    except OpenError as error:
        takes = [f"the fd of {device.node}, attached to a container"] if device.node is not None else []
        takes += [f"the fd of {device.cdev}, bound to an iommufd"] if device.cdev is not None else []
        error.hint = f"fd {fd} is {target}; --fd takes {', or '.join(takes)}"
        raise


def _require_bound(opened: Device, otherwise: OpenError) -> Device:
    """Make sure that a device's own node was bound: the kernel answers EINVAL to everything before."""
    try:
        opened.info()
    except DeviceError as error:
        opened.close()
        if error.errno == errno.EINVAL:
            raise otherwise from error
        raise
    except BaseException:
        opened.close()
        raise
    return opened


def _busy(device: HostDevice) -> DeviceBusyError:
    return DeviceBusyError(
        f"{device.node} is open in another process: EBUSY (Device or resource busy)", device=device.name
    )


def _watch(holder: Holder) -> int | None:
    """Return a pidfd by which the end of the holder is seen; -1 when it has ended, None where it cannot be watched."""
    try:
        return os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return -1
    except OSError:
        return None


def _borrow(device: HostDevice, holders: Sequence[Holder]) -> Device:
    """Borrow from the first holder that can lend it, by its group or by the device's own node.

    Of that there may be open files that are not bound, and do not lead to the device.

    :raises OpenError: none can; says what the first one answered.
    """
    mark = mark_borrower(device)
    try:
        opened = _borrow_from_first(device, holders)
    except BaseException:
        if mark >= 0:
            os.close(mark)
        raise
    opened.own(mark)
    return opened


def _borrow_from_first(device: HostDevice, holders: Sequence[Holder]) -> Device:
    first: OpenError | None = None
    for holder in holders:
        borrow = _borrow_by_group if holder.node == device.node else _borrow_node
        try:
            return borrow(device, holder)
        except OpenError as error:
            first = first or error
    raise first or ValueError("no holder")


def _borrow_node(device: HostDevice, holder: Holder) -> Device:
    """Duplicate the holder's fd of the device's own node, which has been compared by its number."""
    fd = duplicate_fd(device, holder)
    return _require_bound(
        Device(device.name, fd, how="borrowed", node=holder.node, holder=holder, pidfd=_watch(holder)),
        OpenError(
            f"{holder} has {holder.node} open and has not bound it to an iommufd",
            device=device.name,
            hint="wait until that process has set it up, or end it",
        ),
    )


def _borrow_by_group(device: HostDevice, holder: Holder) -> Device:
    """Have the holder's own group give us a second fd of the device, so the kernel vouches for what it is."""
    fd = duplicate_fd(device, holder)
    try:
        return Device(
            device.name,
            _get_device_fd(device, fd),
            how="borrowed",
            node=holder.node,
            holder=holder,
            pidfd=_watch(holder),
        )
    except OpenError as error:
        error.problem = f"{holder} has its group open: {error.problem}"
        error.hint = error.hint or "wait until that process has set it up, or end it"
        raise
    finally:
        os.close(fd)


def _get_device_fd(device: HostDevice, group: int) -> int:
    try:
        return uapi.call(group, uapi.GROUP_GET_DEVICE_FD, bytearray(device.name.encode() + b"\0"))
    except IoctlError as error:
        if error.errno == errno.ESRCH:
            raise NoKvmError(str(error), device=device.name, hint=NO_KVM_HINT) from error
        if error.errno == errno.ENODEV:
            raise DeviceNotFoundError(f"group {device.group} does not have it: {error}", device=device.name) from error
        raise OpenError(str(error), device=device.name) from error


def _open_node(device: HostDevice, path: str, hints: dict[int, str]) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _busy(device) from error
        hint = hints.get(error.errno or 0)
        raise OpenError(
            f"cannot open {path}: {errno_text(error.errno or 0)}",
            device=device.name,
            hint=right_hint(hint or "") if error.errno == errno.EACCES else hint,
        ) from error


def _open_group(device: HostDevice, node: str, memory: Sequence[GuestMemory], *, kvm: bool) -> Device:
    if memory and device.is_noiommu:
        raise UnsupportedError(
            f"no IOMMU confines it ({node}), so guest memory cannot be mapped for it",
            device=device.name,
            hint="leave out --memory; such a device reads and writes all memory of this machine",
        )
    owned: list[int] = []
    try:
        group = _open_node(device, node, _GROUP_HINTS)
        owned.append(group)
        container = _open_node(device, CONTAINER, _CONTAINER_HINTS)
        owned.append(container)
        _join(device, group, container)
        for piece in memory:
            _map(device, container, piece)
        dma = ContainerDma(container, tuple((piece.gpa, piece.size) for piece in memory)) if memory else None
        fd, vm = open_with_kvm(lambda: _get_device_fd(device, group), lambda: attach(device, group, memory), kvm=kvm)
        owned += vm
        opened = Device(device.name, fd, how=GROUP, node=node, dma=dma, owned=owned)
    except BaseException:
        for one in owned:
            os.close(one)
        raise
    return reset_for_vm(opened) if vm else opened


def _join(device: HostDevice, group: int, container: int) -> None:
    """Put the group into the container and give that an IOMMU: v2, as only that can track dirty pages."""
    try:
        status = ffi.new("struct vfio_group_status *", {"argsz": ffi.sizeof("struct vfio_group_status")})
        uapi.call(group, uapi.GROUP_GET_STATUS, status)
        if not status.flags & _VIABLE:
            raise OpenError(
                f"group {device.group} is not viable",
                device=device.name,
                hint="bind every device of the group to a VFIO driver, or to none",
            )
        uapi.call(group, uapi.GROUP_SET_CONTAINER, ffi.new("int *", container))
        uapi.call(container, uapi.SET_IOMMU, _NOIOMMU if device.is_noiommu else _TYPE1V2)
    except IoctlError as error:
        is_unsafe = error.request == uapi.SET_IOMMU and error.errno == errno.EPERM
        hint = _UNSAFE if is_unsafe else _CONTAINER_HINTS.get(error.errno or 0)
        raise OpenError(str(error), device=device.name, hint=hint) from error


def _map(device: HostDevice, container: int, piece: GuestMemory) -> None:
    request = ffi.new(
        "struct vfio_iommu_type1_dma_map *",
        {
            "argsz": ffi.sizeof("struct vfio_iommu_type1_dma_map"),
            "flags": _READ_WRITE,
            "vaddr": uapi.address_of(piece.map()),
            "iova": piece.gpa,
            "size": piece.size,
        },
    )
    try:
        uapi.call(container, uapi.IOMMU_MAP_DMA, request)
    except IoctlError as error:
        raise OpenError(f"guest memory {piece}: {error}", device=device.name) from error
