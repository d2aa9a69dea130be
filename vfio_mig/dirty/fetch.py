# SPDX-License-Identifier: MIT
"""Fetch dirty bitmaps in chunks as large as the kernel takes."""

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from vfio_mig.dirty.bitmap import Buffer, Dirty, count, size, trim
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.errors import DeviceError

MAX_PAGES: Final = 1 << 20
"""Pages of one request (4 GiB of guest memory): the RFC's kernel allocates unchecked and counts in 32 bits."""
MIN_PAGES: Final = 64
"""Pages of the smallest request: one word of the kernel's bitmap; who refuses this refuses for another reason."""
_CLEAN: Final = bytes(size(MAX_PAGES))
"""What chunks without a dirty page share, as most are: new memory for each would be page faults."""
_TOO_LARGE: Final = (errno.EINVAL, errno.ENOMEM, errno.E2BIG)


def fetch(
    get_chunk: Callable[[int, int], Buffer], ranges: Iterable[PageRange], max_pages: int = MAX_PAGES
) -> Iterator[Dirty]:
    """Yield the dirty bits of *ranges* in order, cut into chunks of at most *max_pages* pages.

    A request that the kernel refuses as too large (EINVAL, ENOMEM, E2BIG) is repeated with half as many pages, and
    later ones stay that small; the one of 64 pages or fewer is not repeated.

    :param get_chunk: (first page, number of pages) → bitmap of at least ceil(n / 8) bytes; ``MigrationProtocol.dirty``.
    :raises DeviceError: the kernel refused the smallest request, any request for another reason, or answered too short.
    """
    limit = max(max_pages, 1)
    for range_ in ranges:
        start = range_.start
        while start < range_.end:
            nr_pages = min(limit, range_.end - start)
            try:
                bitmap = get_chunk(start, nr_pages)
            except DeviceError as error:
                if error.errno not in _TOO_LARGE or nr_pages <= MIN_PAGES:
                    raise
                limit = max(nr_pages // 2, MIN_PAGES)
                continue
            if len(bitmap) < size(nr_pages):
                raise DeviceError(f"dirty bitmap of {nr_pages} pages has only {len(bitmap)} bytes")
            yield Dirty(start, nr_pages, trim(bitmap, nr_pages) if count(bitmap, nr_pages) else _clean(nr_pages))
            start += nr_pages


def _clean(nr_pages: int) -> bytes:
    length = size(nr_pages)
    return _CLEAN if length == len(_CLEAN) else bytes(length)
