# SPDX-License-Identifier: MIT
"""A job is a sequence of steps, each with its undo, on things that are to be closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vfio_mig.errors import VfioMigError
from vfio_mig.interrupts import Deferred, protected

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], object]

T = TypeVar("T")


class _Entry(NamedTuple):
    """What is to be done at the end of the block: undo a step, if the job fails; or close something in any case."""

    undo: Callable[[], object] | None
    close: Exit | None = None


class Rollback:
    """Undo the steps done so far, the last one first, when the block ends with an exception; close what was entered.

    The first error is the one that goes on; what fails while undoing or closing is added to it, and stops nothing
    else. Signals wait until everything is undone: contextlib's ExitStack would lose what is left if one came between
    two of its callbacks.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def disarm(self) -> None:
        """Have nothing undone any more; what was entered is still closed."""
        self._entries[:] = [entry for entry in self._entries if entry.undo is None]

    def push(self, undo: Callable[[], object]) -> None:
        """Have *undo* called if the job fails from now on."""
        self._entries.append(_Entry(undo))

    @protected
    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager, which is left at the end of the block, in reverse order of all that was pushed."""
        close = type(manager).__exit__
        value = manager.__enter__()
        self._entries.append(_Entry(None, lambda *error: close(manager, *error)))
        return value

    def __enter__(self) -> Self:
        return self

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        first = error
        with Deferred():
            while self._entries:
                first = self._leave(self._entries.pop(), first)
        if first is not None and first is not error:
            raise first

    @classmethod
    def _leave(cls, entry: _Entry, error: BaseException | None) -> BaseException | None:
        """Undo or close one thing; returns the first error so far."""
        try:
            if entry.close is not None:
                cls._close(entry.close, error)
            elif entry.undo is not None and error is not None:
                entry.undo()
        except BaseException as second:  # noqa: BLE001  # whatever it is, the rest still has to be undone
            if error is None or second is error:
                return second
            _add(error, second)
        return error

    @staticmethod
    def _close(close: Exit, error: BaseException | None) -> None:
        if error is None:
            close(None, None, None)
        else:
            close(type(error), error, error.__traceback__)


def _add(error: BaseException, second: BaseException) -> None:
    if isinstance(error, VfioMigError):
        error.undo_errors.append(second)
    else:
        error.add_note(f"while rolling back: {second}")
