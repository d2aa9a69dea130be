# SPDX-License-Identifier: MIT
"""Reaching another host: what ssh is told beside the user's own words, and what to do when it cannot be reached.

A migration has nobody to answer a question, and a device may stand still while ssh waits. So ssh asks nothing, neither
for a password nor whether a host's key is right, and gives a silent connection up.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

SSH_OPTIONS: Final = ("-oBatchMode=yes", "-oServerAliveInterval=10", "-oServerAliveCountMax=3")
"""Of several values of an option ssh takes the first: what the user says in front of these counts."""
CONNECTION_FAILED: Final = 255
"""With which ssh ends when it, and not the command there, has failed."""
_NOT_RUN: Final = (126, 127)
"""With which a shell ends that cannot run the command."""


def is_ssh(rsh: Sequence[str]) -> bool:
    """Say whether a command is OpenSSH's, by its name."""
    return os.path.basename(rsh[0]) == "ssh"


def prefix(rsh: Sequence[str], destination: str) -> list[str]:
    """Return what stands before the one line of command for another host.

    >>> prefix(["rsh"], "other")
    ['rsh', 'other']
    """
    return [*rsh, *(SSH_OPTIONS if is_ssh(rsh) else ()), destination]


class Way:
    """How a host is reached, for messages: *rsh* and *destination* as the user gave them."""

    def __init__(self, rsh: Sequence[str], destination: str) -> None:
        self._program: Final = os.path.basename(rsh[0])
        self._is_ssh: Final = is_ssh(rsh)
        self._destination: Final = destination
        self._words: Final = [*rsh, destination]

    def _line(self, *words: str) -> str:
        import shlex

        return f"'{shlex.join([*self._words, *words])}'"

    def failure(self, code: int, what: str) -> str | None:
        """Say what failed if it was the connection, None if it was the command there."""
        return f"{self._program} failed at '{what}'" if self._is_ssh and code == CONNECTION_FAILED else None

    def hint(self, code: int, errors: bytes) -> str | None:
        """Say what to do about an exit code of the connection's or of the shell's there.

        :param errors: what came on standard error, whoever wrote it.
        """
        if code in _NOT_RUN:
            return f"install vfio-mig there so that {self._line('vfio-mig', '--version')} finds it"
        if not self._is_ssh or code != CONNECTION_FAILED:
            return None
        if b"IDENTIFICATION HAS CHANGED" in errors:
            return (
                "the host shows another key than the one that is known here: find out why, then forget the old one "
                f"with 'ssh-keygen -R' and run {self._line('true')} once by hand"
            )
        if b"Host key verification failed" in errors:
            return f"run {self._line('true')} once by hand, as this user, and compare the key that it shows"
        if b"Permission denied" in errors:
            return (
                f"nobody is asked for a password: give this user a key that {self._destination} takes, "
                f"so that {self._line('-oBatchMode=yes', 'true')} works"
            )
        return f"see whether {self._line('true')} works"
