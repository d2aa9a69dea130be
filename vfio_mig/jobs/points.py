# SPDX-License-Identifier: MIT
"""The steps of every job, by name, and the listeners at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.jobs.session import Session

POINTS: Final[dict[str, tuple[str, ...]]] = {
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

LISTENERS: Final[list[Callable[[str, str], object]]] = []
"""Called with job and step at each step, before anybody else; an exception ends the job. Tests play faults with it."""


def reached(job: str, name: str, session: Session | None = None) -> None:
    """Tell the listeners that a job has come to a step.

    :param session: whose device has come there.
    """
    for listener in LISTENERS:
        listener(job, name)
    if session is not None:
        session.step(job, name)
