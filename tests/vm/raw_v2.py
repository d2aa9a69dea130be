# SPDX-License-Identifier: MIT
"""The migration protocol v2 without the library under test; numbers are from <linux/vfio.h>."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final, Self

from tests.vm.raw import DEVICE_GET_REGION_INFO, DEVICE_RESET, GROUP_GET_DEVICE_FD, Container, _request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.host import Instance

DEVICE_FEATURE: Final = _request(17)
FEATURE_GET: Final = 1 << 16
FEATURE_SET: Final = 1 << 17
MIGRATION: Final = 1
MIG_DEVICE_STATE: Final = 2

FLAG_STOP_COPY: Final = 1 << 0
FLAG_P2P: Final = 1 << 1
FLAG_PRE_COPY: Final = 1 << 2

# From STOP_COPY never to PRE_COPY or PRE_COPY_P2P: kernels before 7.2 spin in it for ever.
STOP: Final = 1
RUNNING: Final = 2
STOP_COPY: Final = 3


class Device:
    """An open device. It is reset when it is closed: mtty keeps its state, and oopses when it is reopened in some."""

    def __init__(self, container: Container, name: str) -> None:
        argument = bytearray(name.encode() + b"\0")
        self.fd: Final = int(fcntl.ioctl(container.group_fd, GROUP_GET_DEVICE_FD, argument, True))

    @classmethod
    @contextlib.contextmanager
    def opened(cls, instance: Instance) -> Iterator[Self]:
        container = Container(instance.group)
        try:
            device = cls(container, instance.uuid)
            try:
                yield device
            finally:
                device.reset()
                os.close(device.fd)
        finally:
            container.close()

    def reset(self) -> None:
        fcntl.ioctl(self.fd, DEVICE_RESET)

    def feature(self, flags: int, payload: bytes) -> bytes:
        buffer = bytearray(struct.pack("<II", 8 + len(payload), flags) + payload)
        fcntl.ioctl(self.fd, DEVICE_FEATURE, buffer, True)
        return bytes(buffer[8:])

    def migration_flags(self) -> int:
        return int.from_bytes(self.feature(FEATURE_GET | MIGRATION, bytes(8)), "little")

    def state(self) -> int:
        return int(struct.unpack("<Ii", self.feature(FEATURE_GET | MIG_DEVICE_STATE, bytes(8)))[0])

    def set_state(self, state: int) -> int:
        """Go there; returns the data fd, -1 for none."""
        reply = self.feature(FEATURE_SET | MIG_DEVICE_STATE, struct.pack("<Ii", state, -1))
        return int(struct.unpack("<Ii", reply)[1])

    def _offset(self, region: int) -> int:
        reply = fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0))
        return int(struct.unpack("<IIIIQQ", reply)[5])

    def read(self, region: int, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, self._offset(region) + offset)

    def write(self, region: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.fd, data, self._offset(region) + offset)
