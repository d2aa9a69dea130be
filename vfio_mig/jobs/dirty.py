# SPDX-License-Identifier: MIT
"""Ask a device which guest pages it may have written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_mig.errors import UsageError
from vfio_mig.interrupts import waiting
from vfio_mig.jobs.engine.dirtylog import DirtyLog
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.memory import default_ranges
from vfio_mig.ranges import PAGE
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.jobs.engine.session import Settings

LOG_TIME = 1.0
"""Seconds for which a device logs its writes, unless the caller says otherwise."""


@dataclass(frozen=True, kw_only=True)
class DirtyReport(Report):
    """A dirty bitmap. Pages of 4096 bytes, times in seconds.

    :param ranges: (guest-physical address, bytes) of each run of dirty pages; empty unless asked for.
    """

    device: str
    pages: int
    pages_dirty: int
    bitmap_time: float
    ranges: list[tuple[int, int]]


def fetch_dirty(
    name: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    ranges: Sequence[PageRange] = (),
    list_ranges: bool = False,
    log_time: float | None = None,
    pinned: bool = False,
    look: Callable[[list[Dirty]], object] = lambda _: None,
) -> DirtyReport:
    """Fetch the dirty bitmap. For the RFC: pages the device may write, running or stopped; reading clears nothing.

    A device that logs its writes is told to, and asked after *log_time*. So is the container of one that keeps no log,
    whether it can be migrated or not.

    :param ranges: guest pages to ask for; by default those of *memory*, else the first 4 GiB.
    :param list_ranges: fill in the report's ranges.
    :param log_time: seconds, 1 by default; only for a device that logs.
    :param pinned: ask the container of the process that has the device for the pages that are pinned now; it stands
        still for that instant.
    :param look: called with the bitmaps, in order of address.
    :raises UnsupportedError: it cannot be asked.
    """
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.host.lock import DeviceLock

    with Job("dirty", settings) as job:
        guest = job.enter(Memory(memory))
        session = job.open(name, memory=guest.maps, alone=False, any_device=True)
        log = DirtyLog(session, default_ranges(guest, ranges), pinned=pinned)
        log.require()
        if log.is_holders:  # others that read it would have what is missing here
            job.enter(DeviceLock(session.found, "dirty"))
        job.step("opened", session)
        if log.is_log:
            job.undo_with(log.end)
            log.begin()
            _sleep(LOG_TIME if log_time is None else log_time)
        elif log_time is not None:
            what = "with --pinned nothing is logged" if pinned else f"a {session.protocol.name} device keeps no log"
            raise UsageError(what, hint="leave out --for")
        began = time.perf_counter()
        chunks = log.fetch()
        seconds = time.perf_counter() - began
        log.end()
        job.step("fetched", session)
        device = session.device.name  # nothing to commit: the report is all that this job makes
    look(chunks)
    return DirtyReport(
        device=device,
        pages=sum(chunk.nr_pages for chunk in chunks),
        pages_dirty=sum(chunk.total() for chunk in chunks),
        bitmap_time=seconds,
        ranges=_runs(chunks) if list_ranges else [],
    )


_sleep = waiting(time.sleep)


def _runs(chunks: list[Dirty]) -> list[tuple[int, int]]:
    from vfio_mig.dirty.ranges import merge
    from vfio_mig.dirty.runs import find

    merged = merge(run for runs in find(chunks) for run in runs.ranges())
    return [(run.start * PAGE, run.nr_pages * PAGE) for run in merged]
