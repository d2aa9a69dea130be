# SPDX-License-Identifier: MIT
"""A played v2 device for the logic of the conformance checks, with defects on demand. No proof of any driver."""

from __future__ import annotations

import errno
import os
import resource
import struct
from typing import TYPE_CHECKING, Any, Final, NoReturn

from vfio_mig import uapi
from vfio_mig.conform.kit.rig import Rig
from vfio_mig.conform.kit.v2_device import HEAD, INFO, NEEDS, WITH_FD, Kernel, V2Device
from vfio_mig.device import Device, DeviceInfo
from vfio_mig.uapi.v2 import (
    DATA_SIZE,
    DEVICE_STATE,
    ERROR,
    GET,
    LOG_REPORT,
    LOG_START,
    LOG_STOP,
    MIGRATION,
    PRE_COPY,
    PRE_COPY_P2P,
    PRECOPY_INFO_V2,
    PROBE,
    RESUMING,
    RUNNING,
    SAVING,
    SET,
    STOP,
    STOP_COPY,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from vfio_mig.uapi import Request
    from vfio_mig.uapi._generated import CData

MAGIC: Final = b"played\0\0"
FIRST_FD: Final = 600
DEVICE_FD: Final = 599
PAGE: Final = 4096


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


class Session:
    """The file behind a data fd."""

    def __init__(self, data: bytes, *, saving: bool, initial: int = 0) -> None:
        self.data = bytearray(data)
        self.saving = saving
        self.position = 0
        self.is_live = True
        self.initial = initial
        """Bytes that can be read in PRE_COPY."""
        self.broken = 0
        self.again = 0


class Played(Kernel):
    """The kernel with one device in it.

    :param flags: of the migration feature.
    :param defects: what is wrong with it; each is looked for by its name below.
    """

    def __init__(self, flags: int = 7, defects: Collection[str] = (), *, kind: int = 1) -> None:
        self.flags = flags
        self.defects = set(defects)
        self.state = RUNNING
        self.memory = bytes(range(200))
        self.kind = kind
        self.session: Session | None = None
        self.files: dict[int, Session] = {}
        self.is_logging = False
        self.resets = 0
        self.last = 0
        self.reinit = 0
        """Bytes of new initial data, once in a session, for who has opted in."""
        self.is_opted_in = False

    def __contains__(self, defect: str) -> bool:
        return defect in self.defects

    # --- streams: magic, kind, size, sum; then the memory

    def stream(self) -> bytes:
        salt = os.urandom(8) if "salt" in self else bytes(8)
        head = MAGIC + struct.pack("<III", self.kind, len(self.memory), sum(self.memory)) + salt
        return head + self.memory

    def parse(self, data: bytes) -> bytes:
        if len(data) < 28 or data[:8] != MAGIC:
            fail(errno.EINVAL)
        kind, size, total = struct.unpack_from("<III", data, 8)
        body = data[28:]
        if (kind != self.kind and "any kind" not in self) or (any(data[20:28]) and "salt" not in self):
            fail(errno.EINVAL)
        if len(body) < size and "truncation" in self:
            body = body.ljust(size, b"\0")
        elif len(body) != size or (sum(body) != total and "no sum" not in self):
            fail(errno.EINVAL)
        return body

    # --- ioctls

    def ioctl(self, fd: int, request: Request, arg: CData | bytearray | int = 0) -> int:
        if fd in self.files:
            return self._data_ioctl(self.files[fd], request, arg)
        assert fd == DEVICE_FD
        if request == uapi.DEVICE_RESET:
            self.reset()
            return 0
        if request != uapi.DEVICE_FEATURE:
            fail(errno.ENOTTY)
        assert isinstance(arg, bytearray)
        argsz, flags = HEAD.unpack_from(arg)
        if argsz < HEAD.size or flags & ~(0xFFFF | GET | SET | PROBE):
            fail(errno.EINVAL)
        if flags & GET and flags & SET and not flags & PROBE:
            fail(errno.EINVAL)
        self._feature(flags & 0xFFFF, flags & ~0xFFFF, argsz - HEAD.size, arg)
        return 0

    def _offered(self) -> dict[int, tuple[int, int]]:
        """Return features with their operations and bytes of payload."""
        offered = {MIGRATION: (GET, 8), DEVICE_STATE: (GET | SET, 8), DATA_SIZE: (GET, 8)}
        if "no logging" not in self:
            offered |= {LOG_START: (SET, 24), LOG_STOP: (SET, 0), LOG_REPORT: (GET, 32)}
        if self.reinit:
            offered[PRECOPY_INFO_V2] = (SET, 0)
        return offered

    def _feature(self, number: int, operation: int, room: int, arg: bytearray) -> None:
        offered = self._offered()
        if number not in offered:
            fail(errno.EINVAL if "unknown feature" in self else errno.ENOTTY)
        allowed, size = offered[number]
        if operation & (GET | SET) & ~allowed:
            fail(errno.EINVAL)
        if operation & PROBE:
            return
        if not operation & (GET | SET) or (room < size and "argsz" not in self):
            fail(errno.EINVAL)
        self._do(number, operation, arg)

    def _do(self, number: int, operation: int, arg: bytearray) -> None:
        if number == MIGRATION:
            struct.pack_into("=Q", arg, 8, self.flags | (8 if "unknown flag" in self else 0))
        elif number == DATA_SIZE:
            if "size fails" in self and self.state == STOP_COPY:
                fail(errno.EINVAL)
            struct.pack_into("=Q", arg, 8, 1 if "small size" in self else len(self.stream()))
        elif number == DEVICE_STATE:
            self._state(operation, arg)
        elif number == PRECOPY_INFO_V2:
            self.is_opted_in = True
        else:
            self._log(number, arg)

    def _state(self, operation: int, arg: bytearray) -> None:
        if operation & GET:
            if "get stops" in self:
                self.state = STOP
            struct.pack_into("=Ii", arg, 8, self.state, 5 if "get fd" in self else -1)
            return
        target: int = struct.unpack_from("=I", arg, 8)[0]
        struct.pack_into("=Ii", arg, 8, target, self._set(target))

    def supports(self, state: int) -> bool:
        needed = NEEDS.get(state, 0)
        return ERROR < state <= PRE_COPY_P2P and self.flags & needed == needed

    def _set(self, target: int) -> int:
        if target == 8 and "accepts unknown" in self:
            return -1
        if target == ERROR and "accepts error" in self:
            self.state = ERROR
            return -1
        self._refuse(target)
        if self.state == target:
            return -1
        if self.state == RESUMING:
            self._leave_resuming()
        if self.state in SAVING and target in SAVING:
            return self._go_on(target)
        if "keeps session" not in self:
            self._end()
        self.state = target if "wrong state" not in self or target != STOP else RUNNING
        if target not in WITH_FD or ("no fd" in self and target == STOP_COPY):
            return -1
        return self._open(self._begin(target))

    def _refuse(self, target: int) -> None:
        blocked = self.state == STOP_COPY and target in (PRE_COPY, PRE_COPY_P2P)
        if self.state == ERROR or blocked or not self.supports(target):
            if "moves when refused" in self:
                self.state = STOP
            fail(errno.EPERM if "refusal" in self else errno.EINVAL)

    def _go_on(self, target: int) -> int:
        assert self.session is not None
        if target == STOP_COPY:
            self.session.initial = len(self.session.data)
        self.state = target
        return self._open(self.session) if "fd twice" in self else -1

    def _begin(self, target: int) -> Session:
        data = b"" if target == RESUMING else self.stream()
        self.session = Session(data, saving=target != RESUMING, initial=len(data) if target == STOP_COPY else 28)
        if "position" in self:
            self.session.position = self.last
        return self.session

    def _leave_resuming(self) -> None:
        assert self.session is not None
        data = bytes(self.session.data)
        try:
            if self.session.broken and "stop loads" not in self:
                fail(self.session.broken)
            memory = self.memory if "no load" in self else self.parse(data)
        except OSError:
            if "stop loads" in self and self.session.broken:
                return
            self.state = ERROR if "to error" in self else RESUMING
            raise
        self.memory = memory

    def _open(self, session: Session) -> int:
        fd = self._free()
        self.files[fd] = session
        return fd

    def _free(self) -> int:
        fd = next(number for number in range(FIRST_FD, 10_000) if number not in self.files)
        if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            fail(errno.EMFILE)
        return fd

    def _end(self) -> None:
        if self.session is not None:
            self.last = self.session.position
            self.session.is_live = False
        self.session = None

    def reset(self) -> None:
        self.resets += 1
        if "reset fails" in self:
            fail(errno.EAGAIN)
        if "reset keeps session" not in self:
            self._end()
        self.state = STOP if "reset stops" in self else RUNNING

    # --- logging

    def _log(self, number: int, arg: bytearray) -> None:
        import ctypes

        if number == LOG_STOP:
            self.is_logging = False
        elif number == LOG_START:
            size, count, _, pointer = struct.unpack_from("=QIIQ", arg, 8)
            if not count or count > PAGE // 16:
                fail(errno.E2BIG if count else errno.EINVAL)
            if pointer == 8:
                fail(errno.EFAULT)
            table = list(struct.iter_unpack("=QQ", ctypes.string_at(pointer, count * 16)))
            last = -1
            for start, length in table:
                if start % size or length % size:
                    fail(errno.EINVAL)
                if start + length >= 1 << 64:
                    fail(errno.EOVERFLOW)
                if start <= last and "overlap" not in self:
                    fail(errno.EINVAL)
                last = start + length - 1
            if self.is_logging and "start twice" not in self:
                fail(errno.EINVAL)
            self.is_logging = True
        else:
            self._report(*struct.unpack_from("=QQQQ", arg, 8))

    def _report(self, start: int, length: int, size: int, pointer: int) -> None:
        import ctypes

        if size < PAGE or size & (size - 1):
            fail(errno.EINVAL)
        if start + length >= 1 << 64:
            fail(errno.EOVERFLOW)
        if "no bitmaps" in self:
            fail(errno.EOPNOTSUPP)
        if not self.is_logging and "report always" not in self:
            fail(errno.EINVAL)
        words = -(-length // size // 64)
        if "clears buffer" in self:
            ctypes.memset(pointer, 0, words * 8)
        if "ghost bit" in self:
            ctypes.memset(pointer, 1, 1)
        if "long bitmap" in self:
            ctypes.memset(pointer + words * 8, 0, 8)

    # --- data fds

    def _data_ioctl(self, session: Session, request: Request, arg: Any) -> int:
        if request != uapi.MIG_GET_PRECOPY_INFO or not session.saving:
            fail(errno.ENOTTY)
        argsz, flags, _, _ = INFO.unpack(arg)
        if argsz < INFO.size and "info argsz" not in self:
            fail(errno.EINVAL)
        if not session.is_live:
            fail(errno.ENODEV)
        if self.state not in (PRE_COPY, PRE_COPY_P2P) and "info anywhere" not in self:
            fail(errno.EINVAL)
        flags = self._begin_again(session, flags) if self.is_opted_in else flags
        left = max(session.initial - session.position, 0)
        if "initial rises" in self:
            left = session.initial + session.position
        if "no initial" in self:
            left = 0
        INFO.pack_into(arg, 0, argsz, flags, left, 10 if "dirty" in self else 0)
        return 0

    def _begin_again(self, session: Session, flags: int) -> int:
        """Have new initial data when the first were read; returns the flags."""
        if session.position == session.initial and not session.again:
            session.again = session.initial + self.reinit
            session.initial = session.again
        is_new = session.again and (session.position < session.again or "reinit stays" in self)
        if "reinit empty" in self and is_new:
            session.position = session.initial
        return (flags & ~1) | bool(is_new)

    def read(self, fd: int, size: int) -> bytes:
        session = self.files[fd]
        if not session.saving:
            fail(errno.EBADF)
        if not session.is_live:
            fail(errno.EIO if "dead errno" in self else errno.ENODEV)
        end = max(min(session.position + size, session.initial), session.position)
        part = bytes(session.data[session.position : end])
        session.position = end
        if "eof" in self and not part and self.state == STOP_COPY:
            session.position = 0
        if not part and size and self.state != STOP_COPY and "zero" not in self:
            fail(errno.ENOMSG)
        return part

    def write(self, fd: int, data: bytes | memoryview) -> int:
        session = self.files[fd]
        if session.saving:
            fail(errno.EBADF)
        if not session.is_live:
            fail(errno.ENODEV)
        if session.broken:
            fail(session.broken)
        if "full" in self and len(session.data) >= len(self.stream()):
            fail(errno.ENOMEM)
        session.data += data
        if len(session.data) >= 8 and session.data[:8] != MAGIC:
            session.broken = errno.EINVAL
            fail(errno.EINVAL)
        return len(data)

    def read_nowhere(self, fd: int, size: int) -> int:
        if "loses bytes" in self:
            self.files[fd].position += size
        fail(errno.EFAULT)

    def write_nowhere(self, fd: int, size: int) -> int:
        if "adds bytes" in self:
            self.files[fd].data += bytes(size)
        fail(errno.EFAULT)

    def pread(self, fd: int, size: int, offset: int) -> bytes:  # noqa: ARG002
        fail(errno.ESPIPE)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # noqa: ARG002
        fail(errno.ESPIPE)

    def seek(self, fd: int) -> int:  # noqa: ARG002
        if "seek" in self:
            return 0
        fail(errno.ESPIPE)

    def dup(self, fd: int) -> int:
        copy = self._free()
        self.files[copy] = self.files.get(fd, Session(b"", saving=True))
        return copy

    def is_readable(self, fd: int) -> bool:
        return fd in self.files and "poll" not in self

    def is_inheritable(self, fd: int) -> bool:  # noqa: ARG002
        return "inherited" in self

    def close(self, fd: int) -> None:
        del self.files[fd]


class PlayedDevice(Device):
    """What the rig has open; closing it does what the last close does."""

    def __init__(self, kernel: Played) -> None:
        super().__init__("played", -1)
        self.kernel = kernel

    def fileno(self) -> int:
        return DEVICE_FD

    def close(self) -> None:
        self.kernel._end()
        if "close keeps state" not in self.kernel:
            self.kernel.state = RUNNING
        if "close keeps logging" not in self.kernel:
            self.kernel.is_logging = False

    def info(self) -> DeviceInfo:
        return DeviceInfo(2 if "no reset flag" in self.kernel else 3, 9, 5)


def rig_of(kernel: Played, second: Played | None = None, *, dangerous: bool = True) -> Rig:
    """Put a played device on the rig."""
    v2 = V2Device(kernel, DEVICE_FD, dangerous=dangerous)
    v2.flags = kernel.flags
    other = None if second is None else rig_of(second, dangerous=dangerous)
    same = second is not None and second.kind == kernel.kind
    return Rig(PlayedDevice(kernel), v2=v2, opener=lambda _: PlayedDevice(kernel), second=other, same_type=same)
