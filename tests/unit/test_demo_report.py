# SPDX-License-Identifier: MIT
"""What the demonstrations print fits a terminal, names devices by letters, and has each command's own reply."""

from __future__ import annotations

import doctest
import shlex

import pytest

from tools.demo import __main__ as demo
from tools.demo import report
from tools.demo.report import COLUMNS, Report

ONE, OTHER = (f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{number}" for number in (1, 2))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Report:
    reply = f"{ONE}: saved 5120584 bytes of state, {'7 dirty pages, ' * 9}; left stopped\n  second line of {OTHER}\n"
    monkeypatch.setattr(report, "reply_of", lambda *_: reply)
    made = Report()
    assert (made.name(ONE), made.name(OTHER), made.name(ONE)) == ("$A", "$B", "$A")
    return made


def test_a_command_s_reply_stands_below_it_with_letters_for_devices(
    shown: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown.vfio_mig("save", ONE, "gpu.vfm")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  $ vfio-mig save $A gpu.vfm"
    assert lines[1].startswith("    $A: saved 5120584 bytes of state, 7 dirty pages")
    assert lines[-1].split() == ["second", "line", "of", "$B"]
    assert ONE in said


def test_no_line_is_wider_than_a_terminal_and_a_long_command_stays_one(
    shown: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["vfio-mig", "save", ONE, "gpu.vfm", *["--memory", "/dev/shm/guest@0x100000000"] * 4, "--all-memory", "&"]
    shown.begin("title " * 20, "word " * 40)
    shown.step("word " * 40)
    shown.check("word " * 40, holds=True)
    shown.note("word " * 40)
    shown.vfio_mig("list")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= COLUMNS
    shown.command(*words)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert shlex.split(text.replace("\\\n", " "))[1:] == [word.replace(ONE, "$A") for word in words]


def test_a_directory_that_nobody_reads_is_left_out_and_takes_no_letter(
    shown: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    shown.leave_out("/tmp/made-up/")
    shown.note("migrate file:/tmp/made-up/stream")
    assert capsys.readouterr().out == "  migrate file:stream\n"
    assert shown.name("third") == "$C"


def test_what_does_not_hold_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    made = Report()
    made.check("it holds", holds=True)
    assert made.end() == 0
    made.check("it does not", holds=False)
    assert made.end() == 1
    assert "  FAIL  it does not\n" in capsys.readouterr().out


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(demo)
    assert result.attempted > 0
    assert result.failed == 0
