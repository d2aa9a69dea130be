# SPDX-License-Identifier: MIT
"""Keep a device open, so that other commands can stop, save and start it."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_mig.errors import DeviceBusyError, HostError, UsageError, errno_text
from vfio_mig.interrupts import ENDING, waiting
from vfio_mig.jobs.engine.session import Session, Settings, open_session, survey
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_mig.dirty.memory import Memory, MemoryMap


@dataclass(frozen=True, kw_only=True)
class HoldReport(Report):
    """A device that is kept open.

    :param pid: of the process that has it.
    :param protocol: what it speaks, None if it cannot be migrated.
    """

    device: str
    pid: int
    protocol: str | None


def hold_device(
    name: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ready: Callable[[Session], object],
) -> None:
    """Open a device, call *ready*, and keep the device open until SIGINT, SIGTERM or SIGHUP.

    One that cannot be migrated is kept open, too: the user is told why it cannot.

    :param memory: guest memory, mapped for the device's DMA as long as it is held.
    :param ready: called once other commands can borrow the device.
    :raises OpenError: the device cannot be opened, or another process has it.
    """
    hold_devices([name], settings, memory=memory, ready=lambda sessions: ready(sessions[0]))


def hold_devices(
    names: Sequence[str],
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ready: Callable[[Sequence[Session]], object],
) -> None:
    """Open several devices, and keep them open as :func:`hold_device` does with one.

    :param memory: of the one guest that has all of them.
    :param ready: called once all are open.
    """
    from vfio_mig.dirty.memory import Memory

    # Blocked from here on, so that a signal between ready() and the wait is not lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(Memory(memory, writable=True))
            sessions = [_open(stack, name, settings, guest) for name in names]
            for session in sessions:
                if session.refusal is not None:
                    session.warn(f"{session.refusal}; it is held all the same")
            ready(sessions)
            notify("READY=1")
            signal.sigwait(ENDING)
            notify("STOPPING=1")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _open(stack: contextlib.ExitStack, name: str, settings: Settings | None, guest: Memory) -> Session:
    """Open a device that nobody has open, and mark it as held by this process."""
    from vfio_mig.host.holders import mark_hold

    seen = survey(name)
    (found,) = seen.devices
    holder = seen.holder_of(found)
    if holder is not None:
        raise DeviceBusyError(
            f"it is open in {holder}", device=found.name, hint="every command borrows it there; nothing to hold"
        )
    mark = mark_hold(found)
    if mark >= 0:
        stack.callback(os.close, mark)
    return stack.enter_context(open_session(found.name, settings, memory=guest.maps, seen=seen, any_device=True))


class Background:
    """Lets a process go on without the one that started it, which ends once this one is ready.

    :ivar is_starter: whether this is the process that was started; it has to call :meth:`wait` and to end.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._child = os.fork()
        self.is_starter = self._child != 0
        os.close(self._write if self.is_starter else self._read)
        if not self.is_starter:
            os.setsid()  # what ends the terminal's processes does not end it

    @waiting
    def wait(self) -> int:
        """Wait until the other process is ready, or has failed; returns its exit code.

        :raises KeyboardInterrupt: the other process has been ended.
        """
        try:
            if os.read(self._read, 1):
                return 0
        except KeyboardInterrupt:
            os.kill(self._child, signal.SIGTERM)
            os.waitpid(self._child, 0)
            raise
        code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        return code if code >= 0 else 128 - code

    def ready(self) -> None:
        """Let the starter end; nothing more of this process reaches its terminal."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(nothing, fd)
        os.close(nothing)
        os.write(self._write, b"\n")
        os.close(self._write)


def notify(state: str) -> None:
    """Tell systemd, if it has started us as ``Type=notify``: one datagram, sd_notify(3). Failures are its loss."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    import socket

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def announce(fd: int, text: str) -> None:
    """Write one line to an inherited fd and close it.

    :raises UsageError: there is no such fd, or it takes no writing.
    """
    try:
        os.write(fd, f"{text}\n".encode())
        os.close(fd)
    except OSError as error:
        raise UsageError(f"--ready-fd {fd}: {errno_text(error.errno or 0)}") from error


@contextlib.contextmanager
def pid_file(path: str | None) -> Iterator[Callable[[], None]]:
    """Give a function that writes this process's PID to a file, whole or not at all; removed at the end.

    :raises UsageError: there is something else than a file.
    :raises HostError: it cannot be written.
    """
    if path is None:
        yield lambda: None
        return
    from vfio_mig.image.files import check_target, committed

    check_target(path, force=True)
    made: list[int] = []
    try:
        directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"{path}: cannot open its directory: {errno_text(error.errno or 0)}") from error

    def write() -> None:
        with committed(path, force=True) as file:
            file.write(f"{os.getpid()}\n".encode())
            os.fchmod(file.fileno(), 0o644)  # before it has its name, which may be another file's afterwards
            made.append(os.dup(file.fileno()))  # as long as it is open, its number is no other file's

    try:
        yield write
    finally:
        for fd in made:
            _remove(path, directory, fd)
        os.close(directory)


def _remove(path: str, directory: int, fd: int) -> None:
    """Remove our file, unless another has its name by now."""
    name = os.path.basename(path)
    try:
        if os.path.samestat(os.stat(name, dir_fd=directory, follow_symlinks=False), os.fstat(fd)):
            os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostError(f"{path}: cannot remove it: {errno_text(error.errno or 0)}") from error
    finally:
        os.close(fd)
