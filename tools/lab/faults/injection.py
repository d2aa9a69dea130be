# SPDX-License-Identifier: MIT
"""Make a job fail at one of its steps: ``VFIO_MIG_FAULT=save:after-stop=EIO``, for tests.

The installed program knows nothing of this: a test has to install it (:func:`install`), or to start the program by
``python -m tools.lab.faults.faulty``. Several orders are separated by commas. Actions:

- an errno's name: the device fails with it; ENOSPC, EDQUOT, EROFS and EACCES are the host's failures;
- ``sigint``, ``sigterm``, ``sighup``: this process gets the signal; ``kill``: it is gone at once;
- ``wait``: it waits for a signal, so that others can look at what there is at this step.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

from vfio_mig import interrupts
from vfio_mig.errors import DeviceError, HostError, UsageError, errno_text
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.words import Step

VARIABLE: Final = "VFIO_MIG_FAULT"
SIGNALS: Final = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP, "kill": signal.SIGKILL}
LISTENERS: Final[list[Callable[[str, str], object]]] = []
"""Called with job and step at each step, before anybody else; an exception ends the job."""
_HOST: Final = ("ENOSPC", "EDQUOT", "EROFS", "EACCES")

_ANNOUNCE: Final = Job.announce


def install() -> None:
    """Have the jobs of this process obey the variable; a second call changes nothing."""
    if play not in LISTENERS:
        LISTENERS.append(play)
    Job.announce = _announce  # type: ignore[assignment, method-assign]


def _announce(job: Job, name: Step, session: Session | None) -> None:
    """Stand in front of what a job does at a step."""
    for listener in LISTENERS:
        listener(job.name, name)
    _ANNOUNCE(job, name, session)


def play(job: str, name: str) -> None:
    """Do what the variable says for this step of a job.

    :raises DeviceError, HostError: by order.
    :raises UsageError: the variable makes no sense.
    """
    orders = os.environ.get(VARIABLE)
    if not orders:
        return
    for order in orders.split(","):
        where, action = _parse(order)
        if where == f"{job}:{name}":
            _act(where, action)


def _parse(order: str) -> tuple[str, str]:
    where, _, action = order.strip().partition("=")
    job, _, name = where.partition(":")
    if name not in STEPS.get(job, ()):
        raise UsageError(f"{VARIABLE}: there is no step {where!r}")
    if action not in SIGNALS and action != "wait" and _errno(action) is None:
        raise UsageError(
            f"{VARIABLE}: unknown action {action!r}", hint="name an errno, sigint, sigterm, sighup, kill or wait"
        )
    return where, action


def _errno(name: str) -> int | None:
    import errno

    number = getattr(errno, name, None) if name.startswith("E") else None
    return number if isinstance(number, int) else None


def _act(where: str, action: str) -> None:
    if action == "wait":
        _pause()
    elif action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    else:
        number = _errno(action) or 0
        text = f"fault at {where}: {errno_text(number)}"
        if action in _HOST:
            raise HostError(text)
        raise DeviceError(text, errno=number)


_pause = interrupts.waiting(signal.pause)
