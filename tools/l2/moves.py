# SPDX-License-Identifier: MIT
"""Have QEMU itself move a running guest: from one QEMU to another, or into a file and out of it.

QEMU's own migration of VFIO devices, with no help of ours. Its numbers are what ours are compared with.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tools.l2.machine import GuestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfio_mig.vm.qmp import Qmp

DEVICE: Final = "enable-migration=on"
"""Property of QEMU's vfio-pci. By itself QEMU does not migrate a device whose dirty pages nobody logs: VFIO's type1
container takes every pinned page for dirty, which does not count as a log."""
INCOMING: Final = ("-incoming", "defer")
DOWNTIME_MS: Final = 5000
"""Limit that the tests give QEMU; under emulation, on a machine that has more to do, a stop takes long."""
SECONDS: Final = 120.0
REST: Final = 64 << 20
"""Bytes that may be left to send when the guest is stopped: the vGPU's state, the pages that it has mapped, and what
the guest wrote last."""
_UNKNOWN: Final = 100 << 30
"""Bytes that QEMU takes a device's state for where the kernel does not tell (VFIO_MIG_STOP_COPY_SIZE, hw/vfio)."""
_TELLS: Final = (6, 2)
"""Linux from here on has VFIO_DEVICE_FEATURE_MIG_DATA_SIZE."""
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})
_POLL_SECONDS: Final = 0.02


class Move(NamedTuple):
    """What QEMU tells of a migration that completed.

    :param downtime_ms: from the stop of the guest to the end of the migration, as the source has measured it.
    :param total_ms: of all of it.
    :param vfio_bytes: of the device's state.
    :param ram_bytes: of guest memory, those sent twice twice.
    """

    downtime_ms: int
    total_ms: int
    vfio_bytes: int
    ram_bytes: int

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Move:
        """Take them from the answer of ``query-migrate``."""
        return cls(
            answer["downtime"], answer["total-time"], answer["vfio"]["transferred"], answer["ram"]["transferred"]
        )


def switchover_bandwidth(downtime_ms: int, kernel: str) -> int:
    """Return the bytes per second with which QEMU stops the guest once no more than :data:`REST` is left.

    By itself QEMU goes by what it last sent in a second. An idle guest sends next to nothing: then the rest never fits
    into any limit, and the migration does not end.

    :param kernel: the release of the running kernel.
    """
    major, minor = kernel.split(".")[:2]
    unknown = 0 if (int(major), int(minor)) >= _TELLS else _UNKNOWN
    return (unknown + REST) * 1000 // downtime_ms


def migrate(qmp: Qmp, uri: str, *, downtime_ms: int = DOWNTIME_MS, seconds: float = SECONDS) -> Move:
    """Have a QEMU send its guest; returns when it says that it has.

    :raises GuestError: it did not, in time or at all, with QEMU's reason.
    """
    bandwidth = switchover_bandwidth(downtime_ms, os.uname().release)
    limits = {"downtime-limit": downtime_ms, "max-bandwidth": 0, "avail-switchover-bandwidth": bandwidth}
    qmp.execute("migrate-set-parameters", **limits)
    qmp.execute("migrate", uri=uri)
    end = time.monotonic() + seconds
    while (answer := qmp.execute("query-migrate")).get("status") not in _ENDED:
        if time.monotonic() > end:
            raise GuestError(f"no migration to {uri} within {seconds:g} s: {answer}")
        time.sleep(_POLL_SECONDS)
    if answer["status"] != "completed":
        raise GuestError(f"migration to {uri}: {answer['status']}: {answer.get('error-desc')}")
    return Move.of(answer)


def receive(qmp: Qmp, uri: str) -> None:
    """Have a QEMU that was started with :data:`INCOMING` wait for a guest, or read it from a file."""
    qmp.execute("migrate-incoming", uri=uri)


def await_running(qmp: Qmp, seconds: float = SECONDS) -> None:
    """Wait until a guest that comes in has come, and runs.

    :raises GuestError: it took longer.
    :raises vfio_mig.errors.HostError: QEMU has ended.
    """
    await_status(qmp, "running", seconds)


def await_status(qmp: Qmp, wanted: str, seconds: float = SECONDS) -> None:
    """Wait until QEMU says that of its guest.

    :raises GuestError: it took longer.
    :raises vfio_mig.errors.HostError: QEMU has ended.
    """
    end = time.monotonic() + seconds
    while (status := qmp.execute("query-status")["status"]) != wanted:
        if time.monotonic() > end:
            raise GuestError(f"the guest is {status} after {seconds:g} s, not {wanted}")
        time.sleep(_POLL_SECONDS)
