# SPDX-License-Identifier: MIT
"""A VM without a CPU, for drivers that open a device only for a process that has one: kvmgt answers ESRCH to others.

kvmgt tracks the guest's page tables by the VM's memory slots and reads them through VFIO's mappings, so each piece of
guest memory becomes both. The VM must be this process's own: kvmgt compares the address spaces.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.errors import OpenError, errno_text, right_hint
from vfio_mig.uapi import IoctlError, ffi, kvm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.device import Device
    from vfio_mig.host.devices import HostDevice
    from vfio_mig.host.guest import GuestMemory

NODE: Final = "/dev/kvm"
_VFIO: Final = ffi.integer_const("KVM_DEV_TYPE_VFIO")
_GROUP: Final = ffi.integer_const("KVM_DEV_VFIO_GROUP")
_ADD: Final = ffi.integer_const("KVM_DEV_VFIO_GROUP_ADD")
_HINTS: Final = {
    errno.ENOENT: "load the module, kvm_intel or kvm_amd; it needs virtualization, which the firmware may have off",
    errno.ENODEV: "load the module, kvm_intel or kvm_amd; it needs virtualization, which the firmware may have off",
}


NO_KVM_HINT: Final = "its driver demands a process that has made a KVM VM and attached it, as QEMU with -accel kvm does"


class NoKvmError(OpenError):
    """The driver opens the device only for a process with a KVM (ESRCH)."""


def open_with_kvm(
    open_once: Callable[[], int], attach_vm: Callable[[], list[int]], *, kvm: bool
) -> tuple[int, list[int]]:
    """Open a device, with a VM where its driver demands one, or *kvm* does.

    :returns: what *open_once* returned, and the fds of the VM, none without one; the caller's.
    :raises OpenError: the driver refuses it, or there is no KVM.
    """
    vm: list[int] = []
    try:
        if not kvm:
            try:
                return open_once(), vm
            except NoKvmError:
                pass
        vm = attach_vm()
        return open_once(), vm
    except BaseException:
        _close(vm)
        raise


def reset_for_vm(opened: Device) -> Device:
    """Reset a device that was opened with a VM: kvmgt keeps what the last one has left, page tables of its memory too.

    :raises DeviceError: refused; it is closed.
    """
    try:
        opened.reset()
    except BaseException:
        opened.close()
        raise
    return opened


def attach(device: HostDevice, file: int, memory: Sequence[GuestMemory]) -> list[int]:
    """Make a VM with guest memory and let it know a group, or a device's own node.

    :param file: fd of either, open and not yet asked for the device.
    :returns: fds to keep as long as the device is open, in the order in which they are to be closed.
    :raises OpenError: there is no KVM, or it refused.
    """
    owned: list[int] = []
    try:
        try:
            node = os.open(NODE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or 0
            why = f"{NODE} cannot be opened: {errno_text(number)}"
            problem = f"its driver opens it only for a process with a KVM, and {why}"
            hint = right_hint(f"give this user {NODE}") if number == errno.EACCES else _HINTS.get(number)
            raise OpenError(problem, device=device.name, hint=hint) from error
        owned.append(node)
        vm = _fd_of(uapi.call(node, kvm.CREATE_VM))
        owned.insert(0, vm)
        for slot, piece in enumerate(memory):
            _add_memory(vm, slot, piece)
        owned.insert(0, _make_known(vm, file))
    except IoctlError as error:
        _close(owned)
        raise OpenError(f"a VM for it: {error}", device=device.name) from error
    except BaseException:
        _close(owned)
        raise
    return owned


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _fd_of(fd: int) -> int:
    """Keep an fd that an ioctl has made from programs that this process starts; old kernels do not do so."""
    os.set_inheritable(fd, False)
    return fd


def _add_memory(vm: int, slot: int, piece: GuestMemory) -> None:
    request = ffi.new(
        "struct kvm_userspace_memory_region *",
        {
            "slot": slot,
            "guest_phys_addr": piece.gpa,
            "memory_size": piece.size,
            "userspace_addr": uapi.address_of(piece.map()),
        },
    )
    uapi.call(vm, kvm.SET_USER_MEMORY_REGION, request)


def _make_known(vm: int, file: int) -> int:
    """Make the VM's device for VFIO, and add a file to it; returns the device's fd."""
    request = ffi.new("struct kvm_create_device *", {"type": _VFIO})
    uapi.call(vm, kvm.CREATE_DEVICE, request)
    made = _fd_of(request.fd)
    number = bytearray(file.to_bytes(4, sys.byteorder))  # an int32_t
    attribute = ffi.new("struct kvm_device_attr *", {"group": _GROUP, "attr": _ADD, "addr": uapi.address_of(number)})
    try:
        uapi.call(made, kvm.SET_DEVICE_ATTR, attribute)
    except BaseException:
        os.close(made)
        raise
    return made
