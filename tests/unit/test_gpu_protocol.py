# SPDX-License-Identifier: MIT
"""vfio-user, with a client of our own: what a well-behaved one sees, and that a hostile one changes nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.gpu_rig import Client, Reply, memfd
from tools.gpu import dma, wire
from tools.gpu.gpu import Gpu
from tools.gpu.wire import ClosedError, Command

if TYPE_CHECKING:
    from collections.abc import Iterator

RW: Final = dma.READ | dma.WRITE
PAGE: Final = 4096


@pytest.fixture
def client() -> Iterator[Client]:
    gpu = Gpu()
    made = Client(gpu)
    yield made
    made.close()
    gpu.close()


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- no path is needed


def is_alive(client: Client) -> bool:
    return client.ask(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0)).error == 0


def dma_map(client: Client, address: int, size: int, fd: int | None, *, offset: int = 0, flags: int = RW) -> int:
    payload = wire.DMA_MAP.pack(32, flags, offset, address, size)
    return client.ask(Command.DMA_MAP, payload, [] if fd is None else [fd]).error


def test_the_version_is_agreed_on_with_what_the_server_can_take(client: Client) -> None:
    reply = client.ask(Command.VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":{}}\0')
    assert struct.unpack_from("<HH", reply.payload) == (0, 0)
    text = reply.payload[4:]
    assert text.endswith(b"\0")
    assert json.loads(text[:-1])["capabilities"] == {
        "max_msg_fds": 8,
        "max_data_xfer_size": 1 << 20,
        "max_dma_maps": 1024,
        "pgsizes": 4096,
    }


@pytest.mark.parametrize("payload", [b"", b"\0\0\0", struct.pack("<HH", 1, 0)])
def test_another_version_is_refused(client: Client, payload: bytes) -> None:
    assert client.ask(Command.VERSION, payload).error == errno.EINVAL


def test_the_device_is_a_pci_function_that_can_be_reset(client: Client) -> None:
    reply = client.ask(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0))
    assert wire.DEVICE_INFO.unpack(reply.payload) == (16, 3, 9, 5)


def test_registers_are_mapped_but_for_the_pages_with_side_effects(client: Client) -> None:
    def ask(argsz: int) -> Reply:
        return client.ask(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(argsz, 0, 0, 0, 0, 0))

    first = ask(32)
    argsz, flags, index, _, size, _ = wire.REGION_INFO.unpack(first.payload)
    assert (flags, index, size, first.fds) == (15, 0, 16 << 20, [])
    full = ask(argsz)
    assert len(full.payload) == argsz
    assert wire.REGION_INFO.unpack_from(full.payload)[3] == 32
    kind, version, following, count, _ = wire.SPARSE_MMAP.unpack_from(full.payload, 32)
    assert (kind, version, following) == (1, 1, 0)
    areas = [wire.SPARSE_AREA.unpack_from(full.payload, 48 + 16 * each) for each in range(count)]
    mapped = {page for start, length in areas for page in range(start, start + length, PAGE)}
    trapped = set(range(0, 16 << 20, PAGE)) - mapped
    assert trapped == {
        0x2000, 0x4000, 0x9000, 0xA000, 0x12000, 0x1A000, 0x22000, 0x42000, 0x44000, 0x45000, 0x46000, 0x64000,
        0xC4000, 0xC5000, 0x138000,
    }  # fmt: skip
    (fd,) = full.fds
    os.pwrite(fd, b"GPU!", 8 << 20)
    assert client.read(0, 8 << 20, 4) == b"GPU!"
    with pytest.raises(PermissionError):  # sealed: who made it shorter would end the server
        os.ftruncate(fd, 0)
    os.close(fd)


@pytest.mark.parametrize(("index", "size", "flags"), [(1, 0, 0), (2, 1 << 30, 3), (4, 64, 3), (7, 4096, 3), (8, 0, 0)])
def test_the_other_regions_have_their_sizes(client: Client, index: int, size: int, flags: int) -> None:
    reply = client.ask(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(32, 0, index, 0, 0, 0))
    assert wire.REGION_INFO.unpack(reply.payload) == (32, flags, index, 0, size, 0)


def test_a_region_that_is_not_there_is_refused(client: Client) -> None:
    assert client.ask(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(32, 0, 9, 0, 0, 0)).error == errno.EINVAL


@pytest.mark.parametrize(("index", "expected"), [(0, (7, 1)), (1, (9, 1)), (2, (0, 0)), (4, (0, 0))])
def test_interrupts_are_intx_and_one_msi(client: Client, index: int, expected: tuple[int, int]) -> None:
    reply = client.ask(Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, index, 0))
    argsz, flags, told, count = wire.IRQ_INFO.unpack(reply.payload)
    assert (argsz, told, (flags, count)) == (16, index, expected)


def test_a_register_is_written_and_read(client: Client) -> None:
    client.write(0, 0x2030, b"\x10\x00\x00\x00")
    assert client.read(0, 0x2030, 4) == b"\x10\x00\x00\x00"


def test_a_write_that_wants_no_reply_gets_none_even_if_it_is_refused(client: Client) -> None:
    good = wire.REGION_ACCESS.pack(0x2030, 0, 4) + b"\x20\x00\x00\x00"
    bad = wire.REGION_ACCESS.pack(1 << 40, 0, 4) + b"\x20\x00\x00\x00"
    for payload in (good, bad):
        client.send(client.message(Command.REGION_WRITE, payload, flags=wire.NO_REPLY))
    client.server.serve(4)
    assert client.receive() is None
    assert client.read(0, 0x2030, 4) == b"\x20\x00\x00\x00"
    assert "EINVAL" in client.log[-1]


def test_a_reset_brings_registers_and_config_space_back(client: Client) -> None:
    client.write(0, 0x2030, b"\x10\x00\x00\x00")
    client.write(7, 4, b"\x06\x00")
    assert client.ask(Command.DEVICE_RESET).error == 0
    assert client.read(0, 0x2030, 4) == bytes(4)
    assert client.read(7, 4, 2) == bytes(2)


@pytest.mark.parametrize("region", [0, 2, 4, 7])
def test_an_access_has_to_lie_within_its_region(client: Client, region: int) -> None:
    size = client.gpu.regions[region].size
    for offset, count in ((size, 4), (size - 2, 4), (2**64 - 4, 8), (0, 0), (0, wire.MAX_DATA + 1), (0, 2**32 - 1)):
        assert client.ask(Command.REGION_READ, wire.REGION_ACCESS.pack(offset, region, count)).error == errno.EINVAL
    assert client.ask(Command.REGION_WRITE, wire.REGION_ACCESS.pack(size, region, 4) + bytes(4)).error == errno.EINVAL
    assert len(client.read(region, size - 4, 4)) == 4


@pytest.mark.parametrize("region", [1, 3, 5, 6, 8, 9, 2**32 - 1])
def test_a_region_without_bytes_is_never_accessed(client: Client, region: int) -> None:
    assert client.ask(Command.REGION_READ, wire.REGION_ACCESS.pack(0, region, 4)).error == errno.EINVAL
    assert client.ask(Command.REGION_WRITE, wire.REGION_ACCESS.pack(0, region, 4) + bytes(4)).error == errno.EINVAL


@pytest.mark.parametrize(("announced", "sent"), [(4, 3), (4, 5), (0, 0), (2**32 - 1, 4)])
def test_a_write_brings_as_many_bytes_as_it_says(client: Client, announced: int, sent: int) -> None:
    payload = wire.REGION_ACCESS.pack(0, 0, announced) + bytes(sent)
    assert client.ask(Command.REGION_WRITE, payload).error == errno.EINVAL


def test_the_largest_access_is_served(client: Client) -> None:
    data = os.urandom(wire.MAX_DATA)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    client.connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    message = client.message(Command.REGION_WRITE, wire.REGION_ACCESS.pack(2 << 20, 0, len(data)) + data)
    exchange(client, message)
    answer = exchange(client, client.message(Command.REGION_READ, wire.REGION_ACCESS.pack(2 << 20, 0, len(data))))
    assert answer[32:] == data


def exchange(client: Client, message: bytes) -> bytes:
    """Send and receive piece by piece, as large messages need."""
    client.socket.setblocking(False)
    view, answer = memoryview(message), bytearray()
    while view or len(answer) < 16 or len(answer) < struct.unpack_from("<I", answer, 4)[0]:
        if view:
            with contextlib.suppress(BlockingIOError):
                view = view[client.socket.send(view) :]
        client.server.serve(1)
        with contextlib.suppress(BlockingIOError):
            answer += client.socket.recv(1 << 20)
    client.socket.setblocking(True)
    return bytes(answer)


@pytest.mark.parametrize("flags", [wire.NO_REPLY, wire.TYPE_REPLY])
def test_a_broken_message_that_wants_no_reply_gets_none(client: Client, flags: int) -> None:
    client.send(client.message(Command.DEVICE_RESET, flags=flags, size=7))
    client.server.serve(2)
    assert client.receive() is None
    assert is_alive(client)


def test_a_client_that_reads_no_answers_is_not_listened_to_and_takes_no_memory(client: Client) -> None:
    request = client.message(Command.REGION_READ, wire.REGION_ACCESS.pack(0, 0, wire.MAX_DATA))
    for _ in range(64):
        client.send(request)
    client.server.serve(1000)
    assert client.connection.sending
    assert len(client.connection._out) == 1
    client.server.serve(1000)
    assert len(client.connection._out) == 1


FIXED: Final = {
    Command.DMA_MAP: wire.DMA_MAP.size,
    Command.DMA_UNMAP: wire.DMA_UNMAP.size,
    Command.DEVICE_GET_INFO: wire.DEVICE_INFO.size,
    Command.DEVICE_GET_REGION_INFO: wire.REGION_INFO.size,
    Command.DEVICE_GET_IRQ_INFO: wire.IRQ_INFO.size,
    Command.REGION_READ: wire.REGION_ACCESS.size,
    Command.DEVICE_RESET: 0,
}


@pytest.mark.parametrize("command", FIXED)
def test_a_payload_of_another_size_is_refused(client: Client, command: Command) -> None:
    for size in {0, 1, FIXED[command] - 1, FIXED[command] + 1, FIXED[command] + 4096} - {-1, FIXED[command]}:
        assert client.ask(command, bytes(size)).error == errno.EINVAL
    assert is_alive(client)


@pytest.mark.parametrize(
    ("command", "layout"),
    [
        (Command.DMA_MAP, wire.DMA_MAP),
        (Command.DMA_UNMAP, wire.DMA_UNMAP),
        (Command.DEVICE_GET_INFO, wire.DEVICE_INFO),
        (Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO),
        (Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO),
        (Command.DEVICE_SET_IRQS, wire.IRQ_SET),
    ],
)
def test_a_structure_that_claims_to_be_shorter_is_refused(
    client: Client, command: Command, layout: struct.Struct
) -> None:
    for argsz in (0, layout.size - 1):
        assert client.ask(command, struct.pack("<I", argsz) + bytes(layout.size - 4)).error == errno.EINVAL


@pytest.mark.parametrize("command", [Command.DEVICE_SET_IRQS, Command.REGION_WRITE, Command.VERSION])
def test_a_payload_without_its_beginning_is_refused(client: Client, command: Command) -> None:
    assert client.ask(command, b"\0").error == errno.EINVAL


@pytest.mark.parametrize("command", [0, 6, 11, 12, 14, 15, 16, 17, 0xFFFF])
def test_an_unknown_command_is_refused(client: Client, command: int) -> None:
    assert client.ask(command, bytes(64)).error == errno.EOPNOTSUPP
    assert is_alive(client)


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_message_shorter_than_its_header_counts_as_a_header(client: Client, size: int) -> None:
    client.send(client.message(Command.DEVICE_GET_INFO, size=size))
    client.server.serve(2)
    reply = client.receive()
    assert reply is not None
    assert (reply.error, reply.payload) == (errno.EINVAL, b"")
    assert is_alive(client)


def test_a_message_that_is_too_long_is_read_and_forgotten(client: Client) -> None:
    size = wire.MAX_MESSAGE + 1
    message = client.message(Command.REGION_WRITE, size=size) + bytes(size - 16)
    answer = exchange(client, message)
    assert wire.HEADER.unpack(answer)[4] == errno.EMSGSIZE
    assert is_alive(client)


def test_a_promise_of_4_gib_takes_no_memory(client: Client) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.send(client.message(Command.REGION_WRITE, size=2**32 - 1) + bytes(3 << 16))
    for left in (2, 1, 0):  # a piece at a time, so that it cannot keep others from being served
        client.server.serve(4)
        assert client.connection._discard == 2**32 - 17 - (3 - left << 16)
    assert client.receive() is None
    assert len(client.connection._payload) == 0


def test_a_message_in_pieces_is_one_message(client: Client) -> None:
    for byte in client.message(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0)):
        client.server.serve(2)
        assert client.receive() is None
        client.send(bytes([byte]))
    client.server.serve(2)
    reply = client.receive()
    assert reply is not None
    assert reply.error == 0


@pytest.mark.parametrize("flags", [2, 3, 15])
def test_a_message_of_an_unknown_type_is_refused(client: Client, flags: int) -> None:
    assert client.ask(Command.DEVICE_RESET, flags=flags).error == errno.EINVAL


def test_a_reply_to_nothing_is_passed_over(client: Client) -> None:
    client.send(client.message(Command.REGION_READ, bytes(16), flags=wire.TYPE_REPLY))
    client.server.serve(2)
    assert client.receive() is None
    assert is_alive(client)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 20])
def test_a_client_that_goes_away_is_noticed_and_leaves_no_file_open(client: Client, cut: int) -> None:
    before = open_files()
    fd = memfd(PAGE)
    message = client.message(Command.DMA_MAP, wire.DMA_MAP.pack(32, RW, 0, 0, PAGE))[:cut]
    if message:
        client.send(message, [fd])
    os.close(fd)
    client.socket.close()
    with pytest.raises(ClosedError):
        client.server.serve(4)
    client.connection.close()
    assert open_files() < before


def test_memory_is_mapped_and_unmapped(client: Client) -> None:
    before = open_files()
    fd = memfd(4 * PAGE)
    assert dma_map(client, 0x1000, 2 * PAGE, fd, offset=2 * PAGE) == 0
    client.gpu.memory.write32(0x1004, 0x12345678)
    assert os.pread(fd, 4, 2 * PAGE + 4) == b"\x78\x56\x34\x12"
    payload = wire.DMA_UNMAP.pack(24, 0, 0x1000, 2 * PAGE)
    reply = client.ask(Command.DMA_UNMAP, payload)
    assert (reply.error, reply.payload) == (0, payload)
    assert client.gpu.memory.read32(0x1004) == 0xFFFF_FFFF
    os.close(fd)
    assert open_files() == before


def test_memory_that_may_not_be_written_is_not(client: Client) -> None:
    fd = memfd(PAGE)
    os.pwrite(fd, b"\1\2\3\4", 0)
    assert dma_map(client, 0, PAGE, fd, flags=dma.READ) == 0
    client.gpu.memory.write32(0, 0)
    client.gpu.memory.write64(0, 0)
    client.gpu.memory.write(0, bytes(16))
    assert client.gpu.memory.read32(0) == 0x04030201
    os.close(fd)


def test_memory_without_a_file_is_occupied_and_out_of_reach(client: Client) -> None:
    assert dma_map(client, 0, PAGE, None) == 0
    assert not client.gpu.memory.reaches(0)
    client.gpu.memory.write32(0, 1)
    assert client.gpu.memory.read32(0) == 0xFFFF_FFFF
    assert dma_map(client, 0, PAGE, None) == errno.EEXIST


@pytest.mark.parametrize(
    ("address", "size", "offset", "flags"),
    [
        (0, 0, 0, RW),
        (1, PAGE, 0, RW),
        (0, PAGE + 1, 0, RW),
        (0, PAGE, 1, RW),
        (2**64 - PAGE, 2 * PAGE, 0, RW),
        (0, 2**64 - PAGE, 0, RW),
        (0, PAGE, 2**64 - PAGE, RW),
        (0, 3 * PAGE, 0, RW),  # the file has two
        (0, PAGE, 2 * PAGE, RW),
        (0, PAGE, 0, 0),
        (0, PAGE, 0, 4),
        (0, PAGE, 0, 2**32 - 1),
    ],
)
def test_a_map_that_cannot_be_is_refused(client: Client, address: int, size: int, offset: int, flags: int) -> None:
    fd = memfd(2 * PAGE)
    before = open_files()
    assert dma_map(client, address, size, fd, offset=offset, flags=flags) == errno.EINVAL
    assert len(client.gpu.memory) == 0
    assert open_files() == before
    os.close(fd)


def test_a_map_may_end_where_addresses_end(client: Client) -> None:
    fd = memfd(PAGE)
    assert dma_map(client, 2**64 - PAGE, PAGE, fd) == 0
    os.close(fd)


@pytest.mark.parametrize(("address", "size"), [(0x4000, 1), (0x3000, 2), (0x5000, 1), (0x5000, 2), (0x3000, 5)])
def test_maps_do_not_overlap(client: Client, address: int, size: int) -> None:
    fd = memfd(8 * PAGE)
    assert dma_map(client, 0x4000, 2 * PAGE, fd) == 0
    assert dma_map(client, address, size * PAGE, fd) == errno.EEXIST
    assert dma_map(client, 0x3000, PAGE, fd) == 0
    assert dma_map(client, 0x6000, PAGE, fd) == 0
    os.close(fd)


def test_memory_is_a_file_that_can_be_mapped(client: Client) -> None:
    read, write = os.pipe()
    sparse = memfd(1 << 62)
    readonly = os.open("/proc/self/fd/" + str(sparse), os.O_RDONLY)
    for fd in (read, write, client.socket.fileno()):
        assert dma_map(client, 0, PAGE, fd) == errno.EINVAL
    assert dma_map(client, 0, 1 << 62, sparse) == errno.ENOMEM
    assert dma_map(client, 0, PAGE, readonly) == errno.EACCES
    assert is_alive(client)
    for fd in (read, write, sparse, readonly):
        os.close(fd)


def test_thousands_of_maps_with_files_come_to_an_end_before_our_files_do(client: Client) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_files()
    fd = memfd(PAGE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 200, hard))
    try:
        codes = [dma_map(client, each * PAGE, PAGE, fd) for each in range(400)]
        assert is_alive(client)
        assert client.ask(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, 2, 0, 0)).error == 0
        assert dma_map(client, 0, PAGE, fd) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert codes[:150] == [0] * 150
    assert codes[-1] == errno.EMFILE
    client.gpu.memory.clear()
    os.close(fd)
    assert open_files() == before


def test_thousands_of_maps_come_to_an_end(client: Client) -> None:
    codes = [dma_map(client, each * PAGE, PAGE, None) for each in range(3000)]
    assert codes.count(0) == dma.MAX_MAPS
    assert set(codes[dma.MAX_MAPS :]) == {errno.ENOSPC}
    assert client.ask(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, 2, 0, 0)).error == 0
    assert len(client.gpu.memory) == 0


@pytest.mark.parametrize(
    ("address", "size", "flags", "error"),
    [
        (0x4000, PAGE, 0, errno.EINVAL),  # a part of the map
        (0x5000, 4 * PAGE, 0, errno.EINVAL),
        (0x9000, PAGE, 0, errno.ENOENT),
        (0x4000, 0, 0, errno.ENOENT),
        (0x4000, 2 * PAGE, 1, errno.EINVAL),  # with a bitmap of dirty pages, which nobody asked us to keep
        (0x4000, 2 * PAGE, 2, errno.EINVAL),
        (0x4000, 2**64 - 1, 0, 0),
    ],
)
def test_an_unmap_takes_whole_maps(client: Client, address: int, size: int, flags: int, error: int) -> None:
    assert dma_map(client, 0x4000, 2 * PAGE, None) == 0
    assert client.ask(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, flags, address, size)).error == error
    assert len(client.gpu.memory) == (1 if error else 0)


def test_file_descriptors_that_nobody_wants_are_closed(client: Client) -> None:
    before = open_files()
    fds = [memfd(PAGE) for _ in range(8)]
    for command in (Command.REGION_READ, Command.DEVICE_RESET, 77, Command.DMA_MAP):
        client.ask(command, wire.DMA_MAP.pack(32, RW, 0, 1 << 30, PAGE) if command == Command.DMA_MAP else b"", fds)
    client.gpu.memory.clear()
    for fd in fds:
        os.close(fd)
    assert open_files() == before


def test_more_file_descriptors_than_allowed_make_no_message(client: Client) -> None:
    fds = [memfd(PAGE) for _ in range(20)]
    before = open_files()
    payload = wire.DMA_MAP.pack(32, RW, 0, 0, PAGE)
    assert client.ask(Command.DMA_MAP, payload, fds).error == errno.EMFILE
    assert len(client.gpu.memory) == 0
    assert open_files() == before
    assert is_alive(client)
    for fd in fds:
        os.close(fd)


def test_a_file_descriptor_belongs_to_the_message_that_it_came_with(client: Client) -> None:
    fd = memfd(PAGE)
    client.send(client.message(Command.DMA_MAP, wire.DMA_MAP.pack(32, RW, 0, 0, PAGE)))
    client.send(client.message(Command.DMA_MAP, wire.DMA_MAP.pack(32, RW, 0, 0x10000, PAGE)), [fd])
    client.server.serve(4)  # up to the first reply
    client.server.serve(4)
    assert (client.gpu.memory.reaches(0), client.gpu.memory.reaches(0x10000)) == (False, True)
    os.close(fd)
