# SPDX-License-Identifier: MIT
"""Stop, start, reset and ask a device."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vfio_mig import interrupts
from vfio_mig.errors import UnsupportedError, UsageError
from vfio_mig.host.lock import STOPPED, at_work, left_behind
from vfio_mig.interrupts import protected
from vfio_mig.jobs.points import point
from vfio_mig.jobs.rollback import Rollback
from vfio_mig.jobs.session import CLOSED, Settings, find, holder_of, open_session, require_holder, survey
from vfio_mig.jobs.together import quiet, require_p2p, wake
from vfio_mig.protocols.mainline_v2 import MainlineV2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.jobs.session import Session

UNKNOWN = "unknown"


class Done(NamedTuple):
    """One thing done to one device.

    :param action: ``stop``, ``start`` or ``reset``.
    :param seconds: time from the request to the device's answer.
    """

    device: str
    action: str
    seconds: float


class Status(NamedTuple):
    """What can be said of a device.

    :param holder_pid: process that has it open, None when nobody has.
    :param protocol: name of the migration protocol; None when nobody holds the device, as only an open device tells.
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


def _now(session: Session, action: str) -> Done:
    """Start or reset one device."""
    began = time.perf_counter()
    _do_at_once(session, action)
    return Done(session.device.name, action, time.perf_counter() - began)


def _may_stop(session: Session, rollback: Rollback) -> None:
    if not session.is_half_loaded:
        session.note(STOPPED)
        rollback.push(session.go_on)


def _stop(session: Session) -> Done:
    began = time.perf_counter()
    session.protocol.stop()
    seconds = time.perf_counter() - began
    point("stop", "after-stop", session)
    return Done(session.device.name, "stop", seconds)


@protected
def _commit_stop(sessions: list[Session], rollback: Rollback) -> None:
    for session in sessions:
        session.require_holder_alive()
    rollback.forget()
    for session in sessions:
        if not session.is_half_loaded:
            session.note("")
    interrupts.finish()


@protected
def _do_at_once(session: Session, action: str) -> None:
    """Start or reset: what cannot be undone is not to be interrupted either."""
    if action == "reset":
        session.protocol.reset()
        if session.was_left:  # with its note goes the stop
            session.note(STOPPED)
    if action == "start" or session.was_left:
        session.protocol.start()
    session.note("")
    interrupts.finish()


def stop_device(name: str, settings: Settings | None = None) -> Done:
    """Stop a device that some process keeps open; its running work finishes, queued work stays queued.

    :raises DeviceBusyError: nobody has it open, so the stop would not outlive this call.
    :raises DeviceError: the kernel refused; the device still runs.
    """
    return stop_devices([name], settings)[0]


def stop_devices(names: Sequence[str], settings: Settings | None = None, *, without_p2p: bool = False) -> list[Done]:
    """Stop several devices as one job: after a failure all of them run.

    :param without_p2p: also if one of them has no P2P states, and may so write to another one that is stopped already.
    :raises UnsupportedError: one of them lacks the P2P states.
    :raises DeviceBusyError, DeviceError: as :func:`stop_device`.
    """
    for name in names:
        require_holder(find(name), "stop")
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_session(name, settings, job="stop")) for name in names]
        require_p2p(sessions, waived=without_p2p)
        for session in sessions:
            point("stop", "opened", session)
        rollback = stack.enter_context(Rollback())
        for session in sessions:
            _may_stop(session, rollback)
        quiet(sessions)
        done = [_stop(session) for session in sessions]
        _commit_stop(sessions, rollback)
    return done


def start_device(name: str, settings: Settings | None = None) -> Done:
    """Let a stopped device go on.

    :raises DeviceBusyError: nobody has it open; a device starts by itself when it is opened.
    """
    return start_devices([name], settings)[0]


def start_devices(names: Sequence[str], settings: Settings | None = None, *, without_p2p: bool = False) -> list[Done]:
    """Let several devices go on, all by way of the P2P states; a failure leaves those before it running.

    :param without_p2p: also if one of them has no P2P states.
    :raises UnsupportedError: one of them lacks the P2P states; none is started.
    :raises DeviceBusyError: as :func:`start_device`, before any is started.
    """
    for name in names:
        require_holder(find(name), "start")
    with ExitStack() as stack:
        sessions = [stack.enter_context(open_session(name, settings, job="start")) for name in names]
        require_p2p(sessions, waived=without_p2p)
        for session in sessions:
            point("start", "opened", session)
        wake(sessions)
        return [_now(session, "start") for session in sessions]


def reset_device(name: str, settings: Settings | None = None, *, force: bool = False) -> Done:
    """Reset a device: registers, queued work and interrupts are lost.

    :param force: also when it is borrowed from a process that is not our own holder.
    :raises UsageError: it belongs to somebody else, and *force* is not set.
    """
    found = find(name)
    holder = holder_of(found)
    if holder is not None and not holder.is_hold and not force:
        raise UsageError(
            f"a reset would take the device's interrupts and registers away from {holder}",
            device=found.name,
            hint="use --force if that is what you want",
        )
    with open_session(name, settings, job="reset") as session:
        point("reset", "opened", session)
        return _now(session, "reset")


class State(NamedTuple):
    """The state of a device, by QEMU's name."""

    device: str
    state: str


def device_state(name: str, settings: Settings | None = None, *, new: str | None = None) -> State:
    """Return the migration state of a mainline v2 device that some process keeps open, after going to *new*.

    :raises UnsupportedError: the device has no states to ask for.
    :raises UsageError: *new* is a state with a stream, which would be lost.
    """
    require_holder(find(name), "change of state" if new else "look at its state")
    with open_session(name, settings, job=None if new is None else "state") as session:
        protocol = session.protocol
        if not isinstance(protocol, MainlineV2):
            raise UnsupportedError(
                f"a {protocol.name} device cannot be asked for its state", device=session.device.name
            )
        if new is not None:
            protocol.go_to(new)
        return State(session.device.name, protocol.state())


def device_status(name: str, settings: Settings | None = None) -> Status:
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
        with open_session(found.name, settings, seen=seen) as session:
            protocol, state, migratable = session.protocol.name, session.protocol.state(), True
    return Status(
        found.name,
        found.kind,
        found.type,
        None if holder is None else holder.pid,
        None if holder is None else holder.command,
        protocol,
        state,
        None if left is None else str(left),
        None if left is None else left.repair(found.name),
        migratable,
        known.state,
        None if unseen is None else unseen.reason,
        None if work is None else work.job,
        None if work is None else work.pid,
        None if work is None else work.since,
        None if work is None else work.step,
    )
