# SPDX-License-Identifier: MIT
"""The sample driver's v2 side by raw ioctls and its debugfs knobs; numbers are from <linux/vfio.h>.

Never ask a driver for PRE_COPY in STOP_COPY but this one, which refuses: there are kernels that never return.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm.raw import PAGE, bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.vm.raw import Guest

DEVICE_FEATURE: Final = 0x3B75
PRECOPY_INFO: Final = 0x3B79
GET: Final = 1 << 16
SET: Final = 1 << 17
PROBE: Final = 1 << 18
MIGRATION: Final = 1
DEVICE_STATE: Final = 2
LOG_START: Final = 6
LOG_STOP: Final = 7
LOG_REPORT: Final = 8
DATA_SIZE: Final = 9

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
NAMES: Final = ("error", "stop", "running", "stop-copy", "resuming", "running-p2p", "pre-copy", "pre-copy-p2p")
SAVING: Final = (PRE_COPY, PRE_COPY_P2P, STOP_COPY)

KERNEL: Final = tuple(int(part) for part in platform.release().split(".")[:2])
HAS_PRE_COPY: Final = KERNEL >= (6, 2)
STATES: Final = (STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, *((PRE_COPY, PRE_COPY_P2P) if HAS_PRE_COPY else ()))
pre_copy = pytest.mark.skipif(not HAS_PRE_COPY, reason="PRE_COPY is of Linux 6.2")


class V2:
    """A vGPU's v2 side; data fds are closed with it."""

    def __init__(self, guest: Guest) -> None:
        self.guest: Final = guest
        self.fd: Final = guest.device.fd

    def feature(self, flags: int, payload: bytes = b"", argsz: int | None = None) -> bytes:
        size = 8 + len(payload) if argsz is None else argsz
        buffer = bytearray(struct.pack("<II", size, flags) + payload)
        fcntl.ioctl(self.fd, DEVICE_FEATURE, buffer, True)
        return bytes(buffer[8:])

    def flags(self) -> int:
        return int.from_bytes(self.feature(GET | MIGRATION, bytes(8)), "little")

    def state(self) -> int:
        state = int(struct.unpack("<Ii", self.feature(GET | DEVICE_STATE, bytes(8)))[0])
        assert (self.guest.instance.debugfs / "v2_state").read_text() == NAMES[state] + "\n"
        return state

    def go(self, state: int) -> int:
        """Change the state; the data fd, or -1."""
        return int(struct.unpack("<Ii", self.feature(SET | DEVICE_STATE, struct.pack("<Ii", state, 0)))[1])

    @contextlib.contextmanager
    def session(self, state: int) -> Iterator[int]:
        """Change the state to one that comes with a data fd."""
        fd = self.go(state)
        assert fd >= 0
        try:
            yield fd
        finally:
            os.close(fd)

    def data_size(self) -> int:
        return int.from_bytes(self.feature(GET | DATA_SIZE, bytes(8)), "little")

    def set_knob(self, name: str, value: int | str) -> None:
        (self.guest.instance.debugfs / name).write_text(str(value))

    def knob(self, name: str) -> int:
        return int((self.guest.instance.debugfs / name).read_text())

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


def read_all(fd: int, chunk: int = 1 << 20) -> bytes:
    return b"".join(iter(lambda: os.read(fd, chunk), b""))


def write_all(fd: int, stream: bytes, chunk: int = 1 << 20) -> None:
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
    reply = fcntl.ioctl(fd, PRECOPY_INFO, struct.pack("<IIQQ", argsz, 0xDEAD, 0, 0))
    _, flags, initial, dirty = struct.unpack("<IIQQ", reply)
    assert flags == 0
    return initial, dirty


def fails(code: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code


def log_start(vgpu: V2, iova: int, size: int) -> int:
    """Start logging one range; the page size that the driver chose."""
    ranges = ctypes.create_string_buffer(struct.pack("<QQ", iova, size), 16)
    argument = struct.pack("<QIIQ", PAGE, 1, 0, ctypes.addressof(ranges))
    return int.from_bytes(vgpu.feature(SET | LOG_START, argument)[:8], "little")


def log_report(vgpu: V2, iova: int, size: int) -> set[int]:
    bitmap = ctypes.create_string_buffer(-(-size // PAGE // 64) * 8)
    vgpu.feature(GET | LOG_REPORT, struct.pack("<QQQQ", iova, size, PAGE, ctypes.addressof(bitmap)))
    return bits(bitmap.raw, iova)
