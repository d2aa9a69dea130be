# SPDX-License-Identifier: MIT
"""The steps of jobs: one vocabulary, for events and hooks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any, Final

import pytest

from tools import steps_table
from vfio_mig.cli.main import COMMANDS
from vfio_mig.errors import UsageError
from vfio_mig.jobs.engine.events import Hooks
from vfio_mig.jobs.engine.steps import NAMES, OTHER_NAMES, STARTS, STEPS, steps_of

EVERYTHING: Final = {"leave_running": True, "start": True, "await_word": True}


def test_the_table_is_the_one_that_is_made() -> None:
    text = steps_table.DOCS.read_text("utf-8")
    between = text.partition(steps_table.BEGIN)[2].partition(steps_table.END)[0].strip()
    assert between == steps_table.table(), "run python -m tools.steps_table"


def test_the_table_has_every_step_of_every_job_once_and_in_order() -> None:
    names = steps_table.order()
    assert sorted(names) == sorted({step for steps in STEPS.values() for step in steps}) == sorted(steps_table.MEANS)
    for steps in STEPS.values():
        assert sorted(steps, key=names.index) == list(steps)


def test_what_stops_or_starts_says_so_before_and_after() -> None:
    for job, steps in STEPS.items():
        for what in ("stop", "start"):
            assert (f"before-{what}" in steps) == (f"after-{what}" in steps), job
    assert OTHER_NAMES.keys() | {step for steps in STEPS.values() for step in steps} == NAMES
    assert set(OTHER_NAMES.values()) == {f"{when}-{what}" for when in ("before", "after") for what in ("stop", "start")}


@pytest.mark.parametrize("job", STEPS)
def test_a_job_that_is_asked_for_everything_has_all_of_its_steps(job: str) -> None:
    assert steps_of(job, **EVERYTHING) == STEPS[job]


@pytest.mark.parametrize(
    ("job", "asked", "missing"),
    [
        ("save", {}, STARTS),
        ("save", {"leave_running": True}, set()),
        ("save", {"leave_running": True, "raw": True}, {"after-dirty", "after-pages"}),
        ("sync", {"leave_running": False}, STARTS),
        ("restore", {"start": True}, {"loaded"}),
        ("restore", {}, STARTS | {"loaded"}),
        ("restore", {"await_word": True}, set()),
        ("migrate", {}, set()),
        ("migrate", {"no_start": True}, STARTS),
        ("start", {}, set()),
        ("list", {}, set()),
    ],
)
def test_what_was_not_asked_for_is_no_step(job: str, asked: dict[str, Any], missing: set[str]) -> None:
    assert set(STEPS.get(job, ())) - set(steps_of(job, **asked)) == missing


@pytest.mark.parametrize("job", sorted({*COMMANDS, *STEPS}))
def test_a_hook_that_would_never_run_is_refused(job: str) -> None:
    for step in sorted(NAMES):
        if OTHER_NAMES.get(step, step) in steps_of(job):
            Hooks([f"{step}=true"], job)
            continue
        with pytest.raises(UsageError, match=f"hook {step}: ") as caught:
            Hooks([f"{step}=true"], job)
        assert ("has no steps" in str(caught.value)) == (job not in STEPS)


def test_it_says_which_option_would_make_it_run() -> None:
    with pytest.raises(UsageError, match="this save has no such step; it has that with --leave-running"):
        Hooks(["pre-start=true"], "save")
    with pytest.raises(UsageError, match="a stop has opened, before-stop, after-stop"):
        Hooks(["after-dirty=true"], "stop")


@pytest.mark.parametrize("word", [*OTHER_NAMES, *sorted(set(OTHER_NAMES.values()))])
def test_both_words_for_a_step_run_at_it_once(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Hooks, "_run", staticmethod(lambda _, environment: seen.append(environment["VFIO_MIG_STEP"])))
    hooks = Hooks([f"{word}=true"])
    for step in STEPS["restore"]:
        hooks.run("restore", step, "x")
    assert seen == [word]
    assert hooks.idle == []


def test_a_hook_for_what_was_not_to_be_done_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hooks, "_run", staticmethod(lambda *_: None))
    hooks = Hooks(["writing-pages=true", "pre-stop=true"], "restore")
    hooks.run("restore", "before-stop", "x")
    assert hooks.idle == ["writing-pages"]


STALLED: Final = {
    "image": """
from vfio_mig.image.files import Stream
with Stream(os.dup(pipe), "standard output") as file:
    tell()
    for _ in range(100):
        file.write(bytes(1 << 20))
""",
    "events": """
from vfio_mig.jobs.engine.events import Events
events = Events(pipe)
tell()
while True:
    events.emit("opened", job="save", device="x" * 1000)
""",
    "hook": """
from vfio_mig.jobs.engine.events import Hooks
tell()
Hooks(["after-stop=sleep 60"]).run("save", "after-stop", "x")
""",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("what", STALLED)
def test_whoever_lets_a_job_wait_does_not_keep_a_signal_from_it(what: str, number: signal.Signals) -> None:
    body = "".join(f"        {line}\n" for line in STALLED[what].strip().splitlines())
    source = f"""
import os
from vfio_mig import interrupts
from vfio_mig.jobs.engine.job import Job

def tell():
    print("ready", flush=True)

interrupts.install()
reader, pipe = os.pipe()
try:
    with Job("save") as job:
        job.undo_with(lambda: print("undone", flush=True))
{body}
except KeyboardInterrupt:
    print("ended", flush=True)
"""
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(number)
        try:
            rest, _ = child.communicate(timeout=20)
        finally:
            child.kill()
    assert rest.split() == ["undone", "ended"]
