# SPDX-License-Identifier: MIT
"""What the kernel says of a process's open files and mappings, without a word to the files themselves.

A process chooses what it has open. A file of a file system that it serves itself (FUSE) may never answer, and who waits
for such an answer cannot be killed. So a link in ``/proc/PID/fd`` is read and not followed, an inode is asked only for
what the kernel has in memory (``AT_STATX_DONT_SYNC``), and a command line, which is read from the process's own memory,
is never looked at.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


SYS_PIDFD_GETFD: Final = 438
"""The same on every architecture; since Linux 5.6."""
PIDFD_THREAD: Final = os.O_EXCL
"""A pidfd of one thread; since Linux 6.9."""
_SYS_OPENAT2: Final = 437
"""The same on every architecture; since Linux 5.6."""
_RESOLVE_NO_MAGICLINKS: Final = 2
_HUGE: Final = (os.MFD_HUGETLB | os.MFD_HUGE_2MB, os.MFD_HUGETLB | os.MFD_HUGE_1GB)
LOCAL: Final = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hugetlbfs", "ramfs", "tmpfs", "xfs", "zfs"}
)
"""File systems that the kernel itself serves, from memory or a disk."""
_SYS_KCMP: Final = {
    "x86_64": 312,
    "aarch64": 272,
    "riscv64": 272,
    "loongarch64": 272,
    "ppc64": 354,
    "ppc64le": 354,
    "s390x": 343,
}
_KCMP_FILES: Final = 2
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_TYPE_AND_INODE: Final = 0x101
_STATX: Final = struct.Struct("=28xH2xQ88xIIII112x")  # struct statx: stx_mode, stx_ino, stx_rdev_*, stx_dev_*
_SMALL_MAX: Final = 4096
_INIT_PID_NAMESPACE: Final = 0xEFFFFFFC
_INIT_USER_NAMESPACE: Final = 0xEFFFFFFD
"""Inode numbers of the first namespaces (PROC_PID_INIT_INO, PROC_USER_INIT_INO in <linux/proc_ns.h>)."""
_CAP_SYS_PTRACE: Final = 19
_MAPPING: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])[x-]([sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)


class File(NamedTuple):
    """What the kernel has in memory of an inode.

    :param device: number of its file system.
    :param number: of a device's node, the device's; else 0.
    """

    mode: int
    inode: int
    device: int
    number: int

    @property
    def is_character_device(self) -> bool:
        """Whether it is a character device's node."""
        return stat.S_ISCHR(self.mode)


class Mapping(NamedTuple):
    """A line of ``/proc/PID/maps``.

    :param writable: whether the process may write there now.
    :param shared: whether what it writes reaches the file.
    :param device: number of the file system as the memory manager knows it, which may not be what stat(2) says.
    """

    start: int
    end: int
    writable: bool
    shared: bool
    offset: int
    device: int
    inode: int
    path: str


@functools.cache
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _failed(path: str) -> OSError:
    import ctypes

    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


def _statx(fd: int, path: str, flags: int) -> File:
    import ctypes

    reply = ctypes.create_string_buffer(_STATX.size)
    if _libc().statx(fd, path.encode(), flags | _AT_STATX_DONT_SYNC, _STATX_TYPE_AND_INODE, reply) < 0:
        raise _failed(path)
    mode, inode, *numbers = _STATX.unpack(reply.raw)
    return File(mode, inode, os.makedev(numbers[2], numbers[3]), os.makedev(numbers[0], numbers[1]))


def look_at(path: str) -> File:
    """Tell what a link in ``/proc/PID/fd`` leads to.

    :raises OSError: it has been closed (ENOENT, ESRCH), or we may not look (EACCES, EPERM).
    """
    return _statx(_AT_FDCWD, path, 0)


def look_at_fd(fd: int) -> File:
    """Tell what an fd of this process is.

    :raises OSError: it is not open.
    """
    return _statx(fd, "", _AT_EMPTY_PATH)


def read_small(path: str) -> bytes:
    """Return the begin of a file in /proc, empty when it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(_SMALL_MAX) or b""
    except OSError:
        return b""


def pids() -> list[int]:
    """Return the processes that /proc shows.

    :raises OSError: there is no /proc.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command(pid: int) -> str:
    """Return what the kernel calls a process, which is what the process wants to be called."""
    return read_small(f"/proc/{pid}/comm").decode("utf-8", "replace").removesuffix("\n")


def threads_with_fds(pid: int) -> Iterator[int]:
    """Yield 0 for a process as a whole, then each of its threads that has a table of fds of its own.

    A thread may have left the common one (unshare(CLONE_FILES)), or the first thread may have ended before the others.
    """
    yield 0
    directory = f"/proc/{pid}/task"
    try:
        if os.stat(directory).st_nlink <= 3:  # noqa: PLR2004 -- ".", "..", and one thread
            return
        threads = [int(name) for name in os.listdir(directory) if int(name) != pid]
    except OSError:
        return
    for thread in threads:
        if not _share_fds(pid, thread):
            yield thread


def _share_fds(pid: int, thread: int) -> bool:
    """Tell whether two threads have one table of fds; False where the kernel does not say."""
    number = _SYS_KCMP.get(os.uname().machine)
    return number is not None and _libc().syscall(number, pid, thread, _KCMP_FILES, 0, 0) == 0


def fd_directory(pid: int, thread: int = 0) -> str:
    """Return where the fds of a process, or of a thread with fds of its own, are listed."""
    return f"/proc/{pid}/task/{thread}/fd" if thread else f"/proc/{pid}/fd"


def links(directory: str) -> Iterator[tuple[int, str]]:
    """Yield the fds in such a directory and what they are called; none when the process has gone.

    :raises PermissionError: we may not look into it.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, ProcessLookupError):
        return
    for name in names:
        try:
            yield int(name), os.readlink(f"{directory}/{name}")
        except (FileNotFoundError, ProcessLookupError):  # closed meanwhile
            continue


def open_flags(directory: str, fd: int) -> int | None:
    """Return the flags of open(2) of a process's fd, None when it has closed it."""
    text = read_small(f"{directory}info/{fd}")
    match = re.search(rb"^flags:\s*([0-7]{1,12})$", text, re.MULTILINE)
    return None if match is None else int(match[1], 8)


def mount_of(directory: str, fd: int) -> int | None:
    """Return the number of the mount that a process's fd was opened in, None when it has closed it."""
    match = re.search(rb"^mnt_id:\s*([0-9]{1,10})$", read_small(f"{directory}info/{fd}"), re.MULTILINE)
    return None if match is None else int(match[1])


def file_system(pid: int, *, device: int, mount: int | None = None) -> str:
    """Return the name of the file system that a file of another process lies on, without asking it; empty: unknown.

    :param device: its number, by stat(2) or in ``/proc/PID/maps``.
    :param mount: number of the mount, where it is known.
    """
    if device in _memfd_devices():
        return "tmpfs"
    for whose in ("self", str(pid)):
        try:
            with open(f"/proc/{whose}/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
                for line in mounts:
                    words = line.split()
                    numbers = f"{os.major(device)}:{os.minor(device)}"
                    if words[2] == numbers or (mount is not None and words[0] == str(mount)):
                        return words[words.index("-") + 1]
        except (OSError, ValueError, IndexError):
            continue
    return ""


@functools.cache
def _memfd_devices() -> frozenset[int]:
    """Return the numbers of the file systems that memfds lie on, which are mounted nowhere: small pages, and huge."""
    found = set()
    for flags in (os.MFD_CLOEXEC, os.MFD_CLOEXEC | os.MFD_HUGETLB, *(os.MFD_CLOEXEC | one for one in _HUGE)):
        try:
            fd = os.memfd_create("vfio-mig-look", flags)
        except OSError:
            continue
        found.add(os.fstat(fd).st_dev)
        os.close(fd)
    return frozenset(found)


def open_without_magic(path: str, flags: int) -> int:
    """Open a file by a path that does not lead through a link of /proc, which would be any process's word.

    :raises OSError: ELOOP when it does; or as open(2).
    """
    how = struct.pack("=QQQ", flags, 0, _RESOLVE_NO_MAGICLINKS)
    fd: int = _libc().syscall(_SYS_OPENAT2, _AT_FDCWD, os.fsencode(path), how, len(how))
    if fd >= 0:
        return fd
    error = _failed(path)
    if error.errno != errno.ENOSYS:
        raise error
    if os.path.realpath(path).startswith("/proc/"):  # a sandbox without the call: what is certain is let pass
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return os.open(path, flags)


def duplicate(pid: int, fd: int, thread: int = 0) -> int:
    """Duplicate another process's fd, or a thread's: the same open file, with the access that it has there.

    :raises OSError: it has gone (ESRCH), has closed the fd (EBADF), we may not (EPERM), or the kernel cannot (ENOSYS;
        EINVAL for a thread before Linux 6.9).
    """
    pidfd = os.pidfd_open(thread, PIDFD_THREAD) if thread else os.pidfd_open(pid)
    try:
        got: int = _libc().syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
        if got < 0:
            raise _failed("")
    finally:
        os.close(pidfd)
    return got


def mappings(pid: int | str) -> Iterator[Mapping]:
    """Yield what a process has mapped.

    :raises OSError: it has gone, or we may not look.
    """
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            match = _MAPPING.fullmatch(line.rstrip("\n"))
            if match is not None:
                start, end, _, writable, shared, offset, major, minor, inode, path = match.groups()
                yield Mapping(
                    int(start, 16),
                    int(end, 16),
                    writable == "w",
                    shared == "s",
                    int(offset, 16),
                    os.makedev(int(major, 16), int(minor, 16)),
                    int(inode),
                    path,
                )


class Standing(NamedTuple):
    """From where this process looks at others.

    :param has_proc: whether /proc shows this process at all, under its own number.
    :param in_first_pid_namespace: whether every process of the machine has a number here.
    :param in_first_user_namespace: whether a capability counts towards every process.
    :param may_trace: whether CAP_SYS_PTRACE is in effect.
    :param hides: whether /proc leaves out processes that this user may not look into (``hidepid=``).
    """

    has_proc: bool
    in_first_pid_namespace: bool
    in_first_user_namespace: bool
    may_trace: bool
    hides: bool


def standing() -> Standing:
    """Tell from where this process looks."""
    try:
        has_proc = os.readlink("/proc/self") == str(os.getpid())
        pid_namespace, user_namespace = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "user"))
    except OSError:
        return Standing(False, False, False, False, False)
    return Standing(
        has_proc,
        pid_namespace == _INIT_PID_NAMESPACE,
        user_namespace == _INIT_USER_NAMESPACE,
        has_capability(_CAP_SYS_PTRACE),
        _hides_processes(),
    )


def has_capability(number: int) -> bool:
    """Tell whether this thread has a capability in effect, in its user namespace."""
    found = re.search(rb"^CapEff:\s*([0-9a-f]{1,16})$", read_small("/proc/self/status"), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> number & 1)


def _hides_processes() -> bool:
    """Tell whether /proc is mounted so that some processes do not appear in it."""
    options = ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                mount, _, rest = line.partition(" - ")
                if mount.split()[4] == "/proc" and rest.startswith("proc "):
                    options = rest.split()[-1]  # the last one lies on top
    except (OSError, IndexError):
        return True
    return any(word.startswith("hidepid=") and word[8:] not in {"0", "off"} for word in options.split(","))


def is_gone(error: OSError) -> bool:
    """Tell whether a failed look says that the process, or its fd, is there no more."""
    return error.errno in (errno.ENOENT, errno.ESRCH)
