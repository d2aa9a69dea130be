# SPDX-License-Identifier: MIT
"""What a job reads of one device's own state: a part while it runs where it can, and the rest while it is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from vfio_mig.errors import UnsupportedError
from vfio_mig.host.lock import LIVE
from vfio_mig.jobs.engine.live import StateCopy
from vfio_mig.jobs.engine.progress import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.engine.live import Live, StateRound
    from vfio_mig.jobs.engine.pause import Pause


class StateReader:
    """Reads one device's state into an image, or as it is to a file.

    :param writer: the image; None for a bare state, which has no bitmap.
    :param raw: where a bare state goes.
    :param live: what is read while the device runs, and who is told of it.
    :param has_memory: whether guest memory is copied while the device runs.
    :raises UnsupportedError: nothing can be read while the device runs, and that was asked for.
    """

    def __init__(
        self,
        pause: Pause,
        writer: ArchiveWriter | None,
        raw: BinaryIO | None,
        live: Live,
        *,
        has_memory: bool,
    ) -> None:
        self._pause = pause
        self._protocol = pause.session.protocol
        self._writer = writer
        self._raw = raw
        self._progress = live.progress
        self._live = self._protocol.live if live.precopy else None
        self.live = None if self._live is None else StateCopy(self._live, self._pass_on)
        self.state = memoryview(b"")
        self.state_bytes = 0
        if live.precopy and self.live is None and not has_memory:
            raise UnsupportedError(
                "its state can be read only while it is stopped: it has no PRE_COPY",
                device=pause.session.device.name,
                hint="leave out --live",
            )

    @property
    def rounds(self) -> list[StateRound]:
        """Rounds in which the state was read while the device ran."""
        return [] if self.live is None else self.live.rounds

    @property
    def precopy_bytes(self) -> int:
        """Bytes of the state that were read while the device ran."""
        return 0 if self.live is None else self.live.bytes_read

    def begin_live(self) -> None:
        """Begin to read the state of the running device."""
        if self._live is None:
            return
        self._pause.change(LIVE)
        if not self._live.begin_live():
            self._pause.session.warn("it does not run, so its state is read as usual")
            self.live = None

    def read(self) -> None:
        """Read the stopped device's state; a stream goes straight into the image, as it may be of any size."""
        with self._pause.phase("state_read_time"):
            if self._protocol.streams:
                self.state_bytes = self.precopy_bytes + self._pass_on(self._protocol.read_chunks())
            else:
                self.state = self._protocol.read_state()
                self.state_bytes = len(self.state)
        self._pause.job.step("after-state", self._pause.session)

    def _pass_on(self, chunks: Iterable[bytes | memoryview]) -> int:
        chunks = counted(chunks, self._progress)
        if self._writer is not None:
            return self._writer.add_state(chunks)
        return sum(self._raw.write(chunk) for chunk in chunks) if self._raw is not None else 0

    def write_rest(self, dirty: Sequence[Dirty]) -> None:
        """Put into the image what could wait: state and bitmaps. The manifest is the caller's."""
        if self._writer is None:
            if self._raw is not None:
                self._raw.write(self.state)
            return
        self._writer.add_state(self.state)
        for chunk in dirty:
            self._writer.add_dirty(chunk.start_page, chunk.nr_pages, chunk.bitmap)
