# SPDX-License-Identifier: MIT
"""What the monitor of a QEMU is to the jobs, however it is reached, and how its answers are taken: none on trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from vfio_mig.errors import HostError, excerpt

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

LIST_MAX: Final = 1 << 16
"""Entries of an answer; QEMU has no list of what is asked here that comes near."""
TEXT_MAX: Final = 4096
"""Characters of a name or path in an answer (PATH_MAX)."""
NEWS: Final = ("RESUME", "SHUTDOWN", "RESET", "WAKEUP", "GUEST_PANICKED")
"""Events after which what was found out of a paused VM is no longer so."""


class RefusedError(HostError):
    """QEMU does not know a command, or will not do it."""


class GoneError(HostError):
    """QEMU has ended, or has hung up."""


class Words(NamedTuple):
    """What the user types to do a thing to the VM by hand.

    :param cont: lets it go on; *stop* pauses it, *reset* resets it, *wakeup* wakes it, *cancel* ends its migration.
    :param start_paused: starts it so that it does not run yet.
    :param share: gives it RAM that other processes can have, too.
    :param proof: what to look at where another process has the device open.
    """

    cont: str
    stop: str
    reset: str
    wakeup: str
    cancel: str
    start_paused: str
    share: str
    proof: str


QMP_WORDS: Final = Words(
    cont="'cont' in its monitor",
    stop="'stop' in its monitor",
    reset="'system_reset' in its monitor",
    wakeup="'system_wakeup' in its monitor",
    cancel="'migrate_cancel' in its monitor",
    start_paused="start QEMU with -S",
    share="start QEMU with -object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram",
    proof="name a socket that QEMU itself listens on, not one that another process has made for it",
)


class Monitor(Protocol):
    """A connection to the monitor of one QEMU; a context manager.

    :ivar words: how its user does by hand what the jobs do by themselves.
    :ivar listed: the VFIO devices that it has by the word of whoever keeps it, None where nobody does.
    :ivar news: which of :data:`NEWS` have come, each once, since it was last cleared.
    :ivar ignores_signals: whether it is too late for a signal: what is being undone, or is done, is brought to its end.
    """

    words: Words
    listed: list[str] | None
    news: list[str]
    ignores_signals: bool

    @property
    def pid(self) -> int:
        """QEMU's process; 0 when it is in a PID namespace that is not seen from here."""

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer, of which nothing is known; a signal waits for it.

        :raises RefusedError: QEMU does not do it.
        :raises HostError: QEMU is gone, silent, or says what no QEMU says.
        """

    def monitor(self, line: str) -> str:
        """Run a command of the human monitor and return what it prints."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def unknown_answer(command: str, why: str) -> HostError:
    """Return the error of an answer that this program does not know."""
    return HostError(f"QEMU's answer to {command!r} is not understood: {why}")


def entries_of(answer: object, command: str) -> list[dict[str, Any]]:
    """Return an answer that has to be a list of objects.

    :raises HostError: it is something else, or endless.
    """
    if not isinstance(answer, list):
        raise unknown_answer(command, f"{excerpt(answer)} is not a list")
    if len(answer) > LIST_MAX:
        raise unknown_answer(command, f"it has {len(answer)} entries")
    for one in answer:
        if not isinstance(one, dict):
            raise unknown_answer(command, f"{excerpt(one)} is not an object")
    return answer


def text_of(entry: object, key: str, command: str, default: str | None = None) -> str:
    """Return a text of an answer.

    :param default: what stands for a key that is not there, as older and newer QEMUs leave some out; None: it must be.
    :raises HostError: it is not there, no text, or endless.
    """
    if not isinstance(entry, dict):
        raise unknown_answer(command, f"{excerpt(entry)} is not an object")
    value = entry.get(key, default)
    if not isinstance(value, str) or len(value) > TEXT_MAX:
        raise unknown_answer(command, f"{key!r} is {excerpt(value)}" if key in entry else f"it has no {key!r}")
    return value


def flag_of(entry: dict[str, Any], key: str, command: str) -> bool | None:
    """Return a flag of an answer, None for one that this QEMU does not tell.

    :raises HostError: it is not a flag.
    """
    value = entry.get(key)
    if value is not None and not isinstance(value, bool):
        raise unknown_answer(command, f"{key!r} is {excerpt(value)}")
    return value


def printed(answer: object, line: str) -> str:
    """Return what the human monitor has printed, with the line ends of this system.

    :raises HostError: it is not text.
    """
    if not isinstance(answer, str):
        raise unknown_answer(line, f"{excerpt(answer)} is not text")
    return answer.replace("\r\n", "\n")
