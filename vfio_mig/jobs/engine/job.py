# SPDX-License-Identifier: MIT
"""One command's work on one or several devices: what is locked, what is written down, what is undone, what is final."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from vfio_mig import interrupts
from vfio_mig.errors import DeviceBusyError
from vfio_mig.interrupts import protected
from vfio_mig.jobs.engine import session as sessions
from vfio_mig.jobs.engine.rollback import Rollback
from vfio_mig.jobs.engine.session import Settings, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from vfio_mig import words
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.host.discover import Snapshot
    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.words import Step

T = TypeVar("T")


class Job:
    """A context manager around all that a command does.

    Until :meth:`commit` every failure, and every signal at the next step, undoes what was pushed, the last one first.
    From then on the job is done, and neither a signal nor a lost listener makes a failure of it.

    :param name: of the command, as events, hooks and the lock's journal have it.
    """

    def __init__(self, name: words.Job, settings: Settings | None = None) -> None:
        self.name = name
        self.settings = settings or Settings()
        self.committed = False
        self._rollback = Rollback()
        self._guard = interrupts.Guard()

    @protected
    def __enter__(self) -> Self:
        self._guard.enter()
        return self

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._rollback.__exit__(kind, error, traceback)
        finally:
            self._guard.leave(committed=self.committed)

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager, which is left with the job, in reverse order of all that was entered and pushed."""
        return self._rollback.enter(manager)

    def open(
        self,
        device: str,
        *,
        memory: Sequence[MemoryMap] = (),
        alone: bool = True,
        force: bool = False,
        held_for: str | None = None,
        seen: Snapshot | None = None,
        any_device: bool = False,
    ) -> Session:
        """Open a device, or borrow it, for as long as the job lasts; as :func:`open_session` does.

        :param alone: take the device's lock; False for a job that changes nothing.
        :param force: also one whose state an earlier job has moved away.
        :param held_for: refuse a device that nobody has open; names what would be lost with the last close.
        :param seen: the devices and who has them open, where that is known already.
        :param any_device: also one that speaks no protocol.
        :raises DeviceBusyError: nobody has it open.
        """
        if held_for is not None and self.settings.fd is None and self.settings.pid is None:
            seen = seen or sessions.survey(device)
            try:
                sessions.require_holder(seen.find(device), held_for, seen)
            except DeviceBusyError as error:
                error.hint = f"{error.hint}, or use --open to open it for this {held_for} alone"
                raise
        job = self.name if alone else None
        return self.enter(
            open_session(device, self.settings, memory=memory, job=job, seen=seen, force=force, any_device=any_device)
        )

    def step(self, name: Step, session: Session | None = None) -> None:
        """Tell whoever listens, and the device's journal, that the job has come to one of its steps.

        :raises KeyboardInterrupt: a signal has come since the last step.
        """
        if self.committed:
            self._tell_late(name, session)
            return
        interrupts.check()
        if session is not None:
            session.journal_step(name)
        self.announce(name, session)
        interrupts.check()

    def announce(self, name: Step, session: Session | None) -> None:
        """Tell who listens that a device has come to a step; an exception of theirs ends the job."""
        if session is not None and self.settings.on_step is not None:
            self.settings.on_step(self.name, name, session.device.name)

    def _tell_late(self, name: Step, session: Session | None) -> None:
        """Tell of a step behind the commit; a listener that fails is a warning, as nobody can undo what is done."""
        try:
            self.announce(name, session)
        except Exception as error:  # noqa: BLE001
            if session is not None:
                session.warn(f"all is done, but: {error}")

    def undo_with(self, undo: Callable[[], object]) -> None:
        """Have *undo* called if the job fails from now on."""
        self._rollback.push(undo)

    def disarm(self) -> None:
        """Have nothing undone from now on, though the job is not done: somebody else may rely on what it did."""
        self._rollback.disarm()

    @protected
    def commit(self, *finals: Callable[[], object]) -> None:
        """Do what makes the job's work final; from here on nothing is undone.

        :param finals: done in order. If one fails, the job fails and is undone: it has to take itself back before.
        """
        for final in finals:
            final()
        self._rollback.disarm()
        self.committed = True
        if self.settings.on_commit is not None:
            self.settings.on_commit()
