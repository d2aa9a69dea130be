# SPDX-License-Identifier: MIT
"""The stopped window of one device: from the STOP request on, what must be done before it may go on.

Each phase is a method of its own, so that a job on several devices can stop all of them before it reads any.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

from vfio_mig.errors import UnsupportedError
from vfio_mig.jobs.points import point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import LiveCopy, Round
    from vfio_mig.image.archive import ArchiveWriter
    from vfio_mig.jobs.session import Session

PAGE: Final = 4096
ROUNDS_LIVE: Final = 30
"""Rounds before the stop, at most, where a downtime is asked for."""


class Live:
    """How much is copied while the device runs.

    :param rounds: at most so many rounds before the stop; 0: none.
    :param max_downtime: seconds; rounds end when the last one is expected to take no longer.
    :param progress: called with the bytes of each piece of guest memory that was copied.
    :param on_round: called after each round.
    """

    def __init__(
        self,
        rounds: int = 0,
        max_downtime: float | None = None,
        progress: Callable[[int], object] = lambda _: None,
        on_round: Callable[[Round], object] = lambda _: None,
    ) -> None:
        self.rounds = rounds
        self.max_downtime = max_downtime
        self.progress = progress
        self.on_round = on_round


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
    """What a job does to one device from the stop on, and how long it takes.

    :param job: name of the job, for its points.
    :param ranges: guest pages to fetch the dirty bitmap of.
    :param writer: the image; None for a bare state, which has neither bitmap nor pages.
    :param raw: where a bare state goes.
    :raises UnsupportedError: there are pages to copy, and the device cannot tell which.
    """

    def __init__(
        self,
        job: str,
        session: Session,
        ranges: list[PageRange],
        guest: Memory,
        *,
        writer: ArchiveWriter | None,
        raw: BinaryIO | None = None,
        live: Live,
    ) -> None:
        # Imported here, before the device is stopped
        from vfio_mig.dirty.bitmap import preload
        from vfio_mig.dirty.fetch import fetch

        if guest.maps:
            if not session.protocol.has_dirty:
                raise UnsupportedError(
                    f"a {session.protocol.name} device cannot be asked for its dirty pages",
                    device=session.device.name,
                    hint="leave out --memory",
                )
            preload()
        self._fetch = fetch
        self._job = job
        self._session = session
        self._ranges = ranges
        self._guest = guest
        self._live = live
        self._writer = writer
        self._began = 0.0
        self.times: dict[str, float] = {"start_time": 0.0, "bitmap_time": 0.0}
        self.sink = ImageSink(writer, live.progress) if writer is not None and guest.maps else None
        self._copy: LiveCopy | None = None
        if self.sink is not None:
            from vfio_mig.dirty.sync import LiveCopy

            self._copy = LiveCopy(guest, self._fetch_dirty, self.sink, remember=live.rounds > 0)
        self.rounds: list[Round] = []
        self.dirty: list[Dirty] = []
        self.state = b""
        self.state_bytes = 0
        self._raw = raw

    @property
    def pages_dirty(self) -> int:
        """Pages of the last bitmap."""
        return sum(chunk.total() for chunk in self.dirty)

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
            self.dirty = list(self._fetch(self._session.protocol.dirty, self._ranges))
        return self.dirty

    def copy_live(self) -> None:
        """Copy pages in rounds while the device runs."""
        if self._copy is not None:
            self.rounds = self._copy.run(self._live.rounds, self._live.max_downtime, self._live.on_round)

    def stop(self) -> None:
        """Stop the device; time counts from here."""
        self._began = time.perf_counter()
        with self._phase("stop_time"):
            self._session.protocol.stop()
        self._point("after-stop")

    def copy_memory(self) -> None:
        """Fetch the bitmap and copy the pages: guest memory changes as soon as the device goes on."""
        if self._writer is None:
            return
        if self._copy is None:
            if self._session.protocol.has_dirty:
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
                self.state_bytes = self._pass_on(protocol.read_chunks())
            else:
                self.state = bytes(protocol.read_state())
                self.state_bytes = len(self.state)
        self._point("after-state")

    def _pass_on(self, chunks: Iterator[bytes | memoryview]) -> int:
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
        if self._writer is None:
            if self._raw is not None:
                self._raw.write(self.state)
            return
        self._writer.add_state(self.state)
        for chunk in self.dirty:
            self._writer.add_dirty(chunk.start_page, chunk.nr_pages, chunk.bitmap)
