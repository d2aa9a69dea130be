# SPDX-License-Identifier: MIT
"""The time in which one device stands still: stop, start, what is written down and undone, and how long each took."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vfio_mig.errors import UnsupportedError
from vfio_mig.host.lock import STOPPED
from vfio_mig.interrupts import protected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_mig.jobs.engine.job import Job
    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.words import Effect


class Pause:
    """Stops one device for a job, and starts it again; whatever fails meanwhile, it is brought back to where it was.

    :ivar times: seconds of each phase by its name in the report: ``stop_time``, ``start_time``, ``stopped_time``,
        ``bitmap_time``, ``state_read_time``, ``state_write_time``.
    :ivar began: the moment of the STOP request, as time.perf_counter() has it.
    """

    def __init__(self, job: Job, session: Session) -> None:
        self.job = job
        self.session = session
        self.times: dict[str, float] = {"start_time": 0.0, "bitmap_time": 0.0}
        self.began = 0.0
        self._undo: Callable[[], object] | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = time.perf_counter() - began

    @protected
    def change(self, effect: Effect, undo: Callable[[], object] | None = None) -> None:
        """Write down what is about to be done to the device, and have it undone if the job fails.

        :param undo: from now on instead of going on as it was found.
        """
        self.session.journal(effect)
        if self._undo is None:
            self.job.undo_with(self._undo_change)
        self._undo = undo or self._undo or self.session.resume

    def _undo_change(self) -> None:
        if self._undo is not None:
            self._undo()

    def quiet(self) -> None:
        """Keep the device from accessing others, before the first of several is stopped."""
        p2p = self.session.protocol.p2p
        if p2p is not None:
            self.change(STOPPED)
            p2p.quiet()

    def stop(self) -> None:
        """Stop the device; time counts from here."""
        self.change(STOPPED)
        self.began = time.perf_counter()
        with self.phase("stop_time"):
            self.session.protocol.stop()
        self.job.step("after-stop", self.session)

    def resume(self) -> None:
        """Let the device go on as it was found."""
        with self.phase("start_time"):
            goes_on = self.session.let_go_on()
        self.end()
        if goes_on:
            self.session.journal("")
        self.job.step("after-start", self.session)

    def start(self) -> None:
        """Let the device run."""
        with self.phase("start_time"):
            self.session.protocol.start()
        self.job.step("after-start", self.session)

    def end(self) -> None:
        """Take the time: nothing more needs the device to stand still."""
        self.times["stopped_time"] = time.perf_counter() - self.began


# Several devices as one job: none may access another that is stopped already, or does not run yet. So every device
# goes to RUNNING_P2P before the first is stopped, and before the first runs again (<linux/vfio.h>,
# VFIO_DEVICE_STATE_RUNNING_P2P).


def require_p2p(sessions: Sequence[Session], *, waived: bool) -> None:
    """Refuse several devices of which one lacks the P2P states.

    :raises UnsupportedError: names it.
    """
    if len(sessions) < 2 or waived:  # noqa: PLR2004 -- several
        return
    for session in sessions:
        if session.protocol.reaches_others and session.protocol.p2p is None:
            raise UnsupportedError(
                "it has no P2P states, and could write to another device that is stopped already",
                device=session.device.name,
                hint="one device at a time, or use --no-p2p if they do not know of each other",
            )


def stop_all(pauses: Sequence[Pause]) -> None:
    """Stop one or several devices; what is to happen before that does so before the first is touched."""
    for pause in pauses:
        pause.job.step("before-stop", pause.session)
    if len(pauses) > 1:
        for pause in pauses:
            pause.quiet()
    for pause in pauses:
        pause.stop()


def announce_start(job: Job, sessions: Sequence[Session]) -> None:
    """Tell that devices are about to run, before the first one does."""
    for session in sessions:
        job.step("before-start", session)


def wake(sessions: Sequence[Session]) -> None:
    """Let several devices answer each other, before the first runs again.

    :raises DeviceError: the kernel refused.
    """
    if len(sessions) > 1:
        for session in sessions:
            if session.protocol.p2p is not None:
                session.protocol.p2p.wake()
