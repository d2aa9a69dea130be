# SPDX-License-Identifier: MIT
"""Guest memory that is named through another process: ``/proc/PID/fd/N``, ``/proc/PID/map_files/START-END``.

To open such a path is to open the file anew, with our rights: root would write a file that the process may only read.
So its fd is taken as it is, and opened no wider than that; a mapping counts for what the process may do in it. Files of
file systems that anybody may serve are left alone: they may never answer, and who waits for that cannot be killed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Final

from vfio_mig import proc
from vfio_mig.errors import HostError, UsageError, errno_text

if TYPE_CHECKING:
    from collections.abc import Callable

_FD: Final = re.compile(r"/proc/([0-9]{1,9})(?:/task/[0-9]{1,9})?/fd/([0-9]{1,9})")
_MAPPED: Final = re.compile(r"/proc/([0-9]{1,9})/map_files/([0-9a-f]{1,16})-([0-9a-f]{1,16})")
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Without O_NONBLOCK a FIFO would keep us waiting."""
_KINDS: Final = {os.O_RDONLY: "reading", os.O_WRONLY: "writing", os.O_RDWR: "reading and writing"}


def open_memory(path: str, *, writable: bool) -> int:
    """Open a file of guest memory, whose fd is the caller's.

    :raises UsageError: the path leads through another process in a way that proves nothing.
    :raises HostError: a process lends it, and may not do itself what is asked for.
    :raises OSError: it cannot be opened.
    """
    where = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
    if match := _FD.fullmatch(where):
        return _take_fd(path, where, int(match[1]), int(match[2]), writable=writable)
    if match := _MAPPED.fullmatch(where):
        span = int(match[2], 16), int(match[3], 16)
        return _open_mapped(path, where, int(match[1]), span, writable=writable)
    flags = _FLAGS | (os.O_RDWR if writable else os.O_RDONLY)
    try:
        return proc.open_without_magic(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(
                f"{path} leads through a link of /proc, or in a circle",
                hint="name memory of another process as /proc/PID/fd/N or /proc/PID/map_files/START-END",
            ) from error
        raise


def _take_fd(path: str, where: str, pid: int, fd: int, *, writable: bool) -> int:
    directory = os.path.dirname(where)
    _require_answering(path, pid, proc.look_at(where), proc.mount_of(directory, fd))
    _require_access(path, pid, proc.open_flags(directory, fd), writable=writable)
    taken = os.dup(fd) if pid == os.getpid() else _duplicate(path, pid, fd)
    try:
        # It may be another one by now
        _require_access(path, pid, proc.open_flags("/proc/self/fd", taken), writable=writable)
        return _open_anew(taken, writable=writable)
    finally:
        os.close(taken)


def _duplicate(path: str, pid: int, fd: int) -> int:
    try:
        return proc.duplicate(pid, fd)
    except PermissionError as error:
        raise HostError(
            f"{path}: the memory of PID {pid} cannot be taken: {errno_text(error.errno or 0)}",
            hint="it takes CAP_SYS_PTRACE; kernel.yama.ptrace_scope=3 forbids it to everybody",
        ) from error


def _require_access(path: str, pid: int, flags: int | None, *, writable: bool) -> None:
    if flags is None or flags & os.O_PATH:
        raise HostError(f"{path}: PID {pid} does not have it open any more")
    kind = flags & os.O_ACCMODE
    if kind == os.O_RDWR or (kind == os.O_RDONLY and not writable):
        return
    raise HostError(
        f"{path}: PID {pid} has it open for {_KINDS.get(kind, 'nothing')} only, "
        f"and what it may not do itself is not done for it: {'write' if writable else 'read'} there"
    )


def _open_anew(fd: int, *, writable: bool) -> int:
    """Open the same file once more, as far as its owner has: to look for holes moves the position of an open file."""
    try:
        return os.open(f"/proc/self/fd/{fd}", _FLAGS | (os.O_RDWR if writable else os.O_RDONLY))
    except PermissionError:  # its owner may have opened it before it gave up its rights
        return os.dup(fd)


def _open_mapped(path: str, where: str, pid: int, span: tuple[int, int], *, writable: bool) -> int:
    def find() -> proc.Mapping:
        found = next((one for one in proc.mappings(pid) if (one.start, one.end) == span), None)
        if found is None or not found.shared or (writable and not found.writable):
            raise HostError(
                f"{path}: PID {pid} has no {'writable ' if writable else ''}shared mapping there, "
                "and what it may not do itself is not done for it"
            )
        return found

    mapping = find()
    _require_file_system(path, proc.file_system(pid, device=mapping.device))
    fd = os.open(where, _FLAGS | (os.O_RDWR if writable else os.O_RDONLY))
    try:
        _require_same(path, fd, mapping, find)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_same(path: str, fd: int, mapping: proc.Mapping, find: Callable[[], proc.Mapping]) -> None:
    """Make sure that what was opened is what was seen mapped, and that it still is."""
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (mapping.device, mapping.inode) or find() != mapping:
        raise HostError(
            f"{path}: it cannot be proved that this is the file that the process has mapped",
            hint="name its fd: /proc/PID/fd/N",
        )


def _require_answering(path: str, pid: int, file: proc.File, mount: int | None) -> None:
    if not stat.S_ISREG(file.mode):
        raise UsageError(f"{path} is not a regular file; guest memory must be one")
    _require_file_system(path, proc.file_system(pid, device=file.device, mount=mount))


def _require_file_system(path: str, name: str) -> None:
    if name not in proc.LOCAL:
        raise HostError(
            f"{path}: it lies on {name or 'a file system that is not known here'}, which may never answer",
            hint="guest memory of another process must be a memfd, or a file on tmpfs, hugetlbfs or a local disk",
        )
