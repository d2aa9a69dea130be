# SPDX-License-Identifier: MIT
"""Faults by order: what VFIO_MIG_FAULT takes, what each action does, and that every point of the table is one."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from vfio_mig import interrupts
from vfio_mig.errors import DeviceError, HostError, UsageError, VfioMigError
from vfio_mig.interrupts import ENDING, protected
from vfio_mig.jobs.points import POINTS, VARIABLE, point

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
FAULT: Final = "save:after-stop"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("_noted", "_finished"):
        monkeypatch.setattr(interrupts, name, [])
    before = {number: signal.getsignal(number) for number in ENDING}
    interrupts.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
        point("save", "after-stop")
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
    point("save", "after-stop")
    assert came == [number]


@pytest.mark.parametrize("action", ["sigint", "sigterm", "sighup"])
def test_a_signal_by_order_is_an_interrupt(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}={action}")
    with pytest.raises(KeyboardInterrupt):
        point("save", "after-stop")
    point("save", "after-state")


def test_a_point_inside_of_a_protected_function_interrupts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=sigterm")
    with pytest.raises(KeyboardInterrupt):
        protected(point)("save", "after-stop")
    assert interrupts._noted == []


def test_a_kill_leaves_no_time_for_anything() -> None:
    code = """
from vfio_mig.jobs.points import point
try:
    point("save", "after-stop")
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
        point("save", "after-stop")

    with pytest.raises(KeyboardInterrupt):
        job()
    timer.join()
    assert asked == ["SIGTERM"]


# --- orders


def test_without_an_order_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    point("save", "after-stop")
    monkeypatch.setenv(VARIABLE, "")
    point("save", "after-stop")


@pytest.mark.parametrize(("job", "name"), [("save", "after-state"), ("stop", "after-stop"), ("sync", "after-stop")])
def test_another_point_goes_on(monkeypatch: pytest.MonkeyPatch, job: str, name: str) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=EIO")
    point(job, name)


def test_several_orders_each_have_their_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=EIO, restore:verified=ENOSPC,save:written=sigint")
    with pytest.raises(DeviceError, match="EIO"):
        point("save", "after-stop")
    with pytest.raises(HostError, match="ENOSPC"):
        point("restore", "verified")
    with pytest.raises(KeyboardInterrupt):
        point("save", "written")
    point("save", "opened")


def test_the_first_order_for_a_point_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FAULT}=EBUSY,{FAULT}=EIO")
    with pytest.raises(DeviceError, match="EBUSY"):
        point("save", "after-stop")


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ("save:after-lunch=EIO", "there is no point 'save:after-lunch'"),
        ("lunch:opened=EIO", "there is no point 'lunch:opened'"),
        ("stop:written=EIO", "there is no point 'stop:written'"),
        ("save=EIO", "there is no point 'save'"),
        ("EIO", "there is no point 'EIO'"),
        ("=EIO", "there is no point ''"),
        (":=EIO", "there is no point ':'"),
        ("save:=EIO", "there is no point 'save:'"),
        ("save:opened=EIO,", "there is no point ''"),
        ("save:opened=EIO,save:afterstop=EIO", "there is no point 'save:afterstop'"),
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
        point("dirty", "fetched")  # whatever point comes first
    assert caught.value.problem == f"VFIO_MIG_FAULT: {words}"
    assert (caught.value.hint is not None) == words.startswith("unknown action")


@pytest.mark.parametrize("orders", ["", f"{FAULT}=EIO"], ids=["no order", "an order"])
def test_a_signal_that_came_at_a_bad_time_ends_the_job_here(monkeypatch: pytest.MonkeyPatch, orders: str) -> None:
    monkeypatch.setenv(VARIABLE, orders)
    protected(signal.raise_signal)(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        point("save", "after-stop")
    point("save", "after-state")


# --- the table


def _constants(tree: ast.Module) -> dict[str, str]:
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


def _values(tree: ast.Module, function: ast.FunctionDef, node: ast.expr) -> set[str]:
    """All that an argument may be: a text, a constant of the module, or a parameter that its callers know."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    assert isinstance(node, ast.Name), ast.dump(node)
    if node.id in _constants(tree):
        return {_constants(tree)[node.id]}
    place = [arg.arg for arg in function.args.args].index(node.id)
    return {
        value
        for caller in _functions(tree)
        for call in _calls(caller, function.name)
        for value in _values(tree, caller, call.args[place])
    }


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def points_of(text: str) -> set[tuple[str, str]]:
    """Every (job, point) that a module calls."""
    tree = ast.parse(text)
    return {
        (job, name)
        for function in _functions(tree)
        for call in _calls(function, "point")
        for job in _values(tree, function, call.args[0])
        for name in _values(tree, function, call.args[1])
    }


def test_the_table_names_the_points_that_the_jobs_have_and_no_other() -> None:
    jobs = ROOT / "vfio_mig/jobs"
    called = set.union(*(points_of(path.read_text()) for path in sorted(jobs.glob("*.py")) if path.stem != "window"))
    called |= points_of((ROOT / "vfio_mig/conform/runner.py").read_text())
    # The window of a job that stops one device: in a migration the source is not started again
    names = set(re.findall(r'self\._point\("([a-z-]+)"\)', (jobs / "window.py").read_text()))
    called |= {(job, name) for job in ("save", "migrate") for name in names} - {("migrate", "after-start")}
    assert called == {(job, name) for job, names in POINTS.items() for name in names}
    assert [len(set(names)) for names in POINTS.values()] == [len(names) for names in POINTS.values()]


def test_points_are_found_however_they_are_written() -> None:
    code = """
JOB = "save"
def one(action):
    point(action, "opened")
def two():
    one("stop"), one("start")
    def three():
        point(JOB, "inner")
    point("dirty", "outer")
"""
    assert points_of(code) == {("stop", "opened"), ("start", "opened"), ("save", "inner"), ("dirty", "outer")}
