# SPDX-License-Identifier: MIT
"""What came through a pipe, to be read again: the first bytes in memory, what is behind them in an unnamed file."""

from __future__ import annotations

import mmap
import os
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, Final

from vfio_mig.closing import Closing
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

IN_MEMORY: Final = 8 << 20
"""Bytes, and no piece is in memory in part."""


class Kept(Closing):
    """Pieces, each known by its offset. Several threads may read; a context manager.

    :param touched: whether the memory has its pages from the start, for a reader whom somebody will wait for.
    """

    def __init__(self, *, touched: bool) -> None:
        self._memory = memoryview(mmap.mmap(-1, IN_MEMORY))
        if touched:
            self._memory[::PAGE] = bytes(IN_MEMORY // PAGE)
        self._end = 0
        self._file: BinaryIO | None = None
        self._position = Lock()

    def close(self) -> None:
        """Remove the file; a second call does nothing. Views of the memory stay good."""
        if self._file is not None:
            self._file.close()

    def room(self, size: int) -> memoryview | None:
        """Return where the next piece is to go in memory, None if it does not fit there."""
        return self._memory[self._end : self._end + size] if self._end + size <= IN_MEMORY else None

    def keep(self, piece: memoryview) -> int:
        """Keep what was put into :meth:`room`, or a piece that did not fit there; returns its offset.

        :raises OSError: there is no room for the file.
        """
        at = self._end
        if at + len(piece) <= IN_MEMORY:
            self._end += len(piece)
            return at
        return IN_MEMORY + self._spill(piece)

    def _spill(self, piece: memoryview) -> int:
        if self._file is None:
            import tempfile

            self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with this
        at = self._file.seek(0, os.SEEK_END)
        self._file.write(piece)
        self._file.flush()  # that the disk is full is told now, and not when somebody reads
        return at

    def view(self, at: int, size: int) -> memoryview | None:
        """Return a part of what is in memory, None if it is not."""
        return self._memory[at : at + size] if at + size <= self._end else None

    def read(self, at: int, size: int, read: Callable[[BinaryIO, int], bytes]) -> bytes:
        """Return a part of a piece.

        :param read: reads so many bytes of a file.
        """
        view = self.view(at, size)
        if view is not None:
            return bytes(view)
        assert self._file is not None  # noqa: S101 -- nothing else has such an offset
        with self._position:
            self._file.seek(at - IN_MEMORY)
            return read(self._file, size)
