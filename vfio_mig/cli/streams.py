# SPDX-License-Identifier: MIT
"""Standard input, output and error of the process: there from the first line on, and no surprise at the end."""

from __future__ import annotations

import os
import sys
from typing import Final

_NAMES: Final = ("stdin", "stdout", "stderr")


def fill() -> None:
    """Occupy those of the fds 0, 1 and 2 that were closed when this process started.

    Else the next file that is opened gets the number: a device or an image, into which the program's own words would
    go. What stands there instead fails as a closed one does, with EBADF, for this process and those that it starts.
    """
    for fd, name in enumerate(_NAMES):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is this one; opened the wrong way round, so that nobody takes it for a success
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if fd else os.O_WRONLY), True)
        if getattr(sys, name) is None:
            # A stream of these never ends: whoever is here is in the middle of a process
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def settle() -> None:
    """Write out what is in the buffers, and lose what cannot be: Python would try it at exit, and exit with 120."""
    for fd, name in enumerate(_NAMES):
        if fd == 0:
            continue
        try:
            getattr(sys, name).flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            os.close(null)
