# SPDX-License-Identifier: MIT
"""The targets for QEMU streams whose layout depends on capabilities, and for what a saved device is wrapped in."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tempfile
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

from tools.fuzz import builders, inspection
from tools.fuzz.builders import be64, named, part
from tools.fuzz.corpus import Choices
from tools.fuzz.limits import bounded, require, require_linear
from vfio_mig.decode import qemu
from vfio_mig.decode.qemu_replace import PIECE
from vfio_mig.errors import VfioMigError
from vfio_mig.image.archive import read_archive
from vfio_mig.image.bytesource import BufferSource
from vfio_mig.image.wrapped import HEADER_SIZE
from vfio_mig.jobs.files import qemu as qemu_job
from vfio_mig.jobs.files.open_file import open_saved

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.decode.qemu_parts import QemuStream, VfioDevice
    from vfio_mig.jobs.files.open_file import Saved

_HEAD: Final = b"QEVM\0\0\0\3"
_MIB: Final = 1 << 20
_HUGE: Final = 1 << 21
_NAMES: Final = (b"pc.ram", b"vga.vram", b"/rom@etc/acpi/tables")


class _Made(NamedTuple):
    """A stream, and what is in it: capabilities, and the device's state."""

    content: bytes
    capabilities: list[str]
    page_size: int
    state: bytes
    is_described: bool


class _Maker:
    """Writes a good stream, as QEMU does with the capabilities that the input chooses."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        flags = choices.number()
        self._shared, self._mapped = bool(flags & 1), bool(flags & 2 and not flags & 0x10)
        self._uuid, self._bits, self._advised, self._description = (bool(flags & bit) for bit in (4, 8, 0x10, 0x20))
        self._early, self._disks = bool(flags & 0x40), bool(flags & 0x80)
        self._page = 1 << (10 + choices.number() % 7) if self._bits else 4096
        self._out = bytearray(_HEAD)
        self._described: list[dict[str, object]] = []

    def make(self) -> _Made:
        capabilities = [name for name, on in (("x-ignore-shared", self._shared), ("mapped-ram", self._mapped)) if on]
        self._configuration(capabilities)
        if self._advised:
            self._out += b"\x08" + struct.pack(">HHQQ", 3, 16, _HUGE | 4096, self._page)
        if self._early:
            self._full(b"virtio-mem-early", 1, self._choices.take(self._choices.number() % 32), early=True)
        blocks = self._blocks()
        self._out += builders.begin(7, b"a/vfio", be64(builders.SETUP, builders.END))
        if self._disks:
            self._out += builders.begin(9, b"block", be64((1 << 9) | 9) + named(b"d") + be64((50 << 9) | 4, 2))
            self._out += builders.begin(10, b"dirty-bitmap", b"\x1c\1d\1b" + bytes(5) + b"\x42" + bytes(12) + b"\1")
        self._pages(blocks)
        pieces = [self._choices.text() for _ in range(1 + self._choices.number() % 3)]
        frames = b"".join(map(builders.frame, pieces))
        self._out += part(7, frames + be64(builders.END), last=True)
        self._full(b"timer", 0x20, self._choices.take(24))
        self._full(b"a/vfio", 7, be64(builders.CONFIG) + builders.DEVICE_CONFIG + be64(builders.END))
        self._out += b"\0"
        if self._description:
            values = {"configuration": {}, "page_size": self._page, "devices": self._described}
            text = json.dumps(values).encode()
            self._out += b"\6" + struct.pack(">I", len(text)) + text
        return _Made(bytes(self._out), capabilities, self._page, b"".join(pieces), self._description)

    def _configuration(self, capabilities: list[str]) -> None:
        self._out += b"\7" + struct.pack(">I", 2) + b"pc"
        parts: list[tuple[bytes, bytes]] = []
        if self._bits:
            parts.append((b"target-page-bits", struct.pack(">I", self._page.bit_length() - 1)))
        if capabilities:
            names = b"".join(named(name.encode()) for name in capabilities)
            parts.append((b"capabilities", struct.pack(">I", len(capabilities)) + names))
        if self._uuid:
            parts.append((b"uuid", self._choices.take(16).ljust(16, b"\5")))
        for name, content in parts:
            self._out += b"\5" + named(b"configuration/" + name) + struct.pack(">I", 1) + content

    def _full(self, name: bytes, number: int, content: bytes, *, early: bool = False) -> None:
        if early and not self._description:
            return  # QEMU's description is the only word on how long it is, and memory follows
        if name == b"timer":  # of no known layout: its end is known by its footer alone, which it may not have inside
            content = content.replace(b"\x7e" + struct.pack(">I", number), b"")
        self._out += builders.begin(number, name, content, full=True)
        self._described.append({"name": name.decode(), "instance_id": 0, "size": len(content)})

    def _blocks(self) -> list[tuple[bytes, int]]:
        count = 1 + self._choices.number() % len(_NAMES)
        blocks = [(name, self._page * (1 + self._choices.number() % 4)) for name in _NAMES[:count]]
        total = sum(size for _, size in blocks)
        self._out += struct.pack(">BI", 1, 2) + named(b"ram") + struct.pack(">II", 0, 4)
        self._out += be64(total | builders.RAM_SIZE)
        for name, size in blocks:
            self._out += named(name) + be64(size)
            if self._advised and self._choices.number() % 2:
                self._out += be64(_HUGE)
            if self._shared:
                self._out += be64(self._choices.number(4) * self._page)
            if self._mapped:
                self._map(size)
        self._out += be64(builders.RAM_EOS) + struct.pack(">BI", 0x7E, 2)
        return blocks

    def _map(self, size: int) -> None:
        bitmap = len(self._out) + 28
        pages = -(-(bitmap + -(-(size // self._page) // 64) * 8) // _MIB) * _MIB
        self._out += struct.pack(">IQQQ", 1, self._page, bitmap, pages)
        self._out += bytes(pages + size - len(self._out))

    def _pages(self, blocks: list[tuple[bytes, int]]) -> None:
        content = b""
        for name, size in blocks if not self._mapped else []:
            goes_on = 0
            for at in range(0, size, self._page):
                what = self._choices.number() % 4
                flag = (builders.RAM_PAGE, builders.RAM_ZERO, 0x40, 0x100)[what]
                content += be64(at | flag | goes_on) + (b"" if goes_on else named(name))
                packed = self._choices.text()
                page = self._choices.text().ljust(self._page, b"\x7e")[: self._page]
                content += {
                    builders.RAM_PAGE: page,
                    builders.RAM_ZERO: b"\0",
                    0x40: b"\1" + struct.pack(">H", len(packed)) + packed,
                    0x100: struct.pack(">I", len(packed)) + packed,
                }[flag]
                goes_on = builders.RAM_CONTINUE
        self._out += part(2, content + be64(builders.RAM_EOS), last=True)


def qemu_capabilities(data: bytes) -> None:
    """Take a good stream apart, which must be right to the byte; then the same with changes."""
    choices = Choices(data)
    made = _Maker(choices).make()
    with bounded(len(made.content)):
        stream = qemu.read_stream(BufferSource(made.content))
        require((stream.complete, stream.problems) == (True, []), f"a good stream is understood: {stream.problems}")
        require(stream.proved == made.is_described, "a description proves it")
        require((stream.capabilities, stream.page_size) == (made.capabilities, made.page_size), "it is kept")
        (device,) = stream.devices
        state = b"".join(made.content[at : at + size] for at, size in device.frames)
        require(state == made.state, "the device's state is whole")
        require_linear(stream.work, len(made.content))
    changed = bytearray(made.content)
    while choices:
        at = choices.number(3) % len(changed)
        change = choices.text()
        changed[at : at + len(change)] = change[: len(changed) - at]
    with bounded(len(changed)):
        stream = qemu.read_stream(BufferSource(bytes(changed)))
        require(stream.complete or bool(stream.problems), "a stream is whole, or it is said why not")
        for device in stream.devices:
            for at, size in device.frames:
                require(0 <= at <= at + size <= len(changed), "what a device has is in the stream")
        require_linear(stream.work, len(changed))


def qemu_pack(data: bytes) -> None:
    """Take a device out of a stream as an image, and put another state into it: a good stream, or a changed one."""
    choices = Choices(data)
    state = choices.text()
    content = bytearray(b"\0" * (8 * (choices.number() % 3)))  # a hole in front, as with an offset
    content += _Maker(choices).make().content
    is_good = bool(state) and not choices
    while choices:
        at = choices.number(3) % len(content)
        change = choices.text()
        content[at : at + len(change)] = change[: len(content) - at]
    path = inspection.path_of(content)
    try:
        with bounded(2 * len(content)), open_saved(path) as saved:
            require(saved.stream is not None or not is_good, "a good stream is one")
            if saved.stream is not None:
                _take_and_replace(saved, saved.stream, state, bytes(content))
    except VfioMigError as error:
        require(not is_good, f"a good stream is taken: {error}")


def _take_and_replace(saved: Saved, stream: QemuStream, state: bytes, content: bytes) -> None:
    device = qemu_job.choose_device(stream, "vfio0")
    old = b"".join(saved.source.read(at, size) for at, size in device.frames)
    with tempfile.TemporaryFile() as file:
        image = cast("BinaryIO", file)
        require(qemu_job.write_image(saved, device, image) == image.tell(), "an image has its size")
        image.seek(0)
        with read_archive(image) as archive:
            require(archive.state() == old, "the image has the device's state")
    with tempfile.TemporaryFile() as file:
        made = cast("BinaryIO", file)
        size = qemu_job.write_stream(saved, device, BufferSource(state), made)
        made.seek(0)
        new = made.read()
    require(size == len(new), "a stream has its size")
    require(new.startswith(content[: saved.size - saved.source.size]), "what was in front is there")
    _require_replaced(saved, device, state, new)


def _require_replaced(saved: Saved, device: VfioDevice, state: bytes, new: bytes) -> None:
    """See to it that nothing but one device's state is different."""
    again = qemu.read_stream(BufferSource(new[saved.size - saved.source.size :]))
    require(saved.stream is not None and saved.stream.complete and again.complete, "both are whole")
    heads = 16 * -(-len(state) // PIECE)
    without = saved.source.size - sum(16 + size for _, size in device.frames)
    require(len(new) - (saved.size - saved.source.size) == without + heads + len(state), "nothing else has changed")


def pack_seeds() -> list[bytes]:
    """Return inputs for `qemu-pack`: other states, with and without something in front, and changes."""
    return [
        bytes([len(state)]) + state + bytes([hole]) + seed
        for state in (b"", b"another state", b"\xff" * 200)
        for hole in (0, 1)
        for seed in capability_seeds()[:: 1 + len(state) % 3]
    ]


def libvirt(data: bytes) -> None:
    """Look into what libvirt has written: its header's fields, its XML, and a stream, packed or not."""
    choices = Choices(data)
    order = "<>"[choices.number() % 2]
    version, form = choices.number() % 5, choices.number() % 9
    xml = choices.text()
    size = choices.number(4) if choices.number() % 8 == 0 else len(xml)
    cookie = choices.number()
    magic = b"LibvirtQemudPart" if choices.number() % 16 == 1 else b"LibvirtQemudSave"
    header = struct.pack(order + "16s5I56x", magic, version, size, choices.number(), form, cookie)
    require(len(header) == HEADER_SIZE, "the header has its size")
    rest = choices.rest()
    content = rest if len(rest) % 2 else qemu.MAGIC + b"\0\0\0\3" + rest
    inspection.look(header + xml + (gzip.compress(content, 1) if form == 1 else content))


_PACK: Final[tuple[Callable[[bytes], bytes], ...]] = (
    lambda content: gzip.compress(content, 1, mtime=0),
    lambda content: bz2.compress(content, 1),
    lambda content: lzma.compress(content, preset=0),
)
_XZ_MEMORY: Final = 160 << 20
"""A hostile xz header may ask for as much as a good one of `xz -9` needs."""


def compressed(data: bytes) -> None:
    """Look into something compressed: packed here and changed, in several members, or as it comes."""
    choices = Choices(data)
    way, changes = choices.number() % 8, choices.number() % 4
    members = io.BytesIO()
    for _ in range(1 + choices.number() % 3):
        members.write(
            _PACK[way % 3](choices.text() if choices.number() % 2 else builders.qemu_stream([builders.mtty()]))
        )
    content = bytearray(members.getvalue())
    for _ in range(changes):
        at = choices.number(2) % len(content)
        content[at : at + 1] = choices.take(1)
    content += choices.rest()
    inspection.look(content if way < 6 else bytes(content[:6]) + choices.rest(), more=_XZ_MEMORY)  # noqa: PLR2004 -- some


def capability_seeds() -> list[bytes]:
    """Return inputs for `qemu-capabilities`: each capability alone, all together, and changes."""
    flags = [*(1 << bit for bit in range(8)), 0, 3, 0x23, 0x2F, 0x31, 0x35, 0xFF, 0xED]
    pages = b"\1\2" + b"\0\1" * 4 + b"\3abc\5defgh" * 4
    return [
        *(bytes([flag]) + pages for flag in flags),
        *(bytes([flag]) + b"\6" + pages for flag in (0x28, 0x29, 0x2A)),
        bytes([0x21]) + pages + b"\x10\0\0\1\xff" * 5,
        bytes([0x20]) + pages + b"\x08\0\0\4\0\0\0\0",
        bytes([0x01]) + pages + b"\x2f\0\0\x0dx-ignore-what",
    ]


def libvirt_seeds() -> list[bytes]:
    """Return inputs for `libvirt`."""
    stream = builders.qemu_stream([builders.mtty()])[8:]
    xml = b"\x22<domain><name>vm1</name></domain>\0\0"
    return [
        b"\0\2\0" + xml + b"\1\0\0\1" + stream + b"\0" * (len(stream) % 2),
        b"\1\2\1" + xml + b"\1\0\0\1" + stream,
        b"\0\2\6" + xml + b"\1\5\0\1" + stream,
        b"\0\4\0" + xml + b"\1\0\0\1",
        b"\0\2\7" + xml + b"\1\0\0\1",
        b"\0\2\0\0\0\xff\xff\xff\xff\0\0\1",
        b"\0\2\0\0\1\0\1\1x",
        b"",
    ]


def compressed_seeds() -> list[bytes]:
    """Return inputs for `compressed`."""
    return [
        *(bytes([way, 0, 0, 0]) for way in range(6)),
        *(bytes([way, 0, 2, 0, 1, 5]) + b"hello" + b"\0" + bytes(600) for way in range(3)),
        *(bytes([way, 1, 0, 0, 9, 0, 0xFF]) for way in range(3)),
        *(bytes([way, 0, 0, 1, 3]) + b"abc" + b"behind it" for way in range(8)),
        b"",
    ]
