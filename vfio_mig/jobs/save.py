# SPDX-License-Identifier: MIT
"""Save a device: stop it, fetch its dirty bitmap, read its state, commit the image."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.errors import HostError, UsageError
from vfio_mig.jobs.engine.export import Export, Source, begin_image
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import Live
from vfio_mig.jobs.engine.memory import NONE, Content, Wanted, memory_header, new_job_id
from vfio_mig.jobs.engine.pause import Pause, require_p2p
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig import words
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.image.files import Output
    from vfio_mig.jobs.engine.live import StateRound
    from vfio_mig.jobs.engine.session import Settings

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


class _Target:
    """One device of a save and where its image goes."""

    def __init__(self, name: str, file: str, *, raw: bool, force: bool) -> None:
        self.name = name
        self.file = file
        self._raw = raw
        self._force = force
        self.output = _output(file, force=force)

    def open(self, job: Job, guest: Memory, *, open_closed: bool) -> None:
        """Open device and file; nothing is changed yet."""
        held_for = None if open_closed else "save"
        self.session = job.open(self.name, memory=guest.maps, force=self._force, held_for=held_for)
        self._stream = job.enter(self.output)

    def begin(self, job: Job, memory: dict[str, Any]) -> Source:
        """Begin the image.

        :param memory: what it says of guest memory.
        """
        pause = Pause(job, self.session)
        if self._raw:
            return Source(pause, None, self._stream)
        reread = self._stream.fileno() if self.output.can_reread else None
        return Source(pause, begin_image(job, self.session, self._stream, memory, reread=reread))


def _write(
    job: Job, targets: list[_Target], export: Export, sources: list[Source], *, started: bool
) -> list[SaveReport]:
    """Write what could wait, to files that are whole then."""
    dirty = export.end()
    reports = [
        SaveReport(
            device=source.session.device.name,
            file=target.file,
            state=source.session.state_after(started=started),
            pages_written=export.pages_copied(number),
            **{**source.pause.times, **export.figures(number)},
        )
        for number, (target, source) in enumerate(zip(targets, sources, strict=True))
    ]
    for source, its, report in zip(sources, dirty, reports, strict=True):
        source.finish(its, report.statistics())
        job.step("written", source.session)
    return reports


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
    pinned: bool = False,
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
    :param pinned: what a device without a log may have written are the pages that are pinned in the container of the
        process that has it open, which stands still for the instant in which it is asked.
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
        pinned=pinned,
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
    pinned: bool = False,
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
    if pinned and raw:
        raise UsageError("a bare state has no pages", hint="leave out --pinned or --raw")
    wanted = Wanted(ranges, all_memory, guest_paused, strict, pinned)
    targets = [_Target(name, file, raw=raw, force=force) for name, file in pairs]
    with Job(JOB, settings) as job:
        guest = job.enter(Memory(memory))
        for target in targets:
            target.open(job, guest, open_closed=open_closed)
        require_p2p([target.session for target in targets], waived=without_p2p)
        sources = _begin(job, targets, guest, wanted)
        export = Export(job, sources, guest, live or Live(), wanted)
        export.copy_live()
        export.copy_stopped(memory=not raw)
        if leave_running:
            export.resume()
        reports = _write(job, targets, export, sources, started=leave_running)
        _commit(job, targets)
    return reports


def _begin(job: Job, targets: list[_Target], guest: Memory, wanted: Wanted) -> list[Source]:
    """Begin the images: the first has the guest's memory, where it is known, and the others name it."""
    content = Content.expected(wanted, [target.session for target in targets], has_memory=bool(guest.maps))
    job_id = new_job_id()
    first = os.path.basename(targets[0].file) if content.content != NONE else None
    return [
        target.begin(job, memory_header(content, job_id, first if number else None))
        for number, target in enumerate(targets)
    ]
