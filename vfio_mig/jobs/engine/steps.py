# SPDX-License-Identifier: MIT
"""The steps of every job, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vfio_mig.words import Step

STEPS: Final[dict[str, tuple[Step, ...]]] = {
    "conform": ("opened", "checking"),
    "dirty": ("opened", "fetched"),
    "migrate": (
        "opened",
        "after-live",
        "before-stop",
        "after-stop",
        "after-dirty",
        "after-pages",
        "after-state",
        "sent",
        "restored",
        "before-start",
        "after-start",
    ),
    "reset": ("opened",),
    "restore": (
        "waiting",
        "opened",
        "verified",
        "before-stop",
        "after-stop",
        "writing-pages",
        "after-pages",
        "after-state",
        "loaded",
        "before-start",
        "after-start",
    ),
    "save": (
        "opened",
        "after-live",
        "before-stop",
        "after-stop",
        "after-dirty",
        "after-pages",
        "after-state",
        "before-start",
        "after-start",
        "written",
    ),
    "start": ("opened", "before-start", "after-start"),
    "stop": ("opened", "before-stop", "after-stop"),
    "sync": ("opened", "after-round", "before-stop", "after-stop", "copied", "before-start", "after-start"),
}
"""Each job's steps, in order."""

OTHER_NAMES: Final[dict[str, Step]] = {
    "pre-stop": "before-stop",
    "post-stop": "after-stop",
    "pre-start": "before-start",
    "post-start": "after-start",
}
"""Other words for four steps, which `--hook` takes."""
NAMES: Final = frozenset(OTHER_NAMES) | {name for names in STEPS.values() for name in names}
STARTS: Final = frozenset({"before-start", "after-start"})
_IF_SO_ASKED: Final[dict[tuple[str, str], str]] = {
    **{(job, step): "--leave-running" for job in ("save", "sync") for step in STARTS},
    **{("restore", step): "--start" for step in STARTS},
    ("restore", "loaded"): "--await-word",
}
"""Steps that a job has only with an option."""


def option_of(job: str, step: str) -> str | None:
    """Return the option without which a job does not have a step; None if it has it in any case."""
    return _IF_SO_ASKED.get((job, step))


def steps_of(job: str, **asked: object) -> tuple[str, ...]:
    """Return the steps that a job has, in order, as it was asked for.

    :param asked: the options of the command, by their names.
    """

    def has(step: str) -> bool:
        if job == "migrate" and step in STARTS:
            return not asked.get("no_start")
        if job == "save" and step in {"after-dirty", "after-pages"}:
            return not asked.get("raw")
        option = option_of(job, step)
        waits = job == "restore" and bool(asked.get("await_word"))  # and may be told to start
        return option is None or waits or bool(asked.get(option.removeprefix("--").replace("-", "_")))

    return tuple(step for step in STEPS.get(job, ()) if has(step))
