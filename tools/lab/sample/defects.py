# SPDX-License-Identifier: MIT
"""The sample driver's defects: what there are, how they are switched on, and which a kernel has a use for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.lab.sample import host
from tools.lab.sample.guest import Guest
from tools.lab.sample.v2 import V2
from tools.lab.vfio.v2 import HAS_PRE_COPY, LOG_START, PROBE, SET

if TYPE_CHECKING:
    from pathlib import Path


def known() -> list[str]:
    """Return the names of all that the driver has."""
    return (host.DEBUGFS / "defects").read_text().split()


def file(instance: host.Instance) -> Path:
    return instance.debugfs / "defect"


def switch(instance: host.Instance, *names: str) -> None:
    """Have these on and no others."""
    file(instance).write_text(" ".join(names) + "\n")


def possible(name: str, instance: host.Instance) -> bool:
    """Tell whether this kernel has what a defect is about; *instance* speaks v2."""
    if name.startswith("log-"):
        return _logs(instance)
    return HAS_PRE_COPY or not name.startswith(("precopy-", "size-"))


def _logs(instance: host.Instance) -> bool:
    with Guest.opened(instance) as guest:
        try:
            V2(guest).feature(PROBE | SET | LOG_START)
        except OSError:
            return False
        return True
