# SPDX-License-Identifier: MIT
"""The program as it is installed: quick to begin and to end, and nothing of it is lost on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = """
import threading, time, atexit, sys
from vfio_mig import __main__ as program
import vfio_mig.cli as cli

def run():
    {}

cli.main = run
program.main()
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    script = BROKEN.format(body)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [0, 3, 130])
def test_the_exit_code_is_the_commands_own(code: int) -> None:
    done = run(f"print('x' * 100000); sys.exit({code})")
    assert (done.returncode, len(done.stdout), done.stderr) == (code, 100001, "")


def test_a_thread_and_what_is_to_be_done_at_exit_come_before_the_end() -> None:
    later = "lambda: (time.sleep(0.2), print('thread'))"
    done = run(f"atexit.register(print, 'at exit'); threading.Thread(target={later}).start(); sys.exit(0)")
    assert (done.returncode, done.stdout) == (0, "thread\nat exit\n")


def test_an_error_that_nobody_caught_ends_as_usual() -> None:
    done = run("raise RuntimeError('a bug')")
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a bug\n")


def test_the_garbage_collector_is_on_when_the_command_runs() -> None:
    assert run("import gc; print(gc.isenabled()); sys.exit(0)").stdout == "True\n"


def test_the_process_leaves_before_python_takes_its_modules_apart() -> None:
    """Else the quick end does nothing, and nobody would notice."""
    late = "class Late:\n        def __del__(self): print('late', flush=True)\n    cli.late = Late(); sys.exit(0)"
    assert run(late).stdout == ""
