# SPDX-License-Identifier: MIT
"""Reads big-endian numbers front to back, and searches, in time that grows with the distance alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vfio_mig.image.bytesource import ByteSource

_BLOCK: Final = 1 << 16


class CutError(Exception):
    """The stream ends where more is needed, or is not what was expected: the text says it."""


class Cursor:
    """A place in a source. One block of it is kept, so that what is near is not read again.

    :ivar at: the offset of the next byte.
    :ivar work: bytes looked at so far; a parser whose work is linear keeps it below some multiple of the source's size.
    """

    def __init__(self, source: ByteSource, at: int = 0) -> None:
        self.source = source
        self.at = at
        self.work = 0
        self._block = b""
        self._start = at

    def look(self, at: int, size: int) -> bytes:
        """Return bytes from anywhere, fewer at the end of the source; few, at most 64 KiB. Nothing moves."""
        self.work += size
        inside = at - self._start
        if inside < 0 or inside + size > len(self._block):
            self._load(at)
            inside = 0
        return self._block[inside : inside + size]

    def _load(self, at: int) -> None:
        self._block = self.source.read(at, _BLOCK)
        self._start = at
        self.work += len(self._block)

    def take(self, size: int) -> bytes:
        """Return the next bytes, all of them: at most 64 KiB.

        :raises CutError: there are not so many.
        """
        found = self.look(self.at, size)
        if len(found) < size:
            raise CutError(f"cut off at {self.at + len(found):#x}")
        self.at += size
        return found

    def number(self, size: int) -> int:
        """Return the next number of *size* bytes."""
        return int.from_bytes(self.take(size), "big")

    def skip(self, size: int) -> None:
        """Pass over bytes.

        :raises CutError: there are not so many.
        """
        if size > self.source.size - self.at:
            raise CutError(f"{size} bytes promised at {self.at:#x}, {max(0, self.source.size - self.at)} left")
        self.at += size

    def go(self, at: int) -> None:
        """Go forward to an offset.

        :raises CutError: the source ends before it.
        """
        self.skip(at - self.at)

    def name(self) -> str:
        """Return a name with its length, one byte, in front."""
        return self.take(self.number(1)).decode("ascii", "backslashreplace")

    def find(self, pattern: bytes, at: int, end: int) -> int:
        """Return where *pattern* begins next, from *at* on and whole before *end*; -1 if nowhere. Nothing moves."""
        end = min(end, self.source.size)
        while at + len(pattern) <= end:
            if not self._start <= at <= at + len(pattern) <= self._start + len(self._block):
                self._load(at)
                if len(self._block) < len(pattern):
                    return -1
            place = self._block.find(pattern, at - self._start, end - self._start)
            behind = self._start + (len(self._block) - len(pattern) + 1 if place < 0 else place + len(pattern))
            self.work += min(behind, end) - at
            if place >= 0:
                return self._start + place
            at = behind
        return -1
