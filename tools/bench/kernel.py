# SPDX-License-Identifier: MIT
"""What needs the kernel: saving and restoring the sample device, against C, in the VM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.vm import host
from tools.bench.native import build, said
from tools.bench.table import Row, alternate, excess, ratio, show

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 1 << 20
STREAMS: Final = (64,)
OWN_MS: Final = 5
THROUGHPUT: Final = 0.9


class Ours:
    """Runs ``vfio-mig``; remembers the most memory that a run had resident."""

    def __init__(self) -> None:
        program = shutil.which("vfio-mig")
        assert program is not None  # noqa: S101 -- it is installed with this
        self._program: Final = program
        self.peak = 0

    def run(self, *words: str | Path) -> dict[str, Any]:
        """Return the report of one run."""
        with tempfile.TemporaryFile() as out:
            process = subprocess.Popen([self._program, "--json", *words], stdout=out)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                sys.exit(f"vfio-mig {words[0]} failed")
            self.peak = max(self.peak, usage.ru_maxrss * 1024)
            out.seek(0)
            report: dict[str, Any] = json.loads(out.read())
            return report


def rfc_rows(program: Path, directory: Path) -> Iterator[Row]:
    """Compare how long a vGPU stands still."""
    ours = Ours()
    with host.instance() as vgpu:
        image, raw = directory / "image", directory / "raw"

        def save() -> float:
            return float(ours.run("save", vgpu.uuid, image, "--leave-running", "--force")["stopped_time"])

        pairs = alternate(save, lambda: said(program, "rfc-save", str(vgpu.group), vgpu.uuid, raw)["stopped"])
        yield excess("RFC: stopped during a save", pairs, OWN_MS, f"{raw.stat().st_size} bytes of state")


def v2_rows(program: Path, directory: Path, mib: int) -> Iterator[Row]:
    """Compare a stream's way into a file and back; ours with SHA-256 of every byte."""
    ours = Ours()
    with host.loaded(v2=7, migratable=0), host.instance() as vgpu:
        (vgpu.debugfs / "v2_extra_bytes").write_text(str(mib * MIB))
        image, raw = directory / "image", directory / "raw"

        def save() -> float:
            return float(ours.run("save", vgpu.uuid, image, "--leave-running", "--force")["state_read_time"])

        # The pass that verifies the whole image comes before the device is stopped, and is not in this figure
        def restore() -> float:
            return float(ours.run("restore", vgpu.uuid, image, "--start")["state_write_time"])

        most = 1 / THROUGHPUT
        pairs = alternate(save, lambda: said(program, "v2-save", str(vgpu.group), vgpu.uuid, raw)["read"])
        yield ratio(f"v2: {mib} MiB, device to file", "s", pairs, most)
        pairs = alternate(restore, lambda: said(program, "v2-load", str(vgpu.group), vgpu.uuid, raw)["write"])
        yield ratio(f"v2: {mib} MiB, file to device", "s", pairs, most, f"peak {ours.peak // MIB} MiB resident")


def measure() -> list[Row]:
    """Measure everything that needs the kernel, and print it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = build(directory)
        rows = list(rfc_rows(program, directory))
        for mib in STREAMS:
            rows += v2_rows(program, directory, mib)
    show(rows, f"In the VM, Linux {os.uname().release}, the sample device; an emulated CPU")
    return rows
