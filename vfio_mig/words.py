# SPDX-License-Identifier: MIT
"""The words that users, scripts and JSON rely on, as types: a checker finds one that is not among them."""

from __future__ import annotations

from typing import Final, Literal, get_args

State = Literal["running", "running-p2p", "stop", "stop-copy", "resuming", "pre-copy", "pre-copy-p2p", "error"]
"""A migration state as QEMU spells it (<linux/vfio.h>, enum vfio_device_mig_state)."""
RUNNING: Final = "running"
STOP: Final = "stop"
ERROR: Final = "error"
CLOSED: Final = "closed"
"""In the place of a state: nobody has the device open."""
UNKNOWN: Final = "unknown"
"""In the place of a state: the device cannot be asked."""

Via = Literal["auto", "group", "cdev"]
"""How a device is opened that nobody has open."""
WAYS: Final[tuple[Via, ...]] = get_args(Via)
How = Literal["group", "cdev", "borrowed", "inherited"]
"""How an open device was reached."""

Effect = Literal["", "stopped", "live", "loading", "moved"]
"""What a job may leave of a device if it is killed; empty: nothing."""

Action = Literal["stop", "start", "reset"]
Content = Literal["none", "dirty", "all"]
"""What of guest memory a copy has."""

Job = Literal["conform", "dirty", "migrate", "pages", "reset", "restore", "save", "start", "state", "stop", "sync"]
Step = Literal[
    "after-dirty",
    "after-live",
    "after-pages",
    "after-round",
    "after-start",
    "after-state",
    "after-stop",
    "before-start",
    "before-stop",
    "checking",
    "copied",
    "fetched",
    "loaded",
    "opened",
    "restored",
    "sent",
    "verified",
    "waiting",
    "writing-pages",
    "written",
]
"""A step of some job; which job has which: :mod:`vfio_mig.jobs.engine.steps`."""
