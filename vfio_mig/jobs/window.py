# SPDX-License-Identifier: MIT
"""The stopped window of one device: from the STOP request on, what must be done before it may go on.

Each phase is a method of its own, so that a job on several devices can stop all of them before it reads any.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

from vfio_mig.errors import UnsupportedError
from vfio_mig.host.lock import LIVE, STOPPED
from vfio_mig.jobs.dirtylog import DirtyLog
from vfio_mig.jobs.live import StateCopy, copy_live, falls_short
from vfio_mig.jobs.points import point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import LiveCopy, Round
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.live import Live, StateRound
    from vfio_mig.jobs.rollback import Rollback
    from vfio_mig.jobs.session import Session

PAGE: Final = 4096


class ImageSink:
    """Puts guest memory into an image: content as such, zeros as ranges."""

    def __init__(self, writer: ArchiveWriter, progress: Callable[[int], object]) -> None:
        # Imported here, before the device is stopped
        from vfio_mig.dirty.sync import zero_runs

        self._zero_runs = zero_runs
        self._writer = writer
        self._progress = progress
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
        self._progress(len(view))
        return written // PAGE

    def end_round(self) -> None:
        """Write what waits: in the next round the same pages may come again, and then they count."""
        self._writer.flush_pages()
        self.bytes_zero += self._writer.add_zero(self._zero)
        self._zero.clear()


class Window:
    """What a job does to one device from the first round on, and how long it takes.

    :param job: name of the job, for its points.
    :param rollback: undoes what is begun here.
    :param ranges: guest pages to fetch the dirty bitmap of.
    :param writer: the image; None for a bare state, which has neither bitmap nor pages.
    :param raw: where a bare state goes.
    :raises UnsupportedError: there are pages to copy, and the device cannot tell which, or there is nothing to read
        while it runs.
    """

    def __init__(
        self,
        job: str,
        session: Session,
        rollback: Rollback,
        ranges: list[PageRange],
        guest: Memory,
        *,
        writer: ArchiveWriter | None,
        raw: BinaryIO | None = None,
        live: Live,
    ) -> None:
        # Imported here, before the device is stopped
        from vfio_mig.dirty.bitmap import preload

        self._job = job
        self._session = session
        self._rollback = rollback
        self._log = DirtyLog(session, ranges)
        self._live = live
        self._writer = writer
        self._raw = raw
        self._began = 0.0
        self._is_undone = False
        self.times: dict[str, float] = {"start_time": 0.0, "bitmap_time": 0.0}
        self.sink = ImageSink(writer, live.progress) if writer is not None and guest.maps else None
        self._copy: LiveCopy | None = None
        if guest.maps:
            self._log.require()
            preload()
        if self.sink is not None:
            from vfio_mig.dirty.sync import LiveCopy

            self._copy = LiveCopy(guest, self._fetch_dirty, self.sink, remember=live.rounds > 0)
        self._state_copy = self._prepare_state_copy()
        self.rounds: list[Round] = []
        self.dirty: list[Dirty] = []
        self.state = memoryview(b"")
        self.state_bytes = 0

    def _prepare_state_copy(self) -> StateCopy | None:
        protocol = self._session.protocol
        if not self._live.precopy:
            return None
        if protocol.has_precopy:
            return StateCopy(protocol, self._pass_on)
        if self._copy is None:
            raise UnsupportedError(
                "its state can be read only while it is stopped: it has no PRE_COPY",
                device=self._session.device.name,
                hint="leave out --live",
            )
        return None

    @property
    def pages_dirty(self) -> int:
        """Pages of the last bitmap."""
        return sum(chunk.total() for chunk in self.dirty)

    @property
    def state_rounds(self) -> list[StateRound]:
        """Rounds in which the state was read while the device ran."""
        return [] if self._state_copy is None else self._state_copy.rounds

    @property
    def precopy_bytes(self) -> int:
        """Bytes of the state that were read while the device ran."""
        return 0 if self._state_copy is None else self._state_copy.bytes_read

    def _point(self, name: str) -> None:
        point(self._job, name, self._session)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = time.perf_counter() - began

    def _fetch_dirty(self) -> list[Dirty]:
        with self._phase("bitmap_time"):
            self.dirty = self._log.fetch()
        return self.dirty

    def _change(self, effect: str) -> None:
        """Write down what is about to be done to the device, and have it undone if the job fails."""
        self._session.note(effect)
        if not self._is_undone:
            self._is_undone = True
            self._rollback.push(self._session.go_on)

    def begin(self) -> None:
        """Do what need not wait for the stop, and have the device log its writes, if that is needed."""
        self._session.protocol.prepare()
        if self._copy is not None:
            self._rollback.push(self._log.end)
            self._log.begin()

    def copy_live(self) -> None:
        """Copy pages, and read the state, in rounds while the device runs."""
        if self._state_copy is not None:
            self._change(LIVE)
            if not self._session.protocol.begin_live():
                self._session.warn("it does not run, so its state is read as usual")
                self._state_copy = None
        self.rounds = copy_live(self._live, self._copy, self._state_copy)
        short = falls_short(self._live, self.rounds, self._state_copy)
        if short is not None:
            self._session.warn(short)
        self._point("after-live")

    def quiet(self) -> None:
        """Keep the device from accessing others, before the first of several is stopped."""
        self._change(STOPPED)
        self._session.protocol.quiet()

    def stop(self) -> None:
        """Stop the device; time counts from here."""
        self._change(STOPPED)
        self._began = time.perf_counter()
        with self._phase("stop_time"):
            self._session.protocol.stop()
        self._point("after-stop")

    def copy_memory(self) -> None:
        """Fetch the bitmap and copy the pages: guest memory changes as soon as the device goes on."""
        if self._writer is None:
            return
        if self._copy is None:
            # A log that nobody has begun would be empty
            if self._session.protocol.has_dirty and not self._session.protocol.logs:
                self._fetch_dirty()
            self._point("after-dirty")
        else:
            self.rounds.append(self._copy.last_round(lambda: self._point("after-dirty")))
            self._live.on_round(self.rounds[-1])
        self._point("after-pages")

    def read_state(self) -> None:
        """Read the device's internal state; a stream goes straight into the image, as it may be of any size."""
        protocol = self._session.protocol
        with self._phase("state_read_time"):
            if protocol.streams:
                self.state_bytes = self.precopy_bytes + self._pass_on(protocol.read_chunks())
            else:
                self.state = protocol.read_state()
                self.state_bytes = len(self.state)
        self._point("after-state")

    def _pass_on(self, chunks: Iterable[bytes | memoryview]) -> int:
        if self._writer is not None:
            return self._writer.add_state(chunks)
        return sum(self._raw.write(chunk) for chunk in chunks) if self._raw is not None else 0

    def start(self) -> None:
        """Let the device go on."""
        with self._phase("start_time"):
            self._session.go_on()
        self.end()
        self._point("after-start")

    def end(self) -> None:
        """Take it that nothing more needs the device to stand still."""
        self.times["stopped_time"] = time.perf_counter() - self._began

    def write_rest(self) -> None:
        """Put into the image what could wait: state and bitmaps. The manifest is the caller's."""
        self._log.end()
        if self._writer is None:
            if self._raw is not None:
                self._raw.write(self.state)
            return
        self._writer.add_state(self.state)
        for chunk in self.dirty:
            self._writer.add_dirty(chunk.start_page, chunk.nr_pages, chunk.bitmap)
