# SPDX-License-Identifier: MIT
"""The man pages are those of the commands there are, and render."""

from __future__ import annotations

import re
import shutil
import subprocess

import click
import pytest

from tools import man
from vfio_mig.cli import qemu
from vfio_mig.cli.main import cli

SCRIPTING = (man.ROOT / "docs/scripting.md").read_text("utf-8")


def test_the_committed_pages_are_those_of_a_fresh_run() -> None:
    made = man.pages()
    assert {path.name: path.read_text("utf-8") for path in man.DIRECTORY.iterdir()} == made, "run python -m tools.man"


def test_the_exit_codes_are_those_of_the_documentation() -> None:
    table = SCRIPTING.partition("## Exit codes")[2].partition("\n## ")[0]
    assert [code for code, _ in man.EXIT_STATUS] == re.findall(r"^\| ([0-9]+) \|", table, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(man.pages()))
def test_a_page_renders_without_a_warning_and_says_what_the_help_says(name: str) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed: scripts/setup installs groff-base")
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-Kutf8", "-P-cbou", man.DIRECTORY / name], capture_output=True, check=True
    )
    assert done.stderr == b""
    shown = done.stdout.decode()
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"):
        assert heading in shown


@pytest.mark.parametrize(
    ("text", "roff"),
    [
        ("One\ntwo.", [".PP", "One two."]),
        ("Say `--json`.", [".PP", "Say \\fB\\-\\-json\\fR."]),
        ("\b\nExample: vfio-mig list", [".PP", "Example:", ".PP", ".nf", ".RS 4", "vfio\\-mig list", ".RE", ".fi"]),
        ("\b\nExample: why\n  a", [".PP", "Example: why:", ".PP", ".nf", ".RS 4", "a", ".RE", ".fi"]),
        ("\b\nExamples:\n  a\n  b", [".PP", "Examples:", ".PP", ".nf", ".RS 4", "a", "b", ".RE", ".fi"]),
        (".x\\", [".PP", "\\&.x\\e"]),
    ],
)
def test_help_becomes_roff(text: str, roff: list[str]) -> None:
    assert list(man.paragraphs(text)) == roff


def test_a_page_has_the_exit_codes_of_its_command_and_no_others() -> None:
    root = click.Context(cli, **cli.context_settings)
    assert man.CODES.keys() == {*cli.list_commands(root), *qemu.COMMANDS}
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        codes = set(man.CODES[name].split())
        metavars = " ".join(command.collect_usage_pieces(click.Context(command)))
        takes_device = "DEVICE" in metavars or name in {"mdev", "vm"}
        assert ({"3", "5"} <= codes, not codes.isdisjoint({"3", "4", "5"})) == (takes_device, takes_device), name
        assert ("1" in codes) == (name == "diff")
        assert {"0", "2", "7", "130"} <= codes
        shown = man.pages()[f"vfio-mig-{name}.1"].partition(".SH EXIT STATUS")[2].partition(".SH")[0]
        assert set(re.findall(r"\\fB(\d+)\\fR", shown)) == codes


def test_no_page_has_a_stray_mark() -> None:
    for name, text in man.pages().items():
        assert not [line for line in text.splitlines() if line.endswith((",:", "::")) or line in {":", "\\fB:\\fR"}], (
            name
        )
        assert "Exit codes:" not in text
