# SPDX-License-Identifier: MIT
"""Signals end a job, but not in the middle of undoing or committing."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from vfio_mig import interrupts
from vfio_mig.errors import HostError
from vfio_mig.interrupts import ENDING, protected
from vfio_mig.jobs.rollback import Rollback

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    for name in ("_noted", "_finished"):
        monkeypatch.setattr(interrupts, name, [])
    interrupts.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_is_an_interrupt(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.usefixtures("installed")
def test_a_signal_in_a_protected_function_waits_for_the_next_point() -> None:
    done: list[str] = []

    def inner() -> None:
        signal.raise_signal(signal.SIGTERM)
        done.append("inner")

    @protected
    def outer() -> None:
        inner()
        done.append("outer")

    outer()
    assert done == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()


@pytest.mark.usefixtures("installed")
def test_what_has_been_finished_is_known() -> None:
    assert not interrupts.finished()
    interrupts.finish()
    assert interrupts.finished()


def test_what_is_ignored_from_the_start_stays_ignored() -> None:
    code = "import signal; from vfio_mig import interrupts; interrupts.install(); signal.raise_signal(signal.SIGHUP)"
    command = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0


def from_another_thread(number: signal.Signals) -> None:
    """Have the kernel give a signal of the process to a thread that does not mask it, as OpenBLAS' do not."""
    thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number))
    thread.start()
    thread.join()
    time.sleep(0.01)


def test_a_signal_that_another_thread_gets_does_not_cut_a_rollback_short() -> None:
    done: list[str] = []
    rollback = Rollback()

    def undo() -> None:
        from_another_thread(signal.SIGINT)
        done.append("undone")

    rollback.push(undo)
    rollback.push(undo)
    with pytest.raises(KeyboardInterrupt), rollback:
        raise HostError("full")
    assert done == ["undone", "undone"]


class SignalAt:
    """Raises a signal before the *moment*-th instruction that runs once it is armed.

    Not in the job's own frame: there the interpreter looks for signals at calls and jumps back only, which are none on
    the way from the error to ``__exit__``.
    """

    def __init__(self, moment: int) -> None:
        self.left = moment
        self.armed = False
        self.came = False

    def trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_name in {"raise_signal", "_handle", "_is_protected", "raises"}:
            return None
        frame.f_trace_opcodes = True
        if self.armed and event == "opcode" and not self.came and frame.f_code.co_name != "job":
            self.left -= 1
            if self.left < 0:
                self.came = True
                signal.raise_signal(signal.SIGINT)
        return self.trace


@pytest.mark.usefixtures("installed")
def test_no_moment_is_bad_enough_to_leave_a_step_undone() -> None:
    came = 0
    at = SignalAt(0)
    for moment in range(5000):
        undone: list[int] = []
        at = SignalAt(moment)

        def job(undone: list[int] = undone, at: SignalAt = at) -> None:
            with Rollback() as rollback:
                rollback.push(lambda: undone.append(1))
                rollback.push(lambda: undone.append(2))
                at.armed = True
                raise HostError("full")

        sys.settrace(at.trace)
        try:
            job()
        except (HostError, KeyboardInterrupt):
            sys.settrace(None)
        interrupts._noted.clear()
        assert undone == [2, 1], f"moment {moment}"
        came += at.came
        if not at.came:
            break
    assert came > 50
    assert not at.came  # all moments have been tried
