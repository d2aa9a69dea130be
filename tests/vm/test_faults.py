# SPDX-License-Identifier: MIT
"""Each job at each of its steps, and on a driver that fails: the promise holds."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.lab.faults.cells import Cell, all_cells, driver_cells
from tools.lab.faults.stage import SampleStage
from tools.lab.sample.held import side

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.kernel.log import KernelLog


@pytest.fixture(scope="module")
def stage() -> Iterator[SampleStage]:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        source = stack.enter_context(side(directory / "source.mem"))
        target = stack.enter_context(side(directory / "target.mem"))
        yield SampleStage(source, target, directory)


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """As everywhere, but the vGPUs stay for the next cell."""
    kernel_log.new()
    yield
    assert kernel_log.complaints() == []


def marks_of(cell: Cell) -> list[pytest.MarkDecorator]:
    """On the second kernel the driver's own faults only: the steps are all Python's; one signal is like another.

    A signal at each step is tests/unit/test_jobs.py's too; here it is tried where most is under way.
    """
    if cell in [*driver_cells()]:
        return []
    is_variant = cell.action in {"ENOSPC", "sigterm", "sighup"} or (
        cell.action == "sigint" and cell.step not in {"after-stop", "writing-pages", "after-state"}
    )
    return [pytest.mark.slow, *([pytest.mark.variant] if is_variant else [])]


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=marks_of(cell)) for cell in all_cells()], ids=str)
def test_the_promise_holds(stage: SampleStage, cell: Cell) -> None:
    outcome = stage.play(cell)
    assert outcome.broken == []


def test_there_are_enough_cells() -> None:
    assert len(all_cells()) > 60
    assert len({str(cell) for cell in all_cells()}) == len(all_cells())
