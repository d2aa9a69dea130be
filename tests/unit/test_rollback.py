# SPDX-License-Identifier: MIT
from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import pytest

from vfio_mig.errors import DeviceError, HostError
from vfio_mig.interrupts import ENDING
from vfio_mig.jobs.engine.rollback import Rollback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


def fail_with(error: BaseException) -> Callable[[], NoReturn]:
    def undo() -> NoReturn:
        raise error

    return undo


def job(error: BaseException, *undos: Callable[[], object]) -> None:
    """Do some steps, then fail."""
    with Rollback() as rollback:
        for undo in undos:
            rollback.push(undo)
        raise error


def test_nothing_is_undone_on_success() -> None:
    done: list[str] = []
    with Rollback() as rollback:
        rollback.push(lambda: done.append("undone"))
    assert done == []


@pytest.mark.parametrize(
    "error", [DeviceError("no"), ValueError("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr
)
def test_steps_are_undone_the_last_one_first_whatever_ended_the_job(error: BaseException) -> None:
    done: list[int] = []
    with pytest.raises(type(error)) as caught:
        job(error, *[lambda number=number: done.append(number) for number in range(3)])
    assert caught.value is error
    assert done == [2, 1, 0]


def test_the_first_error_is_reported_with_what_failed_while_undoing() -> None:
    done: list[str] = []
    error = DeviceError("STOP failed", device="vgpu", hint="try again")
    second, third = DeviceError("START failed", device="vgpu"), RuntimeError("broken pipe")
    with pytest.raises(DeviceError) as caught:
        job(error, lambda: done.append("a"), fail_with(third), lambda: done.append("b"), fail_with(second))
    assert caught.value is error
    assert done == ["b", "a"]
    assert error.undo_errors == [second, third]
    assert str(error) == (
        "vgpu: STOP failed; while rolling back: vgpu: START failed; while rolling back: broken pipe; try again"
    )


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()], ids=repr)
def test_another_exception_gets_what_failed_as_notes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        job(error, fail_with(HostError("disk")), fail_with(DeviceError("START failed")))
    assert error.__notes__ == ["while rolling back: START failed", "while rolling back: disk"]


@pytest.mark.parametrize("error", [HostError("disk"), ValueError("odd")], ids=repr)
def test_an_error_that_a_file_passes_on_is_not_told_as_another_one(error: Exception) -> None:
    """A context manager that is made of a generator raises what it was given, if it does not swallow it."""

    @contextmanager
    def passing() -> Iterator[None]:
        try:
            yield
        finally:
            pass

    class Raising:
        def __enter__(self) -> None:
            return None

        def __exit__(self, *given: object) -> None:
            assert given[1] is error
            raise error

    def fail() -> None:
        with Rollback() as rollback:
            rollback.enter(passing())
            rollback.enter(Raising())
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert not getattr(error, "__notes__", [])
    assert not getattr(error, "undo_errors", [])


def test_what_fails_to_close_after_a_job_that_went_well_is_an_error_and_the_rest_is_closed() -> None:
    closed: list[str] = []
    second = HostError("the disk is full")

    @contextmanager
    def file(name: str, error: Exception | None = None) -> Iterator[None]:
        yield
        closed.append(name)
        if error is not None:
            raise error

    def work() -> None:
        with Rollback() as rollback:
            rollback.enter(file("first"))
            rollback.enter(file("second", second))
            rollback.enter(file("third"))

    with pytest.raises(HostError) as caught:
        work()
    assert caught.value is second
    assert closed == ["third", "second"]  # the first one was closed for an error, and did not get here


def test_an_undo_runs_once_even_if_the_block_is_left_twice() -> None:
    done: list[int] = []
    rollback = Rollback()
    rollback.push(lambda: done.append(len(done)))
    for _ in range(2):
        with pytest.raises(HostError), rollback:
            raise HostError("again")
    assert done == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_undoing_waits_until_everything_is_undone(number: signal.Signals) -> None:
    done: list[str] = []

    def handler(_number: int, _frame: FrameType | None) -> None:
        done.append("signal")

    def undo() -> None:
        signal.raise_signal(number)
        done.append("undo")

    before = signal.signal(number, handler)
    try:
        with pytest.raises(HostError):
            job(HostError("full"), undo, undo)
    finally:
        signal.signal(number, before)
    assert done == ["undo", "undo", "signal"]


def test_an_interrupt_that_waited_comes_after_all() -> None:
    done: list[str] = []

    def undo() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("undone")

    with pytest.raises(KeyboardInterrupt):
        job(HostError("full"), undo, undo)
    assert done == ["undone", "undone"]


@pytest.mark.parametrize("undo", [list, fail_with(OSError("undo"))], ids=["undone", "undo fails"])
def test_signals_are_afterwards_handled_as_before(undo: Callable[[], object]) -> None:
    handlers = [signal.getsignal(number) for number in ENDING]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with pytest.raises(HostError):
            job(HostError("full"), undo)
        after = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert after == before | {signal.SIGUSR1}
    assert [signal.getsignal(number) for number in ENDING] == handlers


def test_a_job_may_roll_back_in_another_thread() -> None:
    done: list[str] = []

    def run() -> None:
        with pytest.raises(HostError):
            job(HostError("full"), lambda: done.append("undone"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == ["undone"]
