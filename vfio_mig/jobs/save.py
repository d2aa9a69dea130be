# SPDX-License-Identifier: MIT
"""Save a device: stop it, fetch its dirty bitmap, read its state, commit the image."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from vfio_mig import interrupts
from vfio_mig.errors import UsageError, VfioMigError
from vfio_mig.interrupts import protected
from vfio_mig.jobs.check import parse_state
from vfio_mig.jobs.live import Live, with_rounds
from vfio_mig.jobs.points import point
from vfio_mig.jobs.rollback import Rollback
from vfio_mig.jobs.session import Settings, open_session
from vfio_mig.jobs.together import require_p2p, wake
from vfio_mig.jobs.window import PAGE, Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.image.digests import Digests
    from vfio_mig.image.files import Output
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.live import StateRound
    from vfio_mig.jobs.session import Session

JOB = "save"
STDOUT = "-"


class SaveReport(NamedTuple):
    """What a save did. Times in seconds, sizes in bytes, pages of 4096 bytes.

    :param stop_time: from the STOP request to its answer.
    :param bitmap_time: fetching the dirty bitmap.
    :param state_read_time: reading the state.
    :param stopped_time: from the STOP request until the device was started again, or until all of it was read.
    :param start_time: from the START request to its answer, 0 when the device stays stopped.
    :param state: what the device is now: ``stop``, ``running``, or ``closed`` when nobody else has it open.
    :param pages_zero: dirty pages that are all zero: a range in the image, no content.
    :param rounds: of copying guest memory; the last one with the device stopped.
    :param precopy_bytes: the part of the state that was read while the device ran, in *state_rounds*.
    """

    device: str
    file: str
    state: str
    stop_time: float
    bitmap_time: float
    state_read_time: float
    start_time: float
    stopped_time: float
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

    def statistics(self) -> dict[str, Any]:
        """Return the part that the manifest keeps."""
        return {key: value for key, value in self.as_dict().items() if key not in ("device", "file", "state")}


def _output(file: str, *, force: bool) -> Output:
    """Choose the target; it is opened before the device is touched, and is there only once it is committed."""
    from vfio_mig.image.files import Stream, committed

    if file != STDOUT:
        return committed(file, force=force)
    if sys.stdout.isatty():
        raise UsageError("the image is binary and will not be written to a terminal", hint="redirect it or name a file")
    return Stream(os.dup(sys.stdout.fileno()), "standard output")


def describe_device(session: Session) -> dict[str, Any]:
    """Return what ``header.json`` says of a device, so that a restore can tell whether the image fits."""
    from vfio_mig import __version__

    found = session.found
    kernel = os.uname()
    return {
        "protocol": session.protocol.name,
        "device": {"name": found.name, "kind": found.kind, "type": found.type, "driver": found.driver or ""},
        "kernel": kernel.release,
        "machine": kernel.machine,
        "program": f"vfio-mig {__version__}",
        "time": int(time.time()),
    }


def default_ranges(memory: Memory, ranges: Sequence[PageRange]) -> list[PageRange]:
    """Choose the pages to ask for: those given, else the guest memory that we know, else the first 4 GiB."""
    from vfio_mig.dirty.ranges import PageRange, merge

    return merge(ranges) or memory.ranges or [PageRange(0, 1 << 20)]


class _Target:
    """One device of a save and where its image goes."""

    def __init__(self, name: str, file: str, *, raw: bool, force: bool) -> None:
        self.name = name
        self.file = file
        self._raw = raw
        self.output = _output(file, force=force)
        self._writer: ArchiveWriter | None = None

    def open(
        self, stack: ExitStack, settings: Settings | None, guest: Memory, ranges: list[PageRange], live: Live
    ) -> None:
        """Open device and file; nothing is changed yet."""
        from vfio_mig.image.writer import ArchiveWriter

        self.session = stack.enter_context(open_session(self.name, settings, memory=guest.maps, job=JOB))
        # Inside the rollback: a commit that fails starts the device again
        self.rollback = stack.enter_context(Rollback())
        self._stream = stack.enter_context(self.output)
        if not self._raw:
            self._writer = ArchiveWriter(self._stream, describe_device(self.session), self._digests(stack))
        self.window = Window(
            JOB, self.session, self.rollback, ranges, guest, writer=self._writer, raw=self._stream, live=live
        )
        self.window.begin()
        point(JOB, "opened", self.session)

    def _digests(self, stack: ExitStack) -> Digests | None:
        """Have the digests of a streamed state taken beside the job."""
        if not self.session.protocol.streams:
            return None
        from vfio_mig.image.digests import Digests

        return stack.enter_context(Digests(self._stream.fileno() if self.output.can_reread else None))

    def write(self, *, started: bool) -> SaveReport:
        """Write what is left to the file, which is whole then."""
        window = self.window
        parse_state(self.session.protocol.name, window.state)  # refused now rather than at the restore
        window.write_rest()
        report = self._report(started=started)
        if self._writer is not None:
            self._writer.finish(report.statistics())
        point(JOB, "written", self.session)
        return report

    def _report(self, *, started: bool) -> SaveReport:
        window = self.window
        sink = window.sink
        return SaveReport(
            device=self.session.device.name,
            file=self.file,
            state=self.session.state_after(started=started),
            **window.times,
            state_bytes=window.state_bytes,
            pages_dirty=window.pages_dirty,
            pages_written=0 if sink is None else sink.bytes_written // PAGE,
            pages_zero=0 if sink is None else sink.bytes_zero // PAGE,
            rounds=window.rounds,
            precopy_bytes=window.precopy_bytes,
            state_rounds=window.state_rounds,
        )


def _stop(targets: list[_Target]) -> None:
    if len(targets) > 1:
        for target in targets:
            target.window.quiet()
    for target in targets:
        target.window.stop()


@protected
def _commit(targets: list[_Target]) -> None:
    """Make all images final; from here on nothing is undone."""
    for target in targets:
        target.output.prepare()
    for number, target in enumerate(targets):
        try:
            target.output.commit()
        except VfioMigError:
            for done in targets[:number]:
                done.output.withdraw()
            raise
    for target in targets:
        target.rollback.forget()
        target.session.note("")
    interrupts.finish()


def _check_targets(pairs: Sequence[tuple[str, str]], *, raw: bool, memory: Sequence[MemoryMap]) -> None:
    if raw and memory:
        raise UsageError("a raw state has no place for memory pages", hint="leave out --raw or --memory")
    files = [file for _, file in pairs]
    if len(set(files)) < len(files) or (STDOUT in files and len(files) > 1):
        raise UsageError("two devices cannot be saved to one file", hint="name one for each: DEVICE=FILE")


def save(
    name: str,
    file: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ranges: Sequence[PageRange] = (),
    leave_running: bool = False,
    raw: bool = False,
    force: bool = False,
    live: Live | None = None,
) -> SaveReport:
    """Save a device to a file or, as ``-``, to standard output.

    The device is left stopped unless *leave_running*. After any failure it runs and there is no file.

    :param memory: guest memory; its dirty pages go into the image.
    :param ranges: guest pages to fetch the dirty bitmap of; by default those of *memory*, else the first 4 GiB.
    :param raw: write the bare state, without bitmap, pages and integrity.
    :param force: replace an existing file.
    :param live: copy pages, and read the state, while the device runs, before the stop.
    :raises OpenError, UnsupportedError: nothing was done.
    :raises DeviceError: the device failed; it was started again.
    :raises HostError: the file could not be written; the device was started again.
    """
    return save_all(
        [(name, file)],
        settings,
        memory=memory,
        ranges=ranges,
        leave_running=leave_running,
        raw=raw,
        force=force,
        live=live,
    )[0]


def save_all(
    pairs: Sequence[tuple[str, str]],
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ranges: Sequence[PageRange] = (),
    leave_running: bool = False,
    raw: bool = False,
    force: bool = False,
    live: Live | None = None,
    without_p2p: bool = False,
) -> list[SaveReport]:
    """Save several devices as one job: all are stopped before any is read, and after any failure all run.

    :param pairs: (device, file) each; the other parameters are those of :func:`save`.
    :param without_p2p: also if one of them has no P2P states, and may so write to another one that is stopped already.
    :raises UnsupportedError: also because of P2P.
    """
    from vfio_mig.dirty.memory import Memory

    _check_targets(pairs, raw=raw, memory=memory)
    targets = [_Target(name, file, raw=raw, force=force) for name, file in pairs]
    with Memory(memory) as guest, ExitStack() as stack:
        wanted = default_ranges(guest, ranges)
        for target in targets:
            target.open(stack, settings, guest, wanted, live or Live())
        sessions = [target.session for target in targets]
        require_p2p(sessions, waived=without_p2p)
        for target in targets:
            target.window.copy_live()
        _stop(targets)
        for target in targets:
            target.window.copy_memory()
        for target in targets:
            target.window.read_state()
        for target in targets:
            target.window.end()
        if leave_running:
            wake(sessions)
            for target in targets:
                target.window.start()
        reports = [target.write(started=leave_running) for target in targets]
        _commit(targets)
    return reports
