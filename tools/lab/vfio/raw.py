# SPDX-License-Identifier: MIT
"""VFIO without the library under test: fds, ioctls, and the sample vGPU's BAR0 by plain file calls.

Numbers are from <linux/vfio.h>, and for the RFC's two ioctls and its region from cdefs/gvt_rfc.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from ioctl_opt import IO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


PAGE: Final = 4096


def request(number: int) -> int:
    return int(IO(ord(";"), 100 + number))


SET_IOMMU: Final = request(2)
GROUP_GET_STATUS: Final = request(3)
GROUP_SET_CONTAINER: Final = request(4)
GROUP_GET_DEVICE_FD: Final = request(6)
DEVICE_GET_INFO: Final = request(7)
DEVICE_GET_REGION_INFO: Final = request(8)
DEVICE_GET_IRQ_INFO: Final = request(9)
DEVICE_SET_IRQS: Final = request(10)
DEVICE_RESET: Final = request(11)
IOMMU_MAP_DMA: Final = request(13)
IOMMU_UNMAP_DMA: Final = request(14)
IOMMU_DIRTY_PAGES: Final = request(17)
STATUS_SET: Final = request(14)
GET_DIRTY: Final = request(15)

TYPE1V2: Final = 3
MAP_READ_WRITE: Final = 3

FLAG_PCI: Final = 1 << 1
FLAG_MIGRATABLE: Final = 1 << 5

REGION_READ: Final = 1
REGION_WRITE: Final = 2
REGION_MMAP: Final = 4
REGION_CAPS: Final = 8
CAP_SPARSE_MMAP: Final = 1
CAP_TYPE: Final = 2

BAR0: Final = 0
BAR2: Final = 2
CONFIG: Final = 7
STATE: Final = 9
STATE_SIZE: Final = 0x900000

STOP: Final = 1
START: Final = 2

IRQ_INTX: Final = 0
IRQ_MSI: Final = 1
IRQ_DATA_NONE: Final = 1 << 0
IRQ_DATA_EVENTFD: Final = 1 << 2
IRQ_ACTION_MASK: Final = 1 << 3
IRQ_ACTION_UNMASK: Final = 1 << 4
IRQ_ACTION_TRIGGER: Final = 1 << 5

DIRTY_START: Final = 1
DIRTY_STOP: Final = 2
DIRTY_GET_BITMAP: Final = 4

# BAR0, cdefs/gvt_pvinfo.h
MMIO_SIZE: Final = 0x200000
GTT: Final = 0x800000
FENCE: Final = 0x100000
PVINFO: Final = 0x78000
PV_MAPPABLE_BASE: Final = PVINFO + 0x40
PV_NONMAPPABLE_BASE: Final = PVINFO + 0x48
PV_PDP: Final = PVINFO + 0x838
PV_G2V_NOTIFY: Final = PVINFO + 0x818


class Memory:
    """Guest memory at *iova*: a shared mapping, anonymous or of a *file* as a VMM with shared RAM has it.

    :param kept: the file is there, and what is in it stays; else it is made anew.
    """

    def __init__(self, iova: int, pages: int, file: Path | None = None, *, kept: bool = False) -> None:
        self.iova: Final = iova
        self.size: Final = pages * PAGE
        with contextlib.ExitStack() as stack:
            fd = -1 if file is None else stack.enter_context(file.open("r+b" if kept else "w+b")).fileno()
            if fd >= 0:
                os.truncate(fd, self.size)
            self.bytes: Final = mmap.mmap(fd, self.size)

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))

    def read(self, iova: int, size: int) -> bytes:
        at = iova - self.iova
        return self.bytes[at : at + size]

    def write(self, iova: int, data: bytes) -> None:
        at = iova - self.iova
        self.bytes[at : at + len(data)] = data

    def u32(self, iova: int) -> int:
        return int.from_bytes(self.read(iova, 4), "little")

    def u64(self, iova: int) -> int:
        return int.from_bytes(self.read(iova, 8), "little")

    def set_u32(self, iova: int, value: int) -> None:
        self.write(iova, value.to_bytes(4, "little"))


class Container:
    """A type1 container with one group in it."""

    def __init__(self, group: int) -> None:
        self.fd: Final = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.group_fd: Final = os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.close(self.fd)
            raise
        fcntl.ioctl(self.group_fd, GROUP_SET_CONTAINER, struct.pack("i", self.fd))
        fcntl.ioctl(self.fd, SET_IOMMU, TYPE1V2)

    def close(self) -> None:
        os.close(self.group_fd)
        os.close(self.fd)

    def map(self, memory: Memory) -> None:
        arg = struct.pack("<IIQQQ", 32, MAP_READ_WRITE, memory.address, memory.iova, memory.size)
        fcntl.ioctl(self.fd, IOMMU_MAP_DMA, arg)

    def unmap(self, memory: Memory) -> int:
        """Unmap; returns how many bytes the kernel let go."""
        reply: bytes = fcntl.ioctl(self.fd, IOMMU_UNMAP_DMA, struct.pack("<IIQQ", 24, 0, memory.iova, memory.size))
        return int(struct.unpack("<IIQQ", reply)[3])

    def dirty_tracking(self, flag: int) -> None:
        fcntl.ioctl(self.fd, IOMMU_DIRTY_PAGES, struct.pack("<II", 8, flag))

    def dirty_pages(self, memory: Memory) -> set[int]:
        """IOVAs of the pages that type1 calls dirty (its own word, not the driver's)."""
        bitmap = ctypes.create_string_buffer(max(8, memory.size // PAGE // 8))
        arg = struct.pack(
            "<IIQQQQQ",
            8 + 40,
            DIRTY_GET_BITMAP,
            memory.iova,
            memory.size,
            PAGE,
            len(bitmap),
            ctypes.addressof(bitmap),
        )
        fcntl.ioctl(self.fd, IOMMU_DIRTY_PAGES, arg)
        return bits(bitmap.raw, memory.iova)


def bits(bitmap: bytes, start: int) -> set[int]:
    """Addresses of the pages whose bits are set, bit 0 of byte 0 being the page at *start*."""
    return {
        start + (8 * index + bit) * PAGE
        for index, byte in enumerate(bitmap)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    }


@dataclass(frozen=True)
class Region:
    flags: int
    size: int
    offset: int
    sparse: tuple[tuple[int, int], ...]
    capability_ids: tuple[int, ...]


def _region(reply: bytes) -> Region:
    _, flags, _, cap, size, offset = struct.unpack_from("<IIIIQQ", reply)
    ids: list[int] = []
    sparse: list[tuple[int, int]] = []
    while cap and flags & REGION_CAPS and len(ids) < 16:
        kind, _, following = struct.unpack_from("<HHI", reply, cap)
        ids.append(kind)
        if kind == CAP_SPARSE_MMAP:
            areas = struct.unpack_from("<I", reply, cap + 8)[0]
            sparse += [struct.unpack_from("<QQ", reply, cap + 16 + 16 * n) for n in range(areas)]
        cap = following
    return Region(flags, size, offset, tuple(sparse), tuple(ids))


class HasGroup(Protocol):
    """Something with an open group fd that has a container."""

    @property
    def group_fd(self) -> int: ...


class Device:
    """An open VFIO device fd of a vGPU, *opened*, or got from a group. Graphics addresses are the guest's."""

    def __init__(self, opened: HasGroup | int, name: str) -> None:
        self.fd: Final = opened if isinstance(opened, int) else self._open(opened, name)
        self._offsets: Final = {index: self.region(index).offset for index in (BAR0, BAR2, CONFIG, STATE)}

    @staticmethod
    def _open(container: HasGroup, name: str) -> int:
        argument = bytearray(name.encode() + b"\0")
        return int(fcntl.ioctl(container.group_fd, GROUP_GET_DEVICE_FD, argument, True))

    def close(self) -> None:
        os.close(self.fd)

    # --- ioctls

    def info(self) -> tuple[int, int, int]:
        """Flags, number of regions, number of interrupts."""
        reply = fcntl.ioctl(self.fd, DEVICE_GET_INFO, struct.pack("<IIIIII", 24, 0, 0, 0, 0, 0))
        flags, regions, irqs = struct.unpack_from("<III", reply, 4)
        return flags, regions, irqs

    def region(self, index: int) -> Region:
        room = 512
        arg = struct.pack("<IIIIQQ", room, 0, index, 0, 0, 0) + bytes(room - 32)
        return _region(fcntl.ioctl(self.fd, DEVICE_GET_REGION_INFO, arg))

    def irq(self, index: int) -> tuple[int, int]:
        """Flags and count of an interrupt."""
        reply = fcntl.ioctl(self.fd, DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        _, flags, _, count = struct.unpack("<IIII", reply)
        return flags, count

    def set_irqs(self, flags: int, index: int, count: int, data: bytes = b"") -> None:
        fcntl.ioctl(self.fd, DEVICE_SET_IRQS, struct.pack("<IIIII", 20 + len(data), flags, index, 0, count) + data)

    def set_eventfd(self, index: int, eventfd: int) -> None:
        self.set_irqs(IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER, index, 1, struct.pack("<i", eventfd))

    def reset(self) -> None:
        fcntl.ioctl(self.fd, DEVICE_RESET)

    def status(self, flags: int, argsz: int = 8) -> None:
        fcntl.ioctl(self.fd, STATUS_SET, struct.pack("<II", argsz, flags))

    def stop(self) -> None:
        self.status(STOP)

    def start(self) -> None:
        self.status(START)

    def dirty_bytes(self, start: int, pages: int, fill: int = 0) -> bytearray:
        """Ask for *pages* from *start*; the whole bitmap with the extra word, as the kernel wrote it."""
        size = (-(-pages // 64) + 1) * 8
        buffer = bytearray(struct.pack("<QQ", start, pages)) + bytearray([fill]) * size
        fcntl.ioctl(self.fd, GET_DIRTY, buffer, True)
        return buffer[16:]

    def dirty_request(self, pages: int) -> None:
        """Ask for *pages* without room for them, to see the refusal."""
        fcntl.ioctl(self.fd, GET_DIRTY, bytearray(struct.pack("<QQ", 0, pages) + bytes(64)), True)

    def dirty(self, memory: Memory) -> set[int]:
        """IOVAs of the pages that the driver calls dirty."""
        pages = memory.size // PAGE
        return bits(bytes(self.dirty_bytes(memory.iova, pages)[: -(-pages // 8)]), memory.iova)

    # --- regions

    def read(self, region: int, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, self._offsets[region] + offset)

    def write(self, region: int, offset: int, data: bytes | bytearray | memoryview) -> int:
        return os.pwrite(self.fd, data, self._offsets[region] + offset)

    def mmap(self, region: int, offset: int, size: int) -> mmap.mmap:
        return mmap.mmap(self.fd, size, offset=self._offsets[region] + offset)

    def save(self) -> bytes:
        """One snapshot, cut at its data_size."""
        whole = self.read(STATE, 0, STATE_SIZE)
        return whole[: int.from_bytes(whole[12:16], "little")]

    def restore(self, image: bytes | bytearray) -> None:
        """Write one image, padded with zeros to the region's size."""
        written = self.write(STATE, 0, bytes(image) + bytes(STATE_SIZE - len(image)))
        if written != STATE_SIZE:
            raise OSError(f"short write of the state: {written}")

    # --- BAR0

    def reg(self, offset: int) -> int:
        return int.from_bytes(self.read(BAR0, offset, 4), "little")

    def set_reg(self, offset: int, value: int) -> None:
        self.write(BAR0, offset, value.to_bytes(4, "little"))

    def reg64(self, offset: int) -> int:
        return int.from_bytes(self.read(BAR0, offset, 8), "little")

    def pte(self, gma: int) -> int:
        return self.reg64(GTT + (gma >> 12) * 8)

    def set_pte(self, gma: int, value: int) -> None:
        self.write(BAR0, GTT + (gma >> 12) * 8, value.to_bytes(8, "little"))

    def fence(self, number: int) -> int:
        return self.reg64(FENCE + 8 * number)

    def set_fence(self, number: int, low: int, high: int) -> None:
        self.set_reg(FENCE + 8 * number + 4, high)
        self.set_reg(FENCE + 8 * number, low)

    def guest_low(self) -> int:
        return self.reg(PV_MAPPABLE_BASE)

    def guest_high(self) -> int:
        return self.reg(PV_NONMAPPABLE_BASE)

    def make_ppgtt(self, level: int, roots: list[int]) -> None:
        """Tell the host about page table roots, as a PV-aware guest does."""
        for index, root in enumerate(roots):
            self.set_reg(PV_PDP + 8 * index, root & 0xFFFFFFFF)
            self.set_reg(PV_PDP + 8 * index + 4, root >> 32)
        self.set_reg(PV_G2V_NOTIFY, {3: 2, 4: 4}[level])


def fails(code: int, call: Callable[..., object], *arguments: object) -> None:
    """Demand that a call raises an OSError with this errno."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno != code:
            raise AssertionError(f"it failed with errno {error.errno}, and not {code}") from error
    else:
        raise AssertionError(f"it worked, and did not fail with errno {code}")
