# SPDX-License-Identifier: MIT
"""Two held vGPUs on which faults are played, cell by cell, and what must be true afterwards."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from tools.lab import cli
from tools.lab.faults.cells import AFTER_COMMIT, Cell
from tools.lab.faults.injection import VARIABLE
from tools.lab.gvt import held as gvt_held
from tools.lab.gvt.kvmgt import MEMORY
from tools.lab.sample import gpu
from tools.lab.sample.held import Side, run_some_work
from tools.lab.vfio.raw import PAGE
from vfio_mig.host.discover import Host
from vfio_mig.host.holders import find_holder
from vfio_mig.host.lock import Leftover, left_behind
from vfio_mig.image.archive import read_archive

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tools.lab.vfio.raw import Device, Memory

_TIMESTAMP: Final = 0x22358  # of the blitter


@dataclass
class Outcome:
    """What was found; *broken* names every part of the promise that was not kept."""

    code: int
    state: str
    file: str
    memory: str
    broken: list[str] = field(default_factory=list)


class Held(Protocol):
    """A vGPU that `vfio-mig hold` keeps open, with its guest's memory."""

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> Memory: ...

    @property
    def memory_option(self) -> str: ...


HeldT = TypeVar("HeldT", bound=Held)


class Stage(ABC, Generic[HeldT]):
    """Two held vGPUs on which the cells are played one after the other."""

    def __init__(self, source: HeldT, target: HeldT, directory: Path) -> None:
        self.source: Final = source
        self.target: Final = target
        self.directory = directory
        self.image = directory / "good.vfm"
        self.work()
        cli.run("-q", "save", source.name, self.image, "--memory", source.memory_option, warm=True)
        with self.image.open("rb") as file, read_archive(file) as archive:
            self.pages = [(gpa, bytes(content)) for gpa, content in archive.pages()]
        assert self.pages

    @abstractmethod
    def work(self) -> None:
        """Have the source's GPU write some pages."""

    @abstractmethod
    def device(self, side: HeldT) -> Device:
        """Return a second fd of a side's device."""

    @abstractmethod
    def run_state(self, side: HeldT) -> str:
        """Tell whether it is ``running`` or ``stopped``, by other means than the command's."""

    def arm(self, side: HeldT, rules: Sequence[str]) -> None:
        """Have the driver fail; without rules, no more."""
        assert not rules, f"the driver of {side.name} fails by no rule"

    def play(self, cell: Cell) -> Outcome:
        """Do the job with its fault, and compare with the promise."""
        side = self.target if cell.job == "restore" else self.source
        self._prepare(side, cell)
        work = self.directory / "work"
        work.mkdir()
        os.environ[VARIABLE] = f"{cell.job}:{cell.step}={cell.action}" if cell.step else ""
        self.arm(side, cell.driver)
        try:
            done = cli.run(*self._arguments(cell.job, work), rc=None, warm=True)
        finally:
            os.environ.pop(VARIABLE)
            self.arm(side, ())
        outcome = Outcome(done.returncode, self.run_state(side), self._file(work), self._memory())
        self._judge(cell, outcome, done.stderr.decode(), side)
        for path in work.iterdir():
            path.unlink()
        work.rmdir()
        return outcome

    def _arguments(self, job: str, work: Path) -> list[str]:
        source, target = self.source, self.target
        memory = ["--memory", source.memory_option]
        return {
            "save": ["save", source.name, f"{work}/image", *memory, "--leave-running"],
            "sync": ["sync", source.name, f"{work}/copy", *memory, "--leave-running"],
            "restore": ["restore", target.name, str(self.image), "--memory", target.memory_option, "--start"],
            "dirty": ["dirty", source.name, *memory],
        }.get(job, [job, source.name])

    def _prepare(self, side: HeldT, cell: Cell) -> None:
        device = self.device(side)
        if cell.job == "restore":
            device.reset()
            side.memory.bytes[:] = bytes(side.memory.size)
        if cell.job == "start":
            device.stop()
        else:
            device.start()

    def _file(self, work: Path) -> str:
        names = sorted(path.name for path in work.iterdir())
        if names == ["image"]:
            with (work / "image").open("rb") as file, read_archive(file) as archive:
                return "whole" if archive.state_size else "empty"
        if names == ["copy"]:
            content = (work / "copy").read_bytes()
            dirty = self.device(self.source).dirty(self.source.memory)
            good = all(content[at : at + 4096] == self.source.memory.read(at, 4096) for at in dirty)
            return "whole" if good else "torn"
        return "none" if not names else f"unexpected: {names}"

    def _memory(self) -> str:
        memory = self.target.memory
        if not any(memory.bytes[:]):
            return "untouched"
        return "whole" if all(memory.read(gpa, len(content)) == content for gpa, content in self.pages) else "torn"

    def _judge(self, cell: Cell, outcome: Outcome, stderr: str, side: HeldT) -> None:
        broken = outcome.broken
        lines = stderr.splitlines()
        if outcome.code != cell.code:
            broken.append(f"exit code {outcome.code} instead of {cell.code}: {stderr}")
        if cell.code > 0 and (len(lines) != 1 or not stderr.startswith("vfio-mig: ")):
            broken.append(f"not one line: {stderr}")
        makes_file = cell.job in ("save", "sync")
        expected = "whole" if makes_file and cell.code == 0 else "none"
        if outcome.file != expected:
            broken.append(f"file: {outcome.file}, expected {expected}")
        if outcome.memory == "torn" or (cell.job == "restore" and cell.code == 0 and outcome.memory != "whole"):
            broken.append(f"memory of the target: {outcome.memory}")
        self._judge_device(cell, outcome, side)
        self._judge_next(cell, outcome, side)

    def _judge_device(self, cell: Cell, outcome: Outcome, side: HeldT) -> None:
        left = self._left(side)
        effect = None if left is None else left.effect
        if effect != cell.left:
            outcome.broken.append(f"written down: {effect}, expected {cell.left}")
        # start: the device stays as it was found, unless the driver has done what it then complains of
        started = cell.driver == ("start 1 after 16",) or (cell.job, cell.step) == AFTER_COMMIT
        as_found = cell.job == "start" and not started
        if (cell.left is None and cell.action != "kill") or cell.job in ("dirty", "reset"):
            expected = "stopped" if as_found else "running"
            if outcome.state != expected:
                outcome.broken.append(f"device {outcome.state}, expected {expected}")

    def _judge_next(self, cell: Cell, outcome: Outcome, side: HeldT) -> None:
        """The next job of its kind works and clears what was written down; after a restore a restore, else a save."""
        again = Cell("restore" if cell.left == "loading" else "save", "", "", (), 0)
        path = self.directory / "next.vfm"
        arguments = (
            ["restore", side.name, str(self.image), "--memory", side.memory_option, "--start"]
            if again.job == "restore"
            else ["save", side.name, str(path), "--leave-running"]
        )
        done = cli.run(*arguments, rc=None, warm=True)
        if done.returncode:
            outcome.broken.append(f"the next {again.job} fails: {done.stderr.decode()}")
        path.unlink(missing_ok=True)
        if self._left(side) is not None:
            outcome.broken.append(f"still written down after the next {again.job}")
        if self.run_state(side) != "running":
            outcome.broken.append(f"device not running after the next {again.job}")

    @staticmethod
    def _left(side: Held) -> Leftover | None:
        found = Host().find(side.name)
        return left_behind(found, find_holder(found))


class SampleStage(Stage[Side]):
    """The sample driver, which fails at request."""

    def work(self) -> None:
        run_some_work(self.source.guest, gpu.Engine(self.source.guest), 2)

    def device(self, side: Side) -> Device:
        return side.guest.device

    def run_state(self, side: Side) -> str:
        return side.instance.run_state()

    def arm(self, side: Side, rules: Sequence[str]) -> None:
        for rule in rules or ["clear"]:
            (side.instance.debugfs / "fault").write_text(rule)


class GvtStage(Stage[gvt_held.Side]):
    """The real driver, which does what it should."""

    def work(self) -> None:
        for page in range(8):
            self.source.device.set_pte(page * PAGE, MEMORY + page * PAGE | 1)
            self.source.memory.write(MEMORY + page * PAGE, bytes([page + 1]) * PAGE)

    def device(self, side: gvt_held.Side) -> Device:
        return side.device

    def run_state(self, side: gvt_held.Side) -> str:
        """Look at a clock of the vGPU: a stopped one's stands still."""
        clock = [side.device.reg(_TIMESTAMP) for _ in range(2)]
        return "stopped" if clock[0] == clock[1] else "running"
