# SPDX-License-Identifier: MIT
"""The server's side of vfio-user for one PCI function: every message is checked, then passed on or refused.

No message ends the server. What is refused changes nothing, and the client is told an errno.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from tools.gpu import dma, wire
from tools.gpu.errors import RefusedError
from tools.gpu.wire import Command

if TYPE_CHECKING:
    import struct
    from collections.abc import Callable, Mapping, Sequence

    from tools.gpu.dma import DmaSpace
    from tools.gpu.irq import Interrupts
    from tools.gpu.wire import Connection, Message

REGIONS: Final = 9  # VFIO_PCI_NUM_REGIONS
BAR0, BAR2, BAR4, CONFIG = 0, 2, 4, 7

_DEVICE_RESET: Final = 1 << 0  # VFIO_DEVICE_FLAGS_*
_DEVICE_PCI: Final = 1 << 1
REGION_READ: Final = 1 << 0  # VFIO_REGION_INFO_FLAG_*
REGION_WRITE: Final = 1 << 1
REGION_MMAP: Final = 1 << 2
REGION_CAPS: Final = 1 << 3
_CAP_SPARSE_MMAP: Final = 1
_UNMAP_ALL: Final = 1 << 1  # VFIO_DMA_UNMAP_FLAG_ALL
_WITH_ARGSZ: Final = (wire.DMA_MAP, wire.DMA_UNMAP, wire.DEVICE_INFO, wire.REGION_INFO, wire.IRQ_INFO, wire.IRQ_SET)
_CAPABILITIES: Final = {
    "capabilities": {
        "max_msg_fds": wire.MAX_FDS,
        "max_data_xfer_size": wire.MAX_DATA,
        "max_dma_maps": dma.MAX_MAPS,
        "pgsizes": dma.PAGE,
    }
}


class Region(NamedTuple):
    """A region of the function.

    :ivar size: bytes.
    :ivar fd: memory that the client may map, where *areas* (offset, size) say so.
    """

    size: int
    fd: int | None = None
    areas: Sequence[tuple[int, int]] = ()


class Function(Protocol):
    """A PCI function. Offsets and sizes have been checked against the regions."""

    @property
    def memory(self) -> DmaSpace:
        """The client's memory."""

    @property
    def interrupts(self) -> Interrupts:
        """The client's eventfds."""

    @property
    def regions(self) -> Mapping[int, Region]:
        """The regions that it has."""

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read from a region."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region."""

    def reset(self) -> None:
        """Bring the function to the state after power-on."""


class Answer(NamedTuple):
    """A reply's payload, and the file descriptors that go with it."""

    payload: bytes = b""
    fds: Sequence[int] = ()


class Server:
    """Answers one client's messages."""

    def __init__(self, function: Function, connection: Connection, log: Callable[[str], None]) -> None:
        self._function: Final = function
        self._connection: Final = connection
        self._log: Final = log
        self._handlers: Final[dict[int, Callable[[Message], Answer]]] = {
            Command.VERSION: _version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
        }

    def serve(self, most: int) -> None:
        """Answer the messages that are there, *most* of them at the most, up to one that the client waits for.

        :raises ClosedError: the client has gone.
        """
        for _ in range(most):
            if self._connection.sending:
                self._connection.flush()
                return
            message = self._connection.receive()
            if message is None:
                return
            try:
                if self._answer(message):
                    return  # it waits for this, and sends nothing before
            finally:
                message.close()

    def _answer(self, message: Message) -> bool:
        """Do what a message asks for; return whether a reply was sent."""
        if message.flags & wire.TYPE_MASK == wire.TYPE_REPLY:
            return False  # we have asked for nothing
        answer, error = Answer(), 0
        try:
            answer = self._execute(message)
        except RefusedError as refused:
            error = refused.errno
            self._log(f"refused command {message.command} with {errno.errorcode.get(error, error)}: {refused}")
        if message.flags & wire.NO_REPLY:
            return False
        flags = wire.TYPE_REPLY | (wire.ERROR if error else 0)
        size = wire.HEADER.size + len(answer.payload)
        header = wire.HEADER.pack(message.ident, message.command, size, flags, error)
        self._connection.send(header + answer.payload, answer.fds)
        return True

    def _execute(self, message: Message) -> Answer:
        if message.fault:
            raise RefusedError(message.fault, "not a message that can be understood")
        if message.flags & wire.TYPE_MASK != wire.TYPE_COMMAND:
            raise RefusedError(errno.EINVAL, f"flags {message.flags:#x} are those of no command")
        handler = self._handlers.get(message.command)
        if handler is None:
            raise RefusedError(errno.EOPNOTSUPP, "not a command of this server")
        return handler(message)

    def _dma_map(self, message: Message) -> Answer:
        _, flags, offset, address, size = _exactly(wire.DMA_MAP, message)
        fd = message.fds[0] if message.fds else None
        self._function.memory.add(address, size, flags=flags, fd=fd, offset=offset)
        self._log(f"DMA map {address:#x}+{size:#x}{'' if message.fds else ', without memory'}")
        return Answer()

    def _dma_unmap(self, message: Message) -> Answer:
        _, flags, address, size = _exactly(wire.DMA_UNMAP, message)
        if flags == _UNMAP_ALL and not address and not size:
            self._function.memory.clear()
        elif flags:
            raise RefusedError(errno.EINVAL, f"DMA unmap with flags {flags:#x}")
        else:
            self._function.memory.remove(address, size)
        self._log(f"DMA unmap {address:#x}+{size:#x}")
        return Answer(message.payload)

    def _device_info(self, message: Message) -> Answer:
        _exactly(wire.DEVICE_INFO, message)
        counts = (REGIONS, len(self._function.interrupts.counts))
        return Answer(wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, _DEVICE_RESET | _DEVICE_PCI, *counts))

    def _region_info(self, message: Message) -> Answer:
        """Tell about a region; a client without room for its capabilities is told their size, and asks again."""
        argsz, _, index, _, _, _ = _exactly(wire.REGION_INFO, message)
        if index >= REGIONS:
            raise RefusedError(errno.EINVAL, f"there is no region {index}")
        region = self._function.regions.get(index, Region(0))
        flags = REGION_READ | REGION_WRITE if region.size else 0
        capabilities = b""
        if region.areas:
            flags |= REGION_MMAP | REGION_CAPS
            capabilities = wire.SPARSE_MMAP.pack(_CAP_SPARSE_MMAP, 1, 0, len(region.areas), 0)
            capabilities += b"".join(wire.SPARSE_AREA.pack(*area) for area in region.areas)
        size = wire.REGION_INFO.size + len(capabilities)
        first = wire.REGION_INFO.size if capabilities else 0
        payload = wire.REGION_INFO.pack(size, flags, index, first, region.size, 0)
        if argsz < size:
            return Answer(payload)
        return Answer(payload + capabilities, [] if region.fd is None else [region.fd])

    def _irq_info(self, message: Message) -> Answer:
        _, _, index, _ = _exactly(wire.IRQ_INFO, message)
        flags, count = self._function.interrupts.info(index)
        return Answer(wire.IRQ_INFO.pack(wire.IRQ_INFO.size, flags, index, count))

    def _set_irqs(self, message: Message) -> Answer:
        _, flags, index, start, count = _start(wire.IRQ_SET, message)
        data = message.payload[wire.IRQ_SET.size :]
        self._function.interrupts.set(flags, index, start, count, data=data, fds=message.fds)
        return Answer()

    def _region_read(self, message: Message) -> Answer:
        offset, region, size = _exactly(wire.REGION_ACCESS, message)
        self._within(region, offset, size)
        return Answer(message.payload + self._function.read(region, offset, size))

    def _region_write(self, message: Message) -> Answer:
        offset, region, size = _start(wire.REGION_ACCESS, message)
        data = message.payload[wire.REGION_ACCESS.size :]
        if len(data) != size:
            raise RefusedError(errno.EINVAL, f"{size} bytes to write are announced, {len(data)} came")
        self._within(region, offset, size)
        self._function.write(region, offset, data)
        return Answer(message.payload[: wire.REGION_ACCESS.size])

    def _within(self, region: int, offset: int, size: int) -> None:
        known = self._function.regions.get(region, Region(0))
        if not 0 < size <= wire.MAX_DATA or offset + size > known.size:
            raise RefusedError(errno.EINVAL, f"access to region {region} at {offset:#x}+{size:#x} is outside of it")

    def _reset(self, message: Message) -> Answer:
        if message.payload:
            raise RefusedError(errno.EINVAL, "a reset has no arguments")
        self._function.reset()
        return Answer()


def _start(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    """Unpack what a payload begins with."""
    if len(message.payload) < layout.size:
        raise RefusedError(errno.EINVAL, f"{len(message.payload)} bytes where {layout.size} belong")
    fields = layout.unpack_from(message.payload)
    if layout in _WITH_ARGSZ and fields[0] < layout.size:
        raise RefusedError(errno.EINVAL, f"argsz is {fields[0]}, less than the {layout.size} bytes of the structure")
    return fields


def _exactly(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    """Unpack a whole payload."""
    if len(message.payload) != layout.size:
        raise RefusedError(errno.EINVAL, f"{len(message.payload)} bytes where {layout.size} belong")
    return _start(layout, message)


def _version(message: Message) -> Answer:
    """Agree on version 0.0. What the client can do does not matter: nothing is sent that it has not asked for."""
    major, _ = _start(wire.VERSION, message)
    if major != 0:
        raise RefusedError(errno.EINVAL, f"version {major} is not known, 0 is")
    return Answer(wire.VERSION.pack(0, 0) + json.dumps(_CAPABILITIES).encode() + b"\0")
