# SPDX-License-Identifier: MIT
"""What the tests of tools/gpu share: a vfio-user client, and a GPU with memory in which work can be laid out."""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from tools.gpu import dma, irq, registers, wire
from tools.gpu.clock import Clock
from tools.gpu.gpu import Gpu
from tools.gpu.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tools.gpu.record import Entry

PAGE: Final = 4096
BASE: Final = 0x1000_0000
"""DMA address of the rig's memory; offsets below are from there."""
SIZE: Final = 1 << 20
GMA: Final = 0x20_0000
"""Graphics address through the GGTT of offset 0. Through the PPGTT an offset is its own address."""
STATUS_PAGE: Final = 0x0
PML4, PDP, PD, PT = 0x30000, 0x31000, 0x32000, 0x33000
BATCH: Final = 0x40000
DATA: Final = 0x50000
BASES: Final = {layout.name: layout.base for layout in registers.ENGINES}
END: Final = 0x0A << 23
PPGTT_BATCH: Final = 0x31 << 23 | 1 << 8 | 1


class Image(NamedTuple):
    """Where a context and its ring are."""

    lrca: int  # offset
    ring: int
    ident: int

    @property
    def state(self) -> int:
        return self.lrca + PAGE


FIRST: Final = Image(0x10000, 0x20000, 0x11)
SECOND: Final = Image(0x12000, 0x21000, 0x22)
THIRD: Final = Image(0x14000, 0x22000, 0x33)


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def memfd(size: int) -> int:
    fd = os.memfd_create("gpu-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class Rig:
    """A GPU that is set up as a driver does it: GGTT, page tables, status pages, interrupts."""

    def __init__(self, max_commands: int = 10_000) -> None:
        self.time: Final = FakeTime()
        self.gpu: Final = Gpu(clock=Clock(self.time), max_commands=max_commands)
        fd = memfd(SIZE)
        self.memory: Final = mmap.mmap(fd, SIZE)
        self.gpu.memory.add(BASE, SIZE, flags=dma.READ | dma.WRITE, fd=fd, offset=0)
        os.close(fd)
        for page in range(SIZE // PAGE):
            self.gpu.mmio.ggtt[GMA // PAGE + page] = BASE + page * PAGE | 1
            struct.pack_into("<Q", self.memory, PT + 8 * page, BASE + page * PAGE | 3)
        for table, entry in ((PML4, PDP), (PDP, PD), (PD, PT)):
            struct.pack_into("<Q", self.memory, table, BASE + entry | 3)
        for name, base in BASES.items():
            self.write(base + registers.RING_HWS_PGA, GMA + self.status_page(name))
        for bank in range(4):
            self.write(registers.GT_IMR + 16 * bank, 0)
            self.write(registers.GT_IER + 16 * bank, 0xFFFF_FFFF)
        self.write(registers.MASTER_IRQ, 1 << 31)
        self.eventfd: Final = os.eventfd(0, os.EFD_NONBLOCK)
        flags = irq.DATA_EVENTFD | irq.ACTION_TRIGGER
        self.gpu.interrupts.set(flags, irq.MSI, 0, 1, data=b"", fds=[os.dup(self.eventfd)])

    def close(self) -> None:
        self.gpu.close()
        self.memory.close()
        os.close(self.eventfd)

    def status_page(self, engine: str) -> int:
        return STATUS_PAGE + PAGE * list(BASES).index(engine)

    def read(self, offset: int) -> int:
        return int.from_bytes(self.gpu.read(0, offset, 4), "little")

    def write(self, offset: int, value: int) -> None:
        self.gpu.write(0, offset, value.to_bytes(4, "little"))

    def get(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.memory, offset)[0])

    def get64(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.memory, offset)[0])

    def put(self, offset: int, *dwords: int) -> None:
        struct.pack_into(f"<{len(dwords)}I", self.memory, offset, *dwords)

    def interrupts(self) -> int:
        try:
            return os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return 0

    def lay_out(self, image: Image, *commands: int, engine: str = "bcs0", control: int = 0x0009_0009) -> None:
        """Write a context's image, whose ring has these dwords."""
        self.put(image.ring, *commands)
        base = BASES[engine]
        state: dict[int, int] = {
            0x02: base + 0x244, 0x03: control, 0x04: base + 0x34, 0x05: 0, 0x06: base + 0x30,
            0x07: 4 * len(commands) + 7 & ~7, 0x08: base + 0x38, 0x09: GMA + image.ring, 0x0A: base + 0x3C, 0x0B: 1,
            0x31: BASE >> 32, 0x33: BASE + PML4,
        }  # fmt: skip
        for index, value in state.items():
            self.put(image.state + 4 * index, value)

    def append(self, image: Image, *commands: int) -> None:
        """Write more dwords into a ring, behind its tail."""
        tail = self.get(image.state + 4 * 0x07)
        self.put(image.ring + tail, *commands)
        self.put(image.state + 4 * 0x07, tail + (4 * len(commands) + 7 & ~7))

    def submit(self, *images: Image, engine: str = "bcs0", mode: int = 3) -> None:
        """Write the ELSP: upper and lower half of the second element, then of the first."""
        words = [(image.ident, GMA + image.lrca | mode << 3 | 1) for image in images] + [(0, 0)] * (2 - len(images))
        for high, low in reversed(words):
            self.write(BASES[engine] + registers.RING_ELSP, high)
            self.write(BASES[engine] + registers.RING_ELSP, low)

    def run(self, *commands: int, engine: str = "bcs0") -> None:
        """Execute a ring's dwords."""
        self.lay_out(FIRST, *commands, engine=engine)
        self.submit(FIRST, engine=engine)

    def batch(self, *commands: int, engine: str = "bcs0") -> None:
        """Execute a batch's dwords through the PPGTT."""
        self.put(BATCH, *commands, END)
        self.run(PPGTT_BATCH, BATCH, 0, 0, engine=engine)

    def head(self, image: Image = FIRST) -> int:
        return self.get(image.state + 4 * 0x05)

    def tail(self, image: Image = FIRST) -> int:
        return self.get(image.state + 4 * 0x07)

    def events(self, engine: str = "bcs0") -> list[tuple[int, int]]:
        """Return the context status buffer: (context, status) from the oldest on; at most six."""
        page = self.status_page(engine)
        last = self.get(page + 0x7C)
        order = [(last + 1 + each) % 6 for each in range(6)]
        entries = [self.get64(page + 0x40 + 8 * each) for each in order]
        return [(entry >> 32, entry & 0xFFFF_FFFF) for entry in entries if entry]

    def state(self, engine: str = "bcs0") -> str:
        return self.gpu.engines[engine].state

    def entries(self, name: str = "") -> list[Entry]:
        return [entry for entry in self.gpu.record.since(0) if name in entry.name]


@contextlib.contextmanager
def rigged(max_commands: int = 10_000) -> Iterator[Rig]:
    rig = Rig(max_commands)
    try:
        yield rig
    finally:
        rig.close()


class Reply(NamedTuple):
    ident: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]


class Client:
    """A vfio-user client, in the same thread as the server that answers it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu: Final = gpu
        self.socket, other = socket.socketpair()
        self.connection: Final = wire.Connection(other)
        self.log: Final[list[str]] = []
        self.server: Final = Server(gpu, self.connection, self.log.append)
        self._ident = 0
        self.socket.settimeout(5)

    def close(self) -> None:
        self.socket.close()
        self.connection.close()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def message(self, command: int, payload: bytes = b"", *, flags: int = 0, size: int | None = None) -> bytes:
        self._ident = self._ident + 1 & 0xFFFF
        return wire.HEADER.pack(self._ident, command, 16 + len(payload) if size is None else size, flags, 0) + payload

    def receive(self) -> Reply | None:
        """Return the reply that has come, or None."""
        self.socket.setblocking(False)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(1 << 21, socket.CMSG_SPACE(32))
        except BlockingIOError:
            return None
        finally:
            self.socket.setblocking(True)
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        ident, command, size, flags, error = wire.HEADER.unpack_from(data)
        assert size == len(data)
        return Reply(ident, command, flags, error, data[16:], list(fds))

    def ask(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> Reply:
        """Send a command, let the server answer it, and return the reply."""
        self.send(self.message(command, payload, flags=flags), fds)
        self.server.serve(16)
        reply = self.receive()
        assert reply is not None
        assert (reply.ident, reply.command, reply.flags & 0xF) == (self._ident, command, 1)
        return reply

    def read(self, region: int, offset: int, size: int) -> bytes:
        reply = self.ask(wire.Command.REGION_READ, wire.REGION_ACCESS.pack(offset, region, size))
        assert reply.error == 0
        return reply.payload[16:]

    def write(self, region: int, offset: int, data: bytes) -> None:
        payload = wire.REGION_ACCESS.pack(offset, region, len(data)) + data
        assert self.ask(wire.Command.REGION_WRITE, payload).error == 0
