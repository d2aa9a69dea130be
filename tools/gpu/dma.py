# SPDX-License-Identifier: MIT
"""The client's memory, as the device reaches it by DMA: files that the client has passed, mapped at DMA addresses."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from tools.gpu.errors import RefusedError

PAGE: Final = 4096
ADDRESS_END: Final = 1 << 64
MAX_MAPS: Final = 1024
"""Each map costs us a file descriptor and an entry in the kernel's table of our mappings."""

READ: Final = 1 << 0  # VFIO_USER_F_DMA_REGION_READ
WRITE: Final = 1 << 1

_ONES32: Final = 0xFFFF_FFFF
_ONES64: Final = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(slots=True)
class _Map:
    """A range of DMA addresses. Without memory (the client passed no file) it is occupied and cannot be reached."""

    start: int
    end: int
    writable: bool
    memory: mmap.mmap | None = None
    view: memoryview | None = None  # bytes; dwords and qwords are the same memory
    # Whole dwords are stored at once; struct.pack_into with a byte order stores them byte by byte, and the client's
    # CPUs, which read at the same time, would see numbers that were never written.
    dwords: memoryview | None = None
    qwords: memoryview | None = None

    def close(self) -> None:
        for view in (self.dwords, self.qwords, self.view):
            if view is not None:
                view.release()
        if self.memory is not None:
            self.memory.close()


_NOWHERE: Final = _Map(-1, -1, writable=False)


class DmaSpace:
    """All of the client's memory. Addresses outside of it read as ones, and writes there are dropped, as on a bus."""

    def __init__(self) -> None:
        self._maps: list[_Map] = []  # by address, without overlaps
        self._starts: list[int] = []
        self._last = _NOWHERE

    def __len__(self) -> int:
        return len(self._maps)

    def add(self, address: int, size: int, *, flags: int, fd: int | None, offset: int) -> None:
        """Map *size* bytes of a file at a DMA address; *fd* stays the caller's.

        :param fd: a regular file or memfd that is at least ``offset + size`` bytes long, or None.
        :raises RefusedError: EINVAL for what is not page aligned, is empty, wraps around, or is not such a file;
            EEXIST for an overlap; ENOSPC for one map too many; what mmap(2) said.
        """
        if size <= 0 or (address | size | offset) % PAGE:
            raise RefusedError(errno.EINVAL, f"DMA map {address:#x}+{size:#x} at {offset:#x} is empty or not aligned")
        if address + size > ADDRESS_END or not flags & (READ | WRITE) or flags & ~(READ | WRITE):
            raise RefusedError(errno.EINVAL, f"DMA map {address:#x}+{size:#x} wraps around, or has flags {flags:#x}")
        position = bisect_right(self._starts, address)
        before = self._maps[position - 1] if position else _NOWHERE
        after = self._maps[position] if position < len(self._maps) else None
        if before.end > address or (after is not None and after.start < address + size):
            raise RefusedError(errno.EEXIST, f"DMA map {address:#x}+{size:#x} overlaps another one")
        if len(self._maps) >= MAX_MAPS:
            raise RefusedError(errno.ENOSPC, f"there are {MAX_MAPS} DMA maps already")
        new = _Map(address, address + size, writable=bool(flags & WRITE))
        if fd is not None:
            _attach(new, fd, offset)
        self._maps.insert(position, new)
        self._starts.insert(position, address)

    def remove(self, address: int, size: int) -> None:
        """Unmap what lies within a range.

        :raises RefusedError: EINVAL where a map lies partly in it, ENOENT where none does.
        """
        end = address + size
        found = [m for m in self._maps if m.start < end and address < m.end]
        if any(m.start < address or m.end > end for m in found):
            raise RefusedError(errno.EINVAL, f"DMA unmap {address:#x}+{size:#x} cuts a map")
        if not found:
            raise RefusedError(errno.ENOENT, f"DMA unmap {address:#x}+{size:#x}: nothing is mapped there")
        self._keep([m for m in self._maps if m.start >= end or m.end <= address])
        for gone in found:
            gone.close()

    def clear(self) -> None:
        """Unmap everything."""
        gone = self._maps
        self._keep([])
        for one in gone:
            one.close()

    def reaches(self, address: int) -> bool:
        """Tell whether there is memory at an address."""
        return self._find(address).view is not None

    def read32(self, address: int) -> int:
        """Read a dword; *address* is a multiple of 4."""
        found = self._find(address)
        return _ONES32 if found.dwords is None else int(found.dwords[(address - found.start) >> 2])

    def read64(self, address: int) -> int:
        """Read a qword; *address* is a multiple of 8."""
        found = self._find(address)
        return _ONES64 if found.qwords is None else int(found.qwords[(address - found.start) >> 3])

    def write32(self, address: int, value: int) -> None:
        """Write a dword at once; *address* is a multiple of 4."""
        found = self._find(address)
        if found.dwords is not None and found.writable:
            found.dwords[(address - found.start) >> 2] = value & _ONES32

    def write64(self, address: int, value: int) -> None:
        """Write a qword at once; *address* is a multiple of 8."""
        found = self._find(address)
        if found.qwords is not None and found.writable:
            found.qwords[(address - found.start) >> 3] = value & _ONES64

    def read(self, address: int, size: int) -> bytes:
        """Read bytes of one map."""
        found = self._find(address)
        if found.view is None or address + size > found.end:
            return b"\xff" * size
        return bytes(found.view[address - found.start : address - found.start + size])

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Write bytes into one map."""
        if len(data) in {4, 8} and address % len(data) == 0:
            value = int.from_bytes(data, "little")
            (self.write32 if len(data) == 4 else self.write64)(address, value)  # noqa: PLR2004
            return
        found = self._find(address)
        if found.view is not None and found.writable and address + len(data) <= found.end:
            found.view[address - found.start : address - found.start + len(data)] = data

    def _find(self, address: int) -> _Map:
        last = self._last
        if last.start <= address < last.end:
            return last
        position = bisect_right(self._starts, address)
        if position and address < self._maps[position - 1].end:
            self._last = self._maps[position - 1]
            return self._last
        return _NOWHERE

    def _keep(self, maps: list[_Map]) -> None:
        self._maps = maps
        self._starts = [m.start for m in maps]
        self._last = _NOWHERE


def _attach(new: _Map, fd: int, offset: int) -> None:
    """Map the file's memory.

    Its length is compared first: a page behind a file's end would end us with SIGBUS when it is touched.
    """
    size = new.end - new.start
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or offset + size > facts.st_size:
            raise RefusedError(errno.EINVAL, f"DMA map of {size:#x} bytes at {offset:#x}: the file has no such part")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if new.writable else 0)
        new.memory = mmap.mmap(fd, size, mmap.MAP_SHARED, protection, offset=offset)
    except OSError as error:
        raise RefusedError(error.errno or errno.EINVAL, f"DMA map of {size:#x} bytes: {error.strerror}") from None
    except (OverflowError, ValueError) as error:
        raise RefusedError(errno.EINVAL, f"DMA map of {size:#x} bytes: {error}") from None
    new.view = memoryview(new.memory)
    new.dwords, new.qwords = new.view.cast("I"), new.view.cast("Q")
