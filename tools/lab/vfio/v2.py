# SPDX-License-Identifier: MIT
"""The migration protocol v2 without the library under test; numbers are from <linux/vfio.h>.

From STOP_COPY never to PRE_COPY or PRE_COPY_P2P, but on the sample driver, which refuses: kernels before 7.2 spin in
it for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
from typing import TYPE_CHECKING, Final, Protocol, Self

from tools.lab.vfio.raw import (
    DEVICE_GET_REGION_INFO,
    DEVICE_RESET,
    GROUP_GET_DEVICE_FD,
    PAGE,
    Container,
    bits,
    request,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE_FEATURE: Final = request(17)
PRECOPY_INFO: Final = request(21)
GET: Final = 1 << 16
SET: Final = 1 << 17
PROBE: Final = 1 << 18
MIGRATION: Final = 1
DEVICE_STATE: Final = 2
LOG_START: Final = 6
LOG_STOP: Final = 7
LOG_REPORT: Final = 8
DATA_SIZE: Final = 9

FLAG_STOP_COPY: Final = 1 << 0
FLAG_P2P: Final = 1 << 1
FLAG_PRE_COPY: Final = 1 << 2

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
NAMES: Final = ("error", "stop", "running", "stop-copy", "resuming", "running-p2p", "pre-copy", "pre-copy-p2p")
SAVING: Final = (PRE_COPY, PRE_COPY_P2P, STOP_COPY)

KERNEL: Final = tuple(int(part) for part in platform.release().split(".")[:2])
HAS_PRE_COPY: Final = KERNEL >= (6, 2)
STATES: Final = (STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, *((PRE_COPY, PRE_COPY_P2P) if HAS_PRE_COPY else ()))


class Client:
    """The v2 side of an open device fd."""

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd

    def feature(self, flags: int, payload: bytes = b"", argsz: int | None = None) -> bytes:
        """Ask for a feature; the payload as the kernel left it."""
        size = 8 + len(payload) if argsz is None else argsz
        buffer = bytearray(struct.pack("<II", size, flags) + payload)
        fcntl.ioctl(self.fd, DEVICE_FEATURE, buffer, True)
        return bytes(buffer[8:])

    def flags(self) -> int:
        """Which parts of the protocol the device has."""
        return int.from_bytes(self.feature(GET | MIGRATION, bytes(8)), "little")

    def state(self) -> int:
        """The state that the kernel tells."""
        return int(struct.unpack("<Ii", self.feature(GET | DEVICE_STATE, bytes(8)))[0])

    def go(self, state: int) -> int:
        """Change the state; the data fd, or -1."""
        return int(struct.unpack("<Ii", self.feature(SET | DEVICE_STATE, struct.pack("<Ii", state, 0)))[1])

    @contextlib.contextmanager
    def session(self, state: int) -> Iterator[int]:
        """Change the state to one that comes with a data fd; the fd is closed behind the block."""
        fd = self.go(state)
        assert fd >= 0
        try:
            yield fd
        finally:
            os.close(fd)

    def data_size(self) -> int:
        """Bytes that the driver expects the state to have."""
        return int.from_bytes(self.feature(GET | DATA_SIZE, bytes(8)), "little")

    def save(self, chunk: int = 1 << 20) -> bytes:
        """Save from whatever state, and stay in STOP."""
        with self.session(STOP_COPY) as fd:
            stream = read_all(fd, chunk)
            assert self.go(STOP) == -1
        return stream

    def load(self, stream: bytes, chunk: int = 1 << 20) -> None:
        """Load from whatever state, and stay in STOP."""
        with self.session(RESUMING) as fd:
            write_all(fd, stream, chunk)
            assert self.go(STOP) == -1

    def log_start(self, iova: int, size: int) -> int:
        """Start logging one range; the page size that the driver chose."""
        ranges = ctypes.create_string_buffer(struct.pack("<QQ", iova, size), 16)
        argument = struct.pack("<QIIQ", PAGE, 1, 0, ctypes.addressof(ranges))
        return int.from_bytes(self.feature(SET | LOG_START, argument)[:8], "little")

    def log_report(self, iova: int, size: int) -> set[int]:
        """IOVAs of the pages of a range that the device wrote since the last report."""
        bitmap = ctypes.create_string_buffer(-(-size // PAGE // 64) * 8)
        self.feature(GET | LOG_REPORT, struct.pack("<QQQQ", iova, size, PAGE, ctypes.addressof(bitmap)))
        return bits(bitmap.raw, iova)


class Mdev(Protocol):
    """What a device is opened by."""

    @property
    def uuid(self) -> str: ...

    @property
    def group(self) -> int: ...


class Device(Client):
    """An open device. It is reset when it is closed: mtty keeps its state, and oopses when it is reopened in some."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, instance: Mdev) -> Iterator[Self]:
        """Open an mdev by its group, for the block."""
        container = Container(instance.group)
        try:
            argument = bytearray(instance.uuid.encode() + b"\0")
            device = cls(int(fcntl.ioctl(container.group_fd, GROUP_GET_DEVICE_FD, argument, True)))
            try:
                yield device
            finally:
                device.reset()
                os.close(device.fd)
        finally:
            container.close()

    def reset(self) -> None:
        """Reset the device."""
        fcntl.ioctl(self.fd, DEVICE_RESET)

    def _offset(self, region: int) -> int:
        reply = fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0))
        return int(struct.unpack("<IIIIQQ", reply)[5])

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read of a region."""
        return os.pread(self.fd, size, self._offset(region) + offset)

    def write(self, region: int, offset: int, data: bytes) -> int:
        """Write to a region; how many bytes the driver took."""
        return os.pwrite(self.fd, data, self._offset(region) + offset)


def read_all(fd: int, chunk: int = 1 << 20) -> bytes:
    """Read a data fd to its end."""
    return b"".join(iter(lambda: os.read(fd, chunk), b""))


def write_all(fd: int, stream: bytes, chunk: int = 1 << 20) -> None:
    """Write all of a state to a data fd."""
    view = memoryview(stream)
    while view:
        view = view[os.write(fd, view[:chunk]) :]


def read_now(fd: int) -> bytes:
    """Read in PRE_COPY, to the end that there is now."""
    parts = []
    while True:
        try:
            parts.append(os.read(fd, 1 << 20))
        except OSError as error:
            if error.errno != errno.ENOMSG:
                raise
            return b"".join(parts)


def precopy_info(fd: int, argsz: int = 24) -> tuple[int, int]:
    """Ask how many bytes there are in PRE_COPY: initial ones, dirty ones."""
    reply = fcntl.ioctl(fd, PRECOPY_INFO, struct.pack("<IIQQ", argsz, 0xDEAD, 0, 0))
    _, flags, initial, dirty = struct.unpack("<IIQQ", reply)
    assert flags == 0
    return initial, dirty
