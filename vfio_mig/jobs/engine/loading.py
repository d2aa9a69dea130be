# SPDX-License-Identifier: MIT
"""Write the guest memory of images: planned and proved before anything is stopped, then each page once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_mig import interrupts
from vfio_mig.errors import HostError, ImageError, MismatchError, VfioMigError
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.memory import Memory
    from vfio_mig.image.memoryplan import MemoryImage

PARTLY_NEW: Final = "guest memory is partly new: write it again before its guest runs"
WHOLLY_NEW: Final = "guest memory has the image's pages already"
_RESERVE: Final = 256 << 20


class MemoryLoad:
    """What is written to guest memory by one job.

    :ivar pages: how many pages have been written, 4096 bytes each; all of them once :meth:`write` has returned.
    :raises MismatchError: two images have the same page, and nothing tells which is newer.
    """

    def __init__(self, images: Sequence[MemoryImage], guest: Memory) -> None:
        from vfio_mig.image.memoryplan import MemoryPlan

        self._plan = MemoryPlan(images)
        self._guest = guest
        self.pages = 0
        self.is_begun = False

    @property
    def pages_planned(self) -> int:
        """Pages that will be written."""
        return self._plan.pages

    def prove(self) -> None:
        """Make sure that every page has a place and can be written, before anything is.

        :raises MismatchError: the guest memory given does not have it.
        :raises HostError: it cannot be mapped for writing, or there is no room in its file.
        """
        from vfio_mig.dirty.ranges import PageRange

        known = self._guest.ranges
        for start, end in self._plan.ranges:
            if not any(one.start * PAGE <= start and end <= one.end * PAGE for one in known):
                raise MismatchError(
                    f"the image has {end - start} bytes of memory at {start:#x}, which --memory does not"
                )
        whole = [PageRange(start // PAGE, (end - start) // PAGE) for start, end in self._plan.ranges]
        for map_ in {id(map_): map_ for map_, _ in self._guest.find(whole)}.values():
            map_.map()
        for start, end in self._plan.content_ranges():
            for at in range(start, end, _RESERVE):
                interrupts.check()
                self._guest.reserve(at, min(_RESERVE, end - at))

    @property
    def bytes_planned(self) -> int:
        """Bytes that will be written."""
        return self.pages_planned * PAGE

    def write(self, progress: Callable[[int], object]) -> None:
        """Write all pages; a signal is looked at between pieces of 16 MiB.

        :raises HostError: also where an image has changed since it was verified; some pages are written.
        :raises KeyboardInterrupt: some pages are written.
        """
        try:
            for gpa, size, content in self._plan.pieces():
                interrupts.check()
                self.is_begun = True
                self.pages += self._guest.clear(gpa, size) if content is None else self._guest.write(gpa, content)
                progress(size)
        except ImageError as error:
            raise HostError(f"the image has changed while it was loaded: {error}") from error

    def explain(self, error: BaseException | None) -> None:
        """Add to the error that ends a job what it has done to guest memory."""
        if not self.is_begun or error is None:
            return
        if isinstance(error, VfioMigError):
            error.consequences.append(PARTLY_NEW if self.pages < self.pages_planned else WHOLLY_NEW)
        else:
            error.add_note(PARTLY_NEW if self.pages < self.pages_planned else WHOLLY_NEW)
