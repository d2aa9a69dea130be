# SPDX-License-Identifier: MIT
"""Find the process that has a device open, and borrow its fd."""

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
RIGHTS: Final = "CAP_SYS_PTRACE and, for another user's process, CAP_DAC_READ_SEARCH"
"""What it takes to borrow from a process: the first to get its fd and to see what it is, the second to list its fds."""
_OPTIONS_WITH_VALUE: Final = ("--abi", "--uapi-header", "--events", "--status-fd", "--hook", "--via")


class Holder(NamedTuple):
    """A process that has a device's group, or the device's own node, open.

    :param command: the kernel's name of it.
    :param is_hold: whether it is a `vfio-mig hold`.
    :param fd: the number that the fd has there.
    :param node: what it has open: the group's node, or the device's.
    """

    pid: int
    command: str
    is_hold: bool
    fd: int
    node: str = ""

    def __str__(self) -> str:
        return f"PID {self.pid} ({self.command})"


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


def may_look_into(pid: int) -> bool:
    """Tell whether a process's fds can be seen; also if it is gone."""
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            os.readlink(f"{directory}/{name}")
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def _nodes(device: HostDevice) -> dict[str, int]:
    """Return the device's nodes with their device numbers, 0 for one that is not there."""
    nodes = {}
    if device.node is not None:
        try:
            nodes[device.node] = os.stat(device.node).st_rdev
        except OSError:
            nodes[device.node] = 0
    if device.cdev is not None:
        nodes[device.cdev] = device.cdev_number or 0
    return nodes


def _which(device: HostDevice, nodes: dict[str, int], path: str, target: str) -> str | None:
    """Tell which node an fd is; by number, where a container calls it by another path.

    A path is enough for a group alone, which is asked for the device by name.
    """
    if target == device.node:
        return target
    if target not in nodes and "/vfio/" not in target:
        return None
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return None
    return next((node for node, its in nodes.items() if its and its == number), None)


def sees_all() -> bool:
    """Tell whether we may look into every process; otherwise a device without a holder may well have one."""
    try:
        os.listdir("/proc/1/fd")
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def find_holders(device: HostDevice, pid: int | None = None) -> Iterator[Holder]:
    """Yield the processes that have the device's group or node open, one by one, once for each fd of it.

    Needs the right to look into them, see :data:`RIGHTS`; others are passed over.

    :param pid: look at this process only.
    """
    nodes = _nodes(device)
    if not nodes:
        return
    for candidate in _pids() if pid is None else [pid]:
        if candidate == os.getpid():
            continue
        for fd, target in _fds(candidate):
            node = _which(device, nodes, f"/proc/{candidate}/fd/{fd}", target)
            if node is not None:
                command = _read(f"/proc/{candidate}/comm").decode("utf-8", "replace").strip()
                is_hold = _is_hold(candidate)
                yield Holder(candidate, PROGRAM if is_hold else command, is_hold, fd, node)


def find_holder(device: HostDevice, pid: int | None = None) -> Holder | None:
    """Return the process to borrow from: our own holder if there is one, else the first; None when none is found.

    Several may have it open, a launcher and its VMM for example; each one's fd leads to the same device.

    :param pid: look at this process only.
    """
    first = None
    for holder in find_holders(device, pid):
        if holder.is_hold:
            return holder
        first = first or holder
    return first


def duplicate_fd(device: HostDevice, holder: Holder) -> int:
    """Duplicate the holder's fd; the caller owns the result, which is proved to be the node it was found as.

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
    # The process may have closed it meanwhile and opened something else, or be another one with a recycled number
    path = f"/proc/self/fd/{fd}"
    if _which(device, _nodes(device), path, os.readlink(path)) != holder.node:
        os.close(fd)
        raise _refused(device, holder, errno.EBADF)
    return int(fd)


def _refused(device: HostDevice, holder: Holder, number: int) -> DeviceBusyError:
    hint = {
        errno.EPERM: f"run as root or with {RIGHTS}; kernel.yama.ptrace_scope=3 forbids it to everybody, "
        "a container's seccomp profile to those inside; the owner can pass its fd of the group or node: --fd N",
        errno.ESRCH: "it has ended meanwhile; try again",
        errno.EBADF: "it has closed the device meanwhile; try again",
        errno.ENOSYS: "Linux 5.6 or newer is needed",
    }.get(number)
    return DeviceBusyError(
        f"{holder} has it open and its fd cannot be borrowed: {errno_text(number)}", device=device.name, hint=hint
    )
