# SPDX-License-Identifier: MIT
"""Requests of ``/dev/kvm``, of a VM, and of a device in it (<linux/kvm.h>); their numbers have their structs' sizes."""

from __future__ import annotations

from typing import Final

import ioctl_opt

from vfio_mig.uapi import Request, ffi

KVMIO: Final = 0xAE


_WRITE: Final = ioctl_opt.IOC_WRITE
_BOTH: Final = ioctl_opt.IOC_READ | ioctl_opt.IOC_WRITE


def _request(name: str, nr: int, direction: int, size: int) -> Request:
    return Request(name, ioctl_opt.IOC(direction, KVMIO, nr, size))


CREATE_VM: Final = _request("KVM_CREATE_VM", 0x01, ioctl_opt.IOC_NONE, 0)
SET_USER_MEMORY_REGION: Final = _request(
    "KVM_SET_USER_MEMORY_REGION", 0x46, _WRITE, ffi.sizeof("struct kvm_userspace_memory_region")
)
CREATE_DEVICE: Final = _request("KVM_CREATE_DEVICE", 0xE0, _BOTH, ffi.sizeof("struct kvm_create_device"))
SET_DEVICE_ATTR: Final = _request("KVM_SET_DEVICE_ATTR", 0xE1, _WRITE, ffi.sizeof("struct kvm_device_attr"))
