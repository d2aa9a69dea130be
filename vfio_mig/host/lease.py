# SPDX-License-Identifier: MIT
"""A read lease on a file, fcntl(2): nobody has it open for writing, and who opens it so waits, and is seen.

What was verified under a lease need not be verified again. Only the kernel's own file systems are trusted with it: what
is stored elsewhere may change there.
"""

from __future__ import annotations

import fcntl
import os
import signal
from typing import Final

_LOCAL: Final = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "ramfs", "tmpfs", "xfs"})


def _file_system(fd: int) -> str:
    """Return the name of the file system of a file; empty where it is not known."""
    device = os.fstat(fd).st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            mount, _, rest = line.partition(" - ")
            if mount.split()[2] == numbers:
                return rest.split()[0]
    return ""


class Lease:
    """Taken at once where the kernel gives it; it ends with the file's last close.

    :param fd: a file open for reading only.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            self._is_taken = _file_system(fd) in _LOCAL
            if self._is_taken:
                # Told of by a signal that nobody minds: the default one ends the process
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:  # somebody has it open for writing, or it is not ours
            self._is_taken = False

    def holds(self) -> bool:
        """Tell whether the file is still what it was: nobody has tried to open it for writing."""
        return self._is_taken and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
