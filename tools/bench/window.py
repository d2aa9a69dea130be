# SPDX-License-Identifier: MIT
"""What our own code takes of the stopped window, on this CPU: the job's real steps, the kernel's part played by a file.

The VM shows the same with a real kernel, but under emulation, where Python is 15 to 20 times slower.
"""

from __future__ import annotations

import io
import os
import struct
from typing import TYPE_CHECKING, Final, cast

from tools.bench.table import Row, alternate, excess
from vfio_mig.device import Device, Region
from vfio_mig.dirty.memory import Memory
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import Live
from vfio_mig.jobs.engine.memory import MemoryCopy, Wanted, last_round
from vfio_mig.jobs.engine.pause import Pause, stop_all
from vfio_mig.jobs.engine.state import StateReader
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.uapi.profile import DEFAULT_PROFILE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.uapi import Request

OWN_MS: Final = 5
_HEAD: Final = struct.pack("<IIii", 1, 528, 0, 5 << 20)
_PAGES: Final = 1 << 20


class _Kernel(Device):
    """Answers every request at once, with a clean bitmap; its state region is a file."""

    def call(self, request: Request, arg: object = 0) -> int:
        del request, arg
        return 0


class _Session:
    """As much of a session as a window needs."""

    def __init__(self, protocol: GvtRfc) -> None:
        self.protocol = protocol
        self.device = protocol.device

    def journal(self, effect: str) -> None:
        """Write nothing down: that is not part of the window."""

    def journal_step(self, name: str) -> None:
        """Write nothing down."""

    def resume(self) -> None:
        """Start the device."""
        self.protocol.start()


def _ours(path: Path, size: int) -> Callable[[], float]:
    def run() -> float:
        fd = os.open(path, os.O_RDONLY)
        with _Kernel("bench", fd) as device, Job("save") as job:
            guest = job.enter(Memory([]))
            protocol = GvtRfc(device, DEFAULT_PROFILE, Region(0, 3, size, 0, None, None, (), ()))
            pause = Pause(job, cast("Session", _Session(protocol)))
            wanted = Wanted([PageRange(0, _PAGES)])
            copy = MemoryCopy(job, [pause], guest, None, wanted, remember=False)
            reader = StateReader(pause, ArchiveWriter(io.BytesIO(), {}), None, Live(), has_memory=False)
            protocol.prepare()
            copy.begin()
            stop_all([pause])
            last_round(job, copy, [pause])
            reader.read()
            pause.resume()
            job.commit()
            return pause.times["stopped_time"]

    return run


def window_rows(said: Callable[[Path], float], directory: Path) -> list[Row]:
    """Compare a save's stopped window with the same reads in C.

    :param said: runs the reference on a region's file and returns the seconds.
    """
    size = DEFAULT_PROFILE.image_max
    path = directory / "region"
    path.write_bytes(_HEAD + os.urandom(size - len(_HEAD)))
    pairs = alternate(_ours(path, size), lambda: said(path))
    return [excess("own time while stopped, RFC", pairs, OWN_MS, f"{size >> 20} MiB region, bitmap of 4 GiB")]
