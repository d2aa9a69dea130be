# SPDX-License-Identifier: MIT
"""Where the downtime of the main job goes, phase by phase: on the sample driver, and on kvmgt with the RFC's patches.

Each VM has one of the two and writes its figures to a file; :func:`show` puts the files' figures beside each other. The
commands' own figures are taken, so the start of a process is not among them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tools.bench.table import RUNS
from tools.demo.report import run
from tools.lab.gvt import kvmgt, rfc
from tools.lab.gvt.held import side as kvmgt_side
from tools.lab.gvt.kvmgt import MEMORY, Vgpu
from tools.lab.sample import gpu
from tools.lab.sample.held import queue_one, run_some_work
from tools.lab.sample.held import side as sample_side

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAMPLE: Final = "the sample driver"
REAL: Final = "kvmgt"
BITMAP: Final = "dirty bitmap"
PHASES: Final = (
    "stop",
    BITMAP,
    "sync the pages, stopped",
    "read the state",
    "write the state",
    "start",
)
FACTS: Final = ("state, bytes", "dirty pages")


class Pair(NamedTuple):
    """Two held vGPUs of one kind, by name and by what --memory takes.

    :param queue: gives the first one work that waits until it is started; leaves it stopped.
    """

    driver: str
    source: str
    source_memory: str
    target: str
    target_memory: str
    queue: Callable[[], object]


class Figures(NamedTuple):
    """What was measured in one VM: medians, in seconds, and how much there was to do."""

    driver: str
    kernel: str
    values: dict[str, float]


def _sample(stack: ExitStack, directory: Path) -> Pair:
    one, other = (stack.enter_context(sample_side(directory / name)) for name in ("source", "target"))
    engine = gpu.Engine(one.guest)
    one.guest.device.make_ppgtt(4, [0x5000])
    run_some_work(one.guest, engine)

    def queue() -> None:
        queue_one(one.guest, engine)

    return Pair(SAMPLE, one.name, one.memory_option, other.name, other.memory_option, queue)


def _real(stack: ExitStack, directory: Path) -> Pair:
    """Make a pair of kvmgt's; this process holds the first one, as kvmgt reads guest memory where it is mapped."""
    one = stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance()), directory / "source"))
    other = stack.enter_context(kvmgt_side(directory / "target"))

    def queue() -> None:
        one.device.start()  # as some of the work is done before
        rfc.queue_work(one)
        other.memory.bytes[:] = one.memory.bytes[:]  # page tables are never dirty

    return Pair(REAL, one.name, f"{directory / 'source'}@{MEMORY:#x}", other.name, other.memory_option, queue)


def _vfio_mig(*words: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run("--json", *words))
    return result


def _measured(pair: Pair, directory: Path) -> dict[str, list[float]]:
    """Do each phase some times; the first time is not counted."""
    times: dict[str, list[float]] = {name: [] for name in (*PHASES, *FACTS)}
    image, copy = str(directory / "gpu.vfm"), str(directory / "copy")
    for _ in range(RUNS + 1):
        _vfio_mig("start", pair.source)
        times["stop"].append(_vfio_mig("stop", pair.source)["seconds"])
    pair.queue()
    for _ in range(RUNS + 1):
        dirty = _vfio_mig("dirty", pair.source, "--memory", pair.source_memory)
        synced = _vfio_mig("sync", pair.source, copy, "--memory", pair.source_memory, "--rounds", "0")
        saved = _vfio_mig("save", pair.source, image, "--memory", pair.source_memory, "--force")
        restored = _vfio_mig("restore", pair.target, image, "--memory", pair.target_memory)
        started = _vfio_mig("start", pair.target)
        found = (
            dirty["bitmap_time"],
            synced["stopped_time"] - synced["stop_time"],
            saved["state_read_time"],
            restored["state_write_time"],
            started["seconds"],
            saved["state_bytes"],
            saved["pages_dirty"],
        )
        for name, value in zip((*PHASES[1:], *FACTS), found, strict=True):
            times[name].append(float(value))
    return {name: values[1:] for name, values in times.items()}


def measure() -> Figures:
    """Measure on the vGPUs that this VM has."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        pair = (_real if kvmgt.available() else _sample)(stack, directory)
        medians = {name: statistics.median(values) for name, values in _measured(pair, directory).items()}
    return Figures(pair.driver, os.uname().release, medians)


def write(figures: Figures, file: Path) -> None:
    """Append figures to a file, a line of JSON."""
    with file.open("a") as out:
        out.write(json.dumps(figures._asdict()) + "\n")


def read(file: Path) -> list[Figures]:
    """Read what :func:`write` has written."""
    return [Figures(**json.loads(line)) for line in file.read_text().splitlines()]


def table(columns: Sequence[Figures]) -> str:
    """Put figures beside each other, times in milliseconds, as a table in Markdown."""
    rows = [["", *(f"{one.driver}, {one.kernel}" for one in columns)], ["---"] * (len(columns) + 1)]
    rows += [[name, *(f"{one.values[name] * 1e3:.1f} ms" for one in columns)] for name in PHASES]
    summed = [name for name in PHASES if name != BITMAP]  # of which the sync fetches one, too
    rows.append(
        ["sum, the bitmap once", *(f"{sum(one.values[name] for name in summed) * 1e3:.1f} ms" for one in columns)]
    )
    rows += [[name, *(f"{one.values[name]:,.0f}" for one in columns)] for name in FACTS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
