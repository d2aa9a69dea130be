# SPDX-License-Identifier: MIT
"""A job is a sequence of steps, each with its undo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_mig.errors import VfioMigError
from vfio_mig.interrupts import Deferred, protected

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self


class Rollback:
    """Undo the steps done so far, the last one first, when the block ends with an exception.

    The first error is the one that goes on; what fails while undoing is added to it, and stops no other undo. Signals
    wait until everything is undone.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], object]] = []

    def forget(self) -> None:
        """Take it that the job is done: nothing is undone any more."""
        self._undos.clear()

    def push(self, undo: Callable[[], object]) -> None:
        """Have *undo* called if the job fails from now on."""
        self._undos.append(undo)

    def __enter__(self) -> Self:
        return self

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        with Deferred():
            while self._undos:
                self._undo(self._undos.pop(), error)

    @staticmethod
    def _undo(undo: Callable[[], object], error: BaseException) -> None:
        try:
            undo()
        except Exception as second:  # noqa: BLE001  # whatever it is, the other undos still have to run
            if isinstance(error, VfioMigError):
                error.undo_errors.append(second)
            else:
                error.add_note(f"while rolling back: {second}")
