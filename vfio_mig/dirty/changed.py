# SPDX-License-Identifier: MIT
"""Tell which pages have another content than when they were last looked at.

The RFC's bitmap says "may be written" for as long as a page is pinned, so in each round most dirty pages are as they
were. 16 bytes of BLAKE2b per page tell, keyed by chance so that no guest can make two pages look the same.
"""

import hashlib
import os
from collections.abc import Iterator
from typing import Final

from vfio_mig.ranges import PAGE

DIGEST: Final = 16
"""Bytes kept per page of guest memory."""
BLOCK: Final = 256
"""Pages (1 MiB of guest memory) whose digests are kept together, from when one of them is first looked at."""


class Fingerprints:
    """Remembers what each page was like that it was asked for: memory grows with these, not with the address space."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}
        self._key = os.urandom(DIGEST)

    def changed(self, gpa: int, view: memoryview) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages that are new or changed, (first page in *view*, pages), and remember them."""
        start = None
        number = 0
        for number in range(len(view) // PAGE):
            if self._is_new(gpa // PAGE + number, view[number * PAGE : (number + 1) * PAGE]):
                start = number if start is None else start
            elif start is not None:
                yield start, number - start
                start = None
        if start is not None:
            yield start, number + 1 - start

    def _is_new(self, page: int, content: memoryview) -> bool:
        block = self._blocks.get(page // BLOCK)
        if block is None:
            block = self._blocks[page // BLOCK] = bytearray(BLOCK * DIGEST)
        digest = hashlib.blake2b(content, digest_size=DIGEST, key=self._key).digest()
        at = page % BLOCK * DIGEST
        place = slice(at, at + DIGEST)
        if block[place] == digest:
            return False
        block[place] = digest
        return True
