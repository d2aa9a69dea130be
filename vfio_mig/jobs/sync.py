# SPDX-License-Identifier: MIT
"""Copy the guest pages that a device may have written: in rounds while it runs, and once more when it stands."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.errors import HostError, UsageError, errno_text
from vfio_mig.image.places import open_file
from vfio_mig.interrupts import protected
from vfio_mig.jobs.engine.export import describe_device
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import ROUNDS_LIVE, Live, copy_live
from vfio_mig.jobs.engine.memory import Content, MemoryCopy, Wanted, memory_header, new_job_id
from vfio_mig.jobs.engine.pause import Pause, announce_start, stop_all
from vfio_mig.jobs.save import STDOUT
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from vfio_mig import words
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round, Sink
    from vfio_mig.image.files import NewFile
    from vfio_mig.jobs.engine.session import Session, Settings

JOB: Final = "sync"


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
        return ImageSink(self._writer)

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
    copied: Callable[[int], object] = lambda _: None,
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
    :param copied: called with the bytes of each piece that was copied.
    """
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.sync import ROUNDS

    if not memory:
        raise UsageError("nothing to copy from", hint="name the guest's memory with --memory FILE@GPA[:SIZE]")
    if rounds is None:
        rounds = ROUNDS if max_downtime is None else ROUNDS_LIVE
    wanted = Wanted(ranges, all_memory, guest_paused, strict)
    with Job(JOB, settings) as job:
        guest = job.enter(Memory(memory))
        session = job.open(name, memory=guest.maps, held_for=None if open_closed else JOB)
        destination: _Pipe | _Destination = _Pipe() if file == STDOUT else _Destination(file)
        job.enter(destination)
        content = Content.expected(wanted, [session], has_memory=True)
        sink = destination.open_sink(session, guest, memory_header(content, new_job_id(), None))
        pause = Pause(job, session)
        copy = MemoryCopy(job, [pause], guest, sink, wanted, remember=rounds > 0, progress=copied)
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
