# SPDX-License-Identifier: MIT
"""Write the guest memory of an image to where a guest's memory is; no device is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_mig.errors import UsageError
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.loading import MemoryLoad
from vfio_mig.jobs.engine.progress import expect
from vfio_mig.jobs.files.input import open_input
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.jobs.engine.session import Settings


@dataclass(frozen=True, kw_only=True)
class PagesReport(Report):
    """What was written, pages of 4096 bytes; each counted once, in whatever round it was sent."""

    file: str
    pages_written: int


def load_pages(
    file: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap],
    progress: Callable[[int], object] = lambda _: None,
) -> PagesReport:
    """Write the pages of an image, ``-`` for standard input, to guest memory.

    :raises ImageError: it is not whole, or has pages elsewhere; nothing was written.
    :raises HostError: there is no room; nothing was written.
    """
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.image.archive import read_archive
    from vfio_mig.image.memoryplan import MemoryImage

    if not memory:
        raise UsageError("nowhere to write to", hint="name the guest's memory with --memory FILE@GPA[:SIZE]")
    with Job("pages", settings) as job:
        guest = job.enter(Memory(memory, writable=True))
        stream = job.enter(open_input(file))
        archive = job.enter(read_archive(stream))
        load = MemoryLoad([MemoryImage(file, archive)], guest)
        load.prove()
        expect(progress, lambda: load.bytes_planned)
        try:
            load.write(progress)
        except BaseException as error:
            load.explain(error)
            raise
        job.commit()
    return PagesReport(file=file, pages_written=load.pages)
