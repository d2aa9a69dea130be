# SPDX-License-Identifier: MIT
"""QEMU's monitor, one command at a time; the ``qemu.qmp`` package does the talking."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vfio_mig import interrupts
from vfio_mig.errors import HostError, OpenError, UsageError, errno_text

try:
    from qemu.qmp import QMPClient
    from qemu.qmp.error import QMPError
    from qemu.qmp.qmp_client import ExecuteError
except ModuleNotFoundError as error:
    raise HostError("the Python package qemu.qmp is missing", hint="pip install 'vfio_mig[qemu]'") from error

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

GREETING_SECONDS: Final = 10.0
REPLY_SECONDS: Final = 60.0
"""A pause first waits for the disks."""


class Qmp:
    """A connection to the QMP socket at *path*; a context manager.

    :raises OpenError: nobody answers there.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())  # its errors reach us as exceptions
        connected = self._connect(path)
        self.pid: Final[int] = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        """The process that listens there."""
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient()
        try:
            self._greet(connected)
        except BaseException:
            self._loop.close()
            connected.close()
            raise
        interrupts.check()

    @staticmethod
    def _connect(path: str) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(os.fspath(path))
            connected.setblocking(False)  # as asyncio wants it
        except OSError as error:
            connected.close()
            if error.errno is None:  # Python's own: the path is too long
                raise UsageError(f"{path}: {error}") from error
            raise OpenError(
                f"{path}: cannot connect to QMP: {errno_text(error.errno)}",
                hint="give QEMU a socket with -qmp unix:PATH,server=on,wait=off",
            ) from error
        return connected

    @interrupts.protected
    def _greet(self, connected: socket.socket) -> None:
        try:
            self._wait(self._client.connect(connected), GREETING_SECONDS)
        except (TimeoutError, QMPError, OSError, EOFError) as error:
            raise OpenError(
                f"{self._path}: no QMP greeting: {_text(error)}",
                hint="QEMU talks to one client at a time; if libvirt is it, give QEMU a second -qmp socket",
            ) from error

    def __enter__(self) -> Self:
        return self

    @interrupts.protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(TimeoutError, QMPError, OSError, EOFError):
            self._wait(self._client.disconnect(), GREETING_SECONDS)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer; a signal waits for it.

        :raises HostError: QEMU refuses it, or is gone.
        """
        answer = self._execute(command, arguments)
        interrupts.check()
        return answer

    def monitor(self, line: str) -> str:
        """Run a command of the human monitor and return what it prints."""
        return str(self.execute("human-monitor-command", **{"command-line": line})).replace("\r\n", "\n")

    @interrupts.protected
    def _execute(self, command: str, arguments: dict[str, object]) -> Any:
        try:
            return self._wait(self._client.execute(command, arguments or None), REPLY_SECONDS)
        except ExecuteError as error:
            raise HostError(f"{self._path}: QEMU refuses {command!r}: {error}") from error
        except TimeoutError as error:
            raise HostError(f"{self._path}: no answer to {command!r} within {REPLY_SECONDS:.0f} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise HostError(f"{self._path}: QEMU has gone while it was asked for {command!r}") from error

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, seconds))


def _text(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"none within {GREETING_SECONDS:.0f} s"
    return " ".join(str(error).split()) or type(error).__name__
