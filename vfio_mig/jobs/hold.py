# SPDX-License-Identifier: MIT
"""Keep a device open, so that other commands can stop, save and start it."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from vfio_mig.errors import DeviceBusyError, HostError, UsageError, errno_text
from vfio_mig.interrupts import ENDING
from vfio_mig.jobs.engine.session import Session, Settings, open_session, survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_mig.dirty.memory import MemoryMap


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
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.host.holders import mark_hold

    seen = survey(name)
    (found,) = seen.devices
    holder = seen.holder_of(found)
    if holder is not None:
        raise DeviceBusyError(
            f"it is open in {holder}", device=found.name, hint="every command borrows it there; nothing to hold"
        )
    # Blocked from here on, so that a signal between ready() and the wait is not lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    mark = mark_hold(found)
    try:
        with (
            Memory(memory, writable=True) as guest,
            open_session(found.name, settings, memory=guest.maps, seen=seen, any_device=True) as session,
        ):
            if session.refusal is not None:
                session.warn(f"{session.refusal}; it is held all the same")
            ready(session)
            notify("READY=1")
            signal.sigwait(ENDING)
            notify("STOPPING=1")
    finally:
        if mark >= 0:
            os.close(mark)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
