# SPDX-License-Identifier: MIT
"""Save a device: stop it, fetch its dirty bitmap, read its state, commit the image."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.errors import HostError, UsageError
from vfio_mig.jobs.check import parse_state
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import Live, copy_live, falls_short
from vfio_mig.jobs.engine.memory import (
    NONE,
    Content,
    ImageSink,
    MemoryCopy,
    Wanted,
    last_round,
    memory_header,
    new_job_id,
)
from vfio_mig.jobs.engine.pause import Pause, announce_start, require_p2p, stop_all, wake
from vfio_mig.jobs.engine.state import StateReader
from vfio_mig.ranges import PAGE
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig import words
    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.image.digests import Digests
    from vfio_mig.image.files import Output
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.engine.live import StateRound
    from vfio_mig.jobs.engine.session import Session, Settings

JOB: Final = "save"
STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class SaveReport(Report):
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
    :param memory: what of guest memory is in the images of this job: ``none``, ``dirty``, the pages that the devices
        may have written, or ``all``. Of several devices the first one's image has it.
    :param guest_paused: whether the caller knows that the guest's CPUs did not run meanwhile; else a page of ``all``
        may be old.
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
    memory: words.Content = NONE
    guest_paused: bool = False

    def statistics(self) -> dict[str, Any]:
        """Return the part that the manifest keeps."""
        return {key: value for key, value in self.as_dict().items() if key not in ("device", "file", "state")}


def _output(file: str, *, force: bool) -> Output:
    """Choose the target; it is opened before the device is touched, and is there only once it is committed."""
    from vfio_mig.image.files import committed, standard_output

    if file != STDOUT:
        return committed(file, force=force)
    return standard_output("the image is binary", "redirect it or name a file")


def describe_device(session: Session) -> dict[str, Any]:
    """Return what ``header.json`` says of a device, so that a restore can tell whether the image fits."""
    from vfio_mig.version import __version__

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


class _Target:
    """One device of a save and where its image goes."""

    def __init__(self, name: str, file: str, *, raw: bool, force: bool) -> None:
        self.name = name
        self.file = file
        self._raw = raw
        self._force = force
        self.output = _output(file, force=force)
        self._writer: ArchiveWriter | None = None

    def open(self, job: Job, guest: Memory, *, open_closed: bool) -> None:
        """Open device and file; nothing is changed yet."""
        held_for = None if open_closed else "save"
        self.session = job.open(self.name, memory=guest.maps, force=self._force, held_for=held_for)
        self.pause = Pause(job, self.session)
        self._stream = job.enter(self.output)

    def write_header(self, job: Job, memory: dict[str, Any]) -> None:
        """Begin the image.

        :param memory: what it says of guest memory.
        """
        from vfio_mig.image.writer import ArchiveWriter

        if not self._raw:
            header = {**describe_device(self.session), "memory": memory}
            self._writer = ArchiveWriter(self._stream, header, self._digests(job))

    def _digests(self, job: Job) -> Digests | None:
        """Have the digests of a streamed state taken beside the job."""
        if not self.session.protocol.streams:
            return None
        from vfio_mig.image.digests import Digests

        return job.enter(Digests(self._stream.fileno() if self.output.can_reread else None))

    def sink(self, live: Live) -> ImageSink | None:
        """Return where guest memory goes; None for a bare state, which has no place for it."""
        return None if self._writer is None else ImageSink(self._writer, live.progress)

    def prepare(self, live: Live, *, has_memory: bool) -> None:
        """Do what need not wait for the stop."""
        self.reader = StateReader(self.pause, self._writer, self._stream, precopy=live.precopy, has_memory=has_memory)
        self.session.protocol.prepare()

    def write(self, dirty: Sequence[Dirty], report: SaveReport) -> None:
        """Write what is left to the file, which is whole then."""
        parse_state(self.session.protocol.name, self.reader.state)  # refused now rather than at the restore
        self.reader.write_rest(dirty)
        if self._writer is not None:
            self._writer.finish(report.statistics())
        self.pause.job.step("written", self.session)


class _Save:
    """A save of one or several devices: one copy of guest memory, in the first one's image."""

    def __init__(self, job: Job, targets: list[_Target], guest: Memory, live: Live, wanted: Wanted) -> None:
        self._job = job
        self._targets = targets
        self._live = live
        self._pauses = [target.pause for target in targets]
        sink = targets[0].sink(live) if guest.maps else None
        self._sink = sink
        self._copy = MemoryCopy(job, self._pauses, guest, sink, wanted, remember=live.rounds > 0)
        self._rounds: list[Round] = []
        for target in targets:
            target.prepare(live, has_memory=sink is not None)
            job.step("opened", target.session)

    def copy_live(self) -> None:
        """Copy pages, and read states, in rounds while the devices run."""
        self._copy.begin()
        for target in self._targets:
            target.reader.begin_live()
        states = [target.reader.live for target in self._targets if target.reader.live is not None]
        self._rounds = copy_live(self._live, self._copy if self._copy.copies else None, states)
        short = falls_short(self._live, self._rounds, states)
        if short is not None:
            self._targets[0].session.warn(short)
        for target in self._targets:
            self._job.step("after-live", target.session)

    def copy_stopped(self, *, raw: bool, leave_running: bool) -> None:
        """Stop the devices, copy what is left, and read their states."""
        stop_all(self._pauses)
        if not raw:
            last = last_round(self._job, self._copy, self._pauses)
            self._rounds += last
            for one in last:
                self._live.on_round(one)
        for target in self._targets:
            target.reader.read()
        for pause in self._pauses:
            pause.end()
        if leave_running:
            announce_start(self._job, [pause.session for pause in self._pauses])
            wake([pause.session for pause in self._pauses])
            for pause in self._pauses:
                pause.resume()

    def write(self, *, leave_running: bool) -> list[SaveReport]:
        """Write what could wait."""
        self._copy.end()
        reports = [self._report(number, started=leave_running) for number in range(len(self._targets))]
        for target, dirty, report in zip(self._targets, self._copy.dirty, reports, strict=True):
            target.write(dirty, report)
        return reports

    def _report(self, number: int, *, started: bool) -> SaveReport:
        target = self._targets[number]
        sink = self._sink if number == 0 else None
        content = self._copy.content
        return SaveReport(
            device=target.session.device.name,
            file=target.file,
            state=target.session.state_after(started=started),
            **target.pause.times,
            state_bytes=target.reader.state_bytes,
            pages_dirty=self._copy.pages_dirty(number),
            pages_written=0 if sink is None else sink.bytes_written // PAGE,
            pages_zero=0 if sink is None else sink.bytes_zero // PAGE,
            rounds=self._rounds if number == 0 else [],
            precopy_bytes=target.reader.precopy_bytes,
            state_rounds=target.reader.rounds,
            memory=content.content,
            guest_paused=content.guest_paused,
        )


def _commit(job: Job, targets: list[_Target]) -> None:
    """Make all images final; from here on nothing is undone."""
    from vfio_mig.image.files import commit_outputs

    for target in targets:
        target.output.prepare()
    job.commit(
        lambda: commit_outputs([target.output for target in targets]),
        *[lambda session=target.session: session.journal("") for target in targets],
    )
    for target in targets:
        target.output.settle()


def _check_targets(pairs: Sequence[tuple[str, str]], *, raw: bool, memory: Sequence[MemoryMap], force: bool) -> None:
    if raw and memory:
        raise UsageError("a raw state has no place for memory pages", hint="leave out --raw or --memory")
    from vfio_mig.image.files import check_target

    files = [file for _, file in pairs]
    if len(set(files)) < len(files) or (STDOUT in files and len(files) > 1):
        raise UsageError("two devices cannot be saved to one file", hint="name one for each: DEVICE=FILE")
    for file in files:
        if file != STDOUT:
            with suppress(HostError):  # what the file system says is told once the device is known to be there
                check_target(file, force=force)


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
    all_memory: bool = False,
    guest_paused: bool = False,
    strict: bool = False,
    open_closed: bool = False,
) -> SaveReport:
    """Save a device to a file, or as ``-`` to standard output. The file is whole or not there.

    The device is left stopped, or is brought back to where it was found with *leave_running*. After a failure it is as
    it was found, or runs where that cannot be known.

    :param memory: guest memory; what the device may have written is put into the image.
    :param ranges: guest pages to fetch the dirty bitmap of; by default those of *memory*, else the first 4 GiB.
    :param raw: write the bare state region: neither bitmap nor pages, no integrity.
    :param force: replace *file*, and save a device whose state an earlier job has moved to another one.
    :param live: what is copied while the device runs, before the stop.
    :param all_memory: put every page of *memory* into the image. Pages that the guest's CPUs write meanwhile may be
        old in there.
    :param guest_paused: the caller knows that no CPU of the guest runs until this returns. Then the image of a device
        that logs its writes has every page, too, as only the log's begin tells what it wrote.
    :param strict: refuse dirty pages that are not in *memory*, instead of warning of them.
    :param open_closed: also a device that no other process has open: it is opened for the save alone, and closed.
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
        all_memory=all_memory,
        guest_paused=guest_paused,
        strict=strict,
        open_closed=open_closed,
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
    all_memory: bool = False,
    guest_paused: bool = False,
    strict: bool = False,
    open_closed: bool = False,
) -> list[SaveReport]:
    """Save several devices as one job: all are stopped before any is read, and after any failure all run.

    There is one copy of guest memory, of the pages that any of them may have written. It is in the first one's image,
    and the others name that.

    :param pairs: (device, file) each; the other parameters are those of :func:`save`.
    :param without_p2p: also if one of them has no P2P states, and may so write to another one that is stopped already.
    :raises UnsupportedError: also because of P2P.
    """
    from vfio_mig.dirty.memory import Memory

    _check_targets(pairs, raw=raw, memory=memory, force=force)
    wanted = Wanted(ranges, all_memory, guest_paused, strict)
    live = live or Live()
    targets = [_Target(name, file, raw=raw, force=force) for name, file in pairs]
    with Job(JOB, settings) as job:
        guest = job.enter(Memory(memory))
        for target in targets:
            target.open(job, guest, open_closed=open_closed)
        require_p2p([target.session for target in targets], waived=without_p2p)
        _write_headers(job, targets, guest, wanted)
        work = _Save(job, targets, guest, live, wanted)
        work.copy_live()
        work.copy_stopped(raw=raw, leave_running=leave_running)
        reports = work.write(leave_running=leave_running)
        _commit(job, targets)
    return reports


def _write_headers(job: Job, targets: list[_Target], guest: Memory, wanted: Wanted) -> None:
    """Begin the images: the first has the guest's memory, where it is known, and the others name it."""
    content = Content.expected(wanted, [target.session for target in targets], has_memory=bool(guest.maps))
    job_id = new_job_id()
    first = os.path.basename(targets[0].file) if content.content != NONE else None
    for number, target in enumerate(targets):
        target.write_header(job, memory_header(content, job_id, first if number else None))
