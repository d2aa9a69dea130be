# SPDX-License-Identifier: MIT
"""What a save and a migration have in common: devices' states, and what they wrote of guest memory, go into images."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vfio_mig.jobs.engine.live import copy_live, falls_short
from vfio_mig.jobs.engine.memory import NONE, ImageSink, MemoryCopy, last_round
from vfio_mig.jobs.engine.pause import announce_start, stop_all, wake
from vfio_mig.jobs.engine.state import StateReader
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.sync import Round
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.engine.job import Job
    from vfio_mig.jobs.engine.live import Live
    from vfio_mig.jobs.engine.memory import Wanted
    from vfio_mig.jobs.engine.pause import Pause
    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.protocols.states import KnownState


_AWAITED_FIRST: Final = 256 << 10
"""Bytes of the first state member of an image that somebody waits for."""


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


def begin_image(
    job: Job,
    session: Session,
    stream: BinaryIO,
    memory: Mapping[str, Any],
    *,
    reread: int | None = None,
    is_awaited: bool = False,
) -> ArchiveWriter:
    """Begin a device's image; the digests of a streamed state, and of guest memory, are taken beside the job.

    :param memory: what its header says of guest memory.
    :param reread: an fd to read the image back by; None where that cannot be.
    :param is_awaited: somebody reads the image from a pipe and waits for its end while the device stands still: the
        digests of any state are taken beside the job, and its first members are small.
    """
    from vfio_mig.image.digests import Digests
    from vfio_mig.image.layout import CHUNK
    from vfio_mig.image.writer import ArchiveWriter

    is_long = session.protocol.streams or memory["content"] != NONE
    digests = job.enter(Digests(reread)) if is_long or is_awaited else None
    header = {**describe_device(session), "memory": memory}
    return ArchiveWriter(stream, header, digests, first=_AWAITED_FIRST if is_awaited else CHUNK)


class Source:
    """One device, and the image that its state goes into.

    :param writer: the image; None for a bare state, which goes to *raw*.
    """

    def __init__(self, pause: Pause, writer: ArchiveWriter | None, raw: BinaryIO | None = None) -> None:
        self.pause = pause
        self.session = pause.session
        self.writer = writer
        self._raw = raw

    def prepare(self, live: Live, *, has_memory: bool) -> None:
        """Do what need not wait for the stop."""
        self.reader = StateReader(self.pause, self.writer, self._raw, live, has_memory=has_memory)
        self.session.protocol.prepare()

    def finish(self, dirty: Sequence[Dirty], statistics: Mapping[str, Any]) -> KnownState | None:
        """Write what could wait; the image is whole then. Returns the state, where its layout is known."""
        self.reader.write_rest(dirty)
        # Refused now rather than at the restore; whoever reads the image meanwhile does not have the end of it
        known = self.session.protocol.parse_state(memoryview(self.reader.state))
        if self.writer is not None:
            self.writer.finish(statistics)
        return known


class Export:
    """Reads one or several devices: one copy of guest memory, in the first one's image.

    :param live: what is read while they run.
    :param wanted: which guest memory is copied.
    :ivar rounds: in which guest memory was copied.
    """

    def __init__(self, job: Job, sources: Sequence[Source], guest: Memory, live: Live, wanted: Wanted) -> None:
        self._job = job
        self._sources = sources
        self._live = live
        self._pauses = [source.pause for source in sources]
        first = sources[0].writer
        self._sink = ImageSink(first) if guest.maps and first is not None else None
        self._copy = MemoryCopy(
            job, self._pauses, guest, self._sink, wanted, remember=live.rounds > 0, progress=live.progress
        )
        self.rounds: list[Round] = []
        for source in sources:
            source.prepare(live, has_memory=self._sink is not None)
            job.step("opened", source.session)

    def copy_live(self) -> None:
        """Copy pages, and read states, in rounds while the devices run."""
        self._copy.begin()
        for source in self._sources:
            source.reader.begin_live()
        states = [source.reader.live for source in self._sources if source.reader.live is not None]
        self.rounds = copy_live(self._live, self._copy if self._copy.copies else None, states)
        short = falls_short(self._live, self.rounds, states)
        if short is not None:
            self._sources[0].session.warn(short)
        for source in self._sources:
            self._job.step("after-live", source.session)

    def copy_stopped(self, *, memory: bool = True) -> None:
        """Stop the devices, copy what is left, and read their states.

        :param memory: False where there is no place for bitmaps and pages.
        """
        stop_all(self._pauses)
        if memory:
            last = last_round(self._job, self._copy, self._pauses)
            self.rounds += last
            for one in last:
                self._live.on_round(one)
        for source in self._sources:
            source.reader.read()
        for pause in self._pauses:
            pause.end()

    def resume(self) -> None:
        """Let the devices go on as they were found."""
        sessions = [source.session for source in self._sources]
        announce_start(self._job, sessions)
        wake(sessions)
        for pause in self._pauses:
            pause.resume()

    def end(self) -> list[list[Dirty]]:
        """End what tells of dirty pages; returns each device's last bitmaps."""
        self._copy.end()
        return self._copy.dirty

    def pages_copied(self, number: int) -> int:
        """Return how many pages with content are in the image of a device, one of several rounds in each."""
        return 0 if self._sink is None or number else self._sink.bytes_written // PAGE

    def figures(self, number: int) -> dict[str, Any]:
        """Return what every report says of a device's image, by the report's words."""
        reader = self._sources[number].reader
        return {
            "state_bytes": reader.state_bytes,
            "pages_dirty": self._copy.pages_dirty(number),
            "pages_zero": 0 if self._sink is None or number else self._sink.bytes_zero // PAGE,
            "rounds": [] if number else self.rounds,
            "precopy_bytes": reader.precopy_bytes,
            "state_rounds": reader.rounds,
            "memory": self._copy.content.content,
            "guest_paused": self._copy.content.guest_paused,
        }
