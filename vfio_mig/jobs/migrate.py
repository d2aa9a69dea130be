# SPDX-License-Identifier: MIT
"""Move a device's state to another device, on this host or another, in one go.

The source is started again unless the target has said that it holds the whole, verified state; and the target is
started only after that. So at no time do both run, and a connection that breaks at any byte leaves the source running.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.errors import (
    DeviceError,
    HostError,
    MismatchError,
    OpenError,
    UnsupportedError,
    UsageError,
    VfioMigError,
)
from vfio_mig.host.lock import MOVED
from vfio_mig.interrupts import protected
from vfio_mig.jobs.check import missing_memory
from vfio_mig.jobs.engine.export import Export, Source, begin_image
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import Live
from vfio_mig.jobs.engine.memory import ALL, NONE, Content, Wanted, memory_header, new_job_id
from vfio_mig.jobs.engine.pause import Pause, announce_start
from vfio_mig.jobs.engine.rehearsal import rehearse
from vfio_mig.jobs.peer import Peer, number, seconds
from vfio_mig.report import Report
from vfio_mig.words import CLOSED, RUNNING, STOP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig import words
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.jobs.engine.live import StateRound
    from vfio_mig.jobs.engine.session import Session, Settings
    from vfio_mig.jobs.peer import Run

JOB: Final = "migrate"
CONNECTION: Final = "the connection"
NEVER: Final = (
    "the source stays stopped; look at the target and start it, or else the source with --force, but never both"
)


@dataclass(frozen=True, kw_only=True)
class MigrateReport(Report):
    """What a migration did. Times in seconds, sizes in bytes, pages of 4096 bytes.

    :param stop_time: from the STOP request to the source's answer.
    :param bitmap_time: fetching the dirty bitmap.
    :param state_read_time: reading the state.
    :param transfer_time: all else until the target had the whole image, verified it and loaded it, with the notes and
        hooks of both sides' steps: so these times add up to the downtime.
    :param state_write_time: the part of it in which the target's device took the state.
    :param start_time: from the request until the target said that it ran, 0 when it was left stopped.
    :param downtime: from the STOP request until the target ran, or held the state.
    :param state: what the source is now; *target_state*: what the target is.
    :param pages_sent: pages with content that were sent, one of several rounds in each.
    :param pages_written: pages that the target has written to its guest's memory, those of zeros too.
    :param memory, guest_paused: as a save's report has them.
    """

    device: str
    target: str
    state: str
    target_state: str
    stop_time: float
    bitmap_time: float
    state_read_time: float
    transfer_time: float
    state_write_time: float
    start_time: float
    downtime: float
    state_bytes: int
    pages_dirty: int
    pages_sent: int
    pages_written: int
    pages_zero: int
    rounds: list[Round]
    precopy_bytes: int
    state_rounds: list[StateRound]
    memory: words.Content
    guest_paused: bool


def _require_target(session: Session, peer: Peer) -> None:
    """Make sure before the stop that the target is there, held, and of the same type.

    :raises OpenError: nobody holds it, so the state would go with the restore's end.
    :raises UnsupportedError: it cannot be migrated.
    :raises MismatchError: it is of another type, or speaks another protocol.
    """
    status = peer.status()
    if status.state == CLOSED:
        raise OpenError(
            f"{peer.target}: nobody has it open, so what is restored would be lost at once",
            hint=f"keep it open there with 'vfio-mig hold {peer.name}' first",
        )
    if status.migratable is False:
        raise UnsupportedError(
            f"{peer.target}: it speaks no migration protocol", hint=f"'vfio-mig info {peer.name}' there says why"
        )
    if status.type != session.found.type:
        raise MismatchError(
            f"the target is a {status.type!r}, the source a {session.found.type!r}", device=session.device.name
        )
    if status.protocol not in (None, session.protocol.name):
        raise MismatchError(
            f"the target speaks {status.protocol!r}, the source {session.protocol.name!r}", device=session.device.name
        )


class _Sender:
    """Sends one device's image into a pipe."""

    def __init__(self, job: Job, session: Session, run: Run, guest: Memory, *, wanted: Wanted, live: Live) -> None:
        from vfio_mig.image.files import Stream

        self._job = job
        self._output = Stream(os.dup(run.stdin), CONNECTION)
        content = Content.expected(wanted, [session], has_memory=bool(guest.maps))
        header = memory_header(content, new_job_id(), None)
        self.pause = Pause(job, session)
        image = begin_image(job, session, job.enter(self._output), header, is_awaited=True)
        self._source = Source(self.pause, image)
        self.export = Export(job, [self._source], guest, live, wanted)

    def run(self) -> None:
        """Send what can be sent while the device runs, then stop it and send everything."""
        self.export.copy_live()
        self.export.copy_stopped()

    def finish(self, *, no_memory: bool) -> None:
        """Send what could wait, and the end of the image."""
        (dirty,) = self.export.end()
        figures = self.export.figures(0)
        known = self._source.finish(dirty, {**self.pause.times, "pages_dirty": figures["pages_dirty"]})
        self._output.close()
        session, content = self._source.session, figures["memory"]
        self._job.step("sent", session)
        if known is not None and known.relies_on and content != ALL and not no_memory:
            missing = missing_memory(known.relies_on, content, has_pages=content != NONE)
            session.warn(f"guest memory: {missing}")


@protected
def _give_up(job: Job, session: Session) -> None:
    """Treat the state as the target's from here on: the source stays stopped, and says so."""
    job.disarm()
    session.journal(MOVED)


def _end_target(run: Run, peer: Peer, session: Session, *, start: bool) -> tuple[dict[str, Any], float]:
    """Let the target start, or stay as it is; the state is its own by now.

    :returns: its report, and when it said that it runs, as time.perf_counter() has it: that its process ends takes as
        long as all the rest, and is not its guest's time.
    """
    name = session.device.name
    try:
        run.say("start" if start else "stay")
        if start:
            run.wait_for("after-start")
        end = time.perf_counter()
        report = run.finish()
    except VfioMigError as error:
        raise DeviceError(f"{peer.target} has the state, but: {error}", device=name, hint=NEVER) from error
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{peer.target} has the state, and has not said whether it runs; {NEVER}")
        raise
    if start and report.get("state") != RUNNING:
        raise DeviceError(f"{peer.target} has the state, but was not started", device=name, hint=NEVER)
    return report, end


def _check_memory(memory: Sequence[MemoryMap], target_memory: Sequence[str], *, no_memory: bool) -> None:
    if no_memory:
        return
    if memory and not target_memory:
        raise UsageError(
            "the pages of --memory have no place to go to",
            hint="name the target's with --target-memory, or use --no-memory to move the state alone",
        )
    if target_memory and not memory:
        raise UsageError("there is nothing to write to --target-memory", hint="name the source's memory with --memory")


def migrate(
    name: str,
    target: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    target_memory: Sequence[str] = (),
    ranges: Sequence[PageRange] = (),
    start: bool = True,
    live: Live | None = None,
    rsh: Sequence[str] = ("ssh",),
    force: bool = False,
    no_memory: bool = False,
    all_memory: bool = False,
    guest_paused: bool = False,
    strict: bool = False,
    open_closed: bool = False,
) -> MigrateReport:
    """Move a device's state, and with *memory* its dirty pages, to another device of the same type.

    :param target: a device on this host, or ``ssh://[USER@]HOST[:PORT]/NAME``; some process there holds it open.
    :param target_memory: ``FILE@GPA[:SIZE]`` of the target's guest memory, as its host knows it.
    :param start: start the target.
    :param live: copy pages while the source runs, before the stop.
    :param rsh: what reaches another host.
    :param force: also if the source's state was moved before: what goes on with it runs a second time then.
    :param no_memory: move the state alone, whatever memory is named.
    :param all_memory, guest_paused, strict, open_closed: as :func:`vfio_mig.save` has them.
    :raises VfioMigError: of the class of what failed, here or there; the source runs.
    :raises DeviceError: also when the target holds the state and could not be started; the source stays stopped then.
    """
    from vfio_mig.dirty.memory import Memory

    _check_memory(memory, target_memory, no_memory=no_memory)
    if no_memory:
        memory, target_memory = (), ()
    peer = Peer(target, rsh)
    options = ["--await-word", *(f"--memory={text}" for text in target_memory)]
    with Job(JOB, settings) as job:
        guest = job.enter(Memory(memory))
        held_for = None if open_closed else JOB
        session = job.open(name, memory=guest.maps, force=force, held_for=held_for)
        _require_target(session, peer)
        run = job.enter(peer.start("restore", peer.name, "-", options=options, stdin=subprocess.PIPE))
        rehearse(session)  # while the other end does the same
        run.wait_for("waiting")
        try:
            wanted = Wanted(ranges, all_memory, guest_paused, strict)
            sender = _Sender(job, session, run, guest, wanted=wanted, live=live or Live())
            sender.run()
            sender.finish(no_memory=no_memory)
        except HostError as error:
            if not error.problem.startswith(CONNECTION):
                raise
            raise run.error() from error
        run.wait_for("loaded")
        job.step("restored", session)
        if start:
            announce_start(job, [session])
        _give_up(job, session)
        held = time.perf_counter()
        restored, end = _end_target(run, peer, session, start=start)
        end = end if start else held
        job.commit()
        if start:
            job.step("after-start", session)
        return _report(target, sender, session, restored, held=held, end=end, start=start)


def _report(
    target: str,
    sender: _Sender,
    session: Session,
    restored: dict[str, Any],
    *,
    held: float,
    end: float,
    start: bool,
) -> MigrateReport:
    times: dict[str, Any] = {key: sender.pause.times[key] for key in ("stop_time", "bitmap_time", "state_read_time")}
    return MigrateReport(
        device=session.device.name,
        target=target,
        state=session.state_after(started=False),
        target_state=RUNNING if start else STOP,
        **times,
        transfer_time=held - sender.pause.began - sum(times.values()),
        state_write_time=seconds(restored.get("state_write_time")),
        start_time=end - held if start else 0.0,
        downtime=end - sender.pause.began,
        pages_sent=sender.export.pages_copied(0),
        pages_written=number(restored.get("pages_written")),
        **sender.export.figures(0),
    )
