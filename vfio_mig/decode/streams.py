# SPDX-License-Identifier: MIT
"""Streams of protocol v2 in words. The kernel gives them no common header: each driver's is known by its first bytes.

Layouts: the drivers' own sources in Linux (``samples/vfio-mdev/mtty.c``, ``drivers/vfio/pci/``); that of our sample
driver: ``tools/kmod/README.md``. A stream that nothing is known of is its length and its first bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.decode import gvt as gvt_words
from vfio_mig.decode.section import LISTED_MAX, Decoded, Section, listed
from vfio_mig.uapi.profile import IMAGE_LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.decode.commands import PageReader
    from vfio_mig.image.bytesource import ByteSource

FIRST: Final = 64
"""Bytes that are shown of a stream whose layout is not known."""
RECORDS_MAX: Final = 1 << 20
"""Records that are walked over, at most."""

GVT_SAMPLE_MAGIC: Final = b"gvt_v2\0\0"
_GVT_HEADER: Final = struct.Struct("<QII16sQQQQ")
_GVT_RECORD: Final = struct.Struct("<IIQ")
_GVT_PRECOPY: Final = 1
_GVT_PAGE, _GVT_IMAGE = 1, 2

MTTY_MAGIC: Final = struct.pack("<Q", 0x7E9D09898C3E2C4E)
_MTTY_HEADER: Final = struct.Struct("<QIIII")
_MTTY_PORT: Final = struct.Struct("<8s16sBBBBBxHBBBx")
_MTTY_PORTS_MAX: Final = 2
_UART: Final = ("data", "ier", "iir_fcr", "lcr", "mcr", "lsr", "msr", "scr")

_HISI: Final = {0xAACCFEEDDECADEDE: 2, 0xCDCDCDCDFEEDAACC: 1}
QAT_MAGIC: Final = struct.pack("<I", 0xADF5CAEA)
_QAT: Final = struct.Struct("<IIHHI")
_TAGGED: Final = struct.Struct("<QII")
_TAGS: Final = {0: "data", 1: "stop-copy-size"}
_XE: Final = struct.Struct("<BBBBIQQ")
_XE_TYPES: Final = {1: "descriptor", 2: "trailer", 3: "ggtt", 4: "mmio", 5: "guc", 6: "vram"}
_XE_DESCRIPTOR: Final = 1


def _mtty(stream: ByteSource, _: PageReader) -> Decoded:
    header = stream.read(0, _MTTY_HEADER.size)
    problems = []
    _, major, minor, ports, flags = _MTTY_HEADER.unpack(header)
    sections = [
        Section("header", 0, len(header), {"major": major, "minor": minor, "ports": ports, "flags": flags}),
    ]
    expected = _MTTY_HEADER.size + ports * _MTTY_PORT.size
    if ports > _MTTY_PORTS_MAX or stream.size != expected:
        problems.append(f"{stream.size} bytes, {ports} ports have {expected}")
    for number in range(min(ports, _MTTY_PORTS_MAX)):
        at = _MTTY_HEADER.size + number * _MTTY_PORT.size
        content = stream.read(at, _MTTY_PORT.size)
        if len(content) == _MTTY_PORT.size:
            sections.append(Section(f"port{number}", at, len(content), _mtty_port(content)))
    return Decoded("mtty", sections, problems)


def _mtty_port(content: bytes) -> dict[str, Any]:
    uart, fifo, head, tail, count, dlab, overrun, divisor, fcr, size, trigger = _MTTY_PORT.unpack(content)
    return {
        "registers": dict(zip(_UART, uart, strict=True)),
        "fifo": fifo.hex(),
        "head": head,
        "tail": tail,
        "count": count,
        "dlab": dlab,
        "overrun": overrun,
        "divisor": divisor,
        "fcr": fcr,
        "fifo_size": size,
        "trigger": trigger,
    }


def _gvt_sample(stream: ByteSource, read_page: PageReader) -> Decoded:
    content = stream.read(0, _GVT_HEADER.size)
    if len(content) < _GVT_HEADER.size:
        return Decoded("gvt_sample", [], [f"the header is cut off at byte {len(content)}"])
    _, version, flags, kind, total, filler, seed, rest = _GVT_HEADER.unpack(content)
    name = kind.rstrip(b"\0").decode("ascii", "backslashreplace")
    values = {"version": version, "flags": flags, "vgpu_type": name, "total": total, "filler": filler, "seed": seed}
    sections = [Section("stream", 0, len(content), values)]
    problems = [f"the last word of the header is {rest:#x} instead of 0"] if rest else []
    if not flags & _GVT_PRECOPY and total != stream.size:
        problems.append(f"{stream.size} bytes, the header says {total}")
    at = _GVT_HEADER.size + filler
    if at > stream.size:
        return Decoded("gvt_sample", sections, [*problems, f"{filler} bytes of filler promised, more than there are"])
    sections.append(Section("filler", _GVT_HEADER.size, filler, {"size": filler}))
    for number in range(RECORDS_MAX):
        head = stream.read(at, _GVT_RECORD.size)
        if len(head) < _GVT_RECORD.size:
            return Decoded("gvt_sample", sections, [*problems, f"record at {at:#x}: cut off"])
        record, size, count = _GVT_RECORD.unpack(head)
        if count != number or record not in {_GVT_PAGE, _GVT_IMAGE} or size > stream.size - at - len(head):
            problem = f"record at {at:#x}: number {count}, type {record}, {size} bytes: impossible"
            return Decoded("gvt_sample", sections, [*problems, problem])
        at += len(head)
        if record == _GVT_IMAGE:
            # All records before it are dirty pages
            records = Section("records", at - len(head), 0, {"dirty_pages": number, "image": size, "image_at": at})
            return _gvt_image(stream, Decoded("gvt_sample", [*sections, records], problems), read_page)
        at += size
    return Decoded("gvt_sample", sections, [*problems, f"more than {RECORDS_MAX} records"])


def _gvt_image(stream: ByteSource, so_far: Decoded, read_page: PageReader) -> Decoded:
    """Decode the RFC's image inside our sample's stream; its sections keep their names, their offsets move."""
    at, size = (so_far.sections[-1].values[key] for key in ("image_at", "image"))
    problems = list(so_far.problems)
    if at + size != stream.size:
        problems.append(f"{stream.size - at - size} bytes behind the image")
    if size > IMAGE_LARGEST:
        return so_far._replace(problems=[*problems, f"an image of {size} bytes is too large"])
    inner = gvt_words.decode(stream.read(at, size), read_page)
    sections = [*so_far.sections, *(section._replace(offset=at + section.offset) for section in inner.sections)]
    return Decoded("gvt_sample", sections, problems + inner.problems)


def _hisi(stream: ByteSource, _: PageReader) -> Decoded:
    (magic,) = struct.unpack("<Q", stream.read(0, 8))
    values = {"magic": magic, "version": _HISI[magic], "size": stream.size}
    return Decoded("hisi_acc", [Section("header", 0, 8, values)], [])


def _qat(stream: ByteSource, _: PageReader) -> Decoded:
    content = stream.read(0, _QAT.size)
    if len(content) < _QAT.size:
        return Decoded("qat", [], [f"the header is cut off at byte {len(content)}"])
    magic, version, header_size, sections, size = _QAT.unpack(content)
    values = {"magic": magic, "version": version, "header_size": header_size, "sections": sections, "size": size}
    return Decoded("qat", [Section("header", 0, len(content), values)], [])


def _walk(
    stream: ByteSource, layout: str, step: Callable[[bytes], tuple[dict[str, Any], int] | str], head: int
) -> Decoded:
    """Walk over records that follow each other.

    :param head: bytes of a record's own header.
    :param step: takes it, and says what it is and how many bytes follow, or what is wrong with it.
    """
    at = count = 0
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    while at < stream.size:
        content = stream.read(at, head)
        one = step(content) if len(content) == head else "its header is cut off"
        if count == RECORDS_MAX:
            one = f"it is one of more than {RECORDS_MAX}"
        if isinstance(one, str) or one[1] > stream.size - at - head:
            problem = one if isinstance(one, str) else f"{one[1]} bytes promised, {stream.size - at - head} left"
            problems.append(f"record at {at:#x}: {problem}")
            break
        values, size = one
        count += 1
        if len(found) < LISTED_MAX:
            found.append({"offset": at, "size": size, **values})
        at += head + size
    return Decoded(layout, [Section("records", 0, stream.size, {"records": listed(found, count)})], problems)


def _tagged_step(content: bytes) -> tuple[dict[str, Any], int] | str:
    size, flags, tag = _TAGGED.unpack(content)
    return {"tag": tag, "tag_name": _TAGS.get(tag, "unknown"), "flags": flags}, size


def _mlx5(stream: ByteSource, _: PageReader) -> Decoded:
    return _walk(stream, "mlx5", _tagged_step, _TAGGED.size)


def _tagged(stream: ByteSource, _: PageReader) -> Decoded:
    return _walk(stream, "mlx5-or-virtio", _tagged_step, _TAGGED.size)


def _xe_step(content: bytes) -> tuple[dict[str, Any], int] | str:
    version, kind, tile, gt, flags, offset, size = _XE.unpack(content)
    if version != 1:
        return f"version {version} is unknown"
    name = _XE_TYPES.get(kind, "unknown")
    # A trailer has no content
    return {"type": kind, "name": name, "tile": tile, "gt": gt, "flags": flags, "at": offset}, size


def _xe(stream: ByteSource, _: PageReader) -> Decoded:
    return _walk(stream, "xe", _xe_step, _XE.size)


def _unknown(stream: ByteSource, _: PageReader) -> Decoded:
    first = stream.read(0, FIRST)
    return Decoded("unknown", [Section("state", 0, stream.size, {"size": stream.size, "first_bytes": first.hex()})], [])


def _rfc(stream: ByteSource, read_page: PageReader) -> Decoded:
    return gvt_words.decode(stream.read(0, IMAGE_LARGEST), read_page)


def _magic(magic: bytes, size: int = 0) -> Callable[[bytes, str], bool]:
    """Return what knows a stream by its first bytes; *size*: how many there must be at least."""
    return lambda first, _: first.startswith(magic) and len(first) >= size


def _is_mlx5(first: bytes, driver: str) -> bool:
    return len(first) >= _TAGGED.size and (_TAGGED.unpack_from(first) == (8, 1, 1) or "mlx5" in driver)


def _is_tagged(first: bytes, _driver: str) -> bool:
    """Tell records of mlx5's layout, which virtio has, too, by a first one that has no flag and no tag."""
    if len(first) < _TAGGED.size:
        return False
    size, flags, tag = _TAGGED.unpack_from(first)
    return (flags, tag) == (0, 0) and size > 0


class Layout(NamedTuple):
    """A layout that can be decoded.

    :param begins: takes a stream's first FIRST bytes and the driver's name, and tells whether it is one.
    """

    begins: Callable[[bytes, str], bool]
    decode: Callable[[ByteSource, PageReader], Decoded]


LAYOUTS: Final = (
    Layout(lambda first, _: gvt_words.is_image(first), _rfc),
    Layout(_magic(GVT_SAMPLE_MAGIC), _gvt_sample),
    Layout(_magic(MTTY_MAGIC, _MTTY_HEADER.size), _mtty),
    Layout(_magic(QAT_MAGIC), _qat),
    Layout(lambda first, _: int.from_bytes(first[:8], "little") in _HISI, _hisi),
    Layout(_magic(bytes((1, _XE_DESCRIPTOR)), _XE.size), _xe),
    Layout(_is_mlx5, _mlx5),
    Layout(_is_tagged, _tagged),
)
"""The surest first: a stream is of the first layout that it begins as."""


def decode(stream: ByteSource, read_page: PageReader = gvt_words.no_page, *, driver: str = "") -> Decoded:
    """Decode a state of any driver, as far as its layout is known.

    :param read_page: gives pages of guest memory, for what a GVT-g vGPU has queued.
    :param driver: the driver that the image's header names; some drivers' records look alike.
    """
    first = stream.read(0, FIRST)
    for layout in LAYOUTS:
        if not layout.begins(first, driver):
            continue
        decoded = layout.decode(stream, read_page)
        # Two zero words are not a magic number: without a good first record it is nobody's
        if decoded.layout == "mlx5-or-virtio":
            if not decoded.sections[0].values["records"]["count"]:
                continue
            decoded = decoded._replace(layout="virtio" if "virtio" in driver else decoded.layout)
        return decoded
    return _unknown(stream, read_page)
