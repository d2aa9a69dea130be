# SPDX-License-Identifier: MIT
"""What can go wrong: with the program itself, or with one request of a client."""

from __future__ import annotations

from typing import Final

EXIT_USAGE: Final = 2
EXIT_HOST: Final = 7


class GpuError(Exception):
    """The program cannot start; one line that says why."""


class RefusedError(Exception):
    """A request that is answered with an error; nothing has changed.

    :ivar errno: the errno that the client is told.
    """

    def __init__(self, errno: int, why: str) -> None:
        super().__init__(why)
        self.errno: Final = errno
