# SPDX-License-Identifier: MIT
"""From graphics addresses to the client's memory: the global GTT, and a context's page tables (PPGTT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.gpu.dma import DmaSpace

PAGE: Final = 4096
_OFFSET: Final = PAGE - 1
_PRESENT: Final = 1 << 0
_LARGE: Final = 1 << 7  # the entry points to memory, not to a table: 2 MiB, 1 GiB
_IPS_64K: Final = 1 << 11  # in a page directory entry: its table has pages of 64 KiB
_ADDRESS: Final = 0x7F_FFFF_F000  # 39 bits
_INDEX: Final = 0x1FF
PPGTT_BITS: Final = 48
LEGACY_32: Final = 1  # addressing modes of a context descriptor
LEGACY_64: Final = 3


class FaultError(Exception):
    """A graphics address leads nowhere.

    :ivar address: the graphics address.
    :ivar ggtt: whether the global GTT was asked.
    """

    def __init__(self, address: int, *, ggtt: bool, why: str) -> None:
        super().__init__(f"{'GGTT' if ggtt else 'PPGTT'} fault at {address:#x}: {why}")
        self.address: Final = address
        self.ggtt: Final = ggtt


class Ggtt:
    """The global GTT, whose entries are in BAR 0."""

    def __init__(self, entries: memoryview) -> None:
        self.entries: Final = entries
        self.size: Final = len(entries) * PAGE  # bytes of graphics addresses

    def translate(self, address: int) -> int:
        """Return the DMA address.

        :raises FaultError: the address is behind the table's end, or its entry is not present.
        """
        if not 0 <= address < self.size:
            raise FaultError(address, ggtt=True, why="behind the table's end")
        entry = int(self.entries[address // PAGE])
        if not entry & _PRESENT:
            raise FaultError(address, ggtt=True, why="not present")
        return entry & _ADDRESS | address & _OFFSET


class Ppgtt:
    """A context's page tables, read from memory at every walk."""

    def __init__(self, dma: DmaSpace, mode: int, roots: Sequence[int]) -> None:
        """Take what the context's image says.

        :param mode: the descriptor's addressing mode; with 48-bit addresses roots[0] is the PML4's address, else the
            four roots are page directories'.
        """
        self._dma: Final = dma
        self._mode: Final = mode
        self._roots: Final = tuple(roots)

    def translate(self, address: int) -> int:
        """Return the DMA address.

        :raises FaultError: an entry on the way is not present, or the mode is unknown.
        """
        address &= (1 << PPGTT_BITS) - 1
        directory = self._directory(address)
        if directory & _LARGE:
            return directory & _ADDRESS & -(1 << 30) | address & ((1 << 30) - 1)
        entry = self._entry(directory, address >> 21, address)
        if entry & _LARGE:
            return entry & _ADDRESS & -(1 << 21) | address & ((1 << 21) - 1)
        if entry & _IPS_64K:
            page = self._entry(entry, (address >> 12) & ~0xF, address)
            return page & _ADDRESS & ~0xFFFF | address & 0xFFFF
        return self._entry(entry, address >> 12, address) & _ADDRESS | address & _OFFSET

    def _directory(self, address: int) -> int:
        """Return the entry that leads to the page directory."""
        if self._mode == LEGACY_64:
            pointers = self._entry(self._roots[0] | _PRESENT, address >> 39, address)
            return self._entry(pointers, address >> 30, address)
        if self._mode == LEGACY_32:
            if address >> 32:
                raise FaultError(address, ggtt=False, why="beyond the 4 GiB of a 32-bit context")
            return self._roots[address >> 30] & _ADDRESS
        raise FaultError(address, ggtt=False, why=f"addressing mode {self._mode} is not supported")

    def _entry(self, table: int, index: int, address: int) -> int:
        where = (table & _ADDRESS) + 8 * (index & _INDEX)
        if not self._dma.reaches(where):
            raise FaultError(address, ggtt=False, why=f"a page table at {where:#x} is outside of the memory")
        entry = self._dma.read64(where)
        if not entry & _PRESENT:
            raise FaultError(address, ggtt=False, why=f"the entry at {where:#x} is not present")
        return entry
