# SPDX-License-Identifier: MIT
"""What is asked on the command line reaches the job, as it was asked and nothing else with it.

The jobs are not done: each is called with what its function takes, and ends there.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, Final, NamedTuple

import click
import pytest

from tests.unit.click_runner import runner
from vfio_mig.cli.main import cli
from vfio_mig.dirty.memory import MemoryMap
from vfio_mig.errors import UsageError
from vfio_mig.jobs.engine.live import ROUNDS_LIVE, Live
from vfio_mig.jobs.engine.session import Settings

A: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
B: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
MEMORY: Final = "guest@0x1000:0x2000+0x3000"
COPY: Final[dict[str, dict[str, Any]]] = {
    f"--memory {MEMORY}": {"memory": [MEMORY]},
    "--range 0x2000+0x1000": {"ranges": [(2, 1)]},
    "--all-memory": {"all_memory": True},
    "--strict": {"strict": True},
}
LIVE: Final[dict[str, dict[str, Any]]] = {
    "--live": {"live": (ROUNDS_LIVE, None, True)},
    "--rounds 7": {"live": (7, None, False)},
    "--live --rounds 0": {},  # nothing is read before the stop, then
    "--live --rounds 7": {"live": (7, None, True)},
    "--max-downtime 250": {"live": (ROUNDS_LIVE, 0.25, False)},
}


class Command(NamedTuple):
    """A command, the job that it is for, and what each of its options changes in what the job is asked."""

    module: str
    function: str
    words: str
    options: dict[str, dict[str, Any]]


COMMANDS: Final = {
    "save": Command(
        "save",
        "save_all",
        f"save {A} file",
        {
            **COPY,
            **LIVE,
            "--raw": {"raw": True},
            "--force": {"force": True},
            "--leave-running": {"leave_running": True},
            "--no-p2p": {"without_p2p": True},
            "--pinned": {"pinned": True},
            "--open": {"open_closed": True},
        },
    ),
    "restore": Command(
        "restore",
        "restore_all",
        f"restore {A} file",
        {
            f"--memory {MEMORY}": {"memory": [MEMORY]},
            "--no-memory": {"no_memory": True},
            "--start": {"start": True},
            "--raw": {"raw": True},
            "--force": {"force": True},
            "--no-verify-state": {"verify_state": False},
            "--await-word": {"await_verdict": True},
            "--no-p2p": {"without_p2p": True},
            "--open": {"open_closed": True},
        },
    ),
    "sync": Command(
        "sync",
        "sync_dirty",
        f"sync {A} file",
        {
            **COPY,
            "--rounds 7": {"rounds": 7},
            "--rounds 0": {"rounds": 0},
            "--max-downtime 250": {"max_downtime": 0.25},
            "--leave-running": {"leave_running": True},
            "--open": {"open_closed": True},
        },
    ),
    "dirty": Command(
        "dirty",
        "fetch_dirty",
        f"dirty {A}",
        {
            f"--memory {MEMORY}": {"memory": [MEMORY]},
            "--range 0x2000+0x1000": {"ranges": [(2, 1)]},
            "--list": {"list_ranges": True},
            "--for 2.5": {"log_time": 2.5},
            "--pinned": {"pinned": True},
        },
    ),
    "migrate": Command(
        "migrate",
        "migrate",
        f"migrate {A} {B}",
        {
            **COPY,
            **LIVE,
            f"--target-memory {MEMORY}": {"target_memory": (MEMORY,)},
            "--no-memory": {"no_memory": True},
            "--no-start": {"start": False},
            "--force": {"force": True},
            "--open": {"open_closed": True},
            "--rsh rsh": {"rsh": ["rsh"]},
        },
    ),
    "stop": Command("control", "stop_devices", f"stop {A} {B}", {"--no-p2p": {"without_p2p": True}}),
    "start": Command(
        "control", "start_devices", f"start {A} {B}", {"--no-p2p": {"without_p2p": True}, "--force": {"force": True}}
    ),
    "reset": Command("control", "reset_device", f"reset {A}", {"--force": {"force": True}}),
}
OF_THE_DEVICE: Final[dict[str, dict[str, Any]]] = {
    "--pid 7": {"pid": 7},
    "--via cdev": {"via": "cdev"},
    "--abi gvt-rfc": {"abi": "gvt-rfc"},
}
PRINTING: Final = {"--map", "--plot"}
CASES: Final = [(name, option) for name, one in COMMANDS.items() for option in (*one.options, *OF_THE_DEVICE)]


def plain(value: object) -> object:
    """Return what can be compared; nothing for what only listens."""
    if isinstance(value, Live):
        return value.rounds, value.max_downtime, value.precopy
    if isinstance(value, Settings):
        return None
    if isinstance(value, list | tuple) and value and isinstance(value[0], MemoryMap):
        return [str(one) for one in value]
    return None if callable(value) else value


def asked(monkeypatch: pytest.MonkeyPatch, command: Command, *words: str) -> dict[str, Any]:
    """Return with what a command calls its job, and which settings."""
    module = import_module(f"vfio_mig.jobs.{command.module}")
    signature = inspect.signature(getattr(module, command.function))
    calls: list[dict[str, Any]] = []

    def play(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = bound.arguments["settings"]
        calls.append(
            {name: plain(value) for name, value in bound.arguments.items()}
            | {name: getattr(settings, name) for name in ("pid", "fd", "via", "abi")}
        )
        raise UsageError("enough")

    with monkeypatch.context() as patched:
        patched.setattr(module, command.function, play)
        result = runner().invoke(cli, [*command.words.split(), *words])
    assert str(result.exception) == "enough", result.exception
    (call,) = calls
    return call


@pytest.mark.parametrize(("name", "option"), CASES, ids=[f"{name} {option}" for name, option in CASES])
def test_an_option_changes_what_the_job_is_asked_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    command = COMMANDS[name]
    before, after = asked(monkeypatch, command), asked(monkeypatch, command, *option.split())
    changed = {key: value for key, value in after.items() if value != before[key]}
    assert changed == {**command.options, **OF_THE_DEVICE}[option]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_tried_here(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = {
        one.opts[0] for one in command.params if isinstance(one, click.Option) and not one.hidden
    } - PRINTING  # what is printed is no business of the job's
    assert options - {"--fd", "--help"} == {word.split()[0] for word in (*COMMANDS[name].options, *OF_THE_DEVICE)} - {
        "--abi",
        "--via",
    }
