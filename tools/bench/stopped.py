# SPDX-License-Identifier: MIT
"""How long a vGPU of the real kvmgt stands still: ``vfio-mig save`` and ``migrate``, the same requests in C, and QEMU.

Of each of our kvmgt's interfaces in one VM, in turn, medians of :data:`RUNS`; each run has vGPUs of its own. Ours are
the commands' own reports, C's what tools/bench/c/reference.c prints. Of C the time of each request to the device is
known, which is the driver's; what we take longer than all of these together is ours. What pinning takes is the
difference between loads of a vGPU without any guest page in its table, and with :data:`PAGES`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tools.bench import downtime
from tools.bench.native import build, said
from tools.bench.table import RUNS, Row, excess
from tools.demo.report import run
from tools.lab.gvt import kvmgt, rfc
from tools.lab.gvt.held import Side, side
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES, Vgpu
from tools.lab.vfio import v2
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

OWN_MS: Final = 5
RFC: Final = "RFC"
V2: Final = "v2"
INTERFACES: Final = {RFC: "migration=rfc", V2: "migration=v2"}
"""kvmgt's parameter for each."""
SAVE: Final = "save"
MOVE: Final = "migrate"
FRESH: Final = "fresh"
QUEUED: Final = "queued work"
MAPPED: Final = "8 MiB mapped"
WORKS: Final = (FRESH, QUEUED)
PAGES: Final = MEMORY_PAGES
PHASES: Final = ("stop", "bitmap", "read", "load", "start")
TOTAL: Final = "stopped"
STATE: Final = "bytes"

Times = dict[str, float]
"""Seconds by phase, and :data:`TOTAL`; and :data:`STATE`."""
_OUR_NAMES: Final = {
    SAVE: {"stop": "stop_time", "bitmap": "bitmap_time", "read": "state_read_time", "start": "start_time"},
    MOVE: {
        "stop": "stop_time",
        "bitmap": "bitmap_time",
        "read": "state_read_time",
        "load": "state_write_time",
        "start": "start_time",
    },
}
_LOST: Final = "less than what runs differ by"
_OUR_TOTAL: Final = {SAVE: "stopped_time", MOVE: "downtime"}
_ITS_TOTAL: Final = {SAVE: "stopped", MOVE: "downtime"}


class Pair(NamedTuple):
    """Two vGPUs: one that this process holds, as kvmgt reads guest memory where it is mapped, and one of a holder's."""

    source: Vgpu
    target: Side

    def words(self) -> tuple[str, str, str, str]:
        """Return how the reference is told of both."""
        source = f"{os.getpid()}:{self.source.container.group_fd}"
        return source, self.source.name, f"{self.target.pid}:{_group_fd(self.target)}", self.target.name


class Measured(NamedTuple):
    """One comparison: medians of what each took.

    :param work: what was in the vGPU.
    :param ours: of ``vfio-mig``, empty where only the driver was looked at.
    :param reference: of the C program.
    :param qemu: seconds that QEMU's own migration took, None where it was not measured.
    """

    interface: str
    job: str
    work: str
    kernel: str
    ours: Times
    reference: Times
    qemu: float | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.interface}: {self.job}, {self.work}"

    @property
    def driver(self) -> float:
        """Seconds of all requests to the device, as C sees them."""
        return sum(self.reference[phase] for phase in PHASES)

    @property
    def our_driver(self) -> Times:
        """What of our own time is the driver's, by phase: what C takes for it, or what we do where that is less."""
        return {phase: min(self.reference[phase], self.ours.get(phase, self.reference[phase])) for phase in PHASES}

    @property
    def our_rest(self) -> float:
        """Seconds that we take beside the driver."""
        return self.ours[TOTAL] - sum(self.our_driver.values())

    @property
    def row(self) -> Row:
        """The comparison with the goal."""
        return excess(self.name, [(self.ours[TOTAL], self.reference[TOTAL])], OWN_MS)

    @property
    def verdicts(self) -> list[tuple[str, bool]]:
        """Each goal, and whether it is met; none where only the driver was looked at."""
        if not self.ours:
            return []
        found = [(f"C + {OWN_MS} ms", bool(self.row.met))]
        return found if self.qemu is None else [*found, ("QEMU", self.ours[TOTAL] <= self.qemu)]

    @property
    def met(self) -> bool:
        """Whether all of them are."""
        return all(met for _, met in self.verdicts)


def _group_fd(held: Side) -> int:
    """Find the fd of the group in its holder."""
    node = f"/dev/vfio/{(kvmgt.DEVICES / held.name / 'iommu_group').readlink().name}"
    files = Path(f"/proc/{held.pid}/fd").iterdir()
    return next(int(file.name) for file in files if str(file.readlink()) == node)


def _stop(vgpu: Vgpu, interface: str) -> None:
    if interface == RFC:
        vgpu.device.stop()
    else:
        v2.Client(vgpu.device.fd).go(v2.STOP)


def _pair(stack: ExitStack, within: Path) -> Pair:
    """Make vGPUs."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=within)))
    source = stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance()), directory / "source"))
    return Pair(source, stack.enter_context(side(directory / "target")))


def _fill(pair: Pair, interface: str, work: str) -> None:
    """Put something into the first one, which is new; with queued work it is stopped, else that would be done."""
    source, target = pair
    if work == QUEUED:
        rfc.queue_work(source, stop=lambda: _stop(source, interface))
        target.memory.bytes[:] = source.memory.bytes[:]  # page tables are never dirty
    elif work == MAPPED:
        for offset in range(0, PAGES * PAGE, PAGE):
            source.device.set_pte(source.low + offset, MEMORY + offset | 1)


def _ours(pair: Pair, job: str, directory: Path) -> Times:
    """Run the command, and take what it reports."""
    words = {
        SAVE: ("save", pair.source.name, str(directory / "image"), "--force", "--leave-running"),
        MOVE: ("migrate", pair.source.name, pair.target.name),
    }[job]
    report: dict[str, Any] = json.loads(run("--json", *words))
    times = {phase: float(report[key]) for phase, key in _OUR_NAMES[job].items()}
    return {**times, TOTAL: float(report[_OUR_TOTAL[job]]), STATE: float(report["state_bytes"])}


def _reference(pair: Pair, interface: str, job: str, program: Path, directory: Path) -> Times:
    """Run the C program, and take what it prints."""
    group, source, *target = pair.words()
    if job == SAVE:
        found = said(program, f"{interface.lower()}-save", group, source, directory / "bare")
    else:
        found = said(program, f"{interface.lower()}-move", group, source, *target)
    return {**{phase: found.get(phase, 0.0) for phase in PHASES}, TOTAL: found[_ITS_TOTAL[job]], STATE: found[STATE]}


def medians(runs: Sequence[Mapping[str, float]]) -> Times:
    """Take the median of each phase; the first run is not counted."""
    counted = runs[1:]
    return {name: statistics.median(one[name] for one in counted) for name in runs[0]} if counted else {}


def in_turn(sides: Sequence[Callable[[], Times]], runs: int) -> list[Times]:
    """Run all in turn, once unmeasured, and from the other end every other time; returns the medians of each."""
    found: list[list[Times]] = [[] for _ in sides]
    for number in range(runs + 1):
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for one in order:
            found[one].append(sides[one]())
    return [medians(its) for its in found]


class _Bench(NamedTuple):
    """Where all of it is done: the reference, and a directory for what both write."""

    program: Path
    directory: Path


def _compared(bench: _Bench, interface: str, job: str, work: str, *, driver_only: bool = False) -> Measured:
    program, directory = bench

    def with_pair(measure: Callable[[Pair], Times]) -> Times:
        with ExitStack() as stack:
            pair = _pair(stack, directory)
            _fill(pair, interface, work)
            return measure(pair)

    def by_qemu() -> Times:
        with ExitStack() as stack:
            names = [stack.enter_context(kvmgt.instance()) for _ in range(2)]
            paths = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="q", dir="/run")))
            return {TOTAL: downtime.by_qemu(downtime.KVMGT, names[0], names[1], paths).downtime_ms / 1e3}

    sides = [lambda: with_pair(lambda pair: _reference(pair, interface, job, program, directory))]
    if not driver_only:
        sides.append(lambda: with_pair(lambda pair: _ours(pair, job, directory)))
    if (interface, job, work) == (V2, MOVE, FRESH):
        sides.append(by_qemu)
    reference, ours, qemu = [*in_turn(sides, RUNS), {}, {}][:3]
    return Measured(interface, job, work, os.uname().release, ours, reference, qemu.get(TOTAL))


def measure(interfaces: Iterable[str] = INTERFACES) -> Iterator[Measured]:
    """Measure on vGPUs of our kvmgt, which is loaded once with each interface; the GPU's own driver stays."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        bench = _Bench(build(Path(name)), Path(name))
        for interface in interfaces:
            rfc.load_ours(None, INTERFACES[interface])
            for work in WORKS:
                for job in (SAVE, MOVE):
                    yield _compared(bench, interface, job, work)
            yield _compared(bench, interface, MOVE, MAPPED, driver_only=True)


def write(measured: Measured, file: Path) -> None:
    """Append figures to a file, a line of JSON."""
    with file.open("a") as out:
        out.write(json.dumps(measured._asdict()) + "\n")


def read(file: Path) -> list[Measured]:
    """Read what :func:`write` has written."""
    return [Measured(**json.loads(line)) for line in file.read_text().splitlines()]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def goals_table(measured: Sequence[Measured]) -> str:
    """Compare totals, in Markdown."""
    rows = [["", "state", "ours", "C", "ours more", "QEMU", "goals"], ["---"] * 7]
    rows += [
        [
            one.name,
            f"{one.ours[STATE]:,.0f}",
            _ms(one.ours[TOTAL]),
            _ms(one.reference[TOTAL]),
            _ms(one.ours[TOTAL] - one.reference[TOTAL]),
            _ms(one.qemu),
            "; ".join(f"{goal}: {'met' if met else '**missed**'}" for goal, met in one.verdicts),
        ]
        for one in measured
        if one.ours
    ]
    return _markdown(rows)


def phases_table(measured: Sequence[Measured]) -> str:
    """Say where the time goes, in Markdown: the driver's own, request by request, and what comes on top of it."""
    rows = [["", *PHASES, "driver", "C's rest", "our rest"], ["---"] * (len(PHASES) + 4)]
    rows += [
        [
            one.name,
            *(_ms(one.reference[phase]) for phase in PHASES),
            _ms(one.driver),
            _ms(one.reference[TOTAL] - one.driver),
            _ms(one.our_rest) if one.ours else "",
        ]
        for one in measured
    ]
    return _markdown(rows)


def pinning(measured: Sequence[Measured]) -> dict[str, float]:
    """Return by interface the seconds that loading takes longer with :data:`PAGES` guest pages than without any."""
    loads = {(one.interface, one.work): one.reference["load"] for one in measured if one.job == MOVE}
    return {
        interface: loads[interface, MAPPED] - loads[interface, FRESH]
        for interface in INTERFACES
        if {(interface, MAPPED), (interface, FRESH)} <= loads.keys()
    }


def text(measured: Sequence[Measured]) -> str:
    """Return both tables, and what pinning takes."""
    pinned = "".join(
        f"{interface}: {PAGES:,} guest pages to pin and map: "
        + (f"{_ms(seconds)} more of loading, {seconds / PAGES * 1e6:.1f} us a page\n" if seconds > 0 else f"{_LOST}\n")
        for interface, seconds in pinning(measured).items()
    )
    return f"{goals_table(measured)}\n{phases_table(measured)}\n{pinned}"


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
