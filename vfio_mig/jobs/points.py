# SPDX-License-Identifier: MIT
"""Named points of every job, where a test can make it fail: ``VFIO_MIG_FAULT=save:after-stop=EIO``.

Several are separated by commas. Actions:

- an errno's name: the device fails with it; ENOSPC, EDQUOT, EROFS and EACCES are the host's failures;
- ``sigint``, ``sigterm``, ``sighup``: this process gets the signal; ``kill``: it is gone at once;
- ``wait``: it waits for a signal, so that others can look at what there is at this point.

Without the variable a point only looks for a signal that came at a bad time.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

from vfio_mig import interrupts
from vfio_mig.errors import DeviceError, HostError, UsageError, errno_text

if TYPE_CHECKING:
    from vfio_mig.jobs.session import Session

VARIABLE: Final = "VFIO_MIG_FAULT"
POINTS: Final[dict[str, tuple[str, ...]]] = {
    "conform": ("opened", "checking"),
    "dirty": ("opened", "fetched"),
    "migrate": ("opened", "after-live", "after-stop", "after-dirty", "after-pages", "after-state", "sent", "restored"),
    "reset": ("opened",),
    "restore": ("waiting", "opened", "verified", "after-stop", "after-pages", "after-state", "after-start"),
    "save": (
        "opened",
        "after-live",
        "after-stop",
        "after-dirty",
        "after-pages",
        "after-state",
        "after-start",
        "written",
    ),
    "start": ("opened",),
    "stop": ("opened", "after-stop"),
    "sync": ("opened", "after-round", "before-stop", "after-stop", "copied", "after-start"),
}
SIGNALS: Final = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP, "kill": signal.SIGKILL}
_HOST: Final = ("ENOSPC", "EDQUOT", "EROFS", "EACCES")


def point(job: str, name: str, session: Session | None = None) -> None:
    """Tell who listens, do what the variable says for this point of a job, and end it if a signal came at a bad time.

    :param session: whose device has come to this point.

    :raises KeyboardInterrupt: a signal came before.
    :raises DeviceError, HostError: by order.
    :raises UsageError: the variable makes no sense.
    """
    interrupts.check()
    if session is not None:
        session.step(job, name)
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
    if name not in POINTS.get(job, ()):
        raise UsageError(f"{VARIABLE}: there is no point {where!r}")
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
        signal.pause()
    elif action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    else:
        number = _errno(action) or 0
        text = f"fault at {where}: {errno_text(number)}"
        if action in _HOST:
            raise HostError(text)
        raise DeviceError(text, errno=number)
    interrupts.check()
