# SPDX-License-Identifier: MIT
"""Write the guest memory of an image to where a guest's memory is; no device is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vfio_mig.errors import UsageError
from vfio_mig.jobs.restore import reserve_pages, write_pages
from vfio_mig.jobs.source import open_input

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.memory import MemoryMap


class PagesReport(NamedTuple):
    """What was written, pages of 4096 bytes; one that was sent in several rounds counts in each."""

    file: str
    pages_written: int


def load_pages(
    file: str, *, memory: Sequence[MemoryMap], progress: Callable[[int], object] = lambda _: None
) -> PagesReport:
    """Write the pages of an image, ``-`` for standard input, to guest memory.

    :raises ImageError: it is not whole, or has pages elsewhere; nothing was written.
    :raises HostError: there is no room; nothing was written.
    """
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.image.archive import read_archive

    if not memory:
        raise UsageError("nowhere to write to", hint="name the guest's memory with --memory FILE@GPA[:SIZE]")
    with Memory(memory, writable=True) as guest, open_input(file) as stream, read_archive(stream) as archive:
        reserve_pages(archive, guest)
        return PagesReport(file, write_pages(archive, guest, progress))
