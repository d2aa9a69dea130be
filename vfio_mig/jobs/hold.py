# SPDX-License-Identifier: MIT
"""Keep a device open, so that other commands can stop, save and start it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from vfio_mig.interrupts import ENDING
from vfio_mig.jobs.session import Session, Settings, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.memory import MemoryMap


def hold_device(
    name: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ready: Callable[[Session], object],
) -> None:
    """Open a device, call *ready*, and keep the device open until SIGINT, SIGTERM or SIGHUP.

    :param memory: guest memory, mapped for the device's DMA as long as it is held.
    :param ready: called once other commands can borrow the device.
    :raises OpenError: the device cannot be opened, or another process has it.
    """
    from vfio_mig.dirty.memory import Memory

    # Blocked from here on, so that a signal between ready() and the wait is not lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        with Memory(memory, writable=True) as guest, open_session(name, settings, memory=guest.maps) as session:
            ready(session)
            signal.sigwait(ENDING)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
