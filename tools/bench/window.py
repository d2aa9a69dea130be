# SPDX-License-Identifier: MIT
"""What our own code takes of the stopped window, on this CPU: the job's real steps, the kernel's part played by a file.

The VM shows the same with a real kernel, but under emulation, where Python is 15 to 20 times slower.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Final, cast

from tools.bench import played
from tools.bench.table import Row, alternate, excess
from tools.fuzz.corpus import good_image
from vfio_mig.device import Device, Region
from vfio_mig.dirty.memory import Memory
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.host.lock import VARIABLE
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import Live
from vfio_mig.jobs.engine.memory import MemoryCopy, Wanted, last_round
from vfio_mig.jobs.engine.pause import Pause, stop_all
from vfio_mig.jobs.engine.state import StateReader
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.protocols.mainline_v2 import MainlineV2
from vfio_mig.uapi.profile import DEFAULT_PROFILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.uapi import Request

OWN_MS: Final = 5
STREAM: Final = 3_021_968
"""Bytes of a v2 state, as kvmgt has it of a _8."""
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
        """Start the device after a failure."""
        self.let_go_on()

    def let_go_on(self) -> bool:
        """Start the device; there is nothing to write down."""
        self.protocol.start()
        return False


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


def move_rows(said: Callable[[str, Path], float], directory: Path) -> Iterator[Row]:
    """Compare a migration between two processes with the same bytes through a pipe in C, which verifies nothing.

    :param said: runs the reference on a state's file, named by the protocol, and returns the seconds.
    """
    image = good_image()
    for name, protocol, content in (
        ("RFC", GvtRfc.name, image.ljust(DEFAULT_PROFILE.image_max, b"\0")),
        ("v2", MainlineV2.name, image[:STREAM]),
    ):
        path = directory / name.lower()
        path.write_bytes(content)
        moved = mover(protocol, path, directory)
        pairs = alternate(moved, lambda name=name, path=path: said(name.lower(), path))  # type: ignore[misc]
        size = len(image) if name == "RFC" else STREAM
        yield excess(f"own time while stopped, migrate, {name}", pairs, OWN_MS, f"{size / 1e6:.1f} MB, SHA-256 twice")


def mover(protocol: str, path: Path, directory: Path) -> Callable[[], float]:
    """Return what migrates between two devices that a file plays, and gives the seconds of the downtime."""
    reach = played.rsh(directory, protocol, path)
    words = [sys.executable, "-m", played.__name__, protocol, str(path), "-q", "--json"]
    words += ["migrate", "--force", "one", f"ssh://here/{path.name}", "--rsh", str(reach)]
    environment = {**os.environ, VARIABLE: str(directory / "locks")}

    def run() -> float:
        done = subprocess.run(words, capture_output=True, check=False, env=environment)
        if done.returncode:
            sys.exit(done.stderr.decode())
        return float(json.loads(done.stdout)["downtime"])

    return run
