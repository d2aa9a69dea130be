# SPDX-License-Identifier: MIT
"""The function's configuration space: 4096 bytes, what is writable in it, and its capabilities."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZE: Final = 4096
CONVENTIONAL_SIZE: Final = 256
"""All of it, with zeros from 0x100 on: kvmgt copies 4096 bytes, and what a conventional function has there (ones) sends
QEMU's walk through extended capabilities round in circles. Hence the PCI Express capability."""

_INTEL: Final = 0x8086
_BARS: Final = {0: (0x10, 0x4), 2: (0x18, 0xC), 4: (0x20, 0x1)}
"""BAR: its offset, and its type bits: 64-bit memory; the same, prefetchable; I/O."""
_FIRST_CAPABILITY: Final = 0x34
_PCIE, _MSI, _PM = 0x70, 0xAC, 0xD0
_GMCH_8M_GGTT: Final = 3 << 6  # no stolen memory: gt/intel_ggtt.c, gen8_get_total_gtt_size
_PCIE_V2_RC_ENDPOINT: Final = 0x0092
_PCIE_ROLE_BASED_ERRORS: Final = 0x8000

_FIXED: Final[tuple[tuple[int, str, tuple[int, ...]], ...]] = (
    (0x00, "<H", (_INTEL,)),
    (0x06, "<H", (0x0010,)),  # status: has capabilities
    (0x08, "<BBBB", (6, 0, 0, 3)),  # revision; class 0x030000, VGA
    (0x2C, "<HH", (_INTEL, 0x2212)),  # subsystem
    (_FIRST_CAPABILITY, "<B", (_PCIE,)),
    (0x3D, "<B", (1,)),  # INTA
    (0x50, "<H", (_GMCH_8M_GGTT,)),
    (_PCIE, "<BBHI", (0x10, _MSI, _PCIE_V2_RC_ENDPOINT, _PCIE_ROLE_BASED_ERRORS)),
    (_MSI, "<BB", (0x05, _PM)),
    (_PM, "<BBH", (0x01, 0, 0x0022)),
)
_WRITABLE: Final[tuple[tuple[int, str, tuple[int, ...]], ...]] = (
    (0x04, "<H", (0x0547,)),  # I/O, memory, bus master, parity, SERR, INTx disable
    (0x0C, "<B", (0xFF,)),  # cache line size
    (0x3C, "<B", (0xFF,)),  # interrupt line
    (_PCIE + 8, "<H", (0x7FFF,)),  # device control, but for the bit that starts a function level reset
    (_MSI + 2, "<H", (0x0071,)),  # enable, vectors
    (_MSI + 4, "<IH", (0xFFFF_FFFC, 0xFFFF)),  # address, data
    (_PM + 4, "<H", (0x0103,)),  # power state, PME enable
    (0xE0, "<8I", (0xFFFF_FFFF,) * 8),  # software SCI, ASLE and the OpRegion's address, which firmware and driver share
)


class ConfigSpace:
    """The bytes, with a mask of writable bits."""

    def __init__(self, device: int, bars: Mapping[int, int], *, conventional: bool = False) -> None:
        """Make the space of a function.

        :param device: the PCI device id.
        :param bars: BAR number to size in bytes, a power of two.
        :param conventional: a function of conventional PCI, with 256 bytes and no PCI Express capability.
        """
        self.size: Final = CONVENTIONAL_SIZE if conventional else SIZE
        self._conventional: Final = conventional
        self._device: Final = device
        self._mask: Final = bytearray(SIZE)
        self._bytes: Final = bytearray(SIZE)
        for offset, layout, values in _WRITABLE:
            struct.pack_into(layout, self._mask, offset, *values)
        for bar, size in bars.items():
            offset, kind = _BARS[bar]
            wide = not kind & 1
            address_bits = (1 << 64 if wide else 1 << 32) - size
            self._mask[offset : offset + 4 + 4 * wide] = address_bits.to_bytes(4 + 4 * wide, "little")
        self.reset()

    def reset(self) -> None:
        """Bring all of it to the values after power-on."""
        self._bytes[:] = bytes(SIZE)
        for offset, layout, values in _FIXED:
            struct.pack_into(layout, self._bytes, offset, *values)
        struct.pack_into("<H", self._bytes, 0x02, self._device)
        if self._conventional:
            struct.pack_into("<B", self._bytes, _FIRST_CAPABILITY, _MSI)
        for offset, kind in _BARS.values():
            self._bytes[offset] = kind

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes."""
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; bits that are not writable keep their value."""
        for position, new in enumerate(data, offset):
            mask = self._mask[position]
            self._bytes[position] = self._bytes[position] & ~mask | new & mask
