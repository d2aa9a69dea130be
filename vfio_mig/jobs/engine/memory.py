# SPDX-License-Identifier: MIT
"""The one copy of guest memory that a job makes, from what all of its devices have dirtied together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.errors import UnsupportedError
from vfio_mig.jobs.engine.dirtylog import DirtyLog
from vfio_mig.jobs.engine.progress import expect
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig import words
    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import LiveCopy, Round, Sink
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.engine.job import Job
    from vfio_mig.jobs.engine.pause import Pause
    from vfio_mig.jobs.engine.session import Session

NONE: Final = "none"
DIRTY: Final = "dirty"
ALL: Final = "all"
SINCE_NOW: Final = (
    "it tells only what it writes from now on, so the copy has no page that it wrote before; --all-memory copies all"
)
MAY_BE_OLD: Final = (
    "--all-memory copies every page, also those that the guest's CPUs write meanwhile: unless the VM is paused for as "
    "long as this takes, some of them are old in the copy, and a restore puts them over newer ones"
)


class Content(NamedTuple):
    """What a copy of guest memory is worth.

    :param content: ``none``; ``dirty``: pages that the devices may have written; ``all``: every page, what the guest's
        CPUs wrote too.
    :param guest_paused: whether the caller knows that no CPU of the guest ran from the first page to the last.
    """

    content: words.Content
    guest_paused: bool

    @classmethod
    def expected(cls, wanted: Wanted, sessions: Sequence[Session], *, has_memory: bool) -> Content:
        """Say what a copy will be worth, before it is made, unless a device loses its log."""
        if not has_memory:
            return cls(NONE, guest_paused=False)
        logs = not wanted.pinned and any(session.protocol.dirty_log is not None for session in sessions)
        is_all = wanted.all_memory or (wanted.guest_paused and logs)
        return cls(ALL if is_all else DIRTY, wanted.guest_paused)


class Wanted(NamedTuple):
    """Which guest memory a job copies.

    :param ranges: guest pages to ask the devices for; by default those of the memory that is known, else 4 GiB.
    :param all_memory: copy every page once, not only what the devices may have written.
    :param guest_paused: the caller knows that no CPU of the guest runs as long as the job does.
    :param strict: refuse dirty pages that are in no memory that is known, instead of telling of them.
    :param pinned: ask the containers of whoever has the devices for the pages that are pinned.
    """

    ranges: Sequence[PageRange] = ()
    all_memory: bool = False
    guest_paused: bool = False
    strict: bool = False
    pinned: bool = False


class ImageSink:
    """Puts guest memory into an image: content as such, zeros as ranges."""

    def __init__(self, writer: ArchiveWriter) -> None:
        # Imported here, before the device is stopped
        from vfio_mig.dirty.sync import zero_runs

        self._zero_runs = zero_runs
        self._writer = writer
        self._zero: list[tuple[int, int]] = []
        self.bytes_written = 0
        self.bytes_zero = 0

    def write(self, gpa: int, view: memoryview) -> int:
        """Store whole pages; returns how many were not all zero."""
        written = 0
        for start, count, is_zero in self._zero_runs(view):
            if is_zero:
                self._zero.append((gpa + start * PAGE, count * PAGE))
            else:
                written += self._writer.put_pages(gpa + start * PAGE, view[start * PAGE : (start + count) * PAGE])
        self.bytes_written += written
        return written // PAGE

    def end_round(self) -> None:
        """Write what waits: in the next round the same pages may come again, and then they count."""
        self._writer.flush_pages()
        self.bytes_zero += self._writer.add_zero(self._zero)
        self._zero.clear()


class _Counted:
    """A sink that tells how far it has come."""

    def __init__(self, sink: Sink, progress: Callable[[int], object]) -> None:
        self._sink = sink
        self._progress = progress
        self.end_round = sink.end_round

    def write(self, gpa: int, view: memoryview) -> int:
        """Pass pages on."""
        written = self._sink.write(gpa, view)
        self._progress(len(view))
        return written


def default_ranges(memory: Memory, ranges: Sequence[PageRange]) -> list[PageRange]:
    """Choose the pages to ask for: those given, else the guest memory that we know, else the first 4 GiB."""
    from vfio_mig.dirty.ranges import PageRange, merge

    return merge(ranges) or memory.ranges or [PageRange(0, 1 << 20)]


class MemoryCopy:
    """Copies the pages that a job's devices may have written, in rounds while they run and once more when they stand.

    A page that any of them has dirtied is copied once a round, whichever it was: so there is one copy, and the last
    round's is the newest. Without guest memory it fetches the bitmaps alone.

    :param sink: where pages go; None: nowhere, as no memory is known.
    :param progress: called with the bytes of each piece that was copied.
    :param remember: there will be rounds before the stop.
    :raises UnsupportedError: there are pages to copy, and a device cannot tell which.
    """

    def __init__(
        self,
        job: Job,
        pauses: Sequence[Pause],
        guest: Memory,
        sink: Sink | None,
        wanted: Wanted,
        *,
        remember: bool,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        # Imported here, before the device is stopped
        from vfio_mig.dirty.bitmap import union
        from vfio_mig.dirty.runs import preload

        self._job = job
        self._pauses = list(pauses)
        self._guest = guest
        self._wanted = wanted
        self._union = union
        asked = default_ranges(guest, wanted.ranges)
        self._logs = [DirtyLog(pause.session, asked, pinned=wanted.pinned) for pause in pauses]
        self._ever: list[Dirty] = []
        self._remember = remember
        self._progress = progress
        self._is_last = self._owes_all = False
        self._copy: LiveCopy | None = None
        self.dirty: list[list[Dirty]] = [[] for _ in self._logs]
        """The last bitmap of each device."""
        if guest.maps or wanted.pinned:
            for log in self._logs:
                log.require()
            preload()
        if sink is not None:
            from vfio_mig.dirty.sync import LiveCopy

            copy = LiveCopy(guest, self._fetch, _Counted(sink, progress), remember=remember)
            self._copy = job.enter(copy)

    @property
    def copies(self) -> bool:
        """Whether pages are copied, and not only counted."""
        return self._copy is not None

    @property
    def content(self) -> Content:
        """What the copy is worth; it may become ``all`` when a device loses its log."""
        content = self._expected
        return content._replace(content=ALL) if self.copies and any(log.was_lost for log in self._logs) else content

    @property
    def _expected(self) -> Content:
        sessions = [pause.session for pause in self._pauses]
        return Content.expected(self._wanted, sessions, has_memory=self.copies)

    def begin(self) -> None:
        """Have the devices log their writes, where they need to be told, and look for pages that would be missed.

        :raises UnsupportedError: there are some, and the caller is strict.
        """
        if self._copy is None:
            return
        for log in self._logs:
            self._job.undo_with(log.end)
            log.begin()
        self._say_what_it_is_worth()
        for log, pause in zip(self._logs, self._pauses, strict=True):
            pages, first = log.outside(self._guest)
            if pages:
                self._missed(pause, pages, f", the first at {first * PAGE:#x}")

    def _say_what_it_is_worth(self) -> None:
        if self._expected.content == ALL:
            if not self._wanted.guest_paused:
                self._pauses[0].session.warn(MAY_BE_OLD)
            self._owes_all = True
            return
        for log, pause in zip(self._logs, self._pauses, strict=True):
            if log.is_log:
                pause.session.warn(SINCE_NOW)

    def _missed(self, pause: Pause, pages: int, where: str = "") -> None:
        text = f"{pages} pages that it may have written are in no memory that --memory names{where}"
        if self._wanted.strict:
            raise UnsupportedError(
                text, device=pause.session.device.name, hint="name all of the guest's memory, or leave out --strict"
            )
        pause.session.warn(f"{text}: they are not copied")

    def _fetch(self) -> list[Dirty]:
        """Return which pages are to be copied now, and tell how many."""
        found = self._find()
        expect(self._progress, lambda: sum(chunk.total() for chunk in found) * PAGE)
        return found

    def _find(self) -> list[Dirty]:
        """Return what the devices have dirtied together.

        The RFC's bitmap has what is mapped now. A page that was mapped in an earlier round, and written again before
        it was unmapped, is in no later one. So the last round looks at all pages that were ever dirty in this job.
        """
        self._fetch_each()
        found = self._union(self.dirty)
        if self._remember and any(log.is_snapshot for log in self._logs):
            self._ever = self._union([self._ever, found])
            found = self._ever if self._is_last else found
        if self._owes_all:
            self._owes_all = False
            return list(self._logs[0].every_page())
        return found

    def _fetch_each(self) -> None:
        for number, (log, pause) in enumerate(zip(self._logs, self._pauses, strict=True)):
            with pause.phase("bitmap_time"):
                self.dirty[number] = log.fetch()

    def round(self) -> Round:
        """Copy once while the devices run."""
        assert self._copy is not None  # noqa: S101 -- the caller asks `copies`
        return self._checked(self._copy.round())

    def last_round(self, fetched: Callable[[], object]) -> Round | None:
        """Copy what is left, or where no memory is known fetch the bitmaps; the devices stand still.

        :param fetched: called when the bitmaps are there.
        :returns: None where nothing is copied.
        """
        self._is_last = True
        if self._copy is not None:
            return self._checked(self._copy.last_round(fetched))
        # A log that nobody has begun would be empty
        for number, (log, pause) in enumerate(zip(self._logs, self._pauses, strict=True)):
            if log.is_snapshot:
                with pause.phase("bitmap_time"):
                    self.dirty[number] = log.fetch()
        fetched()
        return None

    def _checked(self, one: Round) -> Round:
        if one.pages_outside and (self._is_last or self._wanted.strict):
            self._missed(self._pauses[0], one.pages_outside)
        return one

    def pages_dirty(self, number: int) -> int:
        """Count the pages of a device's last bitmap."""
        return sum(chunk.total() for chunk in self.dirty[number])

    def end(self) -> None:
        """End the logs."""
        for log in self._logs:
            log.end()


def last_round(job: Job, copy: MemoryCopy, pauses: Sequence[Pause]) -> list[Round]:
    """Do a copy's last round, with its steps; returns it, nothing where no page is copied."""

    def fetched() -> None:
        for pause in pauses:
            job.step("after-dirty", pause.session)

    done = copy.last_round(fetched)
    for pause in pauses:
        job.step("after-pages", pause.session)
    return [] if done is None else [done]


def new_job_id() -> str:
    """Return a number by which the images of one job know each other: 128 bits of chance, in hexadecimal."""
    return os.urandom(16).hex()


def memory_header(content: Content, job_id: str, file: str | None) -> dict[str, Any]:
    """Return what ``header.json`` says of guest memory.

    :param file: name of the image of the same job that has the pages; None: this one.
    """
    return {**content._asdict(), "job": job_id, **({} if file is None else {"in": file})}
