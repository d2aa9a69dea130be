# SPDX-License-Identifier: MIT
"""Faults by order: what VFIO_MIG_FAULT takes, what each action does, and that every step of the table is one."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import pytest

from tools.lab.faults.injection import LISTENERS, VARIABLE, install
from vfio_mig import interrupts, words
from vfio_mig.errors import DeviceError, HostError, UsageError, VfioMigError
from vfio_mig.interrupts import ENDING
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
FAULT: Final = "save:after-stop"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    install()
    install()
    assert len(LISTENERS) == 1
    before = {number: signal.getsignal(number) for number in ENDING}
    interrupts.install()
    yield
    LISTENERS.clear()
    interrupts.install()
    for number, handler in before.items():
        signal.signal(number, handler)


def reach(name: Any, step: Any) -> None:
    """Come to a step of a job."""
    interrupts.install()
    with Job(name) as job:
        job.step(step)


def test_an_installed_program_does_not_obey_the_variable() -> None:
    code = "from vfio_mig.jobs.engine.job import Job\nwith Job('save') as job: job.step('after-stop')"
    environment = {**os.environ, VARIABLE: f"{FAULT}=kill"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    for path in (ROOT / "vfio_mig").rglob("*.py"):
        assert VARIABLE not in path.read_text(), path


# --- actions


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("EIO", DeviceError, 5),
        ("EBUSY", DeviceError, 5),
        ("ETIMEDOUT", DeviceError, 5),
        ("ENOSPC", HostError, 7),
        ("EDQUOT", HostError, 7),
        ("EROFS", HostError, 7),
        ("EACCES", HostError, 7),
    ],
)
def test_an_errno_is_the_device_s_failure_or_the_host_s(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: type[VfioMigError], code: int
) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}={name}")
    with pytest.raises(kind) as caught:
        reach("save", "after-stop")
    number = getattr(errno, name)
    assert str(caught.value) == f"fault at {FAULT}: {name} ({os.strerror(number)})"
    assert caught.value.exit_code == code
    assert getattr(caught.value, "errno", number) == number


@pytest.mark.parametrize(
    ("action", "number"), [("sigint", signal.SIGINT), ("sigterm", signal.SIGTERM), ("sighup", signal.SIGHUP)]
)
def test_a_signal_comes_to_this_process(monkeypatch: pytest.MonkeyPatch, action: str, number: int) -> None:
    came: list[int] = []
    signal.signal(number, lambda which, _: came.append(which))
    monkeypatch.setenv(VARIABLE, f"{FAULT}={action}")
    with Job("save") as job:
        job.step("after-stop")
    assert came == [number]


@pytest.mark.parametrize("action", ["sigint", "sigterm", "sighup"])
def test_a_signal_by_order_is_an_interrupt(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}={action}")
    with pytest.raises(KeyboardInterrupt):
        reach("save", "after-stop")
    reach("save", "after-state")


def test_a_kill_leaves_no_time_for_anything() -> None:
    code = """
from tools.lab.faults.injection import install
from vfio_mig.jobs.engine.job import Job
install()
try:
    with Job("save") as job:
        job.step("after-stop")
finally:
    print("undone", flush=True)
"""
    environment = {**os.environ, VARIABLE: f"{FAULT}=kill"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


def test_a_wait_ends_with_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=wait")
    asked: list[str] = []

    def end_it() -> None:
        asked.append("SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(0.05, end_it)

    def job() -> None:
        timer.start()
        reach("save", "after-stop")

    with pytest.raises(KeyboardInterrupt):
        job()
    timer.join()
    assert asked == ["SIGTERM"]


# --- orders


def test_without_an_order_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    reach("save", "after-stop")
    monkeypatch.setenv(VARIABLE, "")
    reach("save", "after-stop")


@pytest.mark.parametrize(("job", "name"), [("save", "after-state"), ("stop", "after-stop"), ("sync", "after-stop")])
def test_another_point_goes_on(monkeypatch: pytest.MonkeyPatch, job: str, name: str) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=EIO")
    reach(job, name)


def test_several_orders_each_have_their_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=EIO, restore:verified=ENOSPC,save:written=sigint")
    with pytest.raises(DeviceError, match="EIO"):
        reach("save", "after-stop")
    with pytest.raises(HostError, match="ENOSPC"):
        reach("restore", "verified")
    with pytest.raises(KeyboardInterrupt):
        reach("save", "written")
    reach("save", "opened")


def test_the_first_order_for_a_point_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=EBUSY,{FAULT}=EIO")
    with pytest.raises(DeviceError, match="EBUSY"):
        reach("save", "after-stop")


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ("save:after-lunch=EIO", "there is no step 'save:after-lunch'"),
        ("lunch:opened=EIO", "there is no step 'lunch:opened'"),
        ("stop:written=EIO", "there is no step 'stop:written'"),
        ("save=EIO", "there is no step 'save'"),
        ("EIO", "there is no step 'EIO'"),
        ("=EIO", "there is no step ''"),
        (":=EIO", "there is no step ':'"),
        ("save:=EIO", "there is no step 'save:'"),
        ("save:opened=EIO,", "there is no step ''"),
        ("save:opened=EIO,save:afterstop=EIO", "there is no step 'save:afterstop'"),
        ("save:opened", "unknown action ''"),
        ("save:opened=", "unknown action ''"),
        ("save:opened=eio", "unknown action 'eio'"),
        ("save:opened=5", "unknown action '5'"),
        ("save:opened=ENOTHING", "unknown action 'ENOTHING'"),
        ("save:opened=SIGINT", "unknown action 'SIGINT'"),
        ("save:opened=sigkill", "unknown action 'sigkill'"),
        ("save:opened=errorcode", "unknown action 'errorcode'"),
        ("save:opened=EIO=EIO", "unknown action 'EIO=EIO'"),
    ],
)
def test_an_order_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch, orders: str, words: str) -> None:
    monkeypatch.setenv(VARIABLE, orders)
    with pytest.raises(UsageError) as caught:
        reach("dirty", "fetched")  # whatever step comes first
    assert caught.value.problem == f"VFIO_MIG_FAULT: {words}"
    assert (caught.value.hint is not None) == words.startswith("unknown action")


# --- the table


def literal_steps(tree: ast.AST) -> Iterator[str]:
    """Yield every name that a module's ``….step("name")`` has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value)


def test_the_table_names_the_steps_that_the_jobs_have_and_no_other() -> None:
    """Which job has which: tests/unit/test_jobs.py, and for migrate and conform tests/vm."""
    paths = [*(ROOT / "vfio_mig/jobs").rglob("*.py"), ROOT / "vfio_mig/conform/runner.py"]
    named = {name for path in paths for name in literal_steps(ast.parse(path.read_text()))}
    assert named == {name for names in STEPS.values() for name in names}
    assert [len(set(names)) for names in STEPS.values()] == [len(names) for names in STEPS.values()]


def test_the_words_of_jobs_and_steps_are_those_of_the_table() -> None:
    assert {name for names in STEPS.values() for name in names} == set(get_args(words.Step))
    assert STEPS.keys() < set(get_args(words.Job))
