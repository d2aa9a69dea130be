# SPDX-License-Identifier: MIT
"""Pipes with more room than they begin with."""

import fcntl
from contextlib import suppress
from typing import Final

PIPE_BYTES: Final = (16 << 20, 1 << 20)
"""What a privileged process may have, enough for most devices' states; and what the kernel allows everybody for a pipe
(/proc/sys/fs/pipe-max-size)."""


def widen(fd: int) -> None:
    """Give a pipe more room, so that who fills it and who empties it need not wait for each other at every page.

    Where the kernel refuses, as it does once a user has many of them, the pipe stays as it is.
    """
    for size in PIPE_BYTES:
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
            return
