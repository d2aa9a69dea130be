# SPDX-License-Identifier: MIT
"""An engine's way to memory: it translates, accesses, and notes in the record what was touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tools.gpu.translate import PAGE, FaultError

if TYPE_CHECKING:
    from tools.gpu.dma import DmaSpace
    from tools.gpu.misbehaviour import Misbehaviour
    from tools.gpu.record import Entry
    from tools.gpu.translate import Ggtt, Ppgtt

_OFFSET: Final = PAGE - 1
_MAX_CACHED: Final = 4096


class Access:
    """One engine's. Translations are kept until they are invalidated, as in a TLB."""

    def __init__(self, dma: DmaSpace, ggtt: Ggtt, misbehaviour: Misbehaviour) -> None:
        self.dma: Final = dma
        self.ggtt: Final = ggtt
        self._misbehaviour: Final = misbehaviour
        self._ppgtt: Ppgtt | None = None
        self._cached: dict[tuple[bool, int], int] = {}

    def use(self, ppgtt: Ppgtt | None) -> None:
        """Take a context's page tables for what is not reached through the GGTT, and forget all translations."""
        self._ppgtt = ppgtt
        self.invalidate()

    def invalidate(self) -> None:
        """Forget all translations."""
        self._cached.clear()

    def translate(self, address: int, *, ggtt: bool) -> int:
        """Return the DMA address.

        :raises FaultError: there is none, or this address was told to fault.
        """
        if self._misbehaviour.faults:
            self._refuse_faulty("ggtt" if ggtt else "ppgtt", address, address, ggtt=ggtt)
        key = (ggtt, address & ~_OFFSET)
        page = self._cached.get(key)
        if page is None:
            page = self._walk(key[1], ggtt=ggtt)
            if len(self._cached) >= _MAX_CACHED:
                self._cached.clear()
            self._cached[key] = page
        if self._misbehaviour.faults:
            self._refuse_faulty("dma", page | address & _OFFSET, address, ggtt=ggtt)
        return page | address & _OFFSET

    def fetch(self, address: int, *, ggtt: bool) -> int:
        """Read a dword of a command."""
        return self.dma.read32(self.translate(address & ~3, ggtt=ggtt))

    def read(self, address: int, entry: Entry, *, ggtt: bool) -> int:
        """Read a dword of data."""
        where = self.translate(address & ~3, ggtt=ggtt)
        value = self.dma.read32(where)
        entry.read(where, value)
        return value

    def write(self, address: int, value: int, entry: Entry, *, ggtt: bool) -> None:
        """Write a dword of data."""
        where = self.translate(address & ~3, ggtt=ggtt)
        self.dma.write32(where, value)
        entry.wrote(where, value & 0xFFFF_FFFF)

    def write64(self, address: int, value: int, entry: Entry, *, ggtt: bool) -> None:
        """Write a qword of data at once."""
        where = self.translate(address & ~7, ggtt=ggtt)
        self.dma.write64(where, value)
        entry.wrote(where, value & 0xFFFF_FFFF)
        entry.wrote(where + 4, value >> 32 & 0xFFFF_FFFF)

    def read_bytes(self, address: int, size: int, entry: Entry) -> bytes:
        """Read through the PPGTT, page by page; the record gets the first dword of each page."""
        found = bytearray()
        while len(found) < size:
            position = address + len(found)
            piece = min(size - len(found), PAGE - (position & _OFFSET))
            where = self.translate(position, ggtt=False)
            data = self.dma.read(where, piece)
            entry.read(where, int.from_bytes(data[:4], "little"))
            found += data
        return bytes(found)

    def write_bytes(self, address: int, data: bytes, entry: Entry) -> None:
        """Write through the PPGTT, page by page; the record gets the first dword of each page."""
        done = 0
        while done < len(data):
            position = address + done
            piece = data[done : done + PAGE - (position & _OFFSET)]
            where = self.translate(position, ggtt=False)
            self.dma.write(where, piece)
            entry.wrote(where, int.from_bytes(piece[:4], "little"))
            done += len(piece)

    def peek(self, address: int) -> int:
        """Read a dword through the GGTT for the engine itself."""
        return self.dma.read32(self.translate(address, ggtt=True))

    def poke(self, address: int, value: int) -> None:
        """Write a dword through the GGTT for the engine itself."""
        self.dma.write32(self.translate(address, ggtt=True), value)

    def poke64(self, address: int, value: int) -> None:
        """Write a qword through the GGTT for the engine itself, at once."""
        self.dma.write64(self.translate(address, ggtt=True), value)

    def _walk(self, page: int, *, ggtt: bool) -> int:
        if ggtt:
            return self.ggtt.translate(page)
        if self._ppgtt is None:
            raise FaultError(page, ggtt=False, why="no context is loaded")
        return self._ppgtt.translate(page)

    def _refuse_faulty(self, space: str, where: int, address: int, *, ggtt: bool) -> None:
        if self._misbehaviour.is_faulty(space, where):
            raise FaultError(address, ggtt=ggtt, why="told to fault")
