# SPDX-License-Identifier: MIT
"""What reaches a terminal: everything goes through one place, and what others wrote cannot speak to the terminal."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, Final
from unittest import mock

import click
import pytest

from tests.unit.saved_images import HEADER, run, write
from vfio_mig.cli import output
from vfio_mig.cli.options import Options
from vfio_mig.errors import json_text
from vfio_mig.jobs.queries.devices import DeviceRow

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "vfio_mig"
PLACE: Final = PACKAGE / "cli" / "output.py"
BAD: Final = "\x1b]0;owned\x07\x1b[2J\r\nforged line\x7f\x9b31m\u202e\udcff"
"""A window title, a cleared screen, a second line, DEL, a C1 control, reversed writing, a byte that is not text."""
PRINTERS: Final = frozenset(
    [
        "echo",
        "secho",
        "echo_via_pager",
        "style",
        "progressbar",
        "prompt",
        "confirm",
        "print",
        "pprint",
        "print_exc",
        "print_exception",
        "print_stack",
        "dump_traceback",
    ]
)
STREAMS: Final = frozenset({"stdout", "stderr", "__stdout__", "__stderr__"})
# Where the fd or a property of a standard stream is wanted, and nothing is printed
HARMLESS: Final = frozenset({"isatty", "fileno", "encoding", "close", "reconfigure"})


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def ways_around(source: str) -> list[int]:
    """Return the lines that print, or take a standard stream for something else than a look at it."""
    tree = ast.parse(source)
    used = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in HARMLESS and _name(node.value) in STREAMS
    }
    used |= {  # whether there is one
        id(node.left)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and ast.unparse(node).endswith(" is None")
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in PRINTERS:
            found.add(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in STREAMS and _name(node.value) == "sys":
            if id(node) not in used:
                found.add(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module in {"sys", "click"}:
            found |= {node.lineno for one in node.names if one.name in PRINTERS | STREAMS}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found |= {node.lineno for one in modules if one.split(".")[0] in {"rich", "curses", "termcolor", "logging"}}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "os.write" and _fd(node) in {1, 2}:
            found.add(node.lineno)
    return sorted(found)


def _fd(call: ast.Call) -> Any:
    return call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None


MODULES: Final = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PLACE]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_prints_but_through_the_one_place(path: Path) -> None:
    assert ways_around(path.read_text("utf-8")) == []


def test_in_the_one_place_every_print_is_escaped_json_or_made_of_ours() -> None:
    """A line that is escaped, JSON, and what clears a terminal; tqdm draws numbers of ours."""
    calls = [
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse(PLACE.read_text("utf-8")))
        if isinstance(node, ast.Call) and _name(node.func) in PRINTERS
    ]
    assert sorted(calls) == ["'\\x1b[H\\x1b[J'", "f'{before}{printable(text)}{behind}'", "json_text(value)"]


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "click.echo(x)",
        "from click import echo",
        "import sys\nsys.stdout.write(x)",
        "import sys\nout = sys.stderr",
        "from sys import stdout",
        "import os\nos.write(2, b'')",
        "import rich",
        "import traceback\ntraceback.print_exc()",
        "from rich.console import Console",
        "import logging",
    ],
)
def test_a_way_around_is_noticed(source: str) -> None:
    assert ways_around(source)


def test_the_scripts_for_qemu_print_through_the_package_alone() -> None:
    """They tell what a VM says of itself, and run as root: vfio_mig/cli/qemu.py does, through the one place."""
    calls = [
        ast.unparse(node.args[0])
        for path in sorted((ROOT / "tools" / "qemu_host").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and _name(node.func) in PRINTERS
    ]
    assert calls == []


def test_looking_at_a_stream_is_no_way_around() -> None:
    assert ways_around("import sys\nsys.stderr.isatty()\nsys.stdout.fileno()\nput(text)") == []


def clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_a_line_stays_one_line_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    output.put(BAD)
    output.put(BAD, err=True)
    output.warn(BAD)
    out, err = capsys.readouterr()
    assert clean(out)
    assert clean(err)
    assert (out.count("\n"), err.count("\n")) == (1, 2)
    assert r"\x1b]0;owned\x07\x1b[2J\r\nforged line\x7f\x9b31m\u202e\udcff" in out


def test_json_is_ascii_without_control_characters_and_says_the_same() -> None:
    text = json_text({BAD: [BAD]})
    assert text.isascii()
    assert clean(text)
    assert json.loads(text) == {BAD: [BAD]}


def test_what_an_image_holds_is_escaped_keys_and_names_of_files_included(tmp_path: Path) -> None:
    bad = BAD.replace("\udcff", "").replace("/", "")
    header = {**HEADER, bad: {bad: bad}, "device": {"type": bad, "driver": bad, "name": bad}, "list": [{bad: [bad]}]}
    path = write(tmp_path / f"image{bad}", b"state", header=header)
    other = write(tmp_path / f"other{bad}", b"stats")
    commands: list[list[str | Path]] = [
        ["inspect", path],
        ["inspect", path, "--section", "image.header"],
        ["inspect", path, "--section", bad],
        ["diff", path, other],
        ["verify", path],
        ["extract", path, tmp_path / f"parts{bad}"],
        ["pack", tmp_path / f"parts{bad}", tmp_path / f"again{bad}"],
        ["extract", path, tmp_path / f"parts{bad}"],
        ["pages", path, "--memory", f"{tmp_path / bad}@0"],
        ["check", path, bad],
        ["info", bad],
    ]
    for words in commands:
        for options in ([], ["--json"]):
            result = run(*options, *words)
            assert clean(result.stdout), (words, result.stdout)
            assert clean(result.stderr), (words, result.stderr)
            assert clean(str(result.exception)), words
            if options and result.exit_code == 0:
                json.loads(result.stdout)


def test_a_process_cannot_forge_a_line_of_the_list_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = dict.fromkeys(DeviceRow.__dataclass_fields__)
    values.update(device="one", kind="mdev", type=BAD, driver=BAD, node=BAD, holder=f"qemu{BAD} x", holder_pid=7)
    one = DeviceRow(**{**values, "migratable": None, "state": "?", "cdev": None})
    monkeypatch.setattr("vfio_mig.jobs.queries.devices.list_devices", lambda: [one])
    result = run("list")
    assert result.exception is None
    assert clean(result.stdout)
    (line,) = result.stdout.splitlines()
    assert len(line.split(" ")) == 9


MB: Final = 10**6


class Clock:
    """Time that passes when it is told to, and a terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool = True) -> None:
        self.now = 100.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)


def test_a_copy_is_shown_once_it_has_taken_a_second_and_then_cleared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    threads = threading.active_count()
    with output.Meter(Options()) as meter:
        meter.expect(1000 * MB)
        meter(250 * MB)
        assert capsys.readouterr().err == ""
        clock.now += 2
        meter(250 * MB)
        line = capsys.readouterr().err
        assert re.fullmatch(r"\r 50%\|\S+ +\| 500M/1\.00G \[00:02<00:0[12], 250MB/s\]", line)
        meter(1)
        assert capsys.readouterr().err == ""  # too soon
        clock.now += 1
        meter.expect(1 * MB)
        meter(2 * MB)
        assert capsys.readouterr().err.startswith("\r502MB [00:03, ")  # more than was expected
    assert capsys.readouterr().err.split("\r") == ["", mock.ANY, ""]
    assert threading.active_count() == threads


@pytest.mark.parametrize(("columns", "width"), [(0, 79), (50, 49), (200, 199)])
def test_it_fits_the_terminal_and_a_serial_line_that_has_no_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, width: int
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("sys.stderr.fileno", lambda: 2)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 0)) if fd == 2 else None)
    with output.Meter(Options()) as meter:
        meter.expect(1000 * MB)
        clock.now += 5
        meter(250 * MB)
        assert len(capsys.readouterr().err) == 1 + width


def test_words_meanwhile_have_a_line_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, options = Clock(monkeypatch), Options()
    with click.Context(click.Command("x"), obj=options).scope(), output.Meter(options) as meter:
        meter(1)
        clock.now += 5
        meter(1 * MB)
        shown = capsys.readouterr().err
        output.warn("look")
        output.warn("again")
        said = capsys.readouterr().err
    assert "1.00MB" in shown
    first, second, _ = (line.rpartition("\r")[2] for line in said.split("\n"))
    assert (first, second) == ("vfio-mig: warning: look", "vfio-mig: warning: again")


def test_a_terminal_that_has_gone_ends_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def write(_: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with output.Meter(Options()) as meter:
        meter(1)
        clock.now += 5
        monkeypatch.setattr("sys.stderr.write", write)
        meter(1 << 20)
        meter.clear()


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True)])
def test_nothing_is_shown_in_a_pipe_or_to_one_who_wants_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool, quiet: bool
) -> None:
    clock, options = Clock(monkeypatch, terminal=terminal), Options()
    options.quiet = quiet
    with output.Meter(options) as meter:
        meter.expect(1 << 30)
        meter(1)
        clock.now += 5
        meter(1 << 30)
        meter.clear()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terminal", "variables", "shown"),
    [
        (True, {}, "\033[31mproblem\033[0m\n"),
        (True, {"NO_COLOR": "1"}, "problem\n"),
        (True, {"TERM": "dumb"}, "problem\n"),
        (False, {}, "problem\n"),
    ],
)
def test_what_is_wrong_is_red_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    terminal: bool,
    variables: dict[str, str],
    shown: str,
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    output.put("problem", alarm=True)
    output.put("ok")
    output.put_lines("pass  a\nFAIL  b", alarm="FAIL ")
    red = "\033[31mFAIL  b\033[0m" if "\033" in shown else "FAIL  b"
    assert capsys.readouterr().out == f"{shown}ok\npass  a\n{red}\n"
