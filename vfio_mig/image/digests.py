# SPDX-License-Identifier: MIT
"""SHA-256 of an image's members, taken beside the job: its device stands still while they are made."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Final, Self

from vfio_mig.errors import HostError
from vfio_mig.image.layout import Buffer
from vfio_mig.interrupts import protected
from vfio_mig.threads import WORKERS_MAX, make_pool, spare_cpus

SMALL: Final = 64 << 10
"""Bytes: to hand less than this to a thread takes longer than to take its digest."""
_READ: Final = 1 << 20


class Digests:
    """Takes digests in threads, where this process has more than one CPU; else when they are asked for.

    A context manager; at its end no thread is left.

    :param fd: the image's file, open for reading too, so that content need not be kept in memory; None for a pipe.
    """

    def __init__(self, fd: int | None) -> None:
        self.fd: Final = fd
        self._pool = make_pool(min(spare_cpus(), WORKERS_MAX))  # now, and not while the device stands still

    def __enter__(self) -> Self:
        return self

    @protected
    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def of_memory(self, *parts: Buffer) -> Callable[[], str]:
        """Return what gives the digest of all parts; they must stay as they are until then."""
        if sum(map(len, parts)) < SMALL:
            digest = _of_parts(parts)
            return lambda: digest
        return self._submit(lambda: _of_parts(parts))

    def of_file(self, offset: int, size: int) -> Callable[[], str]:
        """Return what gives the digest of *size* bytes that have been written to the file at *offset*.

        :raises HostError: (from what is returned) they cannot be read.
        """
        return self._submit(lambda: self._read(offset, size))

    def _submit(self, work: Callable[[], str]) -> Callable[[], str]:
        return work if self._pool is None else self._pool.submit(work).result

    def _read(self, offset: int, size: int) -> str:
        from vfio_mig.image.files import host_error

        assert self.fd is not None  # noqa: S101 -- for the type checker
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(size, _READ)))
        while size:
            try:
                count = os.preadv(self.fd, [buffer[: min(size, _READ)]], offset)
            except OSError as error:
                raise host_error("cannot read it back", "the image", error) from error
            if not count:
                raise HostError(f"the image ends at {offset}, before what was written to it")
            digest.update(buffer[:count])
            offset, size = offset + count, size - count
        return digest.hexdigest()


def _of_parts(parts: Sequence[Buffer]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
