# SPDX-License-Identifier: MIT
"""A guest of a GVT-g vGPU: as little of its driver as it takes to have work for the GPU.

The work is a context of the blitter whose ring stores a number in guest memory. Registers and commands are those of
gen8 and gen9: Intel's open-source PRM, volumes 2a (commands) and 2c (registers).
"""

from __future__ import annotations

import mmap
import struct
import time
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.verdict import NotApplicable
from vfio_mig.ranges import PAGE
from vfio_mig.uapi import ffi

if TYPE_CHECKING:
    from vfio_mig.conform.kit.v2_device import Kernel
    from vfio_mig.device import Region

GPA: Final = 0x100000
"""Where the guest's memory begins."""
RESULT_GPA: Final = GPA + 2 * PAGE
SECONDS: Final = 10.0
"""How long a workload may take: it is a few commands, but the GPU may be an emulated one."""

# Pages of the guest's memory, and of its graphics memory: the same ones, from the 17th page on
_STATUS, _RESULT = 0, 2
_WORK: Final = (4, 8)
"""Two contexts of two pages, and a ring behind each: the GPU writes the last one back a moment after its work."""
_PAGES: Final = 16
_FIRST: Final = 16

_GTT: Final = ffi.integer_const("GVT_GTT_OFFSET")
_PVINFO: Final = ffi.integer_const("VGT_PVINFO_PAGE")
_MAGIC: Final = ffi.integer_const("VGT_MAGIC")
_LOW: Final = ffi.offsetof("struct vgt_if", "mappable_base")

# The blitter's registers
_BASE: Final = 0x22000
_TAIL, _HEAD, _START, _CONTROL = (_BASE + offset for offset in (0x30, 0x34, 0x38, 0x3C))
_STATUS_PAGE: Final = _BASE + 0x80
_ELSP: Final = _BASE + 0x230
_CONTEXT_CONTROL: Final = _BASE + 0x244
_MODE: Final = _BASE + 0x29C
_EXECLISTS_ON: Final = 1 << 31 | 1 << 15
_CONTEXT_ON: Final = 0x0009_0009  # restore and save, masked
_VALID: Final = 1 << 0 | 1 << 3 | 1 << 8  # of a descriptor: valid, page tables of three levels, privileged

_LOAD_REGISTERS: Final = 0x1100_101B
_STORE: Final = 0x1040_0002  # MI_STORE_DATA_IMM of a dword, by the global GTT


class OwnMemory:
    """Guest memory of our own: a :class:`~vfio_mig.host.guest.GuestMemory`."""

    def __init__(self) -> None:
        self.gpa: Final = GPA
        self.size: Final = _PAGES * PAGE
        self.bytes: Final = mmap.mmap(-1, self.size)

    def __str__(self) -> str:
        return f"{self.size} bytes of our own at {self.gpa:#x}"

    def map(self) -> mmap.mmap:
        """Return it."""
        return self.bytes


class GvtGuest:
    """The driver.

    :param fd: the device's, which was opened with *memory*; stays the caller's.
    :param bar: its registers.
    :raises NotApplicable: it does not say that it is a GVT-g vGPU.
    """

    def __init__(self, kernel: Kernel, fd: int, bar: Region, memory: OwnMemory) -> None:
        self._kernel: Final = kernel
        self._fd: Final = fd
        self._bar: Final = bar
        self._memory: Final = memory
        if self._read(_PVINFO, 8) != _MAGIC:
            raise NotApplicable("it does not say that it is a GVT-g vGPU: no PVINFO")
        self._low: Final = self._read(_PVINFO + _LOW, 4) + _FIRST * PAGE
        self._turn = 0

    def _read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._kernel.pread(self._fd, size, self._bar.offset + offset), "little")

    def _write(self, offset: int, value: int, size: int = 4) -> None:
        self._kernel.pwrite(self._fd, value.to_bytes(size, "little"), self._bar.offset + offset)

    def _address(self, page: int) -> int:
        return self._low + page * PAGE

    def prepare(self) -> None:
        """Map guest memory into graphics memory, and turn the engine on."""
        for page in range(_PAGES):
            self._write(_GTT + (self._address(page) >> 12) * 8, GPA + page * PAGE | 1, 8)
        self._write(_STATUS_PAGE, self._address(_STATUS))
        self._write(_MODE, _EXECLISTS_ON)

    def submit(self, value: int) -> None:
        """Hand the GPU the work of storing *value*; the fourth write does it."""
        context = _WORK[self._turn % 2]
        ring_page, state_page = context + 2, context + 1
        self._turn += 1
        memory = self._memory.bytes
        ring = struct.pack("<4I", _STORE, self._address(_RESULT), 0, value)
        memory[_RESULT * PAGE : (_RESULT + 1) * PAGE] = bytes(PAGE)
        memory[ring_page * PAGE : ring_page * PAGE + len(ring)] = ring
        pairs = (
            (_CONTEXT_CONTROL, _CONTEXT_ON),
            (_HEAD, 0),
            (_TAIL, len(ring)),
            (_START, self._address(ring_page)),
            (_CONTROL, 1),  # a page, and valid
        )
        state = struct.pack("<2I10I", 0, _LOAD_REGISTERS, *(word for pair in pairs for word in pair))
        memory[state_page * PAGE : (state_page + 1) * PAGE] = state.ljust(PAGE, b"\0")
        for word in (0, 0, context, self._address(context) | _VALID):
            self._write(_ELSP, word)

    def result(self) -> int:
        """Return the number that is in guest memory now."""
        at = _RESULT * PAGE
        return int.from_bytes(self._memory.bytes[at : at + 4], "little")

    def has_stored(self, value: int, seconds: float = SECONDS) -> bool:
        """Wait for the number; tells whether it came."""
        deadline = time.monotonic() + seconds
        while self.result() != value:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True
