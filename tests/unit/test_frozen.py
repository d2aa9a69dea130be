# SPDX-License-Identifier: MIT
"""Another process stands still while something is done, and goes on whatever happens. The process is a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from vfio_mig.device import Holder
from vfio_mig.errors import DeviceBusyError
from vfio_mig.host import frozen
from vfio_mig.host.frozen import while_still

if TYPE_CHECKING:
    from collections.abc import Iterator

THREADS: Final = 4
# Counts in several threads, begins and ends others all the time, and says at SIGUSR1 that it came
PROGRAM: Final = f"""
import os, signal, threading, time
def count():
    while True:
        time.sleep(0.0001)
def begin():
    while True:
        threading.Thread(target=time.sleep, args=(0.001,)).start()
        time.sleep(0.0005)
# print() may not be interrupted by another print(), and the next signal comes as soon as the line is read
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"signal\\n"))
for _ in range({THREADS - 1}):
    threading.Thread(target=count, daemon=True).start()
threading.Thread(target=begin, daemon=True).start()
print("ready", flush=True)
while True:
    time.sleep(0.001)
"""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def holder(pid: int) -> Holder:
    return Holder(pid, "busy", is_hold=False, fd=3)


def states(pid: int) -> set[str]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.add(task.joinpath("stat").read_text().rpartition(")")[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def await_going(pid: int) -> None:
    end = time.monotonic() + 10
    while states(pid) & set("tT"):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_thread_stands_still_and_goes_on_afterwards(busy: subprocess.Popen[str]) -> None:
    seen: list[set[str]] = []

    def look() -> None:
        for _ in range(20):
            seen.append(states(busy.pid))
            time.sleep(0.005)

    for _ in range(5):
        while_still("gpu", holder(busy.pid), look)
    assert len(seen) == 100
    assert all(one <= {"t", "Z"} and "t" in one for one in seen)
    await_going(busy.pid)
    assert busy.poll() is None


def test_what_fails_is_raised_and_the_process_goes_on(busy: subprocess.Popen[str]) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        while_still("gpu", holder(busy.pid), fail)
    await_going(busy.pid)


def test_signals_that_come_meanwhile_are_not_lost(busy: subprocess.Popen[str]) -> None:
    assert busy.stdout is not None

    def send() -> None:
        os.kill(busy.pid, signal.SIGUSR1)

    for _ in range(10):
        while_still("gpu", holder(busy.pid), send)
        assert busy.stdout.readline() == "signal\n"
    # and those that come just as it is being stopped
    for _ in range(20):
        sender = threading.Thread(target=os.kill, args=(busy.pid, signal.SIGUSR1))
        sender.start()
        while_still("gpu", holder(busy.pid), lambda: None)
        sender.join()
        assert busy.stdout.readline() == "signal\n"


def test_a_process_that_is_killed_meanwhile_is_no_error(busy: subprocess.Popen[str]) -> None:
    while_still("gpu", holder(busy.pid), busy.kill)
    assert busy.wait(10) == -signal.SIGKILL


def test_who_stopped_it_may_be_killed(busy: subprocess.Popen[str]) -> None:
    code = (
        "import os, signal, sys\nfrom vfio_mig.device import Holder\nfrom vfio_mig.host.frozen import while_still\n"
        "while_still('gpu', Holder(int(sys.argv[1]), 'busy', is_hold=False, fd=3),"
        " lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(busy.pid)], check=False)
    assert done.returncode == -signal.SIGKILL
    await_going(busy.pid)
    assert busy.poll() is None


def test_a_process_that_has_gone_or_that_another_traces_is_told(busy: subprocess.Popen[str]) -> None:
    tracing, over = threading.Event(), threading.Event()

    def trace() -> None:
        frozen._ptrace(frozen._SEIZE, busy.pid)
        tracing.set()
        over.wait(10)

    tracer = threading.Thread(target=trace)
    tracer.start()
    tracing.wait(10)
    done: list[None] = []
    with pytest.raises(DeviceBusyError, match=rf"PID {busy.pid} \(busy\) cannot be made to stand still: EPERM"):
        while_still("gpu", holder(busy.pid), lambda: done.append(None))
    over.set()
    tracer.join()
    busy.kill()
    busy.wait()
    with pytest.raises(DeviceBusyError, match="ESRCH"):
        while_still("gpu", holder(busy.pid), lambda: done.append(None))
    assert done == []


def test_a_thread_that_does_not_stop_in_time_is_told_and_all_go_on(
    busy: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.waitpid
    monkeypatch.setattr(os, "waitpid", lambda pid, flags: (0, 0) if pid == busy.pid else real(pid, flags))
    monkeypatch.setattr(frozen, "SECONDS", 0.05)
    with pytest.raises(DeviceBusyError, match="ETIMEDOUT"):
        while_still("gpu", holder(busy.pid), lambda: None)
    monkeypatch.undo()
    await_going(busy.pid)
    assert busy.poll() is None


def test_our_own_process_is_not_stopped() -> None:
    done: list[None] = []
    while_still("gpu", holder(os.getpid()), lambda: done.append(None))
    assert done == [None]
