# SPDX-License-Identifier: MIT
"""QEMU's monitor, one command at a time; the ``qemu.qmp`` package does the talking."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vfio_mig import interrupts
from vfio_mig.errors import HostError, OpenError, UsageError, errno_text
from vfio_mig.vm.monitor import NEWS, QMP_WORDS, GoneError, RefusedError, printed

try:
    from qemu.qmp import QMPClient
    from qemu.qmp.error import QMPError
    from qemu.qmp.qmp_client import ExecuteError
except ModuleNotFoundError as error:
    raise HostError("the Python package qemu.qmp is missing", hint="pip install 'vfio_mig[qemu]'") from error

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
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
        self.words = QMP_WORDS
        self.listed: list[str] | None = None
        self.news: list[str] = []
        """Which of :data:`NEWS` have come, each once, since it was last cleared."""
        self.ignores_signals = False
        """Whether it is too late for a signal: what is being undone, or is done, is brought to its end."""
        connected = self._connect(path)
        self.pid: Final[int] = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        """The process that listens there; 0 when it is in a PID namespace that we do not see."""
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("vfio-mig")
        self._client.logger.disabled = True  # this client's alone; its errors reach us as exceptions
        # By itself it keeps every event for ever; so it keeps none
        self._client.events.names = set(NEWS)
        self._client.events.event_filter = self._hear
        try:
            self._greet(connected)
        except BaseException:
            self._loop.close()
            connected.close()
            raise
        interrupts.check()

    def _hear(self, event: Mapping[str, Any]) -> bool:
        name = str(event["event"])
        if name not in self.news:
            self.news.append(name)
        return False

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
        self._hang_up()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer, of which nothing is known; a signal waits for it.

        :raises RefusedError: QEMU does not do it.
        :raises HostError: QEMU is gone, silent, or says what no QEMU says.
        """
        answer = self._execute(command, arguments)
        if not self.ignores_signals:
            interrupts.check()
        return answer

    def monitor(self, line: str) -> str:
        """Run a command of the human monitor and return what it prints, at most the 10 MB that an answer may have."""
        return printed(self.execute("human-monitor-command", **{"command-line": line}), line)

    @interrupts.protected
    def _execute(self, command: str, arguments: dict[str, object]) -> Any:
        try:
            return self._wait(self._client.execute(command, arguments or None), REPLY_SECONDS)
        except ExecuteError as error:
            raise RefusedError(f"{self._path}: QEMU refuses {command!r}: {error}") from error
        except TimeoutError as error:
            raise HostError(f"{self._path}: no answer to {command!r} within {REPLY_SECONDS:.0f} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise GoneError(
                f"{self._path}: QEMU has gone while it was asked for {command!r}", hint=self._hang_up()
            ) from error

    def _hang_up(self) -> str | None:
        """End the connection; tells a QEMU that has said too much, or what is not QMP, from one that has ended."""
        try:
            self._wait(self._client.disconnect(), GREETING_SECONDS)
        except (TimeoutError, QMPError, OSError, EOFError):
            return None
        except ValueError as error:  # asyncio's, of a line longer than it keeps (10 MB); or what is not text
            return f"what it said is not an answer: {' '.join(str(error).split())[:200]}"
        return None

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, seconds))


def _text(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"none within {GREETING_SECONDS:.0f} s"
    return " ".join(str(error).split()) or type(error).__name__
