# SPDX-License-Identifier: MIT
"""Ask a device which guest pages it may have written, and copy them."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.errors import HostError, UsageError, errno_text
from vfio_mig.image.places import open_file
from vfio_mig.interrupts import protected, waiting
from vfio_mig.jobs.engine.dirtylog import DirtyLog
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import ROUNDS_LIVE, Live, copy_live
from vfio_mig.jobs.engine.memory import Content, MemoryCopy, Wanted, default_ranges, memory_header, new_job_id
from vfio_mig.jobs.engine.pause import Pause, announce_start, stop_all
from vfio_mig.jobs.save import STDOUT, describe_device
from vfio_mig.ranges import PAGE
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from vfio_mig import words
    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round, Sink
    from vfio_mig.image.files import NewFile
    from vfio_mig.jobs.engine.session import Session, Settings

SYNC: Final = "sync"
LOG_TIME = 1.0
"""Seconds for which a device logs its writes, unless the caller says otherwise."""


@dataclass(frozen=True, kw_only=True)
class DirtyReport(Report):
    """A dirty bitmap. Pages of 4096 bytes, times in seconds.

    :param ranges: (guest-physical address, bytes) of each run of dirty pages; empty unless asked for.
    """

    device: str
    pages: int
    pages_dirty: int
    bitmap_time: float
    ranges: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class SyncReport(Report):
    """What a sync did; the last round ran with the device stopped.

    :param stop_time: from the STOP request to its answer, seconds.
    :param stopped_time: from the STOP request to the end of the last round.
    :param state: what the device is now: ``stop``, ``running``, or ``closed`` when nobody else has it open.
    :param memory: ``dirty``: pages that the device may have written; ``all``: every page.
    :param guest_paused: whether the caller knows that the guest's CPUs did not run meanwhile; else a page of ``all``
        may be old.
    """

    device: str
    file: str
    state: str
    stop_time: float
    stopped_time: float
    pages_dirty: int
    pages_written: int
    bytes_written: int
    rounds: list[Round]
    memory: words.Content
    guest_paused: bool


def fetch_dirty(
    name: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ranges: Sequence[PageRange] = (),
    list_ranges: bool = False,
    log_time: float | None = None,
    look: Callable[[list[Dirty]], object] = lambda _: None,
) -> DirtyReport:
    """Fetch the dirty bitmap. For the RFC: pages the device may write, running or stopped; reading clears nothing.

    A device that logs its writes is told to, and asked after *log_time*. So is the container of one that keeps no log,
    whether it can be migrated or not.

    :param ranges: guest pages to ask for; by default those of *memory*, else the first 4 GiB.
    :param list_ranges: fill in the report's ranges.
    :param log_time: seconds, 1 by default; only for a device that logs.
    :param look: called with the bitmaps, in order of address.
    :raises UnsupportedError: it cannot be asked.
    """
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.host.lock import DeviceLock

    with Job("dirty", settings) as job:
        guest = job.enter(Memory(memory))
        session = job.open(name, memory=guest.maps, alone=False, any_device=True)
        log = DirtyLog(session, default_ranges(guest, ranges))
        log.require()
        if log.is_holders:  # others that read it would have what is missing here
            job.enter(DeviceLock(session.found, "dirty"))
        job.step("opened", session)
        if log.is_log:
            job.undo_with(log.end)
            log.begin()
            _sleep(LOG_TIME if log_time is None else log_time)
        elif log_time is not None:
            raise UsageError(f"a {session.protocol.name} device keeps no log", hint="leave out --for")
        began = time.perf_counter()
        chunks = log.fetch()
        seconds = time.perf_counter() - began
        log.end()
        job.step("fetched", session)
        device = session.device.name  # nothing to commit: the report is all that this job makes
    look(chunks)
    return DirtyReport(
        device=device,
        pages=sum(chunk.nr_pages for chunk in chunks),
        pages_dirty=sum(chunk.total() for chunk in chunks),
        bitmap_time=seconds,
        ranges=_runs(chunks) if list_ranges else [],
    )


_sleep = waiting(time.sleep)


def _runs(chunks: list[Dirty]) -> list[tuple[int, int]]:
    from vfio_mig.dirty.ranges import merge

    runs = merge(run for chunk in chunks if chunk.total() for run in chunk.ranges())
    return [(run.start * PAGE, run.nr_pages * PAGE) for run in runs]


class _Destination:
    """The file that pages are copied to; links are not followed.

    An existing file is written in place, as somebody may have it mapped; a new one is there only once it is whole.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._new: NewFile | None = None
        self.fd = -1

    @protected
    def __enter__(self) -> Self:
        try:
            self.fd = open_file(self._path, os.O_RDWR | os.O_NONBLOCK)
        except FileNotFoundError:
            from vfio_mig.image.files import committed

            self._new = committed(self._path)
            self.fd = self._new.__enter__().fileno()
        except OSError as error:
            raise HostError(f"{self._path}: cannot open the destination: {errno_text(error.errno or 0)}") from error
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            os.close(self.fd)
            raise UsageError(f"{self._path} is not a regular file", hint="the destination must be one")
        return self

    def open_sink(
        self,
        session: Session,  # noqa: ARG002 -- as the pipe's
        guest: Memory,
        memory: dict[str, Any],  # noqa: ARG002
    ) -> Sink:
        """Return where pages go."""
        from vfio_mig.dirty.sync import SparseFile

        _refuse_same_file(guest, self.fd, self._path)
        self._end = guest.end
        self._sink = SparseFile(self.fd, self._path)
        return self._sink

    def finish(self) -> None:
        """Make the file as long as the guest's memory, and durable."""
        self._sink.finish(self._end)

    def commit(self) -> None:
        """Give a new file its name."""
        if self._new is not None:
            self._new.commit()

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._new is not None:
            self._new.__exit__(kind, error, traceback)
        else:
            os.close(self.fd)


class _Pipe:
    """Standard output: an image with guest memory alone, for ``vfio-mig pages`` at the other end."""

    def __init__(self) -> None:
        from vfio_mig.image.files import standard_output

        self._output = standard_output("pages are binary", "redirect them")

    def __enter__(self) -> Self:
        self._stream = self._output.__enter__()
        return self

    def open_sink(
        self,
        session: Session,
        guest: Memory,  # noqa: ARG002 -- as the file's
        memory: dict[str, Any],
    ) -> Sink:
        """Return where pages go."""
        from vfio_mig.image.writer import ArchiveWriter
        from vfio_mig.jobs.engine.memory import ImageSink

        self._writer = ArchiveWriter(self._stream, {**describe_device(session), "memory": memory})
        return ImageSink(self._writer, lambda _: None)

    def finish(self) -> None:
        """Write the end of the image."""
        self._writer.finish()

    def commit(self) -> None:
        """Pass on what is still in the buffer."""
        self._output.commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._output.__exit__(kind, error, traceback)


def _refuse_same_file(guest: Memory, fd: int, path: str) -> None:
    here = os.fstat(fd)
    for map_ in guest.maps:
        there = os.stat(map_.path)
        if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            raise UsageError(f"{path} is the guest's memory itself", hint="name another destination")


def sync_dirty(
    name: str,
    file: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap],
    ranges: Sequence[PageRange] = (),
    rounds: int | None = None,
    max_downtime: float | None = None,
    leave_running: bool = False,
    all_memory: bool = False,
    guest_paused: bool = False,
    strict: bool = False,
    open_closed: bool = False,
    progress: Callable[[Round], object] = lambda _: None,
) -> SyncReport:
    """Copy the dirty pages of guest memory into a sparse file, at their guest-physical addresses, or as ``-`` into an
    image on standard output.

    Rounds run while the device does, as long as they bring something; then it is stopped for the last one, and left
    stopped unless *leave_running*. After a failure the device runs; a new file is not there, and one that was
    there has some of the pages: to be synced again before it is used.

    :param rounds: rounds before the stop, at most; by default 3, or 30 with *max_downtime*.
    :param max_downtime: seconds; the device is stopped as soon as the last round is expected to take no longer.
    :param all_memory, guest_paused, strict, open_closed: as :func:`vfio_mig.save` has them.
    :param progress: called after each round.
    """
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.sync import ROUNDS

    if not memory:
        raise UsageError("nothing to copy from", hint="name the guest's memory with --memory FILE@GPA[:SIZE]")
    if rounds is None:
        rounds = ROUNDS if max_downtime is None else ROUNDS_LIVE
    wanted = Wanted(ranges, all_memory, guest_paused, strict)
    with Job(SYNC, settings) as job:
        guest = job.enter(Memory(memory))
        session = job.open(name, memory=guest.maps, held_for=None if open_closed else SYNC)
        destination: _Pipe | _Destination = _Pipe() if file == STDOUT else _Destination(file)
        job.enter(destination)
        content = Content.expected(wanted, [session], has_memory=True)
        sink = destination.open_sink(session, guest, memory_header(content, new_job_id(), None))
        pause = Pause(job, session)
        copy = MemoryCopy(job, [pause], guest, sink, wanted, remember=rounds > 0)
        job.step("opened", session)
        copy.begin()

        def after_round(one: Round) -> None:
            progress(one)
            job.step("after-round", session)

        done = copy_live(Live(rounds, max_downtime, on_round=after_round), copy, [])
        stop_all([pause])
        last = copy.last_round(lambda: None)
        assert last is not None  # noqa: S101 -- there is memory
        done.append(last)
        progress(last)
        pause.end()
        stopped = pause.times["stopped_time"]
        copy.end()
        job.step("copied", session)
        if leave_running:
            announce_start(job, [session])
            pause.resume()
        destination.finish()
        report = SyncReport(
            device=session.device.name,
            file=file,
            state=session.state_after(started=leave_running),
            stop_time=pause.times["stop_time"],
            stopped_time=stopped,
            pages_dirty=last.pages_dirty,
            pages_written=sum(one.pages_written for one in done),
            bytes_written=sum(one.bytes_written for one in done),
            rounds=done,
            memory=copy.content.content,
            guest_paused=guest_paused,
        )
        job.commit(destination.commit, lambda: session.journal(""))
    return report
