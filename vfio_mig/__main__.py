# SPDX-License-Identifier: MIT
"""The program: what the installed ``vfio-mig`` and ``python -m vfio_mig`` run.

It is the command line of ``vfio_mig.cli``, begun and ended faster than Python does by itself: a script calls the
command a thousand times.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn


class _QuickExit:
    """Ends the process once nothing is left to do: Python would take every module apart first, for about 3 ms.

    Python waits for threads before it calls what is registered here, and calls last what was registered first. A
    process that ends by an error that nobody caught has no code here, and ends as usual.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self.leave)

    def leave(self) -> None:
        if self.code is None:
            return
        for name in ("stdout", "stderr"):  # nothing is printed here: tests/unit/test_output.py
            getattr(sys, name).flush()
        os._exit(self.code)


def main() -> NoReturn:
    """Run the command line, and exit with its code."""
    ending = _QuickExit()
    gc.disable()  # nothing of what imports make is garbage
    from vfio_mig.cli import main as run

    gc.freeze()
    gc.enable()
    try:
        run()
    except SystemExit as done:
        ending.code = done.code if isinstance(done.code, int) else None
        raise


if __name__ == "__main__":
    main()
