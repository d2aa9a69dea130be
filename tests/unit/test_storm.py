# SPDX-License-Identifier: MIT
"""Storms of signals at jobs; `python -m tools.faults.storm` has as many as there is time for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults.storm import is_whole

ROOT = Path(__file__).parents[2]


def test_a_storm_of_signals_skips_no_undo() -> None:
    command = [sys.executable, "-m", "tools.faults.storm", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) interrupted", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) > 0


@pytest.mark.parametrize(
    ("done", "whole"),
    [
        (["+file0", "+0", "+1", "-1", "-0", "-file0"], True),
        (["+file0", "+0", "+1", "-0", "-file0"], False),
        (["+file0", "+0", "-0"], False),
        (["+file0", "+0", "committed", "-file0"], True),
        (["+file0", "+0", "committed"], False),
        (["+file0", "+0", "committed", "-0", "-file0"], False),
    ],
)
def test_what_was_not_undone_would_be_noticed(done: list[str], *, whole: bool) -> None:
    assert is_whole(done) == whole
