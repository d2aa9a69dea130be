# SPDX-License-Identifier: MIT
"""Find the process that has a device's group open, and borrow its fd."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import DeviceBusyError, errno_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.host.discover import HostDevice

SYS_PIDFD_GETFD: Final = 438
"""The same on every architecture; since Linux 5.6."""
HOLD: Final = "hold"
PROGRAM: Final = "vfio-mig"
_OPTIONS_WITH_VALUE: Final = ("--abi", "--uapi-header")


class Holder(NamedTuple):
    """A process that has a device's group open.

    :param command: the kernel's name of it.
    :param is_hold: whether it is a `vfio-mig hold`.
    :param fd: the number that the group's fd has there.
    """

    pid: int
    command: str
    is_hold: bool
    fd: int


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _is_hold(pid: int) -> bool:
    """Tell by its arguments: the kernel calls a Python program by its interpreter."""
    arguments = _read(f"/proc/{pid}/cmdline").decode("utf-8", "replace").split("\0")
    programs = [os.path.basename(argument) for argument in arguments[:3]]
    return PROGRAM in programs and _command(arguments[programs.index(PROGRAM) + 1 :]) == HOLD


def _command(arguments: list[str]) -> str:
    """Return the command among a vfio-mig's arguments: the first that is neither an option nor the value of one."""
    words = iter(arguments)
    for word in words:
        if word in _OPTIONS_WITH_VALUE:
            next(words, "")
        elif not word.startswith("-"):
            return word
    return ""


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _fds(pid: int) -> Iterator[tuple[int, str]]:
    """Yield a process's fds and what they are; none when it is gone or not ours to look into."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        try:
            yield int(name), os.readlink(f"{directory}/{name}")
        except OSError:
            continue


def find_holder(device: HostDevice, pid: int | None = None) -> Holder | None:
    """Return the process that has the device's group open, None when none is found.

    Needs the right to look into that process: root, or CAP_SYS_PTRACE.

    :param pid: look at this process only.
    """
    if device.node is None:
        return None
    for candidate in _pids() if pid is None else [pid]:
        if candidate == os.getpid():
            continue
        for fd, target in _fds(candidate):
            if target == device.node:
                command = _read(f"/proc/{candidate}/comm").decode("utf-8", "replace").strip()
                is_hold = _is_hold(candidate)
                return Holder(candidate, PROGRAM if is_hold else command, is_hold, fd)
    return None


def duplicate_fd(device: HostDevice, holder: Holder) -> int:
    """Duplicate the holder's group fd; the caller owns the result.

    :raises DeviceBusyError: the holder has gone, has closed it, or we may not.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    try:
        pidfd = os.pidfd_open(holder.pid)
    except OSError as error:
        raise _refused(device, holder, error.errno or 0) from error
    try:
        fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, holder.fd, 0)
        number = ctypes.get_errno()
    finally:
        os.close(pidfd)
    if fd < 0:
        raise _refused(device, holder, number)
    return int(fd)


def _refused(device: HostDevice, holder: Holder, number: int) -> DeviceBusyError:
    hint = {
        errno.EPERM: "run as root or with CAP_SYS_PTRACE; kernel.yama.ptrace_scope=3 forbids it to everybody",
        errno.ESRCH: "it has ended meanwhile; try again",
        errno.EBADF: "it has closed the device meanwhile; try again",
        errno.ENOSYS: "Linux 5.6 or newer is needed",
    }.get(number)
    return DeviceBusyError(
        f"PID {holder.pid} ({holder.command}) has it open and its fd cannot be borrowed: {errno_text(number)}",
        device=device.name,
        hint=hint,
    )
