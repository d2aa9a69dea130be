# SPDX-License-Identifier: MIT
"""A read lease on a file, fcntl(2): nobody has it open for writing, and a process that opens it so waits, and is seen.

What was verified under a lease need not be verified again. Only the kernel's own file systems are trusted with it: what
is stored elsewhere may change there.
"""

from __future__ import annotations

import fcntl
import os
import signal
from typing import Final

from vfio_mig.closing import Closing

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


class Lease(Closing):
    """Taken at once where the kernel gives it; it ends with :meth:`close`, or with this process.

    A lease belongs to an open file, and standard input is one of the shell's, too, where it would outlive us: so the
    file is opened once more.

    :param fd: a file open for reading.
    """

    def __init__(self, fd: int) -> None:
        self._fd = -1
        try:
            if _file_system(fd) not in _LOCAL:
                return
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            # Told of by a signal that nobody minds: the default one ends the process
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:  # somebody has it open for writing, or it is not ours
            self.close()

    def holds(self) -> bool:
        """Tell whether the file is still what it was: nobody has tried to open it for writing.

        Who has tried waits, and need not any longer than until this has been asked.
        """
        if self._fd >= 0 and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            self.close()
        return self._fd >= 0

    def close(self) -> None:
        """Give the file free; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
