# SPDX-License-Identifier: MIT
"""``python tools/lab/reaper.py PROGRAM …``: run a program and bury what it leaves behind; it ends with its last child.

The VM's first process reaps nobody, and libvirt waits 40 s for each zombie of its probes. It imports nothing of ours.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Be the reaper; SIGTERM goes to the program."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 -- a list, no shell

    def pass_on(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main()
