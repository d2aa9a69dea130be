# SPDX-License-Identifier: MIT
"""What needs the kernel: saving and restoring the sample device, asking it for dirty pages; against C, in the VM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tools.bench.native import SIZES, build, said
from tools.bench.table import RUNS, Row, alternate, excess, ratio, show
from tools.lab.sample import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GIB: Final = 1 << 30
MIB: Final = 1 << 20
PAGE: Final = 4096
STREAMS: Final = ((64, RUNS), (1024, 3))
"""MiB of state, and how often: a GiB takes minutes under emulation."""
OWN_MS: Final = 5
THROUGHPUT: Final = 0.9
DIRECTORY: Final = "/dev/shm"  # noqa: S108 -- a name of our own in it; the VM's disk is a file system of its own kind


class Ours:
    """Runs ``vfio-mig``; remembers the most memory that a run had resident."""

    def __init__(self) -> None:
        program = shutil.which("vfio-mig")
        assert program is not None  # noqa: S101 -- it is installed with this
        self._program: Final = program
        self.peak = 0

    def run(self, *words: str | Path, to: str | None = None) -> dict[str, Any]:
        """Return the report of one run.

        :param to: where the image goes that is written to standard output; there is no report then.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(to or os.devnull, "wb") as sink:  # noqa: PTH123 -- /dev/null, as a rule
            process = subprocess.Popen([self._program, "-q", "--json", *words], stdout=sink if to else out, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                err.seek(0)
                sys.exit(err.read().decode().strip() or f"vfio-mig {words[0]} failed")
            self.peak = max(self.peak, usage.ru_maxrss * 1024)
            out.seek(0)
            report: dict[str, Any] = {} if to else json.loads(out.read())
            return report


class Sides(NamedTuple):
    """Both programs, and a directory for what they write."""

    ours: Ours
    program: Path
    directory: Path

    def pair(
        self, vgpu: host.Instance, words: tuple[str, ...], key: str, its_words: tuple[str, ...], its_key: str
    ) -> tuple[Callable[[], float], Callable[[], float]]:
        """Return what runs ``vfio-mig`` and the reference, and gives a figure of what each one says."""
        return (
            lambda: float(self.ours.run(words[0], vgpu.uuid, *words[1:])[key]),
            lambda: said(self.program, its_words[0], str(vgpu.group), vgpu.uuid, *its_words[1:])[its_key],
        )


def rfc_rows(sides: Sides) -> Iterator[Row]:
    """Compare how long a vGPU stands still, and the way of its state."""
    image, raw = str(sides.directory / "image"), str(sides.directory / "raw")
    save, its_save = ("save", image, "--leave-running", "--force", "--open"), ("rfc-save", raw)
    with host.instance() as vgpu:
        pairs = alternate(*sides.pair(vgpu, save, "stopped_time", its_save, "stopped"))
        size = Path(raw).stat().st_size
        yield excess("RFC: stopped during a save", pairs, OWN_MS, f"{size} bytes of state")
        pairs = alternate(*sides.pair(vgpu, save, "state_read_time", its_save, "read"))
        yield ratio("RFC: read the state", "s", pairs)
        pairs = alternate(
            *sides.pair(vgpu, ("restore", image, "--start", "--open"), "state_write_time", ("rfc-load", raw), "write")
        )
        yield ratio("RFC: write the state", "s", pairs)


def dirty_rows(sides: Sides) -> Iterator[Row]:
    """Compare fetching and counting the dirty bitmap of ever more address space, of which little is dirty."""
    with host.instance() as vgpu:
        for gib, size in SIZES:
            pages = gib * GIB // PAGE
            words = ("dirty", "--range", f"0+{gib << 30}")
            pairs = alternate(*sides.pair(vgpu, words, "bitmap_time", ("dirty", str(pages)), "fetch"))
            yield ratio(f"RFC: fetch dirty bitmap, {size}", "s", pairs)


def _without(file: str, run: Callable[[], float]) -> float:
    """Remove what was saved before, for which there may be no room beside the new one."""
    Path(file).unlink(missing_ok=True)
    return run()


def v2_rows(sides: Sides, mib: int, runs: int) -> Iterator[Row]:
    """Compare a stream's way into a file and back; ours with SHA-256 of every byte."""
    image, raw = str(sides.directory / "image"), str(sides.directory / "raw")
    most = 1 / THROUGHPUT
    with host.loaded(v2=7, migratable=0), host.instance() as vgpu:
        (vgpu.debugfs / "v2_extra_bytes").write_text(str(mib * MIB))
        # Digests are taken, and the image is verified, outside of what these times are of
        words = ("save", image, "--leave-running", "--open")
        save, its_save = sides.pair(vgpu, words, "state_read_time", ("v2-save", raw), "copy")
        pairs = alternate(lambda: _without(image, save), lambda: _without(raw, its_save), runs)
        yield ratio(f"v2: {mib} MiB, device to file", "s", pairs, most)
        load = ("restore", image, "--start", "--open")
        pairs = alternate(*sides.pair(vgpu, load, "state_write_time", ("v2-load", raw), "write"), runs)
        yield ratio(f"v2: {mib} MiB, file to device", "s", pairs, most, f"peak {sides.ours.peak // MIB} MiB resident")


def measure() -> list[Row]:
    """Measure everything that needs the kernel, and print it."""
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as name:
        directory = Path(name)
        sides = Sides(Ours(), build(directory), directory)
        rows = [*rfc_rows(sides), *dirty_rows(sides)]
        for mib, runs in STREAMS:
            rows += v2_rows(sides, mib, runs)
    show(rows, f"In the VM, Linux {os.uname().release}, the sample device; an emulated CPU")
    return rows
