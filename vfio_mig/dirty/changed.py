# SPDX-License-Identifier: MIT
"""Tell which pages have another content than when they were last looked at.

The RFC's bitmap says "may be written" for as long as a page is pinned, so in each round most dirty pages are as they
were. 16 bytes of BLAKE2b per page tell, keyed by chance so that no guest can make two pages look the same.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Final

from vfio_mig.dirty.ranges import PAGE, PageRange

DIGEST: Final = 16
"""Bytes kept per page of guest memory; untouched memory costs none, as the kernel gives zeros only when written."""


class Fingerprints:
    """Remembers what each page of guest memory was like.

    :param ranges: the pages that will be asked for, in order, without overlaps.
    """

    def __init__(self, ranges: Sequence[PageRange]) -> None:
        self._tables = [(range_, bytearray(range_.nr_pages * DIGEST)) for range_ in ranges]
        self._key = os.urandom(DIGEST)

    def changed(self, gpa: int, view: memoryview) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages that are new or changed, (first page in *view*, pages), and remember them."""
        range_, table = self._table(gpa // PAGE)
        at = (gpa // PAGE - range_.start) * DIGEST
        start = None
        number = 0
        for number in range(len(view) // PAGE):
            page = view[number * PAGE : (number + 1) * PAGE]
            digest = hashlib.blake2b(page, digest_size=DIGEST, key=self._key).digest()
            place = slice(at + number * DIGEST, at + (number + 1) * DIGEST)
            if table[place] != digest:
                table[place] = digest
                start = number if start is None else start
            elif start is not None:
                yield start, number - start
                start = None
        if start is not None:
            yield start, number + 1 - start

    def _table(self, page: int) -> tuple[PageRange, bytearray]:
        for range_, table in self._tables:
            if range_.start <= page < range_.end:
                return range_, table
        raise ValueError(f"page {page:#x} is none that was announced")
