# SPDX-License-Identifier: MIT
"""`scripts/test` says how far it is, what it leaves out, and how it ended; the tests it starts are made up here."""

from __future__ import annotations

import doctest
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from tools import progress
from tools.progress import Counter, Display, Step, read

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = "import pytest\n\n@pytest.mark.parametrize('n', range(6))\ndef test_it(n):\n    assert n != 3\n"
COUNTED: Final = "6 6 1"


# pytest's part


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_pytest_counts_its_tests_and_those_that_it_starts_do_not(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests/conftest.py")
    body = "import os\n" + TESTS + f"    assert {progress.VARIABLE!r} not in os.environ\n"
    (tmp_path / "tests/test_made_up.py").write_text(body)
    file = tmp_path / "count"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "tests"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, progress.VARIABLE: str(file)}, capture_output=True, check=False
    )
    assert done.returncode == 1, done.stdout
    assert file.read_text().strip() == COUNTED


def test_a_count_that_cannot_be_written_fails_no_test(tmp_path: Path) -> None:
    Counter(tmp_path / "none" / "count").pytest_sessionfinish()


# What is told


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "plan").write_text("01\t1\t100\tVM tests\n02\t2\t20\tlint\n03\t2\t60\tunit tests\n")
    return tmp_path


def test_a_plan_is_read_with_what_has_come_of_it(directory: Path) -> None:
    (directory / "01.begun").touch()
    (directory / "01.count").write_text("5 10 1\n")
    (directory / "02.begun").touch()
    (directory / "02.ended").write_text("passed  lint (3 s)\n")
    one, two, three = read(directory)
    assert (one.lane, one.expected, one.name, one.done, one.total, one.failed) == ("1", 100, "VM tests", 5, 10, 1)
    assert one.begun is not None
    assert one.ended is None
    assert (two.outcome, two.ended is not None) == ("passed  lint (3 s)", True)
    assert (three.begun, three.total) == (None, 0)


def test_a_line_has_each_lane_s_step_and_the_longer_lane_s_time() -> None:
    steps = [
        Step("1", 100, "VM tests", begun=0, done=5, total=10, failed=1),
        Step("2", 20, "lint", begun=0, ended=3, outcome="passed"),
        Step("2", 200, "unit tests", begun=30, done=0, total=6000),
    ]
    expected = "0:50, 1 of 3 steps | VM tests 5/10, 1 FAILED | unit tests 0/6000 | about 3 min left"
    assert progress.line(steps, 50, 50) == expected


def test_a_log_gets_whole_lines_now_and_then_and_every_outcome_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    to = io.StringIO()
    display = Display(to)
    steps = [Step("1", 10, "lint", begun=0)]
    for clock[0] in (1.0, 29.0, 30.0, 31.0, 61.0):
        display.show(steps, clock[0], clock[0])
    assert len(to.getvalue().splitlines()) == 2
    done = [steps[0]._replace(ended=5.0, outcome="passed  lint (5 s)")]
    for clock[0] in (100.0, 200.0):
        display.show(done, clock[0], clock[0])
    display.end()
    assert to.getvalue().splitlines()[2:] == ["passed  lint (5 s)"]
    assert "\033" not in to.getvalue()


def test_a_terminal_has_one_line_that_changes_and_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    to = io.StringIO()
    monkeypatch.setattr(to, "isatty", lambda: True)
    display = Display(to)
    for clock[0] in (1.0, 2.0):
        display.show([Step("1", 10, "a step with a long name " * 9, begun=0)], clock[0], clock[0])
    display.end()
    assert "\n" not in to.getvalue()
    assert [len(line) for line in to.getvalue().split("\r\033[K")] == [0, 79, 79, 0]


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(progress)
    assert result.attempted > 0
    assert result.failed == 0


# The script


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a checkout whose pytest and VM only say that they were called, and fail where `fails` says so."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test", tmp_path / "scripts/test")
    (tmp_path / "tests/vm").mkdir(parents=True)
    (tmp_path / "tests/vm/test_one.py").write_text("@pytest.mark.core\n")
    (tmp_path / "tests/vm/test_two.py").write_text("")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    said = f'printf "%s\\n" "${{0##*/}} $*" >>{tmp_path}/called; echo "said by ${{0##*/}}"; '
    fails = f'[[ "$*" != *"$(cat {tmp_path}/fails 2>/dev/null || echo nothing)"* ]]\n'
    for name in ("scripts/vm", "scripts/kvmgt", "scripts/pair", ".venv/bin/pytest"):
        (tmp_path / name).write_text(f"#!/bin/bash\n{said}{fails}")
    (tmp_path / "scripts/setup").write_text("#!/bin/sh\n")
    python = f'#!/bin/bash\n[[ $2 == tools.progress ]] || exit 0\nexec {sys.executable} "$@"\n'
    (programs / "python").write_text(python)
    for path in (*(tmp_path / "scripts").iterdir(), *programs.iterdir()):
        path.chmod(0o755)
    return tmp_path


def ran(tree: Path, *words: str) -> tuple[int, str, list[str]]:
    """Run it; returns its exit code, what it said, and what it called."""
    environment = {**os.environ, "VFIO_MIG_CACHE": str(tree / "cache")}
    environment.pop("VFIO_MIG_VM_OUT", None)
    done = subprocess.run(
        [tree / "scripts/test", *words], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert list((tree / "cache/out").glob("*")) == []
    called = tree / "called"
    return done.returncode, done.stdout + done.stderr, called.read_text().splitlines() if called.exists() else []


def test_alone_it_runs_lint_units_and_the_core_and_names_the_rest(tree: Path) -> None:
    code, said, called = ran(tree)
    assert code == 0, said
    (vm,) = [one for one in called if one.startswith("vm ")]
    assert "-m core tests/vm/test_one.py" in vm
    assert "test_two" not in vm
    assert "--build-all" not in vm
    outcomes = [line.split(" (")[0] for line in said.splitlines() if line.startswith(("passed", "FAILED"))]
    assert set(outcomes) == {"passed  a core of the VM tests on 6.12", "passed  lint and types", "passed  unit tests"}
    left = said.partition("left out, and run by scripts/test --full:\n")[2].partition("\n==")[0]
    assert "  VM tests on 6.1, without the slow ones\n" in left
    assert "  two VMs joined by a pipe\n" in left
    assert "  unit tests" not in left
    assert "--vm --kernel custom" in left
    assert "said by" not in said  # what went well needs no words


@pytest.mark.parametrize(("what", "step"), [("-m core", "a core of the VM tests"), ("-n auto", "unit tests")])
def test_a_step_that_fails_shows_what_it_said_and_fails_the_run(tree: Path, what: str, step: str) -> None:
    (tree / "fails").write_text(what)
    code, said, called = ran(tree)
    assert code == 1
    assert f"FAILED  {step}" in said
    assert said.count("said by") >= 1
    assert {one.split()[0] for one in called} == {"vm", "pytest"}  # the other lane went on


def test_in_full_every_step_is_run_and_shown(tree: Path) -> None:
    code, said, called = ran(tree, "--full")
    assert code == 0, said
    assert "left out" not in said
    for words in ("--kernel newest", "-m vm and not slow", "--kernel 6.1 --gvt", "pair", "pytest -q tests/runner"):
        assert any(words in one for one in called), words
    assert said.count("\n== ") + said.startswith("== ") >= 11
    assert sum(line.startswith("passed") for line in said.splitlines()) >= 12


def test_a_tier_is_run_alone_and_two_exclude_each_other(tree: Path) -> None:
    code, _, called = ran(tree, "--unit", "-k", "x")
    assert code == 0
    assert {one.split()[0] for one in called} == {"pytest"}
    assert any(one.endswith("-k x") for one in called)
    done = subprocess.run([tree / "scripts/test", "--full", "--unit"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_ci_runs_all_of_it() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1].endswith('scripts/test" --full "$@"')


def test_the_help_is_the_head_of_the_script_and_whole() -> None:
    done = subprocess.run([ROOT / "scripts/test", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("scripts/test [--full | --unit")
    assert done.stdout.endswith("after running the others.\n")
