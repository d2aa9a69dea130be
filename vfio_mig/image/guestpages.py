# SPDX-License-Identifier: MIT
"""Single pages out of an archive's guest memory, which may have any number of them in any order."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vfio_mig.image.archive import Archive
    from vfio_mig.image.layout import Member

_LOADED_MAX: Final = 256
"""Pages that are kept in memory."""
_COUNT: Final = struct.Struct("<Q")


class GuestPages:
    """Finds a page in an archive; where it is there more than once, the later one counts.

    The first question reads the guest memory once, to make an index: 16 bytes for each range in it.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._index: list[tuple[Member, NDArray[np.uint64]]] | None = None
        self._loaded: dict[int, bytes | None] = {}

    def page(self, gpa: int) -> bytes | None:
        """Return the page at a guest-physical address, None where the archive has none.

        :raises ImageError: the file has changed meanwhile.
        """
        if gpa not in self._loaded:
            if len(self._loaded) == _LOADED_MAX:
                self._loaded.clear()
            self._loaded[gpa] = self._find(gpa)
        return self._loaded[gpa]

    def _find(self, gpa: int) -> bytes | None:
        import numpy as np

        if self._index is None:
            self._index = self._read_index()
        for member, ranges in reversed(self._index):
            starts, sizes = ranges[:, 0], ranges[:, 1]
            hits = np.flatnonzero((starts <= gpa) & (np.uint64(gpa) - starts < sizes))
            if len(hits):
                number = int(hits[-1])
                if member.kind == "zero":
                    return bytes(PAGE)
                at = _COUNT.size + ranges.nbytes + int(sizes[:number].sum()) + gpa - int(starts[number])
                return self._archive.content(member)[at : at + PAGE]
        return None

    def _read_index(self) -> list[tuple[Member, NDArray[np.uint64]]]:
        import numpy as np

        index = []
        for member in self._archive.members:
            if member.kind in {"pages", "zero"}:
                content = self._archive.content(member)
                (count,) = _COUNT.unpack_from(content)  # the reader has compared it with what is there
                ranges = np.frombuffer(content, "<u8", 2 * count, _COUNT.size).reshape(-1, 2).copy()
                index.append((member, ranges))
        return index
