# SPDX-License-Identifier: MIT
"""Tell which pages have another content than when they were last looked at.

The RFC's bitmap says "may be written" for as long as a page is pinned, so in each round most dirty pages are as they
were. A hash of each page tells (:mod:`vfio_mig.dirty.pagehash`).
"""

from collections.abc import Iterator
from typing import Final

from vfio_mig.dirty.pagehash import SIZE, PageHash
from vfio_mig.ranges import PAGE

BLOCK: Final = 256
"""Pages (1 MiB of guest memory) whose hashes are kept together, from when one of them is first looked at."""


class Fingerprints:
    """Remembers what each page was like that it was asked for: memory grows with these, not with the address space."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}
        self._hash = PageHash()
        self.of_pages = self._hash.of_pages
        """Takes the fingerprints of whole pages; may be called in any thread."""

    def changed(self, gpa: int, prints: bytes) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages that are new or changed, (first page, pages), and remember them.

        :param gpa: address of the first page, from which pages are counted.
        :param prints: of one page after the other, as :attr:`of_pages` takes them.
        """
        begin = end = 0
        for first, count in self._changed(gpa // PAGE, prints):
            if first != end and end > begin:
                yield begin, end - begin
            begin = begin if first == end else first
            end = first + count
        if end > begin:
            yield begin, end - begin

    def _changed(self, page: int, prints: bytes) -> Iterator[tuple[int, int]]:
        """Yield them block by block, so that a run may come in parts."""
        done, pages = 0, len(prints) // SIZE
        while done < pages:
            number, at = divmod(page + done, BLOCK)
            count = min(BLOCK - at, pages - done)
            new = prints[done * SIZE : (done + count) * SIZE]
            place = slice(at * SIZE, (at + count) * SIZE)
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = bytearray(BLOCK * SIZE)
                block[place] = new
                yield done, count
            elif (old := bytes(block[place])) != new:
                block[place] = new
                for one in range(count):
                    if old[one * SIZE : (one + 1) * SIZE] != new[one * SIZE : (one + 1) * SIZE]:
                        yield done + one, 1
            done += count
