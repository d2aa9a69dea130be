# SPDX-License-Identifier: MIT
"""Move a device's state to another device, on this host or another, in one go.

The source is started again unless the target has said that it holds the whole, verified state; and the target is
started only after that. So at no time do both run, and a connection that breaks at any byte leaves the source running.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig import interrupts
from vfio_mig.errors import DeviceError, HostError, MismatchError, OpenError, VfioMigError
from vfio_mig.interrupts import protected
from vfio_mig.jobs.check import parse_state
from vfio_mig.jobs.live import Live, with_rounds
from vfio_mig.jobs.peer import Peer, seconds
from vfio_mig.jobs.points import point
from vfio_mig.jobs.rollback import Rollback
from vfio_mig.jobs.save import default_ranges, describe_device
from vfio_mig.jobs.session import RUNNING, Settings, open_session
from vfio_mig.jobs.window import PAGE, Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.jobs.live import StateRound
    from vfio_mig.jobs.peer import Run
    from vfio_mig.jobs.session import Session

JOB = "migrate"
CONNECTION: Final = "the connection"
NEVER: Final = "the source stays stopped; look at the target and start it, or else the source, but never both"


class MigrateReport(NamedTuple):
    """What a migration did. Times in seconds, sizes in bytes, pages of 4096 bytes.

    :param stop_time: from the STOP request to the source's answer.
    :param bitmap_time: fetching the dirty bitmap.
    :param state_read_time: reading the state.
    :param transfer_time: from there until the target had the whole image, verified it and loaded it.
    :param state_write_time: the part of it in which the target's device took the state.
    :param start_time: from the request until the target ran, 0 when it was left stopped.
    :param downtime: from the STOP request until the target ran, or held the state.
    :param state: what the source is now; *target_state*: what the target is.
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
    pages_written: int
    pages_zero: int
    rounds: list[Round]
    precopy_bytes: int
    state_rounds: list[StateRound]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return with_rounds(self._asdict())


def _require_target(session: Session, peer: Peer) -> None:
    """Make sure before the stop that the target is there, held, and of the same type.

    :raises OpenError: nobody holds it, so the state would go with the restore's end.
    :raises MismatchError: it is of another type.
    """
    status = peer.status()
    if status.state == "closed":
        raise OpenError(
            f"{peer.target}: nobody has it open, so what is restored would be lost at once",
            hint=f"keep it open there with 'vfio-mig hold {peer.name}' first",
        )
    if status.type != session.found.type:
        raise MismatchError(
            f"the target is a {status.type!r}, the source a {session.found.type!r}", device=session.device.name
        )


class _Sender:
    """Sends one device's image into a pipe."""

    def __init__(self, session: Session, run: Run, guest: Memory, ranges: list[PageRange], live: Live) -> None:
        from vfio_mig.image.digests import Digests
        from vfio_mig.image.files import Stream
        from vfio_mig.image.writer import ArchiveWriter

        self._session = session
        self.output: Final = Stream(os.dup(run.stdin), CONNECTION)
        self.digests: Final = Digests(None)
        self._archive: Final = ArchiveWriter
        self._arguments = (guest, ranges, live)

    def open(self, rollback: Rollback) -> None:
        """Send the header; nothing is changed yet."""
        guest, ranges, live = self._arguments
        self._writer = self._archive(self.output.__enter__(), describe_device(self._session), self.digests)
        self.window = Window(JOB, self._session, rollback, ranges, guest, writer=self._writer, live=live)
        self.window.begin()

    def run(self) -> None:
        """Stop the device and send everything."""
        window = self.window
        window.stop()
        window.copy_memory()
        window.read_state()
        window.end()
        parse_state(self._session.protocol.name, window.state)
        window.write_rest()
        self._writer.finish({**window.times, "pages_dirty": window.pages_dirty})
        self.output.commit()
        point(JOB, "sent", self._session)


@protected
def _commit(session: Session, rollback: Rollback) -> None:
    """Take it that the state is the target's now; from here on the source stays stopped."""
    rollback.forget()
    session.note("")


def _end_target(run: Run, peer: Peer, session: Session, *, start: bool) -> dict[str, Any]:
    """Let the target start, or stay as it is; the state is its own by now."""
    run.say("start" if start else "stay")
    try:
        report = run.finish()
    except VfioMigError as error:
        raise DeviceError(
            f"{peer.target} has the state, but: {error}", device=session.device.name, hint=NEVER
        ) from error
    if start and report.get("state") != RUNNING:
        raise DeviceError(f"{peer.target} has the state, but was not started", device=session.device.name, hint=NEVER)
    return report


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
) -> MigrateReport:
    """Move a device's state, and with *memory* its dirty pages, to another device of the same type.

    :param target: a device on this host, or ``ssh://[USER@]HOST[:PORT]/NAME``; some process there holds it open.
    :param target_memory: ``FILE@GPA[:SIZE]`` of the target's guest memory, as its host knows it.
    :param start: start the target.
    :param live: copy pages while the source runs, before the stop.
    :param rsh: what reaches another host.
    :raises VfioMigError: of the class of what failed, here or there; the source runs.
    :raises DeviceError: also when the target holds the state and could not be started; the source stays stopped then.
    """
    from vfio_mig.dirty.memory import Memory

    peer = Peer(target, rsh)
    options = ["--await-word", *(f"--memory={text}" for text in target_memory)]
    with (
        Memory(memory) as guest,
        open_session(name, settings, memory=guest.maps, job=JOB) as session,
        Rollback() as rollback,
    ):
        _require_target(session, peer)
        with peer.start("restore", peer.name, "-", options=options, stdin=subprocess.PIPE) as run:
            run.wait_for("waiting")
            sender = _Sender(session, run, guest, default_ranges(guest, ranges), live or Live())
            try:
                with sender.output, sender.digests:
                    sender.open(rollback)
                    point(JOB, "opened", session)
                    sender.window.copy_live()
                    began = time.perf_counter()
                    sender.run()
            except HostError as error:
                if not error.problem.startswith(CONNECTION):
                    raise
                raise run.error() from error
            read = time.perf_counter()
            run.wait_for("loaded")
            point(JOB, "restored", session)
            _commit(session, rollback)
            held = time.perf_counter()
            restored = _end_target(run, peer, session, start=start)
        interrupts.finish()
        end = time.perf_counter()
        window, sink = sender.window, sender.window.sink
        times = {key: window.times[key] for key in ("stop_time", "bitmap_time", "state_read_time")}
        return MigrateReport(
            device=session.device.name,
            target=target,
            state=session.state_after(started=False),
            target_state="running" if start else "stop",
            **times,
            transfer_time=held - read,
            state_write_time=seconds(restored.get("state_write_time")),
            start_time=end - held if start else 0.0,
            downtime=end - began,
            state_bytes=window.state_bytes,
            pages_dirty=window.pages_dirty,
            pages_written=0 if sink is None else sink.bytes_written // PAGE,
            pages_zero=0 if sink is None else sink.bytes_zero // PAGE,
            rounds=window.rounds,
            precopy_bytes=window.precopy_bytes,
            state_rounds=window.state_rounds,
        )
