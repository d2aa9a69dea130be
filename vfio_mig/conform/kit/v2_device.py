# SPDX-License-Identifier: MIT
"""A device that speaks protocol v2, driven request by request, with every errno as the kernel gave it.

It shares nothing with :mod:`vfio_mig.protocols.mainline_v2`, whose refusals would hide what a driver does. It refuses
only what is known to take the kernel down with it; ``dangerous`` lifts that.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable
from vfio_mig.interrupts import protected
from vfio_mig.uapi.v2 import (
    DEVICE_STATE,
    ERROR,
    GET,
    MIGRATION,
    P2P_FLAG,
    PRE_COPY,
    PRE_COPY_FLAG,
    PRE_COPY_P2P,
    PROBE,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SAVING,
    SET,
    STOP,
    STOP_COPY,
    state_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.uapi import Request
    from vfio_mig.uapi._generated import CData


STATES: Final = tuple(range(STOP, PRE_COPY_P2P + 1))
WITH_FD: Final = (*SAVING, RESUMING)
NEEDS: Final = {RUNNING_P2P: P2P_FLAG, PRE_COPY: PRE_COPY_FLAG, PRE_COPY_P2P: P2P_FLAG | PRE_COPY_FLAG}
"""Flags without which a state does not exist."""

HEAD: Final = struct.Struct("=II")  # struct vfio_device_feature
STATE: Final = struct.Struct("=Ii")  # struct vfio_device_feature_mig_state
INFO: Final = struct.Struct("=IIQQ")  # struct vfio_precopy_info
NUMBER: Final = struct.Struct("=Q")  # the payloads of MIGRATION and MIG_DATA_SIZE
CHUNK: Final = 1 << 20
"""Bytes of one read or write of a data fd."""
STREAM_MAX: Final = 256 << 20
"""Bytes of a state that are kept in memory for the checks of streams."""

HANG: Final = "kernels 6.2 to 7.1 spin in it for ever, with the driver's lock held"
FROM_ERROR: Final = "vfio_mig_get_next_state() WARNs about a device in state error, and a kernel may panic on WARN"


def errno_name(error: OSError) -> str:
    """Name an errno, without the words for it."""
    return errno.errorcode.get(error.errno or 0, f"errno {error.errno}")


def _libc(call: str, *arguments: object) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    done: int = libc[call](*arguments)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done


def _into_nowhere(call: str, fd: int, size: int) -> int:
    from ctypes import c_size_t, c_void_p

    return _libc(call, fd, c_void_p(8), c_size_t(size))


class Kernel:
    """The system calls of the checks; a unit test plays another."""

    def ioctl(self, fd: int, request: Request, arg: CData | bytearray | int = 0) -> int:
        """Do one ioctl."""
        return uapi.call(fd, request, arg)

    def ioctl_read_only(self, fd: int, request: Request, arg: bytes) -> int:
        """Do one ioctl with a struct, less than a page, that the kernel can read but not write."""
        import ctypes

        memory = mmap.mmap(-1, mmap.PAGESIZE)
        memory[: len(arg)] = arg
        address = ctypes.c_void_p(uapi.address_of(memory))
        _libc("mprotect", address, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ)
        return _libc("ioctl", fd, ctypes.c_ulong(request.number), address)

    def read(self, fd: int, size: int) -> bytes:
        """Read from a data fd."""
        return os.read(fd, size)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Write to a data fd."""
        return os.write(fd, data)

    def read_nowhere(self, fd: int, size: int) -> int:
        """Read to an address that is never mapped."""
        return _into_nowhere("read", fd, size)

    def write_nowhere(self, fd: int, size: int) -> int:
        """Write from there."""
        return _into_nowhere("write", fd, size)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read at a position."""
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write at a position."""
        return os.pwrite(fd, data, offset)

    def seek(self, fd: int) -> int:
        """Go to the beginning."""
        return os.lseek(fd, 0, os.SEEK_SET)

    def dup(self, fd: int) -> int:
        """Make another number for the same open file."""
        return os.dup(fd)

    def is_readable(self, fd: int) -> bool:
        """Tell what poll() says of reading, without waiting."""
        import select

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))

    def is_inheritable(self, fd: int) -> bool:
        """Tell whether a program that is started gets it."""
        return os.get_inheritable(fd)

    def close(self, fd: int) -> None:
        """Close a data fd."""
        os.close(fd)


class V2Device:
    """One open device.

    :param fd: the device's; stays the caller's.
    :param dangerous: also ask for what is known to hang a kernel.
    """

    def __init__(self, kernel: Kernel, fd: int, *, dangerous: bool = False) -> None:
        self.kernel: Final = kernel
        self.fd = fd
        self.dangerous: Final = dangerous
        self._fds: list[int] = []
        self.flags = 0

    def feature(self, flags: int, payload: bytes = b"", argsz: int | None = None) -> bytes:
        """Do one VFIO_DEVICE_FEATURE; returns the payload as the kernel left it.

        :param argsz: what to claim, the true size by default.
        :raises OSError: with the kernel's errno.
        """
        size = HEAD.size + len(payload)
        buffer = bytearray(HEAD.pack(size if argsz is None else argsz, flags) + payload)
        self.kernel.ioctl(self.fd, uapi.DEVICE_FEATURE, buffer)
        return bytes(buffer[HEAD.size :])

    def offers(self, feature: int, operations: int) -> bool:
        """Tell by PROBE whether there is a feature."""
        try:
            self.feature(PROBE | operations | feature)
        except OSError:
            return False
        return True

    def read_flags(self) -> int:
        """Ask for the flags of the migration feature."""
        flags: int = NUMBER.unpack(self.feature(GET | MIGRATION, bytes(NUMBER.size)))[0]
        return flags

    def supports(self, state: int) -> bool:
        """Tell by the flags whether the device has a state."""
        needed = NEEDS.get(state, 0)
        return self.flags & needed == needed

    def states(self) -> list[int]:
        """Return the states that it has, without ERROR."""
        return [state for state in STATES if self.supports(state)]

    def get(self) -> tuple[int, int]:
        """Ask for state and data_fd."""
        state, fd = STATE.unpack(self.feature(GET | DEVICE_STATE, STATE.pack(0, -2)))
        return state, fd

    def state(self) -> int:
        """Ask for the state."""
        return self.get()[0]

    def set(self, state: int) -> int:
        """Ask for a state; returns the data fd, which is closed by :meth:`settle`, or -1.

        :raises OSError: with the kernel's errno.
        :raises NotApplicable: it would hang or WARN.
        """
        if not self.dangerous:
            now = self.state()
            if now == STOP_COPY and state in (PRE_COPY, PRE_COPY_P2P):
                raise NotApplicable(HANG)
            if now == ERROR:
                raise NotApplicable(FROM_ERROR)
        reply = self.feature(SET | DEVICE_STATE, STATE.pack(state & 0xFFFFFFFF, -1))
        fd: int = STATE.unpack(reply)[1]
        if fd >= 0:
            self._fds.append(fd)
        return fd

    def go(self, state: int) -> int:
        """Go to a state, as a step of a check that is about something else.

        :raises Deviation: the device does not get there.
        """
        try:
            fd = self.set(state)
        except OSError as error:
            raise Deviation(
                f"going to {state_name(state)} failed: {errno_name(error)}, now in {state_name(self.state())}"
            ) from error
        now = self.state()
        if now != state:
            raise Deviation(f"going to {state_name(state)} ended in {state_name(now)}")
        return fd

    def session(self, state: int) -> int:
        """Go to a state that comes with a data fd."""
        fd = self.go(state)
        if fd < 0:
            raise Deviation(f"{state_name(state)} came without a data fd")
        return fd

    def close(self, fd: int) -> None:
        """Close one data fd."""
        self._fds.remove(fd)
        self.kernel.close(fd)

    def keep(self, fd: int) -> int:
        """Have an fd closed by :meth:`settle`."""
        self._fds.append(fd)
        return fd

    def reset(self) -> None:
        """Reset the device."""
        self.kernel.ioctl(self.fd, uapi.DEVICE_RESET)

    @protected
    def settle(self) -> None:
        """Close every data fd, and bring the device to RUNNING by a reset where it is elsewhere.

        :raises Deviation: that does not help.
        """
        fds, self._fds = self._fds, []
        for fd in fds:
            with suppress(OSError):
                self.kernel.close(fd)
        if self.state() == RUNNING:
            return
        try:
            self.reset()
        except OSError as error:
            raise Deviation(f"RESET failed: {errno_name(error)}") from error
        now = self.state()
        if now != RUNNING:
            raise Deviation(f"after RESET it is in {state_name(now)}")

    # --- streams

    def chunks(self, fd: int, size: int = CHUNK) -> Iterator[bytes]:
        """Yield a saving session's bytes to the end."""
        while chunk := self.kernel.read(fd, size):
            yield chunk

    def read_all(self, fd: int, size: int = CHUNK) -> bytes:
        """Read a saving session to its end.

        :raises NotApplicable: that are more bytes than are kept.
        """
        parts, total = [], 0
        for chunk in self.chunks(fd, size):
            parts.append(chunk)
            total += len(chunk)
            if total > STREAM_MAX:
                raise NotApplicable(f"the state has more than {STREAM_MAX >> 20} MiB")
        return b"".join(parts)

    def write_all(self, fd: int, data: bytes | memoryview, size: int = CHUNK) -> None:
        """Write all of it.

        :raises OSError: with the kernel's errno.
        :raises Deviation: write() takes nothing and reports no error.
        """
        view = memoryview(data)
        while view:
            done = self.kernel.write(fd, view[:size])
            if not 0 < done <= len(view[:size]):
                raise Deviation(f"write() of {len(view[:size])} bytes returned {done}")
            view = view[done:]

    def save(self) -> bytes:
        """Go to STOP_COPY, read all, and go to STOP."""
        fd = self.session(STOP_COPY)
        stream = self.read_all(fd)
        self.close(fd)
        self.go(STOP)
        return stream

    def load(self, stream: bytes, size: int = CHUNK) -> None:
        """Go to RESUMING, write all, and go to STOP."""
        fd = self.session(RESUMING)
        try:
            self.write_all(fd, stream, size)
        except OSError as error:
            raise Deviation(f"writing the device's own stream failed: {errno_name(error)}") from error
        self.close(fd)
        self.go(STOP)

    def precopy_info(self, fd: int, argsz: int = INFO.size) -> tuple[int, int, int]:
        """Ask a session for flags, initial_bytes and dirty_bytes."""
        buffer = bytearray(INFO.pack(argsz, 0, 0, 0))
        self.kernel.ioctl(fd, uapi.MIG_GET_PRECOPY_INFO, buffer)
        _, flags, initial, dirty = INFO.unpack(buffer)
        return flags, initial, dirty
