# SPDX-License-Identifier: MIT
"""Save a device: stop it, fetch its dirty bitmap, read its state, commit the image."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vfio_mig import interrupts
from vfio_mig.errors import UsageError
from vfio_mig.host.lock import STOPPED
from vfio_mig.interrupts import protected
from vfio_mig.jobs.check import parse_state
from vfio_mig.jobs.points import point
from vfio_mig.jobs.rollback import Rollback
from vfio_mig.jobs.session import Settings, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.image.archive import ArchiveWriter
    from vfio_mig.image.files import Output
    from vfio_mig.jobs.session import Session

JOB = "save"
STDOUT = "-"
PAGE = 4096


class SaveReport(NamedTuple):
    """What a save did. Times in seconds, sizes in bytes, pages of 4096 bytes.

    :param stop_time: from the STOP request to its answer.
    :param bitmap_time: fetching the dirty bitmap.
    :param state_read_time: reading the state.
    :param stopped_time: from the STOP request until the device was started again, or until all of it was read.
    :param start_time: from the START request to its answer, 0 when the device stays stopped.
    :param state: what the device is now: ``stop``, ``running``, or ``closed`` when nobody else has it open.
    :param pages_zero: dirty pages that are all zero: a range in the image, no content.
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

    def statistics(self) -> dict[str, Any]:
        """Return the part that the manifest keeps."""
        return {key: value for key, value in self._asdict().items() if key not in ("device", "file", "state")}


class _Clock:
    """Seconds of each phase, by its name in the report."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {"start_time": 0.0, "bitmap_time": 0.0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = time.perf_counter() - began


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


class _Window:
    """The stopped window: from the STOP request on, what must be done before the device may go on."""

    def __init__(
        self, session: Session, ranges: list[PageRange], guest: Memory, progress: Callable[[int], object]
    ) -> None:
        # Imported here, before the device is stopped
        from vfio_mig.dirty.bitmap import preload
        from vfio_mig.dirty.fetch import fetch
        from vfio_mig.dirty.sync import zero_runs

        if guest.maps:
            preload()
        self._zero_runs = zero_runs
        self._fetch = fetch
        self._progress = progress
        self._session = session
        self._ranges = ranges
        self._guest = guest
        self.clock = _Clock()
        self.dirty: list[Dirty] = []
        self.state = b""
        self.pages_dirty = 0
        self.bytes_written = 0
        self.bytes_zero = 0

    def run(self, writer: ArchiveWriter | None, *, leave_running: bool) -> None:
        """Stop, fetch, copy, read and, if asked to, start."""
        began = time.perf_counter()
        with self.clock.phase("stop_time"):
            self._session.protocol.stop()
        point(JOB, "after-stop")
        if writer is not None:
            self._fetch_dirty()
            point(JOB, "after-dirty")
            self._copy_pages(writer)
            point(JOB, "after-pages")
        with self.clock.phase("state_read_time"):
            self.state = bytes(self._session.protocol.read_state())
        point(JOB, "after-state")
        if leave_running:
            with self.clock.phase("start_time"):
                self._session.go_on()
            point(JOB, "after-start")
        self.clock.times["stopped_time"] = time.perf_counter() - began

    def _fetch_dirty(self) -> None:
        with self.clock.phase("bitmap_time"):
            self.dirty = list(self._fetch(self._session.protocol.dirty, self._ranges))

    def _copy_pages(self, writer: ArchiveWriter) -> None:
        """Guest memory changes as soon as the device runs, so its pages are copied now."""
        if not self._guest.maps:
            return
        for chunk in self.dirty:
            if chunk.total():
                zero: list[tuple[int, int]] = []
                self.bytes_written += writer.add_pages(self._contents(chunk, zero))
                self.bytes_zero += writer.add_zero(zero)

    def _contents(self, chunk: Dirty, zero: list[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """Yield the dirty pages that have content, and list the others."""
        for gpa, view in self._guest.read(chunk.ranges()):
            for start, count, is_zero in self._zero_runs(view):
                if is_zero:
                    zero.append((gpa + start * PAGE, count * PAGE))
                else:
                    yield gpa + start * PAGE, view[start * PAGE : (start + count) * PAGE]
            self._progress(len(view))


def _finish(writer: ArchiveWriter, window: _Window, statistics: dict[str, Any]) -> None:
    """Write what can be written while the device already runs again."""
    writer.add_state(window.state)
    for chunk in window.dirty:
        writer.add_dirty(chunk.start_page, chunk.nr_pages, chunk.bitmap)
    writer.finish(statistics)


def _report(session: Session, file: str, window: _Window, *, started: bool) -> SaveReport:
    return SaveReport(
        device=session.device.name,
        file=file,
        state=session.state_after(started=started),
        **window.clock.times,
        state_bytes=len(window.state),
        pages_dirty=sum(chunk.total() for chunk in window.dirty),
        pages_written=window.bytes_written // PAGE,
        pages_zero=window.bytes_zero // PAGE,
    )


def _save_open(
    session: Session, output: BinaryIO, file: str, window: _Window, *, raw: bool, leave_running: bool
) -> SaveReport:
    """Save an open device to an open file; what fails is the caller's to roll back."""
    from vfio_mig.image.archive import ArchiveWriter

    writer = None if raw else ArchiveWriter(output, describe_device(session))
    window.run(writer, leave_running=leave_running)
    parse_state(session.protocol.name, window.state)  # refused now rather than at the restore
    report = _report(session, file, window, started=leave_running)
    if writer is None:
        output.write(window.state)
    else:
        _finish(writer, window, report.statistics())
    point(JOB, "written")
    return report


@protected
def _commit(session: Session, output: Output, rollback: Rollback) -> None:
    """Make the image final; from here on nothing is undone."""
    output.commit()
    rollback.forget()
    session.note("")
    interrupts.finish()


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
    progress: Callable[[int], object] = lambda _: None,
) -> SaveReport:
    """Save a device to a file or, as ``-``, to standard output.

    The device is left stopped unless *leave_running*. After any failure it runs and there is no file.

    :param memory: guest memory; its dirty pages go into the image.
    :param ranges: guest pages to fetch the dirty bitmap of; by default those of *memory*, else the first 4 GiB.
    :param raw: write the bare state, without bitmap, pages and integrity.
    :param force: replace an existing file.
    :param progress: called with the bytes of each piece of guest memory that was copied.
    :raises OpenError, UnsupportedError: nothing was done.
    :raises DeviceError: the device failed; it was started again.
    :raises HostError: the file could not be written; the device was started again.
    """
    from vfio_mig.dirty.memory import Memory

    if raw and memory:
        raise UsageError("a raw state has no place for memory pages", hint="leave out --raw or --memory")
    with (
        Memory(memory, writable=True) as guest,
        open_session(name, settings, memory=guest.maps, job=JOB) as session,
        Rollback() as rollback,
        # inside the rollback: a commit that fails starts the device again
        ExitStack() as stack,
    ):
        output = _output(file, force=force)
        stream = stack.enter_context(output)
        window = _Window(session, default_ranges(guest, ranges), guest, progress)
        point(JOB, "opened")
        session.note(STOPPED)
        rollback.push(session.go_on)
        report = _save_open(session, stream, file, window, raw=raw, leave_running=leave_running)
        _commit(session, output, rollback)
        return report
