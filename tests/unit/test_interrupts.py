# SPDX-License-Identifier: MIT
"""Signals end a job, but not in the middle of undoing or committing."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import pytest

from vfio_mig import interrupts
from vfio_mig.errors import HostError
from vfio_mig.interrupts import ENDING, protected
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.rollback import Rollback
from vfio_mig.jobs.engine.session import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    interrupts.install()
    yield
    interrupts.install()  # nothing of this test is left
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
def test_the_second_signal_only_takes_a_note() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    interrupts.check()


@pytest.mark.usefixtures("installed")
def test_in_a_job_a_signal_waits_for_the_next_step() -> None:
    done: list[str] = []

    def run() -> None:
        with Job("save") as job:
            job.undo_with(lambda: done.append("undone"))
            signal.raise_signal(signal.SIGTERM)
            done.append("went on")
            job.step("opened")
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == ["went on", "undone"]


@pytest.mark.usefixtures("installed")
def test_in_a_job_a_signal_ends_what_waits_for_others() -> None:
    done: list[str] = []
    wait = interrupts.waiting(signal.raise_signal)

    def run() -> None:
        with Job("save") as job:
            job.undo_with(lambda: done.append("undone"))
            wait(signal.SIGTERM)
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == ["undone"]


@pytest.mark.usefixtures("installed")
def test_a_signal_behind_the_commit_is_forgotten() -> None:
    with Job("save") as job:
        job.undo_with(lambda: pytest.fail("undone"))
        signal.raise_signal(signal.SIGTERM)
        job.commit()
        signal.raise_signal(signal.SIGHUP)
        job.step("written")
    interrupts.check()


def test_a_job_of_a_library_s_user_is_undone_at_ctrl_c_and_its_handler_stands_again() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done: list[str] = []

    def run() -> None:
        with Job("save") as job:
            job.undo_with(lambda: done.append("undone"))
            signal.raise_signal(signal.SIGINT)
            done.append("went on")
            job.step("opened")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
    assert done == ["went on", "undone"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_ctrl_c_of_a_library_s_user_that_comes_too_late_is_not_lost() -> None:
    done: list[str] = []

    def run() -> None:
        with Job("save") as job:
            job.commit()
            signal.raise_signal(signal.SIGINT)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == ["whole"]


def test_one_job_s_commit_says_nothing_of_the_next_one() -> None:
    committed: list[str] = []
    settings = Settings(on_commit=lambda: committed.append("one"))
    with Job("save", settings) as job:
        job.commit()
    with Job("save") as second, contextlib.suppress(HostError):
        second.step("opened")
        raise HostError("full")
    assert (job.committed, second.committed, committed) == (True, False, ["one"])


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


class SignalsAt:
    """Raises a signal before the *moment*-th instruction that runs once it is armed, and more right behind it."""

    def __init__(self, moment: int, more: tuple[int, ...] = ()) -> None:
        self.left = moment
        self.more = sorted(more)
        self.armed = False
        self.came = False
        self._since = 0

    def trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_name in {"raise_signal", "_handle", "_may_raise", "raises"}:
            return None
        frame.f_trace_opcodes = True
        if self.armed and event == "opcode":
            self._count()
        return self.trace

    def _count(self) -> None:
        self.left -= 1
        if not self.came and self.left < 0:
            self.came = True
            signal.raise_signal(signal.SIGINT)
        elif self.came:
            self._since += 1
            while self.more and self._since >= self.more[0]:
                self.more.pop(0)
                signal.raise_signal(signal.SIGTERM)


class Held:
    """Something that is to be closed."""

    def __init__(self, done: list[object]) -> None:
        self.done = done

    def __enter__(self) -> Self:
        self.done.append("open")
        return self

    def __exit__(self, *_: object) -> None:
        self.done.append("closed")


def undo_all(at: SignalsAt, *, fails: bool) -> list[object]:
    """Do a job's steps while signals come; returns what was undone and closed."""
    done: list[object] = []

    def job() -> None:
        with Job("save", Settings(on_commit=lambda: done.append("committed"))) as job:
            job.enter(Held(done))
            for number in (1, 2, 3):
                job.undo_with(lambda number=number: done.append(number))  # type: ignore[misc]
            at.armed = True
            job.step("opened")
            job.step("after-stop")
            if fails:
                raise HostError("full")
            job.commit()

    sys.settrace(at.trace)
    try:
        job()
    except (HostError, KeyboardInterrupt):
        sys.settrace(None)
    sys.settrace(None)
    return done


WHOLE: Final = [["open", 3, 2, 1, "closed"], ["open", "committed", "closed"]]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("fails", [True, False])
def test_no_moment_is_bad_enough_to_leave_a_step_undone(*, fails: bool) -> None:
    for moment in range(5000):
        interrupts.install()
        at = SignalsAt(moment, (1, 2, 5, 20))
        assert undo_all(at, fails=fails) in WHOLE, f"moment {moment}"
        if not at.came:
            break
    assert 50 < moment < 4999  # all moments have been tried


@pytest.mark.usefixtures("installed")
def test_no_storm_of_signals_skips_an_undo() -> None:
    chance = random.Random(13)  # noqa: S311
    came = 0
    for number in range(200):
        interrupts.install()
        at = SignalsAt(chance.randrange(400), tuple(chance.randrange(300) for _ in range(8)))
        assert undo_all(at, fails=bool(number % 2)) in WHOLE, number
        came += at.came
    assert came > 100


@pytest.mark.usefixtures("installed")
def test_a_request_that_a_signal_has_cut_short_is_not_repeated_for_ever() -> None:
    done: list[str] = []
    cut = protected(interrupts.check_cut)

    def run() -> None:
        with Job("save") as job:
            job.undo_with(lambda: done.append("undone"))
            signal.raise_signal(signal.SIGTERM)
            cut()
            done.append("protected")
            interrupts.check_cut()
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == ["protected", "undone"]
