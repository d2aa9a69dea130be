# SPDX-License-Identifier: MIT
"""Find the processes that have devices open, and borrow an fd of theirs."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig import proc
from vfio_mig.device import Holder
from vfio_mig.errors import DeviceBusyError, errno_text, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_mig.host.devices import HostDevice


PROGRAM: Final = "vfio-mig"
RIGHTS: Final = "CAP_SYS_PTRACE and, for another user's process, CAP_DAC_READ_SEARCH"
"""What it takes to borrow from a process: the first to get its fd and to see what it is, the second to list its fds."""
_PASSES: Final = 8
"""How often is looked for processes that have begun meanwhile."""
_LOOKS: Final = 8
"""How often an fd must be the same thing before it is duplicated: a process that swaps it is noticed."""
_DEVICE_LINK: Final = "anon_inode:[vfio-device]"
_MARK: Final = "vfio-mig-"
_HOLDS: Final = f"{_MARK}hold:"
_BORROWS: Final = f"{_MARK}borrows:"
_MARK_MAX: Final = 200
_MFD_NOEXEC_SEAL: Final = 8
_CONTAINER: Final = os.makedev(10, 196)
"""Of /dev/vfio/vfio: MISC_MAJOR in <linux/major.h>, VFIO_MINOR in <linux/miscdevice.h>."""


class Unseen(NamedTuple):
    """Why a process that has a device open may not have been seen.

    :param reason: a clause.
    :param hint: what to do about it.
    """

    reason: str
    hint: str


NO_PROC: Final = Unseen(
    "/proc is not there, or belongs to another PID namespace",
    "mount the one of this namespace: mount -t proc proc /proc",
)
NAMESPACE: Final = Unseen(
    "processes outside this PID namespace cannot be seen",
    "run it in the host's PID namespace; a container gets that with --pid=host",
)
USER_NAMESPACE: Final = Unseen(
    "processes outside this user namespace cannot be looked into",
    "run it outside, where root may look into all of them",
)
UNSETTLED: Final = Unseen("processes begin faster than they can be looked into", "try again")
NO_GROUP: Final = Unseen(
    "a process has a VFIO device open without its group, and the kernel does not say which one",
    "end the processes that use VFIO devices",
)


class View(NamedTuple):
    """Who has devices open, as far as /proc shows it.

    :param holders: by the device's name, whom to borrow from first: processes that use the device, then each
        `vfio-mig hold`, then those that have borrowed it and will soon be gone, then this process.
    :param unseen: why a holder may be missing, None when none can be. What nobody can see is an fd that is on its way
        in a socket, or that only io_uring has: who must know that a device is free opens it.
    """

    holders: dict[str, tuple[Holder, ...]]
    unseen: Unseen | None

    def of(self, device: HostDevice, pid: int | None = None) -> tuple[Holder, ...]:
        """Return the holders of a device, once for each fd of theirs.

        :param pid: of this process only.
        """
        found = self.holders.get(device.name, ())
        return found if pid is None else tuple(one for one in found if one.pid == pid)


def _nodes(device: HostDevice) -> dict[int, str]:
    """Return the device's nodes by their device numbers."""
    pairs = ((device.node_number, device.node), (device.cdev_number, device.cdev))
    return {number: node for number, node in pairs if number and node is not None}


class _Scan:
    """One pass over /proc."""

    def __init__(self, devices: Sequence[HostDevice]) -> None:
        self.places: Final[dict[int, list[tuple[str, str]]]] = {}
        """Device number of a node: the devices that it leads to, each with the node."""
        for device in devices:
            for number, node in _nodes(device).items():
                self.places.setdefault(number, []).append((device.name, node))
        self._paths: Final = {node for places in self.places.values() for _, node in places}
        self._majors: Final = {os.major(number) for number in self.places}
        self.found: Final[dict[str, list[tuple[int, Holder]]]] = {}
        self.refused = 0
        self.has_device = self.has_node = False
        """Whether any process has a device open as such, and whether any has a node of VFIO's open."""
        self.is_settled = True

    def run(self, pid: int | None) -> None:
        """Look into all processes, also those that begin meanwhile, or into one.

        :raises OSError: there is no /proc.
        """
        if pid is not None:
            self._look_into(pid)
            return
        seen: set[int] = set()
        for _ in range(_PASSES):
            fresh = [one for one in proc.pids() if one not in seen]
            if not fresh:
                return
            for one in fresh:
                self._look_into(one)
            seen.update(fresh)
        self.is_settled = False

    def _look_into(self, pid: int) -> None:
        try:
            for thread in proc.threads_with_fds(pid):
                self._look_at_table(pid, thread)
        except PermissionError:
            self.refused += 1
        except OSError as error:
            if not proc.is_gone(error):
                self.refused += 1

    def _look_at_table(self, pid: int, thread: int) -> None:
        directory = proc.fd_directory(pid, thread)
        nodes: list[tuple[int, int]] = []
        marks: set[str] = set()
        for fd, link in proc.links(directory):
            if link == _DEVICE_LINK:
                self.has_device = self.has_device or pid != os.getpid()
            elif link.startswith(f"/memfd:{_MARK}"):
                marks.add(link.removeprefix("/memfd:").removesuffix(" (deleted)"))
            elif self._may_be_node(link):
                number = _character_device(f"{directory}/{fd}")
                self.has_node = self.has_node or os.major(number) in self._majors
                if number in self.places and _is_open(pid, directory, fd):
                    nodes.append((fd, number))
        for fd, number in nodes:
            for name, node in self.places[number]:
                is_marked = _mark(_HOLDS, name) in marks
                rank = 3 if pid == os.getpid() else 2 if _mark(_BORROWS, name) in marks else int(is_marked)
                self.found.setdefault(name, []).append((rank, _holder(pid, thread, fd, node, is_marked)))

    def _may_be_node(self, link: str) -> bool:
        """Tell whether to look closer: a container may call a node otherwise, and what lies elsewhere is let be."""
        return link in self._paths or link.startswith("/dev/") or "vfio" in link


def _character_device(path: str) -> int:
    """Return the device number of what an fd leads to, 0 for what is not a character device."""
    try:
        file = proc.look_at(path)
    except OSError as error:
        if proc.is_gone(error):
            return 0
        raise
    return file.number if file.is_character_device else 0


def _is_open(pid: int, directory: str, fd: int) -> bool:
    """Tell whether a node is really open: an O_PATH fd of it, which anybody can have, is not.

    Of this process's own only what it has opened itself counts: it ends with the process, and so does what it holds.
    """
    flags = proc.open_flags(directory, fd)
    if flags is None or flags & os.O_PATH:
        return False
    return pid != os.getpid() or bool(flags & os.O_CLOEXEC)


def _holder(pid: int, thread: int, fd: int, node: str, is_marked: bool) -> Holder:
    command = PROGRAM if is_marked else printable(proc.command(pid))
    return Holder(pid, command, is_marked or pid == os.getpid(), fd, node, thread)


def _mark(kind: str, name: str) -> str:
    return f"{kind}{name[:_MARK_MAX]}"


def look(devices: Sequence[HostDevice], pid: int | None = None) -> View:
    """Look once for who has these devices open.

    Needs the right to look into processes, see :data:`RIGHTS`; what could not be seen is in the answer.

    :param pid: look at this process only.
    """
    scan = _Scan(devices)
    if not scan.places:  # nothing can be open
        return View({}, None)
    standing = proc.standing()
    if not standing.has_proc:
        return View({}, NO_PROC)
    try:
        scan.run(pid)
    except OSError:
        return View({}, NO_PROC)
    holders = {
        name: tuple(holder for _, holder in sorted(found, key=lambda one: one[0])) for name, found in scan.found.items()
    }
    return View(holders, _why_unseen(scan, standing))


def blind_spot(standing: proc.Standing, refused: int = 0) -> Unseen | None:
    """Tell why some processes cannot be seen from where this one stands, None when all can.

    :param refused: how many could not be looked into.
    """
    if not standing.has_proc:
        return NO_PROC
    if not standing.in_first_pid_namespace:
        return NAMESPACE
    is_barred = refused or (standing.hides and not standing.may_trace)
    if is_barred and not standing.in_first_user_namespace:
        return USER_NAMESPACE
    return Unseen(_refusal(refused), to_see_more()) if is_barred else None


def _why_unseen(scan: _Scan, standing: proc.Standing) -> Unseen | None:
    if unseen := blind_spot(standing, scan.refused):
        return unseen
    if not scan.is_settled:
        return UNSETTLED
    # Whoever borrows a device has it without its group, which another process then has
    return NO_GROUP if scan.has_device and not scan.has_node else None


def _refusal(refused: int) -> str:
    if not refused:
        return "/proc hides processes from this user (hidepid)"
    return f"{refused} {'process' if refused == 1 else 'processes'} cannot be looked into"


def to_see_more() -> str:
    """Say what it takes to see every process; root is not told to become root."""
    return f"it takes {RIGHTS}" if os.geteuid() == 0 else f"run as root or with {RIGHTS}"


def may_look_into(pid: int) -> bool:
    """Tell whether a process's fds can be seen; also if it is gone."""
    try:
        for _ in proc.links(proc.fd_directory(pid)):
            pass
    except OSError:
        return False
    return True


def mark_hold(device: HostDevice) -> int:
    """Make this process known as one that keeps a device open for the other commands, and for nothing else.

    The mark is an fd, a memfd of a certain name: a process can say so of itself, and of no other one. It ends with the
    fd. Arguments and names of programs would be anybody's to choose, too, and reading them asks the process's memory.

    :returns: the fd, the caller's; -1 where the kernel makes none.
    """
    return _make_mark(_mark(_HOLDS, device.name))


def mark_borrower(device: HostDevice) -> int:
    """Make this process known as one that has borrowed a device: others do better to borrow from whom it has it.

    :returns: as :func:`mark_hold`.
    """
    return _make_mark(_mark(_BORROWS, device.name))


def _make_mark(name: str) -> int:
    for flags in (os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL, os.MFD_CLOEXEC):  # the former since Linux 6.3
        try:
            return os.memfd_create(name, flags)
        except OSError:
            continue
    return -1


def find_holders(device: HostDevice, pid: int | None = None) -> Iterator[Holder]:
    """Yield the processes that have the device's group or node open, once for each fd of it.

    :param pid: look at this process only.
    """
    yield from look([device], pid).of(device)


def find_holder(device: HostDevice, pid: int | None = None) -> Holder | None:
    """Return the process to borrow from; None when none is seen.

    Several may have it open, a launcher and its VMM for example; each one's fd leads to the same device.

    :param pid: look at this process only.
    """
    return next(find_holders(device, pid), None)


def duplicate_fd(device: HostDevice, holder: Holder) -> int:
    """Duplicate the holder's fd; the caller owns the result, which is proved to be the node it was found as.

    :raises DeviceBusyError: the holder has gone, has closed it, or we may not.
    """
    number = next((number for number, node in _nodes(device).items() if node == holder.node), 0)
    try:
        _require_node(holder, number)
        if holder.pid == os.getpid():
            return os.dup(holder.fd)
        fd = proc.duplicate(holder.pid, holder.fd, holder.thread)
    except OSError as error:
        raise _refused(device.name, holder, error.errno or 0) from error
    # The process may have closed it meanwhile and opened something else, or be another one with a recycled number
    file = proc.look_at_fd(fd)
    if not file.is_character_device or file.number != number:
        os.close(fd)
        raise _refused(device.name, holder, errno.EBADF)
    return fd


def duplicate_container(name: str, holder: Holder) -> int | None:
    """Duplicate the fd of a holder's VFIO container; the caller's. None if it has none.

    :param name: the device's, for errors.
    :param holder: one that is known to have one device only, and so one container: a `vfio-mig hold`.
    :raises DeviceBusyError: the holder has gone, or we may not; or it has more than one.
    """
    directory = proc.fd_directory(holder.pid, holder.thread)
    try:
        found = [fd for fd, link in proc.links(directory) if _may_be_container(link, f"{directory}/{fd}")]
        if not found:
            return None
        if len(found) > 1:
            raise DeviceBusyError(
                f"{holder} has {len(found)} containers open, and nothing says which is the device's", device=name
            )
        if holder.pid == os.getpid():
            return os.dup(found[0])
        fd = proc.duplicate(holder.pid, found[0], holder.thread)
    except OSError as error:
        raise _refused(name, holder, error.errno or 0) from error
    if proc.look_at_fd(fd).number == _CONTAINER:
        return fd
    os.close(fd)
    raise _refused(name, holder, errno.EBADF)


def _may_be_container(link: str, path: str) -> bool:
    return (link.startswith("/dev/") or "vfio" in link) and _character_device(path) == _CONTAINER


def _require_node(holder: Holder, number: int) -> None:
    """Make sure that the fd is the node before it becomes ours: to close a file may mean to wait for its server.

    :raises OSError: EBADF when it is not.
    """
    directory = proc.fd_directory(holder.pid, holder.thread)
    for _ in range(_LOOKS):
        try:
            is_node = number != 0 and _character_device(f"{directory}/{holder.fd}") == number
        except PermissionError as error:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error
        if not os.path.isdir(f"/proc/{holder.pid}"):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if not is_node or not _is_open(holder.pid, directory, holder.fd):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _refused(name: str, holder: Holder, number: int) -> DeviceBusyError:
    where = f"{'it takes' if os.geteuid() == 0 else 'run as root or with'} {RIGHTS}"
    hint = {
        errno.EPERM: f"{where}; kernel.yama.ptrace_scope=3 forbids it to everybody, "
        "a container's seccomp profile to those inside; the owner can pass its fd of the group or node: --fd N",
        errno.ESRCH: "it has ended meanwhile; try again",
        errno.EBADF: "it has closed the device meanwhile; try again",
        errno.ENOSYS: "Linux 5.6 or newer is needed",
        errno.EINVAL: "only one of its threads has it; Linux 6.9 or newer is needed",
    }.get(number)
    return DeviceBusyError(
        f"{holder} has it open and its fd cannot be borrowed: {errno_text(number)}", device=name, hint=hint
    )
