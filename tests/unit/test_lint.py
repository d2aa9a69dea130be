# SPDX-License-Identifier: MIT
"""The linters, as tests: plain `pytest` is what CI demands of the code and the words."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", "--strict", "vfio_mig", "tools", "tests"],
    ],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def scripts() -> list[Path]:
    """Every file of the project's that a shell runs, by its first line."""
    return [path for path in (ROOT / ".ci/run", *sorted((ROOT / "scripts").iterdir())) if is_shell(path)]


def is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(80)
    return first.startswith(b"#!") and first.rstrip().endswith((b"sh", b"bash"))


@pytest.mark.parametrize(
    "command", [["codespell"], ["shellcheck", *map(str, scripts())]], ids=["codespell", "shellcheck"]
)
def test_words_and_scripts_are_clean(command: list[str]) -> None:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
