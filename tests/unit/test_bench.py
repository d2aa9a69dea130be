# SPDX-License-Identifier: MIT
"""The benchmark's arithmetic, and that its reference counts what we count."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tools.bench import native, phases, table, window

if TYPE_CHECKING:
    from pathlib import Path


def test_a_ratio_is_of_medians_and_its_goal_an_upper_limit() -> None:
    pairs = [(3.0, 2.0), (100.0, 2.0), (1.0, 2.0)]
    row = table.ratio("x", "s", pairs, 1.5)
    assert (row.ours, row.reference, row.figure, row.met) == (3.0, 2.0, 1.5, True)
    assert table.ratio("x", "s", pairs, 1.4).met is False
    assert table.ratio("x", "s", pairs).met is None
    assert table.ratio("x", "s", [(1.0, 0.0)]).figure == float("inf")


def test_an_excess_is_in_milliseconds() -> None:
    row = table.excess("x", [(0.010, 0.004)], 5)
    assert (round(row.figure, 6), row.met) == (6.0, False)
    assert table.excess("x", [(0.008, 0.004)], 5).met


def test_both_run_in_turn_once_unmeasured() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return len(order)

    pairs = table.alternate(lambda: run("ours"), lambda: run("C"), 2)
    assert order == ["ours", "C", "ours", "C", "C", "ours"]
    assert pairs == [(3, 4), (6, 5)]


def test_the_table_and_the_json_have_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [table.ratio("first", "s", [(1.0, 2.0)], 1.1), table.excess("second", [(0.02, 0.01)], 5, "a note")]
    table.show(rows, "Title")
    said = capsys.readouterr().out
    for words in ("Title", "first, s", "at most 1.1 times  met", "second, ms", "MISSED; a note"):
        assert words in said
    assert [json.loads(line)["name"] for line in table.as_json(rows).splitlines()] == ["first", "second"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler; scripts/setup installs one")
def test_the_reference_finds_the_pages_and_runs_that_we_find(tmp_path: Path) -> None:
    program = native.build(tmp_path)
    bitmap = native._bitmap(1 << 16, 0.3)
    (tmp_path / "bitmap").write_bytes(bitmap)
    theirs = native.said(program, "decode", tmp_path / "bitmap")
    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.runs import find

    ours = Dirty(0, 1 << 16, bitmap)
    assert (theirs["pages"], theirs["found"]) == (ours.total(), sum(map(len, find([ours]))))
    memory = tmp_path / "memory"
    memory.write_bytes(b"".join(bytes([number % 3]) * 4096 for number in range(64)))
    (tmp_path / "bits").write_bytes(b"\xff" * 4 + bytes(4))
    copied = native.said(program, "copy", memory, tmp_path / "theirs", tmp_path / "bits")
    native._copier(memory, b"\xff" * 4 + bytes(4), tmp_path / "ours", 64)()
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "ours").read_bytes()
    assert copied["pages"] == sum(number % 3 != 0 for number in range(32))


def test_the_phases_of_two_drivers_are_put_beside_each_other(tmp_path: Path) -> None:
    columns = [
        phases.Figures(name, "6.12", dict.fromkeys((*phases.PHASES, *phases.FACTS), number))
        for name, number in ((phases.SAMPLE, 0.001), (phases.REAL, 1234.5))
    ]
    for one in columns:
        phases.write(one, tmp_path / "figures")
    assert phases.read(tmp_path / "figures") == columns
    lines = phases.table(columns).splitlines()
    assert lines[0] == "|  | the sample driver, 6.12 | kvmgt, 6.12 |"
    assert lines[2] == "| stop | 1.0 ms | 1234500.0 ms |"
    assert lines[-3] == "| sum, the bitmap once | 5.0 ms | 6172500.0 ms |"
    assert lines[-1] == "| dirty pages | 0 | 1,234 |"


def test_the_stopped_window_is_measured_by_the_job_s_own_steps(tmp_path: Path) -> None:
    """Its session is a stand-in, and mypy cannot see what that lacks."""
    [row] = window.window_rows(lambda _: 0.0, tmp_path)
    assert 0 < row.ours < 10_000
    assert row.goal == "at most 5 ms more"
