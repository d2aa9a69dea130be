# SPDX-License-Identifier: MIT
"""The targets: functions that take any bytes. What comes out of one is a bug, unless it is a VfioMigError, caught here.

Everything of vfio_mig that is to be instrumented is imported here, at once.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import struct
import tempfile
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, cast

from tools.fuzz import builders, corpus, gpu, inspection, streams
from tools.fuzz.corpus import Choices, entries_for, manifest_of, signed, tar_of
from tools.fuzz.limits import bounded, require, require_line
from tools.fuzz.printed import printed
from vfio_mig.cli import image as _image  # noqa: F401 -- for the command line, which imports it late
from vfio_mig.cli import inspect as _inspect  # noqa: F401 -- as above
from vfio_mig.cli.main import cli
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.device import Holder
from vfio_mig.dirty.memory import Memory, MemoryMap
from vfio_mig.dirty.ranges import parse_number, parse_range
from vfio_mig.host import lock
from vfio_mig.host.discover import Host
from vfio_mig.image.archive import read_archive
from vfio_mig.image.layout import MEMBER_MAX
from vfio_mig.jobs import check
from vfio_mig.jobs.files import input as input_file  # noqa: F401 -- as above
from vfio_mig.jobs.files.header import load_profile
from vfio_mig.ranges import ADDRESS_END, PAGE
from vfio_mig.uapi.profile import parse_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_mig.image.archive import Archive
    from vfio_mig.jobs.engine.session import Session


class Target(NamedTuple):
    """A target.

    :param run: takes any bytes.
    :param seeds: makes the inputs to start with.
    :param max_len: bytes of an input; larger ones find no more and take longer.
    :param words: what the fuzzer should try to insert.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    max_len: int
    words: tuple[bytes, ...] = ()


class _File:
    """A file in memory that has a path; made when it is first needed."""

    def __init__(self) -> None:
        self._fd = -1

    def fill(self, data: bytes) -> str:
        """Give it this content; returns its path."""
        if self._fd < 0:
            self._fd = os.memfd_create("fuzz")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        return f"/proc/self/fd/{self._fd}"

    def content(self) -> bytes:
        """Return what it holds."""
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def fd_with(self, data: bytes) -> int:
        """Give it this content; returns its fd."""
        self.fill(data)
        return self._fd


_FILE: Final = _File()
_GUEST: Final = _File()


class _Pipe(io.RawIOBase):
    """A stream that cannot seek and gives at most 1,000 bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of a buffer."""
        part = self._data.read(min(len(buffer), 1000))
        buffer[: len(part)] = part
        return len(part)


# Archives ------------------------------------------------------------------------------------------------------------


_GUEST_AT: Final = 0x10000
_GUEST_PAGES: Final = 4


def _take_memory(archive: Archive) -> None:
    """Store an archive's memory where a small guest has its own."""
    path = _GUEST.fill(bytes(_GUEST_PAGES * PAGE))
    expected: dict[int, bytes] = {}
    with Memory([MemoryMap(path, _GUEST_AT)], writable=True) as guest:
        for gpa, size, content in archive.memory():
            require(gpa % PAGE == 0 and size % PAGE == 0 and size > 0, "pages are whole")
            require(gpa + size <= ADDRESS_END, "pages have addresses of 64 bits")
            require(content is None or len(content) == size, "content has its size")
            stored = guest.clear(gpa, size) if content is None else guest.write(gpa, content)
            inside = range(max(gpa, _GUEST_AT), min(gpa + size, _GUEST_AT + _GUEST_PAGES * PAGE), PAGE)
            require(stored == len(inside), "what is the guest's is stored")
            for page in inside:
                expected[page] = bytes(PAGE) if content is None else bytes(content[page - gpa : page - gpa + PAGE])
    places = range(_GUEST_AT, _GUEST_AT + _GUEST_PAGES * PAGE, PAGE)
    wanted = b"".join(expected.get(page, bytes(PAGE)) for page in places)
    require(_GUEST.content() == wanted, "where a page comes again, the later one counts")


_SESSION: Final = SimpleNamespace(
    protocol=SimpleNamespace(name="other", state_size_max=16, knows_states=True),
    found=SimpleNamespace(type="x", driver="x"),
)


def _read_all(file: BinaryIO, size: int) -> bool:
    """Read an archive and all it offers; tells whether it was a good one."""
    whole = False
    with bounded(size), read_archive(file) as archive:
        require(len(archive.state()) == archive.state_size, "the state has its size")
        require(all(len(chunk) <= MEMBER_MAX for chunk in archive.state_chunks()), "chunks have a bound")
        for bitmap in archive.dirty():
            require(len(bitmap.bitmap) == (bitmap.nr_pages + 7) // 8, "a bitmap has its size")
            require(0 <= bitmap.start_page <= bitmap.start_page + bitmap.nr_pages <= ADDRESS_END // PAGE, "64 bits")
        _take_memory(archive)
        require(isinstance(archive.statistics, dict), "statistics are an object")
        for finding in check.header_checks(cast("Session", _SESSION), archive):
            require_line(finding.text)
        whole = True
    return whole  # noqa: RET504 -- bounded() may have swallowed an error


def archive_file(data: bytes) -> None:
    """Read an archive from a file."""
    with open(_FILE.fill(data), "rb") as file:  # noqa: PTH123 -- many times a second
        _read_all(file, len(data))


def archive_pipe(data: bytes) -> None:
    """Read an archive from a pipe, buffered as standard input is."""
    with io.BufferedReader(_Pipe(data)) as pipe:
        _read_all(cast("BinaryIO", pipe), len(data))


def _json(text: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _signed_or(text: bytes, manifest: Any) -> bytes:
    """Return a signed manifest, or the text as it is where there is none to sign."""
    if isinstance(manifest, dict):
        with suppress(ValueError, RecursionError):
            return signed(manifest)
    return text


def _patched(patch: Any) -> dict[str, Any]:
    """Return the good manifest, with an object laid over it or a list of objects over its entries."""
    manifest = manifest_of(entries_for(corpus.GOOD_MEMBERS))
    if isinstance(patch, dict):
        return {**manifest, **patch}
    if isinstance(patch, list):
        for number, (entry, change) in enumerate(zip(manifest["members"], patch, strict=False)):
            manifest["members"][number] = {**entry, **change} if isinstance(change, dict) else change
    return manifest


_KINDS: Final = ("state", "dirty", "pages", "zero")


def _members(choices: Choices) -> bytes:
    """Return an archive of made-up members: kind, content, and what its manifest says of it."""
    members: corpus.Members = [("header.json", corpus.GOOD_HEADER)]
    extras: list[dict[str, int]] = [{}]
    counts = [0] * len(_KINDS)
    while choices and len(members) < 16:  # noqa: PLR2004 -- enough
        kind = choices.number() % (len(_KINDS) + 1)
        content = choices.take(choices.number(2))
        if kind < len(counts):
            name = f"{_KINDS[kind]}/{counts[kind]:04d}"
            counts[kind] += 1
        else:
            name = bytes(byte & 0x7F for byte in choices.text()[:100]).decode("ascii")
        members.append((name, content))
        is_dirty = kind == 1
        extras.append({"start_page": choices.number(8), "nr_pages": choices.number(8)} if is_dirty else {})
    entries = [{**entry, **extra} for entry, extra in zip(entries_for(members), extras, strict=True)]
    return tar_of(members, signed(manifest_of(entries)))


def _archive_of(data: bytes) -> bytes:
    """Build an archive with good checksums: first the way, then header, manifest, its changes, or members."""
    choices = Choices(data)
    way = choices.number() % 5
    if way == 4:  # noqa: PLR2004 -- the ways are listed in the docstring
        return _members(choices)
    text = choices.rest()
    if way == 0:
        members = [("header.json", text), *corpus.GOOD_MEMBERS[1:]]
        return tar_of(members, signed(manifest_of(entries_for(members))))
    manifest = [text, _signed_or(text, _json(text)), _signed_or(text, _patched(_json(text)))][way - 1]
    return tar_of(corpus.GOOD_MEMBERS, manifest)


def manifest(data: bytes) -> None:
    """Read an archive whose checksums are good and whose content is made up, and let `verify` print what it is."""
    archive = _archive_of(data)
    path = _FILE.fill(archive)
    with open(path, "rb") as file:  # noqa: PTH123 -- many times a second
        whole = _read_all(file, len(archive))
    if whole:
        way = len(data) % len(_COMMANDS)
        other = _OTHER.fill(corpus.good_archive()) if _COMMANDS[way][-1] == "diff" else None
        _run(_COMMANDS[way], [path, *([other] if other else [])], len(archive))


_COMMANDS: Final = (["verify"], ["--json", "verify"], ["inspect"], ["--json", "inspect"], ["diff"])
_OTHER: Final = _File()


def _run(command: list[str], files: list[str], size: int) -> None:
    """Run a command of `vfio-mig` and look at what it would print to a terminal."""
    with bounded(size):
        with printed() as lines, cli.make_context("vfio-mig", [*command, *files], color=True) as context:
            cli.invoke(context)
        require(command != ["verify"] or len(lines) == 1, "there is a report")
        if lines != [""]:  # `diff` says nothing where nothing differs
            for line in lines:
                require_line(line, size)


# GVT-g images --------------------------------------------------------------------------------------------------------


def _parse_image(image: bytes | bytearray) -> None:
    with bounded(len(image)):
        parsed = gvt.parse(memoryview(image))
        require(parsed.data_size <= len(image), "an image is no longer than its bytes")
        for record in parsed.records.values():
            require(record.offset + 8 + len(record.payload) <= parsed.data_size, "a record is inside its image")
        for warning in parsed.warnings:
            require_line(warning)
        low, high = parsed.pvinfo.low_size, parsed.pvinfo.high_size
        for device, gm, fits in (
            (parsed.device, (low, high), True),
            (parsed.device ^ 1, (low, high), False),
            (parsed.device, (low + 1, high), False),
        ):
            compared = gvt.compare_target(parsed, vendor=parsed.vendor, device=device, gm=gm)
            require(all(one.saved == one.here for one in compared) == fits, "another device is noticed")


def gvt_image(data: bytes) -> None:
    """Parse the bytes as they are."""
    _parse_image(data)


_PLACES: Final = (8, 12, 16, 24, 536, 540)
"""Offsets of version, data_size, checksum and rest of HEAD, then of the first record's type and size."""


def _places(image: bytes) -> Iterator[int]:
    """Yield offsets that are worth a change: _PLACES, then the payload of PPGTT and WORKLOAD, PVINFO, its windows."""
    yield from _PLACES
    behind = len(image) - len(corpus.PAYLOADS[7])
    yield behind - 8 - len(corpus.PAYLOADS[6])
    yield behind
    pvinfo = image.index(struct.pack("<Q", corpus.PVINFO_MAGIC))
    yield pvinfo
    yield pvinfo + 0x40


_GOOD_IMAGE: Final = corpus.good_image()
_GOOD_PLACES: Final = tuple(_places(_GOOD_IMAGE))


def _image_of(data: bytes) -> bytes | bytearray:
    """Build an image: the good one with changes, or records in any order, mostly of a good size."""
    choices = Choices(data)
    if choices.number() % 2 == 0:
        image = bytearray(_GOOD_IMAGE)
        while choices:
            at = _GOOD_PLACES[choices.number() % len(_GOOD_PLACES)] + choices.number()
            value = choices.take(choices.number() % 33)
            image[at : at + len(value)] = value[: len(image) - at]
        return image
    body = bytearray()
    while choices and len(body) < gvt.IMAGE_MAX:
        kind = choices.number()
        prefix = choices.text()
        shape = choices.number()
        good = corpus.PAYLOADS.get(kind, b"") if not shape & 1 else b""
        payload = prefix + good[len(prefix) :] + bytes(choices.number() if shape & 2 else 0)
        body += corpus.record(kind, payload, choices.number(4) if shape & 4 else None)
    return corpus.head(corpus.HEAD_SIZE + len(body)) + body


def gvt_records(data: bytes) -> None:
    """Parse an image of which some fields and records are made up."""
    _parse_image(_image_of(data))


# Headers, sysfs, syntax ----------------------------------------------------------------------------------------------


def uapi_header(data: bytes) -> None:
    """Take the RFC's numbers from a header."""
    path = _FILE.fill(data)
    with bounded(len(data)):
        values = parse_header(data.decode("utf-8", "replace"))
        require(all(type(value) is int and 0 <= value < 1 << 200 for value in values.values()), "constants are numbers")
    with bounded(len(data)):
        profile = load_profile(path)
        require(profile.stop != profile.start, "stop is not start")
        require(profile.state_index < profile.num_regions, "the state is a region")


class _Tree:
    """A directory that stands for ``/``, emptied for each input."""

    def __init__(self) -> None:
        self.root = ""

    def clear(self) -> None:
        """Empty it."""
        if not self.root:
            self.root = tempfile.mkdtemp(prefix="vfio-mig-fuzz-")
            atexit.register(shutil.rmtree, self.root, ignore_errors=True)
        for name in os.listdir(self.root):  # noqa: PTH208 -- many times a second
            shutil.rmtree(os.path.join(self.root, name))  # noqa: PTH118

    def make(self, path: str, content: bytes | None = None) -> None:
        """Make a directory or a file, and those above."""
        with suppress(OSError):
            path = os.path.join(self.root, path)  # noqa: PTH118
            os.makedirs(path if content is None else os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
            if content is not None:
                with open(path, "wb") as file:  # noqa: PTH123
                    file.write(content)

    def link(self, path: str, target: bytes) -> None:
        """Make a symbolic link."""
        with suppress(OSError):
            os.symlink(target.replace(b"\0", b"?"), os.fsencode(os.path.join(self.root, path)))  # noqa: PTH118, PTH211


_TREE: Final = _Tree()
_OTHER_NAME: Final = 0xFF


def _file_name(choices: Choices) -> str:
    name = os.fsdecode(choices.text().translate(bytes.maketrans(b"\0/", b"??")))
    return name if name not in {"", ".", ".."} else "x"


def _make_device(choices: Choices, bus: str) -> str:
    """Put a device on a bus as the input says: name, form of its entry, bits of what it has, each of them."""
    name = _file_name(choices)
    entry = f"sys/bus/{bus}/devices/{name}"
    form = choices.number() % 4
    _TREE.make(os.path.dirname(entry))  # noqa: PTH120
    if form == 0:  # as the kernel does it
        _TREE.make(f"sys/devices/parent/{name}")
        _TREE.link(entry, os.fsencode(f"../../../devices/parent/{name}"))
    elif form == 1:
        _TREE.make(entry)
    elif form == 2:  # noqa: PLR2004 -- a link to anywhere below the root, or to itself
        _TREE.link(entry, b"./" + choices.text().lstrip(b"/").replace(b"..", b"."))
    else:
        _TREE.make(entry, b"a file")
    has = choices.number()
    for bit, link in enumerate(("iommu_group", "driver", "mdev_type")):
        if has >> bit & 1:
            _TREE.link(f"{entry}/{link}", choices.text())
    for bit, attribute in enumerate(("vendor", "device"), 4):
        if has >> bit & 1:
            _TREE.make(f"{entry}/{attribute}", choices.text())
    if has >> 6 & 1:
        _TREE.make(f"{entry}/vfio-dev/{_file_name(choices)}")
    return name


def sysfs(data: bytes) -> None:
    """Look for devices in a made-up sysfs, by every form of name there is."""
    choices = Choices(data)
    _TREE.clear()
    names: list[str] = []
    while choices and len(names) < 8:  # noqa: PLR2004 -- enough
        what = choices.number()
        if what == _OTHER_NAME:
            names.append(os.fsdecode(choices.text()))
        else:
            names.append(_make_device(choices, ("mdev", "pci")[what % 2]))
    host = Host(_TREE.root)
    with bounded(len(data)):
        for device in host.devices():
            require(device.group is None or device.group >= 0, "a group has a number")
            names += [device.name.upper(), device.name.removeprefix("0000:"), device.sysfs]
            names += [node for node in (device.node, device.cdev) if node is not None]
            names += [f"/dev/vfio/devices/{node}" for node in host.names(device.sysfs, "vfio-dev")]
    for name in names:
        with bounded(len(data), quoted=len(data) + len(name)):
            require(host.find(name).kind in {"mdev", "pci"}, "what is found has a kind")


def syntax(data: bytes) -> None:
    """Take memory, ranges and numbers apart, as users write them, and notes, as jobs leave them in a lock."""
    text = os.fsdecode(data)
    with bounded(len(data), quoted=len(data)):
        require(0 <= parse_number(text) <= ADDRESS_END, "a number has 64 bits")
    with bounded(len(data), quoted=len(data)):
        range_ = parse_range(text)
        require(0 <= range_.start < range_.end <= ADDRESS_END // PAGE, "a range has 64 bits")
    with bounded(len(data), quoted=len(data)):
        _memory(text)
    fd = _FILE.fd_with(data)
    with bounded(len(data)):
        note = lock._read_note(fd)  # noqa: SLF001 -- a lock's own reader is what is tested
        if note:
            _note(note, len(data))


def _memory(text: str) -> None:
    memory = MemoryMap.parse(text)
    require(0 <= memory.gpa <= memory.gpa + memory.size <= ADDRESS_END, "memory has 64 bits")
    if memory.size:
        again = MemoryMap.parse(str(memory))
        same = (again.path, again.gpa, again.size, again.offset) == (
            memory.path,
            memory.gpa,
            memory.size,
            memory.offset,
        )
        require(same, "what is printed can be read")
    if "\0" in text:  # no file has such a name, so it can be tried
        memory.open()


def _note(note: dict[str, Any], size: int) -> None:
    require_line(f"{note['pid']} {note['job']}", size)
    pid = os.getpid()
    holder = lock._identity(Holder(pid, "x", is_hold=True, fd=3))  # noqa: SLF001 -- as above
    left = lock._left({**note, "holder": holder}, holder)  # noqa: SLF001
    if left is not None:
        require_line(str(left), size)
        require_line(left.repair("x"))


_JSON_WORDS: Final = (
    b'"format":"vfio-mig"',
    b'"version":1',
    b'"members":',
    b'"statistics":',
    b"NaN",
    b"\\ud800",
    b"{}",
)

TARGETS: Final = {
    target.name: target
    for target in (
        Target("archive", archive_file, corpus.archive_seeds, 16384, (b"ustar", b"state/0000", b"manifest.json")),
        Target("archive-pipe", archive_pipe, corpus.archive_seeds, 16384, (b"ustar", b"state/0000", b"manifest.json")),
        Target("manifest", manifest, corpus.manifest_seeds, 16384, _JSON_WORDS),
        Target("gvt-image", gvt_image, corpus.image_seeds, 4096),
        Target("gvt-records", gvt_records, corpus.record_seeds, 1024),
        Target(
            "inspect",
            inspection.inspect(_image_of),
            inspection.inspect_seeds,
            16384,
            (builders.mtty()[:24], b"gvt_v2\0\0"),
        ),
        Target("qemu-stream", inspection.qemu_stream, builders.qemu_seeds, 16384, builders.QEMU_WORDS),
        Target("qemu-capabilities", streams.qemu_capabilities, streams.capability_seeds, 4096),
        Target("qemu-pack", streams.qemu_pack, streams.pack_seeds, 4096),
        Target("libvirt", streams.libvirt, streams.libvirt_seeds, 16384, (b"<name>", b"\x1f\x8b\x08")),
        Target("compressed", streams.compressed, streams.compressed_seeds, 4096),
        Target("uapi-header", uapi_header, corpus.header_seeds, 16384, corpus.HEADER_WORDS),
        Target("sysfs", sysfs, corpus.sysfs_seeds, 2048, (corpus.UUID, b"0000:00:02.0", b"/dev/vfio/", b"devices/")),
        Target("gpu-messages", gpu.messages, gpu.message_seeds, gpu.MESSAGES_LENGTH),
        Target("gpu-commands", gpu.commands, gpu.command_seeds, gpu.COMMANDS_LENGTH),
        Target("gpu-control", gpu.control, gpu.control_seeds, gpu.CONTROL_LENGTH, gpu.CONTROL_WORDS),
        Target("syntax", syntax, corpus.syntax_seeds, 8192, (b"0x1000", b"4K", b'"job":"x"', b'"pid":1', b'"left":')),
    )
}
