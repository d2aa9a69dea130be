# SPDX-License-Identifier: MIT
"""Run the checks on a device, one after the other, and leave it RUNNING whatever happens."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vfio_mig import interrupts, threads
from vfio_mig.conform.kit.check import FAIL, OUTCOMES, PASS, RFC, SKIP, V2, WARN, Result
from vfio_mig.conform.kit.rfc_device import Rfc
from vfio_mig.conform.kit.rig import Rig
from vfio_mig.conform.kit.v2_device import Kernel, V2Device, errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, Weakness
from vfio_mig.conform.registry import select
from vfio_mig.errors import DeviceBusyError, DeviceError, UsageError, VfioMigError, printable
from vfio_mig.host.lock import LOADING
from vfio_mig.interrupts import protected, waiting
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.session import Settings, open_session, survey
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.protocols.mainline_v2 import MainlineV2
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from vfio_mig.conform.kit.check import Check, Outcome
    from vfio_mig.device import Device
    from vfio_mig.host.discover import Snapshot
    from vfio_mig.host.guest import GuestMemory
    from vfio_mig.jobs.engine.session import Session

PATIENCE: Final = 30.0
"""Seconds after which a check that has not ended is named."""
UNDEFINED: Final = "undefined"
NOT_ASKED: Final = "only with --dangerous: "


@dataclass(frozen=True, kw_only=True)
class ConformReport(Report):
    """What came of all checks.

    :param protocol: with its flags, as `vfio-mig info` says it.
    :param found: state in which a v2 device was found; ``unknown`` for the RFC.
    :param state: in which it is left: ``running``, ``closed`` when nobody else has it open, ``undefined`` when it could
        not be brought back.
    :param seconds: of all checks.
    """

    device: str
    type: str
    driver: str
    kernel: str
    protocol: str
    found: str
    state: str
    seconds: float
    checks: list[Result]

    def count(self, outcome: Outcome) -> int:
        """Count the checks that ended so."""
        return sum(result.outcome == outcome for result in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**super().as_dict(), "counts": {outcome: self.count(outcome) for outcome in OUTCOMES}}


class Watchdog:
    """Names a check that does not end. It kills nothing: an ioctl that hangs cannot be killed either.

    :param warn: takes a sentence, in a thread of its own.
    """

    def __init__(self, warn: Callable[[str], object] | None, what: str) -> None:
        self._timer = None
        if warn is not None:
            self._timer = threading.Timer(PATIENCE, warn, [f"still in {what} after {PATIENCE:.0f} s"])
            self._timer.daemon = True

    def __enter__(self) -> Self:
        if self._timer is not None:
            threads.start(self._timer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()


@waiting
def _played(check: Check, rig: Rig) -> str:
    """Run a check; a driver may keep it waiting, and the rig copes with whatever state that leaves."""
    return check.run(rig)


def run_check(check: Check, rig: Rig, *, dangerous: bool = False) -> Result:
    """Run one check; whatever it raises becomes its result."""
    began = time.perf_counter()
    outcome: Outcome = PASS
    seen = note = ""
    if check.danger and not dangerous:
        return _result(check, SKIP, NOT_ASKED + check.danger, "", 0.0)
    try:
        rig.begin()
        seen = _played(check, rig)
    except NotApplicable as reason:
        outcome, seen = SKIP, str(reason)
    except Weakness as found:
        outcome, seen, note = WARN, found.seen, found.note
    except Deviation as found:
        outcome, seen, note = FAIL, found.seen, found.note
    except VfioMigError as error:
        outcome, seen = FAIL, str(error)
    except OSError as error:
        outcome, seen = FAIL, errno_name(error)
    except Exception as error:  # noqa: BLE001 -- one check's trouble is not the others'
        outcome, seen, note = FAIL, f"{type(error).__name__}: {error}", "the check itself could not go on"
    return _result(check, outcome, seen, note, time.perf_counter() - began)


def _result(check: Check, outcome: Outcome, seen: str, note: str, seconds: float) -> Result:
    return Result(
        check.id, check.rule, check.source, check.expected, printable(seen), outcome, printable(note), seconds
    )


def conform_device(
    name: str,
    settings: Settings | None = None,
    *,
    checks: Sequence[str] = (),
    second: str | None = None,
    dangerous: bool = False,
    force: bool = False,
) -> ConformReport:
    """Check a device's migration driver against the rules of the header; the device's state is lost.

    :param checks: ids or patterns of the checks to run; all without any.
    :param second: another device, for what takes two.
    :param dangerous: also do what is known to hang or crash kernels.
    :param force: also when another process has the device open; it loses its device's state and interrupts.
    :raises DeviceBusyError: another process has it open, and *force* is not set.
    :raises UnsupportedError: it speaks no migration protocol.
    :raises UsageError: a pattern matches no check, or both devices are the same.
    """
    settings = settings or Settings()
    select(checks)
    seen = survey(*(one for one in (name, second) if one is not None))
    with Job("conform", settings) as job:
        session = job.enter(_open(name, settings, seen, force=force))
        other = None
        if second is not None:
            if seen.find(second).name == session.found.name:
                raise UsageError("--second is the device itself", device=session.found.name)
            other = job.enter(_open(second, settings, seen, force=force))
        job.step("opened", session)
        return _run(job, session, other, select(checks, _family(session)), dangerous=dangerous)


def _open(name: str, settings: Settings, seen: Snapshot, *, force: bool) -> Session:
    found = seen.find(name)
    holder = seen.holder_of(found)
    if holder is not None and not force:
        raise _busy(found.name, str(holder))
    session = open_session(name, settings, job="conform", seen=seen)
    if session.device.borrowed and not force:
        session.close()
        raise _busy(found.name, "another process")
    return session


def _busy(name: str, holder: str) -> DeviceBusyError:
    return DeviceBusyError(
        f"{holder} has it open, and would lose the device's state",
        device=name,
        hint="use --force if that is what you want",
    )


def _family(session: Session) -> str:
    return V2 if isinstance(session.protocol, MainlineV2) else RFC


class _OpenRig:
    """The rig of a session; at the end the device runs, with its own state, or the user is told that it does not."""

    def __init__(
        self, session: Session, settings: Settings, *, second: Rig | None, same_type: bool, dangerous: bool
    ) -> None:
        self._session = session
        self._settings = settings
        self.left = ""
        """State in which the device was left."""
        device, protocol = session.device, session.protocol
        v2 = rfc = None
        if isinstance(protocol, MainlineV2):
            v2 = V2Device(Kernel(), device.fileno(), dangerous=dangerous)
            v2.flags = protocol.flags
        elif isinstance(protocol, GvtRfc):
            region = device.region(protocol.profile.state_index)
            rfc = Rfc(Kernel(), device.fileno(), protocol.profile, region)
        self.rig: Final = Rig(
            device,
            v2=v2,
            rfc=rfc,
            opener=None if device.borrowed else self._open_again,
            second=second,
            same_type=same_type,
        )

    def _open_again(self, memory: Sequence[GuestMemory]) -> Device:
        from vfio_mig.host.opening import open_device

        return open_device(self._session.found, memory=memory, via=self._settings.via)

    def __enter__(self) -> Rig:
        self._session.journal(LOADING)
        return self.rig

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        problem = self._settle()
        self.left = self._session.state_after(started=True) if problem is None else UNDEFINED
        self.rig.device.close()
        if problem is None:
            self._session.clear_journal()
        elif isinstance(error, VfioMigError):
            error.undo_errors.append(problem)
        else:
            self._settings.warn_user(str(problem))

    def _settle(self) -> DeviceError | None:
        name = self._session.device.name
        try:
            self.rig.begin()
        except (Deviation, NotApplicable, OSError, VfioMigError) as problem:
            what = errno_name(problem) if isinstance(problem, OSError) else str(problem)
            return DeviceError(
                f"it cannot be brought back to running: {what}", device=name, hint=f"try 'vfio-mig reset {name}'"
            )
        return None


def _run(job: Job, session: Session, other: Session | None, checks: list[Check], *, dangerous: bool) -> ConformReport:
    settings = job.settings
    found, protocol = session.protocol.state(), session.protocol.describe()
    began = time.perf_counter()
    same_type = other is not None and (other.found.type, _family(other)) == (session.found.type, _family(session))
    with ExitStack() as stack:
        second = None
        if other is not None:
            second = stack.enter_context(_OpenRig(other, settings, second=None, same_type=False, dangerous=dangerous))
        one = _OpenRig(session, settings, second=second, same_type=same_type, dangerous=dangerous)
        rig = stack.enter_context(one)
        results = list(_results(job, session, rig, checks, dangerous=dangerous))
        seconds = time.perf_counter() - began
    return ConformReport(
        device=session.device.name,
        type=session.found.type,
        driver=session.found.driver,
        kernel=os.uname().release,
        protocol=protocol,
        found=found,
        state=one.left,
        seconds=seconds,
        checks=results,
    )


def _results(job: Job, session: Session, rig: Rig, checks: list[Check], *, dangerous: bool) -> Iterator[Result]:
    settings = job.settings
    for check in checks:
        job.step("checking", session)
        with Watchdog(settings.warn_user, check.id):
            result = run_check(check, rig, dangerous=dangerous)
        interrupts.check()
        if settings.tell is not None:
            settings.tell(f"{result.outcome} {result.id}: {result.seen}")
        yield result
