# SPDX-License-Identifier: MIT
"""The wire format of vfio-user, and a connection that never takes more memory than one message of allowed size.

Sizes are in bytes, integers little-endian. The format is the one of QEMU's ``docs/interop/vfio-user.rst``.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DATA: Final = 1 << 20
"""Bytes of region data in one message."""
MAX_FDS: Final = 8
"""File descriptors in one message."""
_OVERHEAD: Final = 4096
"""What a message has besides region data: headers, the client's JSON."""
MAX_MESSAGE: Final = MAX_DATA + _OVERHEAD
_DISCARD: Final = 1 << 16
# Plain numbers, as this is done for each access to a register, and enumerations take microseconds.
_RIGHTS_SPACE: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_CLOSE_ON_EXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED: Final = int(socket.MSG_CTRUNC)

HEADER: Final = struct.Struct("<HHIII")  # message id, command, size with header, flags, error
VERSION: Final = struct.Struct("<HH")  # major, minor; JSON follows
DMA_MAP: Final = struct.Struct("<IIQQQ")  # argsz, flags, offset, address, size
DMA_UNMAP: Final = struct.Struct("<IIQQ")  # argsz, flags, address, size
DEVICE_INFO: Final = struct.Struct("<IIII")  # argsz, flags, regions, interrupts
REGION_INFO: Final = struct.Struct("<IIIIQQ")  # argsz, flags, index, offset of capabilities, size, offset
SPARSE_MMAP: Final = struct.Struct("<HHIII")  # id, version, next, areas, reserved; areas follow
SPARSE_AREA: Final = struct.Struct("<QQ")  # offset, size
IRQ_INFO: Final = struct.Struct("<IIII")  # argsz, flags, index, count
IRQ_SET: Final = struct.Struct("<IIIII")  # argsz, flags, index, start, count
REGION_ACCESS: Final = struct.Struct("<QII")  # offset, region, count; data follows

TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0
TYPE_REPLY: Final = 1
NO_REPLY: Final = 1 << 4
ERROR: Final = 1 << 5


class Command(IntEnum):
    """The commands that clients send; others are answered with EOPNOTSUPP."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DEVICE_RESET = 13


class Message(NamedTuple):
    """A message as it came; its file descriptors are the receiver's to close.

    :ivar fault: an errno when it cannot be what it claims to be; then what it carries does not count.
    """

    ident: int
    command: int
    flags: int
    payload: bytes
    fds: list[int]
    fault: int = 0

    def close(self) -> None:
        """Close the file descriptors that nobody has taken."""
        while self.fds:
            os.close(self.fds.pop())


class ClosedError(Exception):
    """The client has gone."""


class Connection:
    """One client's socket, never waited for. Not thread-safe.

    A message that is too long is read and forgotten, one that claims to be shorter than its header counts as a bare
    header: both come out as messages with a fault, and what follows them is understood again.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket: Final = sock
        self._header = bytearray()
        self._payload = bytearray()
        self._fds: list[int] = []
        self._fault = 0
        self._wanted = HEADER.size  # what is missing of the part that is being read
        self._discard = 0
        self._in_payload = False
        self._out: deque[tuple[memoryview, Sequence[int]]] = deque()

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and the file descriptors of a message that never became whole."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    @property
    def sending(self) -> bool:
        """Whether something still waits to be sent; then nothing is to be received, so that no queue grows."""
        return bool(self._out)

    def receive(self) -> Message | None:
        """Return a message if a whole one is there; what is only to be forgotten is read piece by piece.

        :raises ClosedError: the client has gone.
        """
        try:
            while True:
                if self._discard:
                    self._discard -= len(self._take(min(self._discard, _DISCARD)))
                    if self._discard:
                        return None  # others want to be heard, too
                elif self._wanted:
                    part = self._payload if self._in_payload else self._header
                    data = self._take(self._wanted)
                    part += data
                    self._wanted -= len(data)
                elif not self._in_payload:
                    self._begin_payload()
                else:
                    return self._finish()
        except BlockingIOError:
            return None
        except OSError as error:
            raise ClosedError(str(error)) from None

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message, now or as soon as the client takes it.

        :raises ClosedError: the client has gone.
        """
        self._out.append((memoryview(data), fds))
        self.flush()

    def flush(self) -> None:
        """Send what the client takes of what waits."""
        try:
            while self._out:
                data, fds = self._out[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._socket.sendmsg([data], rights)
                if sent == len(data):
                    self._out.popleft()
                else:
                    self._out[0] = (data[sent:], ())
        except BlockingIOError:
            return
        except OSError as error:
            raise ClosedError(str(error)) from None

    def _begin_payload(self) -> None:
        size = HEADER.unpack(self._header)[2]
        self._in_payload = True
        if size < HEADER.size:
            self._fault = errno.EINVAL
        elif size > MAX_MESSAGE:
            self._fault = errno.EMSGSIZE
            self._discard = size - HEADER.size
        else:
            self._wanted = size - HEADER.size

    def _finish(self) -> Message:
        ident, command, _, flags, _ = HEADER.unpack(self._header)
        message = Message(ident, command, flags, bytes(self._payload), self._fds, self._fault)
        self._header.clear()
        self._payload.clear()
        self._fds = []
        self._fault = 0
        self._wanted = HEADER.size
        self._in_payload = False
        return message

    def _take(self, size: int) -> bytes:
        """Receive at most *size* bytes, all of one message, so that its file descriptors are this message's."""
        data, ancillary, flags, _ = self._socket.recvmsg(size, _RIGHTS_SPACE, _CLOSE_ON_EXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & _TRUNCATED or len(self._fds) > MAX_FDS:
            # Too many, or our own table is full. Some of them are not the message that was meant.
            self._fault = self._fault or errno.EMFILE
            while self._fds:
                with contextlib.suppress(OSError):
                    os.close(self._fds.pop())
        if not data:
            raise ClosedError("end of stream")
        return data
