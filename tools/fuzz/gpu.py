# SPDX-License-Identifier: MIT
"""Targets for the emulated GPU: its client's messages, what its engines execute, its control protocol."""

from __future__ import annotations

import array
import json
import mmap
import os
import select
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from tools.fuzz.corpus import Choices
from tools.fuzz.limits import bounded, require
from tools.gpu import blit, dma, irq, protocol, registers, wire
from tools.gpu.control_server import Handler
from tools.gpu.gpu import Gpu
from tools.gpu.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE: Final = 4096
_MEMORY: Final = 1 << 18
_BASE: Final = 0x1000_0000
_GMA: Final = 0x20_0000
_LRCA, _RING, _BATCH = 0x10000, 0x12000, 0x14000
_PML4, _PDP, _PD, _PT = 0x20000, 0x21000, 0x22000, 0x23000
_MOST_COMMANDS: Final = 500
_LARGEST_BLIT: Final = 2 * (2 * blit.MAX_ROWS + blit.MAX_BYTES // _PAGE)
_RW: Final = dma.READ | dma.WRITE
_FDS: Final = 3
MESSAGES_LENGTH: Final = 4096
COMMANDS_LENGTH: Final = 2048
CONTROL_LENGTH: Final = 4096
CONTROL_WORDS: Final = (b'"do":', b'"misbehave"', b'"record"', b'"since":', b'"fault":', b'"hang":', b'"id":')


@contextmanager
def _gpu() -> Iterator[Gpu]:
    gpu = Gpu(max_commands=_MOST_COMMANDS)
    try:
        yield gpu
    finally:
        gpu.close()


def _memfd(size: int) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _files(choice: int) -> list[int]:
    """Make the file descriptors that go with a message: memory, an eventfd, memory that may only be read."""
    made = []
    if choice & 1:
        made.append(_memfd(16 * _PAGE))
    if choice >> 1 & 1:
        made.append(os.eventfd(0, os.EFD_NONBLOCK))
    if choice >> 2 & 1:
        made.append(os.open("/dev/null", os.O_RDONLY))
    return made


def _drain(client: socket.socket) -> None:
    with suppress(BlockingIOError):
        while True:
            _, ancillary, _, _ = client.recvmsg(1 << 20, socket.CMSG_SPACE(32))
            for _, _, content in ancillary:
                fds = array.array("i")
                fds.frombytes(content)
                for fd in fds:
                    os.close(fd)


def messages(data: bytes) -> None:
    """Send a client's bytes to the server, cut into messages where they say so; a message's number chooses its fds."""
    with _gpu() as gpu, bounded(len(data)):
        client, theirs = socket.socketpair()
        connection = wire.Connection(theirs)
        server = Server(gpu, connection, lambda _line: None)
        client.setblocking(False)
        try:
            while data:
                size = wire.HEADER.unpack_from(data)[2] if len(data) >= wire.HEADER.size else len(data)
                size = min(max(size, wire.HEADER.size), len(data))
                fds = _files(data[0])
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                client.sendmsg([data[:size]], rights)
                for fd in fds:
                    os.close(fd)
                data = data[size:]
                for _ in range(4):
                    server.serve(4)
                    _drain(client)
                gpu.advance()
            require(len(gpu.memory) <= dma.MAX_MAPS, "DMA maps are bounded")
            require(not select.select([client], [], [], 0)[0], "nothing is said that was not asked for")
        finally:
            connection.close()
            client.close()


def commands(data: bytes) -> None:
    """Execute bytes as commands: in a ring, in a batch, in page tables that the batch itself can change."""
    choices = Choices(data)
    engine = registers.ENGINES[choices.number() % len(registers.ENGINES)]
    mode = choices.number() & 3
    ring = choices.take(choices.number(2) % _PAGE)
    fd = _memfd(_MEMORY)
    with _gpu() as gpu, mmap.mmap(fd, _MEMORY) as memory, bounded(len(data)):
        gpu.memory.add(_BASE, _MEMORY, flags=_RW, fd=fd, offset=0)
        os.close(fd)
        for page in range(_MEMORY // _PAGE):
            gpu.mmio.ggtt[_GMA // _PAGE + page] = _BASE + page * _PAGE | 1
            struct.pack_into("<Q", memory, _PT + 8 * page, _BASE + page * _PAGE | 3)
        for table, entry in ((_PML4, _PDP), (_PDP, _PD), (_PD, _PT)):
            struct.pack_into("<Q", memory, table, _BASE + entry | 3)
        memory[_RING : _RING + len(ring)] = ring
        batch = choices.rest()
        memory[_BATCH : _BATCH + len(batch)] = batch
        state = _LRCA + _PAGE
        tail = len(ring) + 7 & ~7
        for index, value in ((0x07, tail), (0x09, _GMA + _RING), (0x0B, 1), (0x33, _BASE + _PML4)):
            struct.pack_into("<I", memory, state + 4 * index, value)
        gpu.mmio.put(engine.base + registers.RING_HWS_PGA, _GMA)
        gpu.interrupts.set(irq.DATA_NONE | irq.ACTION_TRIGGER, irq.MSI, 0, 0, data=b"", fds=[])
        for value in (0, 0, 1, _GMA + _LRCA | mode << 3 | 1):
            gpu.write(0, engine.base + registers.RING_ELSP, value.to_bytes(4, "little"))
        gpu.advance()
        executed = gpu.engines[engine.name].executed
        # What a blit counts is known when it is done, so the last one may go beyond.
        require(executed <= _MOST_COMMANDS + _LARGEST_BLIT, f"{executed} commands were executed")
        recorded = sum(not entry.name[0].islower() for entry in gpu.record.since(0))
        require(recorded <= _MOST_COMMANDS, f"{recorded} commands are in the record")
        require(gpu.engines[engine.name].state in {"idle", "hung", "blocked"}, "an engine comes to rest")


def control(data: bytes) -> None:
    """Answer each line; an answer is one line of JSON, and what is refused has changed nothing."""
    with _gpu() as gpu, bounded(len(data)):
        handler = Handler(gpu)
        for line in data.split(b"\n"):
            before = handler.answer(b'{"do": "state"}')
            answer = handler.answer(line[: protocol.MAX_REQUEST])
            require(answer.endswith(b"\n") and answer.count(b"\n") == 1, "an answer is one line")
            require(len(answer) <= protocol.MAX_ANSWER, "an answer is bounded")
            if not json.loads(answer)["ok"]:
                require(handler.answer(b'{"do": "state"}') == before, "what is refused changes nothing")


def _message(command: int, payload: bytes = b"", ident: int = 0, flags: int = 0) -> bytes:
    return wire.HEADER.pack(ident, command, wire.HEADER.size + len(payload), flags, 0) + payload


def message_seeds() -> list[bytes]:
    """Return what a client says from its start to its first interrupts, and typical mistakes."""
    command = wire.Command
    access = wire.REGION_ACCESS.pack
    start = [
        _message(command.VERSION, wire.VERSION.pack(0, 1) + b'{"capabilities":{}}\0'),
        _message(command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0)),
        *(
            _message(command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(argsz, 0, index, 0, 0, 0))
            for argsz, index in ((32, 0), (4096, 0), (32, 7))
        ),
        _message(command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, irq.MSI, 0)),
        _message(command.DMA_MAP, wire.DMA_MAP.pack(32, _RW, 0, _BASE, 16 * _PAGE), ident=1),
        _message(command.DMA_MAP, wire.DMA_MAP.pack(32, _RW, 0, 0xFE00_0000, _PAGE)),
        _message(command.DEVICE_SET_IRQS, wire.IRQ_SET.pack(20, 0x24, irq.MSI, 0, 1), ident=2),
    ]
    work = [
        _message(command.REGION_WRITE, access(8 << 20, 0, 8) + (_BASE | 1).to_bytes(8, "little"), flags=wire.NO_REPLY),
        *(_message(command.REGION_WRITE, access(0x22230, 0, 4) + bytes([value, 0, 0, 0])) for value in (0, 0, 1, 0x19)),
        _message(command.REGION_WRITE, access(0, 2, 4) + b"GPU!"),
        _message(command.REGION_READ, access(0, 2, 4)),
        _message(command.REGION_READ, access(0, 7, 256)),
        _message(command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, 0, _BASE, 16 * _PAGE)),
        _message(command.DEVICE_RESET),
    ]
    wrong = [
        _message(command.REGION_READ, access(2**64 - 1, 0, 2**32 - 1)),
        _message(command.DMA_MAP, wire.DMA_MAP.pack(32, _RW, _PAGE, 0, 2**63), ident=7),
        _message(99),
    ]
    return [b"".join([*start, *work]), b"".join([*start[6:], *wrong]), *start, *work, *wrong, bytes(16)]


def command_seeds() -> list[bytes]:
    """Return rings that start a batch, and every command that is executed, once."""
    end = 0x0A << 23
    store = (0x20 << 23 | 2, 0x18000, 0, 1)
    known = [
        store,
        (0x20 << 23 | 1 << 22 | 1 << 21 | 3, _GMA + 0x18000, 0, 1, 2),
        (0x21 << 23 | 1, 0x100, 1),
        (0x22 << 23 | 1, 0x22600, 1),
        (0x23 << 23 | 2, _GMA + 0x18000, _BASE | 1, 0),
        (0x24 << 23 | 2, 0x22358, 0x18000, 0),
        (0x26 << 23 | 1 << 14 | 1 << 8 | 2, 0x18000, 0, 1),
        (0x29 << 23 | 2, 0x22600, 0x18000, 0),
        (0x2A << 23 | 1, 0x22600, 0x22604),
        (0x2E << 23 | 3, 0x18000, 0, 0x18004, 0),
        (0x36 << 23 | 2, 0, 0x18000, 0),
        (0x1C << 23 | 1 << 12 | 2, 0, 0x18000, 0),
        (0x31 << 23 | 1 << 22 | 1 << 8 | 1, _BATCH + 0x100, 0),
        (0x7A00_0004, 1 << 14 | 1 << 8, 0x18000, 0, 1, 2),
        (2 << 29 | 0x50 << 22 | 5, 3 << 24 | 0xF0 << 16 | 64, 0, 2 << 16 | 2, 0x18000, 0, 1),
        (2 << 29 | 0x42 << 22 | 8, 3 << 24 | 64, 0, 2 << 16 | 2, 0x18000, 0, 0, 64, 0x19000, 0),
        (2 << 29 | 0x53 << 22 | 8, 3 << 24 | 0xCC << 16 | 64, 0, 2 << 16 | 2, 0x18000, 0, 0, 64, 0x19000, 0),
        (2 << 29 | 0x42 << 22 | 8, 3 << 24, 0, 2 << 16 | 2, 0x18000, 0, 0, 64, 0x19000, 0),  # rows on each other
        (2 << 29 | 0x50 << 22 | 5, 3 << 24 | 0xF0 << 16 | 64, 0, 600 << 16 | 2, 0x18000, 0, 1),  # counts 600 more
        (2 << 23,),
        (0x31 << 23 | 1 << 8 | 1, _BATCH, 0),  # an endless batch
        (0x20 << 23 | 2, _PT, 0, 0, *store),  # a page table loses an entry
    ]

    def input_of(engine: int, ring: tuple[int, ...], batch: tuple[int, ...]) -> bytes:
        words = struct.pack(f"<{len(ring)}I", *ring)
        return struct.pack("<BBH", engine, 3, len(words)) + words + struct.pack(f"<{len(batch)}I", *batch)

    start = (0x31 << 23 | 1 << 8 | 1, _BATCH, 0, 0)
    return [
        *(input_of(number % 4, start, (*each, end)) for number, each in enumerate(known)),
        *(input_of(number % 4, each, ()) for number, each in enumerate(known)),
    ]


def control_seeds() -> list[bytes]:
    """Return requests of each kind, good and bad."""
    return [
        b'{"do": "state", "id": 1}\n{"do": "behave"}',
        b'{"do": "record", "since": 0, "limit": 5, "engine": "bcs0"}',
        b'{"do": "misbehave", "hang": ["bcs0"], "delay": {"rcs0": 0.5}, "lose_interrupts": 1}',
        b'{"do": "misbehave", "fault": [{"space": "dma", "start": 1, "end": 2}]}',
        b'{"do": "misbehave", "hang": ["bcs0"], "lose_interrupts": -1}',
        b'{"do": "register", "offset": 8192}\n{"do": "translate", "address": 0, "lrca": 0}',
        b'{"do": "state", "id": "\\ud800"}\n[[[[',
    ]
