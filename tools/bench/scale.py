# SPDX-License-Identifier: MIT
"""How cost grows: with the address space that a bitmap is asked for, and with the size of a state; in the VM."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tools.bench.kernel import DIRECTORY, GIB, MIB, Ours
from tools.lab import cli
from tools.lab.sample import gpu, held, host
from tools.lab.vfio.raw import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACES: Final = (1, 16, 256, 1024)
"""GiB of guest memory, a sparse file; the same few pages are dirty in each."""
STATES: Final = (1, 16, 256, 1024, 4096)
"""MiB of state."""
MEMORY_MAX: Final = 64 * MIB
"""What a save may have resident beside the interpreter, bytes, whatever the state's size."""
_TIMES: Final = 2
_NOISE: Final = 0.05


class Point(NamedTuple):
    """One size and what it cost: seconds, and bytes that were resident at most, 0 where that is not looked at."""

    what: str
    size: str
    amount: int
    cost: float
    resident: int = 0


def _sync(ours: Ours, directory: Path, gib: int) -> Iterator[Point]:
    file = directory / "memory"
    memory = Memory(0, held.PAGES, file)
    os.truncate(file, gib * GIB)
    # Not in a fork: this process would have to load all of the program, and a child counts as at least as large
    with (
        host.instance() as vgpu,
        cli.hold_started(vgpu.uuid, "--memory", f"{file}@0"),
        held.guest_of(vgpu, memory) as guest,
    ):
        held.run_some_work(guest, gpu.Engine(guest))
        report = ours.run("sync", vgpu.uuid, directory / "copy", "--memory", f"{file}@0", "--leave-running")
    last = report["rounds"][-1]
    yield Point("fetch the bitmap", f"{gib} GiB", gib, last["bitmap_time"])
    yield Point(f"copy {last['pages_dirty']} dirty pages", f"{gib} GiB", gib, last["copy_time"])
    (directory / "copy").unlink()
    file.unlink()


def _save(ours: Ours, mib: int) -> Point:
    with host.instance() as vgpu:
        (vgpu.debugfs / "v2_extra_bytes").write_text(str(mib * MIB))
        ours.peak = 0
        began = time.monotonic()
        ours.run("save", vgpu.uuid, "-", "--leave-running", to=os.devnull)
        return Point("save to a pipe's end", f"{mib} MiB", mib, time.monotonic() - began, ours.peak)


def _interpreter() -> int:
    """Return what ``vfio-mig --version`` has resident, bytes."""
    ours = Ours()
    ours.run("--version", to=os.devnull)
    return ours.peak


def _grows(points: list[Point], *, with_amount: bool) -> bool:
    """Tell whether cost grows no faster than the amount, or not at all; a fixed part and some noise granted."""
    first, last = points[-2], points[-1]
    factor = last.amount / first.amount if with_amount else 1
    return last.cost <= first.cost * factor * _TIMES + _NOISE


def _show(title: str, points: list[Point], interpreter: int = 0) -> None:
    print(f"\n{title}")
    for point in points:
        memory = f"   {(point.resident - interpreter) / MIB:5.1f} MiB above the interpreter" if point.resident else ""
        print(f"{point.size:>10} {point.cost * 1e3:12.1f} ms{memory}")


def measure() -> bool:
    """Measure and print; True when nothing grows faster than it may."""
    ours = Ours()
    good = True
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as name:
        found = [point for gib in SPACES for point in _sync(ours, Path(name), gib)]
    for what in dict.fromkeys(point.what for point in found):
        points = [point for point in found if point.what == what]
        is_bitmap = what.startswith("fetch")
        good &= _grows(points, with_amount=is_bitmap)
        grows = "the kernel's bitmap grows with the address space" if is_bitmap else "no more for more address space"
        _show(f"RFC: {what} ({grows})", points)
    interpreter = _interpreter()
    with host.loaded(v2=7, migratable=0):
        points = [_save(ours, mib) for mib in STATES]
    good &= _grows(points, with_amount=True) and all(one.resident - interpreter < MEMORY_MAX for one in points)
    _show("v2: save, the image to /dev/null", points, interpreter)
    print(f"\n{'linear, in constant memory' if good else 'MISSED: something grows faster than it may'}")
    return good
