# SPDX-License-Identifier: MIT
"""The promise, cell by cell: one job, one fault, and what must be true afterwards.

A job keeps its promise when its exit code tells the cause, the device runs again (or is as the job found it, or what
is left is written down), no file stands that is not a whole verified image, no temporary is left, the guest's memory
is untouched or wholly written, and the next save works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.jobs.engine.steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

ACTIONS: Final = {"EIO": 5, "ENOSPC": 7, "sigint": 130, "sigterm": 130, "sighup": 130, "kill": -9}
"""What happens at a step, and the exit code that tells of it."""

AFTER_COMMIT: Final = ("start", "after-start")
"""A step behind the commit: whatever happens there, the job is done."""


class Cell(NamedTuple):
    """A job and what befalls it.

    :param step: name of the job's step, empty when only the driver fails.
    :param action: of ``VFIO_MIG_FAULT``.
    :param driver: rules for the sample driver's ``fault`` file.
    :param code: exit code that tells of it; 0: the job copes with it.
    :param left: effect that must be written down, as it cannot be undone.
    """

    job: str
    step: str
    action: str
    driver: tuple[str, ...]
    code: int
    left: str | None = None

    def __str__(self) -> str:
        what = [f"{self.step}={self.action}"] if self.step else []
        return f"{self.job}: {', '.join((*what, *self.driver))}"


def _left_by_kill(job: str, step: str) -> str | None:
    """What a kill at a step leaves in the device."""
    stopped = {
        "save": ("after-stop", "after-dirty", "after-pages", "after-state", "before-start"),
        "sync": ("after-stop", "copied", "before-start"),
        "stop": ("after-stop",),
        "restore": ("after-stop",),
    }
    loading = ("writing-pages", "after-pages", "after-state", "loaded", "before-start", "after-start")
    if step in stopped.get(job, ()):
        return "stopped"
    return "loading" if job == "restore" and step in loading else None


def step_cells() -> Iterator[Cell]:
    """Every step of every job with every action."""
    for job, steps in STEPS.items():
        for step in steps:
            if job in {"conform", "migrate"} or (job, step) == ("restore", "loaded"):
                continue  # tests/vm/test_conform.py, tests/vm/test_migrate.py
            for action, code in ACTIONS.items():
                left = _left_by_kill(job, step) if action == "kill" else None
                is_late = (job, step) == AFTER_COMMIT and action != "kill"
                yield Cell(job, step, action, (), 0 if is_late else code, left)


def driver_cells() -> Iterator[Cell]:
    """What the kernel may do: refuse, do and then complain, fall short, take long."""
    for rule, code in {
        "stop 1 errno 5": 5,
        "stop 1 after 5": 5,
        "stop 1 delay 300": 0,
        "dirty 1 errno 5": 5,
        "dirty 1 errno 22": 0,  # too many pages at once: asked for fewer
        "dirty 1 errno 12": 0,
        "dirty 1 after 5": 5,
        "state_read 1 errno 5": 5,
        "state_read 1 errno 14": 5,
        "state_read 1 after 12": 5,
        "state_read 1 short 4096": 5,
        "state_read 1 delay 300": 0,
        "start 1 errno 16": 5,
        "start 1 after 16": 5,
    }.items():
        yield Cell("save", "", "", (rule,), code)
    for rule, code in {
        "stop 1 errno 5": 5,
        "stop 1 after 5": 5,
        "state_write 1 errno 28": 5,
        "state_write 1 errno 14": 5,
        "state_write 1 after 5": 5,
        "state_write 1 short 4096": 5,
        "state_write 1 delay 300": 0,
        "start 1 errno 16": 5,
        "start 1 after 16": 5,
    }.items():
        yield Cell("restore", "", "", (rule,), code)
    for rule in ("dirty 1 errno 5", "dirty 2 errno 5", "dirty 3 errno 5", "stop 1 errno 5", "start 1 errno 16"):
        yield Cell("sync", "", "", (rule,), 5)
    for job, rule in (
        ("stop", "stop 1 errno 5"),
        ("stop", "stop 1 after 5"),
        ("start", "start 1 errno 16"),
        ("start", "start 1 after 16"),
        ("reset", "reset 1 errno 5"),
        ("dirty", "dirty 1 errno 5"),
    ):
        yield Cell(job, "", "", (rule,), 5)
    # what undoes it fails as well: then it is written down
    yield Cell("save", "after-state", "EIO", ("start 1 errno 16",), 5, "stopped")
    yield Cell("sync", "copied", "ENOSPC", ("start 1 errno 16",), 7, "stopped")
    yield Cell("restore", "after-stop", "EIO", ("start 1 errno 16",), 5, "stopped")
    yield Cell("restore", "after-pages", "EIO", ("start 1 errno 16",), 5, "loading")
    yield Cell("restore", "", "", ("state_write 1 errno 5", "reset 1 errno 5"), 5, "loading")
    yield Cell("restore", "", "", ("state_write 1 after 5", "start 1 errno 16"), 5, "loading")


def all_cells() -> list[Cell]:
    return [*step_cells(), *driver_cells()]
