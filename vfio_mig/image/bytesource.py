# SPDX-License-Identifier: MIT
"""Bytes that may be too many for memory, read by offset: a buffer, a file, or parts of either."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from typing import BinaryIO, Final, Protocol

from vfio_mig.image.files import host_error

STEP: Final = 1 << 20
"""Bytes that a search looks at in one go."""


class ByteSource(Protocol):
    """Bytes by offset."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read(self, at: int, size: int) -> bytes:
        """Return the bytes from *at* on: at most *size*, fewer at the end."""


class BufferSource:
    """A buffer as a source."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size: int = len(content)

    def read(self, at: int, size: int) -> bytes:
        """Return a part of the buffer."""
        return self._content[at : at + size]


class FileSource:
    """A regular file as a source, as long as it was at first; it must stay open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size: int = os.fstat(file.fileno()).st_size

    def read(self, at: int, size: int) -> bytes:
        """Read a part of the file.

        :raises HostError: reading failed.
        """
        try:
            return os.pread(self._file.fileno(), max(0, min(size, self.size - at)), at)
        except OSError as error:
            name = getattr(self._file, "name", None)  # a number is standard input's, or that of a file without a name
            raise host_error("cannot read", name if isinstance(name, str) else "input", error) from error


class PartSource:
    """A part of a source."""

    def __init__(self, whole: ByteSource, at: int, size: int) -> None:
        self._whole = whole
        self._at = at
        self.size: int = max(0, min(size, whole.size - at))

    def read(self, at: int, size: int) -> bytes:
        """Return a part of the part."""
        return self._whole.read(self._at + at, max(0, min(size, self.size - at)))


class PiecesSource:
    """Pieces of a source, one behind the other: (offset, bytes) each."""

    def __init__(self, whole: ByteSource, frames: list[tuple[int, int]]) -> None:
        self._whole = whole
        self._frames = [frame for frame in frames if frame[1]]
        self._starts = [0, *accumulate(size for _, size in self._frames)]
        self.size: int = self._starts[-1]

    def read(self, at: int, size: int) -> bytes:
        """Return a part of what the pieces make."""
        parts: list[bytes] = []
        end = min(at + size, self.size)
        while at < end:
            number = bisect_right(self._starts, at) - 1
            offset, length = self._frames[number]
            inside = at - self._starts[number]
            parts.append(self._whole.read(offset + inside, min(length - inside, end - at)))
            if not parts[-1]:
                break
            at += len(parts[-1])
        return b"".join(parts)


def find(source: ByteSource, pattern: bytes, at: int, end: int | None = None) -> int:
    """Return where *pattern* begins next, from *at* on and whole before *end*; -1 if nowhere."""
    end = source.size if end is None else min(end, source.size)
    while at + len(pattern) <= end:
        block = source.read(at, min(STEP, end - at))
        place = block.find(pattern)
        if place >= 0:
            return at + place
        if len(block) < len(pattern):
            return -1
        at += len(block) - len(pattern) + 1
    return -1
