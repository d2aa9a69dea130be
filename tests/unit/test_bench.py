# SPDX-License-Identifier: MIT
"""The benchmark's arithmetic, and that its reference counts what we count."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tools.bench import __main__ as bench
from tools.bench import bars, native, phases, stopped, table, window

if TYPE_CHECKING:
    from collections.abc import Callable
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


def measured(interface: str, job: str, work: str, load: float, *, ours: float = 0.0, qemu: float | None = None) -> Any:
    """Make up a comparison: C takes 1 ms for each phase but the load, and 2 ms beside them."""
    reference = {**dict.fromkeys(stopped.PHASES, 0.001), "load": load, stopped.STATE: 4096.0}
    reference[stopped.TOTAL] = load + 0.006
    mine = {**reference, stopped.TOTAL: ours} if ours else {}
    return stopped.Measured(interface, job, work, "6.12", mine, reference, qemu)


def all_measured() -> list[Any]:
    return [
        measured(stopped.V2, stopped.SAVE, stopped.FRESH, 0.0, ours=0.0109),
        measured(stopped.V2, stopped.MOVE, stopped.FRESH, 0.1, ours=0.110, qemu=0.2),
        measured(stopped.V2, stopped.MOVE, stopped.QUEUED, 0.1, ours=0.112),
        measured(stopped.V2, stopped.MOVE, stopped.MAPPED, 0.3),
    ]


def test_all_sides_take_turns_and_the_first_time_of_each_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            order.append(name)
            return {stopped.TOTAL: float(len(order))}

        return run

    found = stopped.in_turn([side("C"), side("ours"), side("QEMU")], 3)
    assert order == ["QEMU", "ours", "C", "C", "ours", "QEMU", "QEMU", "ours", "C", "C", "ours", "QEMU"]
    assert [one[stopped.TOTAL] for one in found] == [9.0, 8.0, 7.0]


def test_a_stopped_window_is_compared_with_c_by_a_difference_and_with_qemu_by_order() -> None:
    save, move, queued, mapped = all_measured()
    assert (save.met, move.met, queued.met, mapped.met) == (True, True, False, True)
    assert move._replace(qemu=0.1).met is False
    assert move.driver == pytest.approx(0.104)
    assert move.our_rest == pytest.approx(0.006)
    quicker = move._replace(ours={**move.ours, "load": 0.05})  # another run of the same has found the driver quicker
    assert quicker.our_rest == pytest.approx(0.056)


def test_the_tables_of_stopped_windows_say_where_the_time_goes() -> None:
    lines = stopped.text(all_measured()).splitlines()
    assert "| v2: save, fresh | 4,096 | 10.9 ms | 6.0 ms | 4.9 ms |  | C + 5 ms: met |" in lines
    both = "C + 5 ms: met; QEMU: met"
    assert f"| v2: migrate, fresh | 4,096 | 110.0 ms | 106.0 ms | 4.0 ms | 200.0 ms | {both} |" in lines
    assert "| v2: migrate, queued work | 4,096 | 112.0 ms | 106.0 ms | 6.0 ms |  | C + 5 ms: **missed** |" in lines
    phases = ("1.0 ms", "1.0 ms", "1.0 ms", "300.0 ms", "1.0 ms", "304.0 ms", "2.0 ms", "")
    assert f"| v2: migrate, 8 MiB mapped | {' | '.join(phases)} |" in lines
    assert lines[-1] == "v2: 2,048 guest pages to pin and map: 200.0 ms more of loading, 97.7 us a page"
    *rest, mapped = all_measured()
    lost = mapped._replace(reference={**mapped.reference, "load": 0.09})
    assert stopped.text([*rest, lost]).endswith("to pin and map: less than what runs differ by\n")
    assert bars.PIN not in dict(dict(bars.bars([*rest, lost]))[lost.name][0].parts)


def test_figures_of_stopped_windows_are_kept_in_a_file(tmp_path: Path) -> None:
    for one in all_measured():
        stopped.write(one, tmp_path / "figures")
    assert stopped.read(tmp_path / "figures") == all_measured()


def test_the_picture_has_a_bar_for_everybody_and_says_in_words_what_its_colours_mean() -> None:
    found = dict(bars.bars(all_measured()))
    assert [[bar.name for bar in group] for group in found.values()] == [
        ["C", "ours"], ["C", "ours", "QEMU"], ["C", "ours"], ["C"],
    ]  # fmt: skip
    (mapped,) = found["v2: migrate, 8 MiB mapped"]
    assert dict(mapped.parts)[bars.PIN] == pytest.approx(0.2)
    assert mapped.seconds == pytest.approx(0.306)
    svg = ET.fromstring(bars.picture(all_measured()))  # noqa: S314 -- we have just made it
    said = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {*bars.NAMES.values()} <= {*said}
    assert {"C", "ours", "QEMU", "110 ms", "306 ms"} <= {*said}


def test_tables_and_picture_are_made_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in all_measured():
        stopped.write(one, tmp_path / "figures")
    words = ["bench", "windows", "--svg", str(tmp_path / "picture.svg"), "--json", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", words)
    assert bench.main() == 1  # one has missed its goal
    assert capsys.readouterr().out == stopped.text(all_measured())
    assert (tmp_path / "picture.svg").read_text() == bars.picture(all_measured())
    monkeypatch.setattr(sys, "argv", words[:4])
    with pytest.raises(SystemExit, match="needs"):
        bench.main()


def test_a_migration_between_two_devices_that_a_file_plays_is_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are real, and so are its pipes; its figures are the CPU's."""
    monkeypatch.setattr(window, "alternate", lambda one, other: [(one(), other())])
    rows = list(window.move_rows(lambda _kind, _file: 0.0, tmp_path))
    assert [row.name for row in rows] == ["own time while stopped, migrate, RFC", "own time while stopped, migrate, v2"]
    assert all(0 < row.ours < 10_000 for row in rows)
