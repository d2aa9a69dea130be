# SPDX-License-Identifier: MIT
"""An open VFIO device."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig import uapi
from vfio_mig.closing import Closing
from vfio_mig.errors import DeviceError, errno_text
from vfio_mig.uapi import IoctlError, ffi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from vfio_mig.uapi import Request
    from vfio_mig.uapi._generated import CData
    from vfio_mig.words import How

    class Closeable(Protocol):
        """An open file that is not a bare fd."""

        def close(self) -> None:
            """Close it; a second call does nothing."""

    class Dma(Protocol):
        """The guest memory that we have mapped for a device."""

        @property
        def pieces(self) -> tuple[tuple[int, int], ...]:
            """(IOVA, bytes) of each mapping."""


OWN: Final = ("group", "cdev")
"""Ways to a device that nobody else has open."""
READ: Final = ffi.integer_const("VFIO_REGION_INFO_FLAG_READ")
WRITE: Final = ffi.integer_const("VFIO_REGION_INFO_FLAG_WRITE")
MMAP: Final = ffi.integer_const("VFIO_REGION_INFO_FLAG_MMAP")
CAPS: Final = ffi.integer_const("VFIO_REGION_INFO_FLAG_CAPS")
CONFIG_INDEX: Final = ffi.integer_const("VFIO_PCI_CONFIG_REGION_INDEX")
_CAP_SPARSE: Final = ffi.integer_const("VFIO_REGION_INFO_CAP_SPARSE_MMAP")
_CAP_TYPE: Final = ffi.integer_const("VFIO_REGION_INFO_CAP_TYPE")

_PURPOSES: Final[dict[tuple[int | None, int | None], str]] = {
    (0x80008086, 1): "OpRegion",
    (0x80008086, 2): "host bridge's configuration",
    (0x80008086, 3): "LPC bridge's configuration",
    (1, 1): "EDID",
}
# Native order, as the kernel's structs are
_INFO: Final = struct.Struct("=IIIIQQ")  # struct vfio_region_info
_CAP: Final = struct.Struct("=HHI")  # struct vfio_info_cap_header
_PAIR: Final = struct.Struct("=II")
_AREA: Final = struct.Struct("=QQ")
REPLY_MAX: Final = 1 << 16
"""Bytes of a region's capabilities that are accepted; the kernel's longest chains have some hundred."""
CAPS_MAX: Final = 64
"""Capabilities in one chain."""


class Holder(NamedTuple):
    """A process that has a device's group, or the device's own node, open.

    :param command: the kernel's name of it, or ``vfio-mig`` for a `vfio-mig hold`.
    :param is_hold: whether it is a `vfio-mig hold`, or this process itself: nobody else uses the device then.
    :param fd: the number that the fd has there.
    :param node: what it has open: the group's node, or the device's.
    :param thread: the thread whose fd it is, 0 when it is the whole process's.
    """

    pid: int
    command: str
    is_hold: bool
    fd: int
    node: str = ""
    thread: int = 0

    def __str__(self) -> str:
        return f"PID {self.pid} ({self.command})"


class DeviceInfo(NamedTuple):
    """What VFIO_DEVICE_GET_INFO says."""

    flags: int
    num_regions: int
    num_irqs: int


class Region(NamedTuple):
    """A region of a device. Sizes and offsets in bytes; *offset* is its place in the device's file.

    :param type: of the CAP_TYPE capability, None when it has none; so is *subtype*.
    :param sparse_areas: (offset in the region, size) of the mappable parts, when only parts are.
    :param capability_ids: of the whole chain, known or not.
    """

    number: int
    flags: int
    size: int
    offset: int
    type: int | None
    subtype: int | None
    sparse_areas: tuple[tuple[int, int], ...]
    capability_ids: tuple[int, ...]

    @property
    def purpose(self) -> str:
        """What a region beyond PCI's own is for, empty when its type is not known here (<linux/vfio.h>)."""
        return _PURPOSES.get((self.type, self.subtype), "")

    @property
    def access(self) -> str:
        """``rwm``: readable, writable, mappable; ``-`` where it is not."""
        return "".join(
            letter if self.flags & flag else "-" for letter, flag in (("r", READ), ("w", WRITE), ("m", MMAP))
        )


class Device(Closing):
    """An open VFIO device; owns its fd. Not thread-safe: one thread per instance.

    Closing the last fd of a device ends what it was made to do: a vfio-pci function is reset, a GVT-g vGPU drops its
    queued work. Who needs a *stopped* device keeps this object.

    :param name: what the kernel calls it: mdev UUID or PCI address.
    :param fd: the device's fd; this object closes it.
    :param how: how it was reached: opened through its ``group`` or its own node (``cdev``), ``borrowed`` from its
        holder, or ``inherited`` as a group's fd or its own.
    :param node: the node in /dev that it was reached through.
    :param holder: whose it is, if it is borrowed.
    :param pidfd: of the holder, -1 when it has ended; this object closes it. None: its end is not seen.
    :param dma: the guest memory that we have mapped for it, None when that is nobody's or somebody else's business.
    :param owned: what to close after it: its group and container, or its iommufd.
    """

    def __init__(
        self,
        name: str,
        fd: int,
        *,
        how: How = "group",
        node: str | None = None,
        holder: Holder | None = None,
        pidfd: int | None = None,
        dma: Dma | None = None,
        owned: Sequence[int | Closeable] = (),
    ) -> None:
        self.name: Final = name
        self.how: Final = how
        self.node: Final = node
        self.holder: Final = holder
        self.dma: Final = dma
        self._fd = fd
        self._pidfd = pidfd
        self._owned: list[int | Closeable] = [*owned, -1 if pidfd is None else pidfd]

    @property
    def borrowed(self) -> bool:
        """Whether another process has the device open, too."""
        return self.how not in OWN

    @property
    def is_held(self) -> bool:
        """Whether somebody else keeps the device open when this object is closed; an inherited fd says so."""
        if self.holder is None or self._pidfd is None:
            return self.borrowed
        if self._pidfd < 0:
            return False
        import select

        return not select.select([self._pidfd], [], [], 0)[0]  # readable: it has ended

    def fileno(self) -> int:
        """Return the open fd.

        :raises ValueError: the device has been closed.
        """
        if self._fd < 0:
            raise ValueError(f"device {self.name} is closed")
        return self._fd

    def own(self, file: int | Closeable) -> None:
        """Have a file closed together with the device; an fd below 0 is none."""
        self._owned.append(file)

    def close(self) -> None:
        """Close the fd and what came with it; a second call does nothing."""
        files, self._fd, self._pidfd, self._owned = [self._fd, *self._owned], -1, -1, []
        for file in files:
            if not isinstance(file, int):
                file.close()
            elif file >= 0:
                os.close(file)

    def call(self, request: Request, arg: CData | bytearray | int = 0) -> int:
        """Do one ioctl and return the kernel's result.

        :raises DeviceError: names the device, the request and the errno.
        """
        try:
            return uapi.call(self.fileno(), request, arg)
        except IoctlError as error:
            raise DeviceError(str(error), device=self.name, errno=error.errno or 0) from error

    def info(self) -> DeviceInfo:
        """Ask for flags and counts."""
        info = ffi.new("struct vfio_device_info *", {"argsz": ffi.sizeof("struct vfio_device_info")})
        self.call(uapi.DEVICE_GET_INFO, info)
        return DeviceInfo(info.flags, info.num_regions, info.num_irqs)

    def region(self, index: int) -> Region:
        """Ask for one region and decode its capabilities.

        :raises DeviceError: there is no such region, or the kernel's answer makes no sense.
        """
        reply = self._region_reply(index, _INFO.size)
        argsz = _INFO.unpack_from(reply)[0]
        if argsz > len(reply):
            if argsz > REPLY_MAX:
                raise DeviceError(f"region {index}: {argsz} bytes of capabilities", device=self.name)
            reply = self._region_reply(index, argsz)
        return self._decode(index, bytes(reply))

    def regions(self) -> list[Region]:
        """Ask for every region that the device counts; those the kernel refuses are left out."""
        found = []
        for index in range(min(self.info().num_regions, 256)):
            try:
                found.append(self.region(index))
            except DeviceError:
                continue
        return found

    def config(self, offset: int, size: int) -> bytes:
        """Read PCI configuration space."""
        return self.pread(self.region(CONFIG_INDEX), offset, size)

    def pread(self, region: Region, offset: int, size: int) -> bytes:
        """Read *size* bytes at *offset* of a region in one call.

        :raises DeviceError: the kernel refused, or returned fewer bytes.
        """
        try:
            data = os.pread(self.fileno(), size, region.offset + offset)
        except OSError as error:
            raise self._failed(f"reading {size} bytes at {offset:#x} of region {region.number}", error) from error
        if len(data) != size:
            raise DeviceError(f"region {region.number}: {len(data)} bytes read instead of {size}", device=self.name)
        return data

    def pread_into(self, region: Region, offset: int, buffer: bytearray) -> None:
        """Fill *buffer* from *offset* of a region on, in one call.

        :raises DeviceError: the kernel refused, or returned fewer bytes.
        """
        size = len(buffer)
        try:
            done = os.preadv(self.fileno(), [buffer], region.offset + offset)
        except OSError as error:
            raise self._failed(f"reading {size} bytes at {offset:#x} of region {region.number}", error) from error
        if done != size:
            raise DeviceError(f"region {region.number}: {done} bytes read instead of {size}", device=self.name)

    def pwrite(self, region: Region, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write at *offset* of a region in one call.

        :raises DeviceError: the kernel refused, or took only a part.
        """
        size = len(data)
        try:
            done = os.pwrite(self.fileno(), data, region.offset + offset)
        except OSError as error:
            raise self._failed(f"writing {size} bytes at {offset:#x} of region {region.number}", error) from error
        if done != size:
            raise DeviceError(f"region {region.number}: {done} bytes written instead of {size}", device=self.name)

    def reset(self) -> None:
        """Reset the device (VFIO_DEVICE_RESET)."""
        self.call(uapi.DEVICE_RESET)

    def _failed(self, what: str, error: OSError) -> DeviceError:
        number = error.errno or 0
        return DeviceError(f"{what} failed: {errno_text(number)}", device=self.name, errno=number)

    def _region_reply(self, index: int, size: int) -> bytearray:
        # Zeroed before every call: mid-2017 kvmgt leaves size and flags of ROM and VGA as they were
        reply = bytearray(size)
        _INFO.pack_into(reply, 0, size, 0, index, 0, 0, 0)
        self.call(uapi.DEVICE_GET_REGION_INFO, reply)
        return reply

    def _decode(self, index: int, reply: bytes) -> Region:
        _, flags, _, cap, size, offset = _INFO.unpack_from(reply)
        kind = subtype = None
        areas: list[tuple[int, int]] = []
        ids: list[int] = []
        at = cap if flags & CAPS else 0
        while at:
            if at < _INFO.size or at + _CAP.size > len(reply) or len(ids) >= CAPS_MAX:
                raise DeviceError(f"region {index}: broken capability chain at {at:#x}", device=self.name)
            cap_id, _, following = _CAP.unpack_from(reply, at)
            ids.append(cap_id)
            body = reply[at + _CAP.size :]
            if cap_id == _CAP_TYPE and len(body) >= _PAIR.size:
                kind, subtype = _PAIR.unpack_from(body)
            elif cap_id == _CAP_SPARSE and len(body) >= _PAIR.size:
                count = min(_PAIR.unpack_from(body)[0], (len(body) - _PAIR.size) // _AREA.size)
                areas += [_AREA.unpack_from(body, _PAIR.size + number * _AREA.size) for number in range(count)]
            if following and following <= at:
                raise DeviceError(f"region {index}: capability chain turns back at {at:#x}", device=self.name)
            at = following
        return Region(index, flags, size, offset, kind, subtype, tuple(areas), tuple(ids))
