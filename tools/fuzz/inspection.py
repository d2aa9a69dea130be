# SPDX-License-Identifier: MIT
"""The targets that look inside saved devices: bare states, queued commands, differences, QEMU migration streams."""

from __future__ import annotations

import io
import json
import os
import struct
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np  # noqa: F401 -- before the address space is bounded

from tools.fuzz import builders, corpus
from tools.fuzz.corpus import Choices
from tools.fuzz.limits import INPUT_FACTOR, bounded, require, require_line, require_linear
from tools.fuzz.printed import printed
from vfio_mig.cli.inspect import print_report
from vfio_mig.decode import qemu
from vfio_mig.decode.differences import state_differences
from vfio_mig.image.bytesource import BufferSource
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.files.inspect import inspect_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.jobs.files.inspect import InspectReport

PAGE: Final = 4096
_RING, _CONTEXT = 0x1000, 0x2000
_ROWS: Final = 100


@cache
def _fd() -> int:
    return os.memfd_create("fuzz-inspection")


def path_of(content: bytes | bytearray) -> str:
    """Return the path of a file in memory that has this content until the next call."""
    os.ftruncate(_fd(), 0)
    os.pwrite(_fd(), content, 0)
    return f"/proc/self/fd/{_fd()}"


def look(content: bytes | bytearray, *, more: int = 0) -> None:
    """Look into a file, and at what would be printed of it.

    :param more: bytes of memory that it may take besides.
    """
    path = path_of(content)
    with bounded(len(content) + more // INPUT_FACTOR):
        _check(inspect_image(path), len(content))


def _check(report: InspectReport, size: int) -> None:
    json.dumps(report.as_dict(), allow_nan=False)
    for problem in report.problems:
        require_line(problem, size)
    for section in report.sections:
        require(section.offset >= 0 <= section.size, "a section is somewhere")
    with printed() as lines:
        print_report(report, _ROWS)
    for line in lines:
        require_line(line, size)


def _queued(choices: Choices) -> bytes:
    """Return an archive with a queued workload whose context and ring the input makes up."""
    payloads: dict[int, bytes] = {**corpus.PAYLOADS, 5: struct.pack("<QQ", _RING | 1, _CONTEXT | 1)}
    context = bytearray(PAGE)
    for offset, mask in ((0x14, 0xFFC), (0x1C, 0xFF8), (0x24, 0x1000), (0x2C, 0xF001)):
        struct.pack_into("<I", context, offset, choices.number(4) & (mask if choices.number() % 4 else 0xFFFFFFFF))
    # LRCA 0, so its registers are in the page behind, where high graphics memory begins
    payloads[7] = struct.pack("<i4II", choices.number() % 5, 0, 0, 1, 0x109, 3)
    body = b"".join(corpus.record(kind, payload) for kind, payload in payloads.items())
    file = io.BytesIO()
    writer = ArchiveWriter(file, {"protocol": "gvt-rfc"})
    writer.add_state(corpus.head(corpus.HEAD_SIZE + len(body)) + body)
    writer.add_pages([(_CONTEXT, bytes(context)), (_RING, choices.rest()[:PAGE].ljust(PAGE, b"\0"))])
    writer.finish()
    return file.getvalue()


def _compare(first: bytes | bytearray, second: bytes | bytearray) -> None:
    with bounded(len(first) + len(second)):
        for found in state_differences(BufferSource(bytes(first)), BufferSource(bytes(second))):
            require(0 < len(found.listed) <= found.total, "what is listed is there")
            json.dumps([one._asdict() for one in found.listed], allow_nan=False)


def inspect(image_of: Callable[[bytes], bytes | bytearray]) -> Callable[[bytes], None]:
    """Return the target: it looks into a bare state, an image, a queue, or compares two states.

    :param image_of: makes a GVT-g image out of an input.
    """

    def run(data: bytes) -> None:
        way, rest = data[0] % 4 if data else 0, data[1:]
        if way == 0:
            look(rest)
        elif way == 1:
            look(image_of(rest))
        elif way == 2:  # noqa: PLR2004 -- as the docstring counts
            look(_queued(Choices(rest)))
        elif rest[:1] < b"\x80":
            _compare(image_of(rest[1:]), corpus.good_image())
        else:
            _compare(rest[1 : len(rest) // 2], rest[len(rest) // 2 :])

    return run


def qemu_stream(data: bytes) -> None:
    """Take a QEMU migration stream apart and look at its devices; the magic number is there already."""
    content = qemu.MAGIC + b"\0\0\0\3" + data
    with bounded(len(content)):
        stream = qemu.read_stream(BufferSource(content))
        for device in stream.devices:
            places: list[tuple[int, int]] = [*device.frames, *([device.config] if device.config else [])]
            for at, size in places:
                require(0 <= at <= at + size <= len(content), "what a device has is in the stream")
        require(stream.complete or bool(stream.problems), "a stream is whole, or it is said why not")
        require_linear(stream.work, len(content))
    look(content)


def inspect_seeds() -> list[bytes]:
    """Return inputs for each way of the target `inspect`."""
    mtty, records = builders.mtty(), corpus.record_seeds()
    registers = (
        struct.pack("<IB", 0, 1) + struct.pack("<IB", 64, 1) + struct.pack("<IB", 0, 1) + struct.pack("<IB", 1, 1)
    )
    commands = struct.pack("<7I", 0x10400002, 4, 0, 0xABCD, 0x18800001, 0, 0)
    return [
        *(b"\0" + one for one in builders.state_seeds()),
        *(b"\1" + one for one in records),
        b"\2" + registers + b"\0" + commands,
        b"\2" + registers + b"\1" + b"\xff" * 40,
        b"\2" + registers[:5] + struct.pack("<IB", 0xFFFFFFFF, 0) + registers[10:] + b"\2",
        b"\3\0" + b"\0",
        *(b"\3\0" + one for one in records),
        b"\3\xff" + mtty + mtty[:-2],
        b"\3\xffabcdabce",
    ]
