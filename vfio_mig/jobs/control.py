# SPDX-License-Identifier: MIT
"""Stop, start, reset and ask a device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_mig.errors import UnsupportedError, UsageError, VfioMigError
from vfio_mig.host.lock import STOPPED, at_work, left_behind
from vfio_mig.interrupts import protected
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.pause import Pause, announce_start, require_p2p, stop_all, wake
from vfio_mig.jobs.engine.session import Settings, open_session, require_holder, survey
from vfio_mig.report import Report
from vfio_mig.words import CLOSED, STOP, UNKNOWN, Action

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.jobs.engine.session import Session


@dataclass(frozen=True, kw_only=True)
class ActionReport(Report):
    """One thing done to one device.

    :param action: ``stop``, ``start`` or ``reset``.
    :param seconds: time from the request to the device's answer.
    """

    device: str
    action: Action
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StatusReport(Report):
    """What can be said of a device.

    :param holder_pid: process that has it open, None when nobody has.
    :param protocol: name of the migration protocol; None when it has none, or when nobody holds the device, as only an
        open device tells.
    :param state: of a mainline v2 device its state by QEMU's name; ``closed`` when nobody has it open; ``unknown``
        where it cannot be asked: the RFC has no way, and a holder may be one that cannot be seen.
    :param left: what a job that did not come to its end has left behind, None for nothing.
    :param repair: what to do about it.
    :param migratable: whether it has the migration protocol v2 or, held, any of ours; None when that is not known
        before it is opened.
    :param driver_state: its migration state by QEMU's name as the kernel shows it, open or not, where it does: None
        where not, ``?`` when its driver does not answer.
    :param unseen: why a process that has it open may have been missed, None when none can have been.
    :param job: the job that is at work on it, None when none is, empty when it has not said which.
    :param job_pid: its process, as that one's PID namespace has it.
    :param job_since: seconds since 1970 at which it began, None when it has not said.
    :param job_step: the step that it has come to last, None when it has not said.
    :param moved: whether ``migrate`` has moved its state to another device, which goes on with it.
    """

    device: str
    kind: str
    type: str
    holder_pid: int | None
    holder: str | None
    protocol: str | None
    state: str
    left: str | None
    repair: str | None
    migratable: bool | None
    driver_state: str | None
    unseen: str | None = None
    job: str | None = None
    job_pid: int | None = None
    job_since: float | None = None
    job_step: str | None = None
    moved: bool = False


def stop_device(name: str, settings: Settings | None = None) -> ActionReport:
    """Stop a device that some process keeps open; its running work finishes, queued work stays queued.

    :raises DeviceBusyError: nobody has it open, so the stop would not outlive this call.
    :raises DeviceError: the kernel refused; the device still runs.
    """
    return stop_devices([name], settings)[0]


def stop_devices(
    names: Sequence[str], settings: Settings | None = None, *, without_p2p: bool = False
) -> list[ActionReport]:
    """Stop several devices as one job: after a failure all of them run.

    :param without_p2p: also if one of them has no P2P states.
    :raises UnsupportedError: one of them lacks the P2P states; none is stopped.
    :raises DeviceBusyError: as :func:`stop_device`, before any is stopped.
    """
    seen = survey(*names)
    for name in names:
        require_holder(seen.find(name), "stop", seen)
    with Job("stop", settings) as job:
        sessions = [job.open(name, seen=seen) for name in names]
        require_p2p(sessions, waived=without_p2p)
        for session in sessions:
            job.step("opened", session)
        pauses = [Pause(job, session) for session in sessions]
        stop_all(pauses)
        job.commit(
            *[session.require_holder_alive for session in sessions],
            *[lambda session=session: session.journal("") for session in sessions],
        )
        return [
            ActionReport(device=pause.session.device.name, action="stop", seconds=pause.times["stop_time"])
            for pause in pauses
        ]


def start_device(name: str, settings: Settings | None = None, *, force: bool = False) -> ActionReport:
    """Let a stopped device go on.

    :param force: also if its state was moved to another device.
    :raises DeviceBusyError: nobody has it open; a device starts by itself when it is opened.
    """
    return start_devices([name], settings, force=force)[0]


def start_devices(
    names: Sequence[str], settings: Settings | None = None, *, without_p2p: bool = False, force: bool = False
) -> list[ActionReport]:
    """Let several devices go on, all by way of the P2P states. What has been started stays so; after a failure the
    others are as they were found, and the error says which is which.

    :param without_p2p: also if one of them has no P2P states.
    :param force: also if an earlier job has moved the state of one to another device.
    :raises UnsupportedError: one of them lacks the P2P states; none is started.
    :raises DeviceBusyError: as :func:`start_device`, before any is started.
    """
    seen = survey(*names)
    for name in names:
        require_holder(seen.find(name), "start", seen)
    done: list[ActionReport] = []
    with Job("start", settings) as job:
        sessions = [job.open(name, force=force, seen=seen) for name in names]
        require_p2p(sessions, waived=without_p2p)
        for session in sessions:
            job.step("opened", session)
            _warn_of_owner(session)
        announce_start(job, sessions)
        try:
            _wake(job, sessions)
            for session in sessions:
                done.append(_now(session, "start"))
                if len(done) == len(sessions):
                    job.commit()
                job.step("after-start", session)
        except BaseException as error:
            _say_which(error, sessions, done)
            raise
    return done


def _warn_of_owner(session: Session) -> None:
    """Say what a device that its VM may have stopped can mean: a VMM stops it for good when it has migrated its VM."""
    holder = session.device.holder
    if holder is not None and not holder.is_hold and session.leftover is None and session.protocol.state() == STOP:
        session.warn(
            f"{holder} has it, and it stands still: if that VM has been migrated away (QEMU's state postmigrate), it "
            "runs a second time now"
        )


def _wake(job: Job, sessions: Sequence[Session]) -> None:
    """Let the devices answer each other; one that does not get to run goes back to where it was."""
    if len(sessions) > 1:
        for session in sessions:
            if session.protocol.p2p is not None:
                job.undo_with(session.protocol.p2p.undo_wake)
    wake(sessions)


def _say_which(error: BaseException, sessions: Sequence[Session], done: Sequence[ActionReport]) -> None:
    if len(sessions) < 2:  # noqa: PLR2004 -- the error names the one
        return
    names = [session.device.name for session in sessions]
    text = f"started: {', '.join(names[: len(done)]) or 'none'}; not started: {', '.join(names[len(done) :]) or 'none'}"
    if isinstance(error, VfioMigError):
        error.consequences.append(text)
    else:
        error.add_note(text)


def _now(session: Session, action: Action) -> ActionReport:
    """Start or reset one device."""
    began = time.perf_counter()
    _do_at_once(session, action)
    return ActionReport(device=session.device.name, action=action, seconds=time.perf_counter() - began)


@protected
def _do_at_once(session: Session, action: Action) -> None:
    """Start or reset: what cannot be undone is not to be interrupted either."""
    was_left = session.leftover is not None
    if action == "reset":
        session.protocol.reset()
        session.leftover = None
        if was_left:  # what was left is gone, but for the stop
            session.journal(STOPPED)
    if action == "start" or (was_left and session.refusal is None):
        session.protocol.start()
    session.clear_journal()


def reset_device(name: str, settings: Settings | None = None, *, force: bool = False) -> ActionReport:
    """Reset a device: registers, queued work and interrupts are lost.

    :param force: also when it is borrowed from a process that is not our own holder.
    :raises UsageError: it belongs to somebody else, and *force* is not set.
    """
    seen = survey(name)
    found = seen.find(name)
    holder = seen.holder_of(found)
    if holder is not None and not holder.is_hold and not force:
        raise UsageError(
            f"a reset would take the device's interrupts and registers away from {holder}",
            device=found.name,
            hint="use --force if that is what you want",
        )
    with Job("reset", settings) as job:
        session = job.open(name, seen=seen, any_device=True)
        job.step("opened", session)
        done = _now(session, "reset")
        job.commit()
        return done


@dataclass(frozen=True, kw_only=True)
class StateReport(Report):
    """The state of a device, by QEMU's name."""

    device: str
    state: str


def device_state(name: str, settings: Settings | None = None, *, new: str | None = None) -> StateReport:
    """Return the migration state of a mainline v2 device that some process keeps open, after going to *new*.

    :raises UnsupportedError: the device has no states to ask for.
    :raises UsageError: *new* is a state with a stream, which would be lost.
    """
    seen = survey(name)
    (found,) = seen.devices
    require_holder(found, "change of state" if new else "look at its state", seen)
    with open_session(name, settings, job=None if new is None else "state", seen=seen) as session:
        states = session.protocol.states
        if states is None:
            raise UnsupportedError(
                f"a {session.protocol.name} device cannot be asked for its state", device=session.device.name
            )
        if new is not None:
            states.go_to(new)
        return StateReport(device=session.device.name, state=states.state())


def device_status(name: str, settings: Settings | None = None) -> StatusReport:
    """Tell who has a device open and what it speaks; opens nothing that is closed.

    A driver that does not answer is asked nothing: its lock may never be given free, and who waits for that cannot be
    ended.
    """
    from vfio_mig.host.offline import NO_ANSWER, look

    seen = survey(name)
    (found,) = seen.devices
    holder = seen.holder_of(found)
    unseen = None if holder is not None else seen.unseen
    left, work = left_behind(found, holder), at_work(found)
    protocol, state = None, CLOSED if holder is None and unseen is None else UNKNOWN
    (known,) = look([found], seen.host)
    migratable = known.migratable
    if holder is not None and known.state != NO_ANSWER:
        with open_session(found.name, settings, seen=seen, any_device=True) as session:
            protocol, state, migratable = session.protocol_name, session.protocol.state(), session.refusal is None
    return StatusReport(
        device=found.name,
        kind=found.kind,
        type=found.type,
        holder_pid=None if holder is None else holder.pid,
        holder=None if holder is None else holder.command,
        protocol=protocol,
        state=state,
        left=None if left is None else str(left),
        moved=left is not None and left.is_moved,
        repair=None if left is None else left.repair(found.name),
        migratable=migratable,
        driver_state=known.state,
        unseen=None if unseen is None else unseen.reason,
        job=None if work is None else work.job,
        job_pid=None if work is None else work.pid,
        job_since=None if work is None else work.since,
        job_step=None if work is None else work.step,
    )
