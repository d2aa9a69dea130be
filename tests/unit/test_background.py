# SPDX-License-Identifier: MIT
"""A process that goes on in the background: the one that was started ends with what it knows of the other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vfio_mig.jobs.hold import notify

START = """
import os, sys, time
from vfio_mig import interrupts
from vfio_mig.jobs.hold import Background
interrupts.install()
one = Background()
if one.is_starter:
    sys.exit(one.wait())
print(os.getpid(), flush=True)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60, check=False)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["path", "abstract", "none", "relative"])
def test_systemd_is_told_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = {"path": str(tmp_path / "notify"), "relative": "notify"}.get(kind, f"@vfio-mig-test-{os.getpid()}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.setblocking(False)
        if kind == "none":
            monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
        else:
            monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        if kind in {"path", "abstract"}:
            assert systemd.recv(100) == b"READY=1"
        else:  # sd_notify(3) knows no other address
            with pytest.raises(BlockingIOError):
                systemd.recv(100)


def test_it_returns_once_the_other_is_ready_which_goes_on_alone() -> None:
    done = run("one.ready()\nprint('lost')\ntime.sleep(60)")
    pid = int(done.stdout)  # and no more: subprocess has read to the end, which the other one does not keep open
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert is_alive(pid)
        assert os.getsid(pid) == pid
        assert str(Path(f"/proc/{pid}/fd/1").readlink()) == os.devnull
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(4)", 4), ("os.kill(os.getpid(), 9)", 137)])
def test_what_fails_before_it_is_ready_is_the_starter_s_end(ending: str, code: int) -> None:
    assert run(ending).returncode == code


def test_a_signal_to_the_starter_ends_the_other() -> None:
    words = [sys.executable, "-c", f"{START}\ntime.sleep(60)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.send_signal(signal.SIGINT)
        assert starter.wait(60) != 0
    end = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(pid)
