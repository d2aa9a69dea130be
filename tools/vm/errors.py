# SPDX-License-Identifier: MIT
"""What can go wrong in the runner, and the exit codes that say so."""

from typing import Final

EXIT_KERNEL_FAULT: Final = 99
EXIT_TIMEOUT: Final = 124  # as timeout(1)
EXIT_RUNNER: Final = 125  # as env(1) and timeout(1): the runner failed, not the command


class RunnerError(Exception):
    """The VM could not be prepared or started; COMMAND did not run, or its result is unknown."""


class Interrupted(BaseException):
    """A signal asked the runner to end; no error, hence outside of Exception. QEMU is gone when the caller sees it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum: Final = signum
