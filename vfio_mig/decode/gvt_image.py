# SPDX-License-Identifier: MIT
"""The GVT-g device state image of the 2017 RFC: strict parser and the checks before a restore.

Layouts are those of ``cdefs/gvt_image.h`` and ``cdefs/gvt_pvinfo.h``; a test compares. The kernel's own loader
believes what it reads: it ignores the image's length, runs over unknown records, and indexes arrays with numbers
from the image. So nothing reaches a device that :func:`parse` has not understood to its last byte.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from vfio_mig.decode import gvt_ext
from vfio_mig.errors import ImageError
from vfio_mig.ranges import PAGE

IMAGE_MAX: Final = 0x900000
"""Size of the RFC's state region, bytes; an image must be shorter. The header of a kernel may have another."""

NONE, HEAD, CFG_SPACE, VREG, SREG, GTT, PPGTT, WORKLOAD = range(8)
EXT: Final = 0x100
"""Our kvmgt's own, with protocol v2 in place of SREG: :mod:`vfio_mig.decode.gvt_ext`."""

RECORD: Final = struct.Struct("<II")
"""type, payload bytes."""
_HEAD: Final = struct.Struct("<iiQ512x")
HEAD_SIZE: Final = RECORD.size + _HEAD.size
"""Bytes of the HEAD record, header included: the smallest data_size."""
_PPGTT_ENTRY: Final = struct.Struct("<i4x4Q")
_WORKLOAD_ENTRY: Final = struct.Struct("<i4II")
_PVINFO: Final = struct.Struct("<QHHII")
_PVINFO_GM: Final = struct.Struct("<5I")
_PVINFO_GM_AT: Final = 0x40
_PVINFO_AT: Final = 0x78000
_PVINFO_MAGIC: Final = 0x4776544776544776
_REG_SIZE: Final = 0x200000
_CFG_SIZES: Final = (256, 4096)
_RINGS: Final = 5
_ELSP_INDEX_MAX: Final = 3
_PPGTT_LEVELS: Final = (3, 4)
_GM_END: Final = 1 << 32

DIALECTS: Final = {
    "rfc": {PPGTT: "PPGTT", WORKLOAD: "WORKLOAD"},
    "rfc-v1": {PPGTT: "WORKLOAD"},
}
"""Meaning of the record types that trees number differently; the first RFC most likely had no PPGTT record."""
_COMMON: Final = {HEAD: "HEAD", CFG_SPACE: "CFG_SPACE", VREG: "VREG", SREG: "SREG", GTT: "GTT", EXT: "EXT"}

TYPES: Final = {
    (64 << 20, 384 << 20): "8",
    (128 << 20, 512 << 20): "4",
    (256 << 20, 1024 << 20): "2",
    (512 << 20, 2048 << 20): "1",
}
"""(low, high) graphics memory in bytes → *n* of the type name ``GVTg_V4_n`` or ``GVTg_V5_n``."""


class Record(NamedTuple):
    """A record: the kernel's type number, our name for it, offset of its header in the image, payload."""

    kind: int
    name: str
    offset: int
    payload: memoryview


class PvInfo(NamedTuple):
    """What the guest knows of its graphics memory; bases and sizes in bytes of graphics address."""

    version_major: int
    version_minor: int
    vgt_id: int
    caps: int
    low_base: int
    low_size: int
    high_base: int
    high_size: int
    fences: int


class PpgttRoot(NamedTuple):
    """A guest page table: level as its tree numbers it (3 or 4 in ours), root pointers."""

    level: int
    pdp: tuple[int, ...]


class Workload(NamedTuple):
    """A queued submission: engine number, the four ELSP words, the kernel's write counter."""

    ring_id: int
    elsp: tuple[int, ...]
    elsp_index: int


class GvtImage(NamedTuple):
    """A parsed image; records are views of the caller's buffer."""

    data_size: int
    dialect: str
    records: dict[str, Record]
    pvinfo: PvInfo
    vendor: int
    device: int
    ppgtt: list[PpgttRoot]
    workloads: list[Workload]
    warnings: list[str]
    ext: gvt_ext.Ext | None
    """What our kvmgt adds; None in an image of another's."""

    @property
    def type_number(self) -> str | None:
        """*n* of the vGPU type ``GVTg_V*_n``, by the sizes of its graphics memory; None if no type has them."""
        return TYPES.get((self.pvinfo.low_size, self.pvinfo.high_size))


def data_size_of(region: memoryview, *, image_max: int = IMAGE_MAX) -> int:
    """Return how many bytes of a read of the whole state region are the image; behind them are leftovers.

    :raises ImageError: there is no plausible HEAD record.
    """
    if len(region) < HEAD_SIZE:
        raise ImageError(f"HEAD record at 0x0: {HEAD_SIZE} bytes needed, {len(region)} there")
    kind, size = RECORD.unpack_from(region)
    if (kind, size) != (HEAD, _HEAD.size):
        raise ImageError(f"record at 0x0: type {kind} with {size} bytes instead of HEAD with {_HEAD.size}")
    version, data_size, _ = _HEAD.unpack_from(region, RECORD.size)
    if version != 0:
        raise ImageError(f"HEAD record at 0x0: version {version} is unknown")
    if not HEAD_SIZE <= data_size < image_max:
        raise ImageError(f"HEAD record at 0x0: data_size {data_size} is impossible")
    if data_size > len(region):
        raise ImageError(f"cut off at {len(region):#x}: {data_size} bytes promised")
    return int(data_size)


def parse(image: memoryview, *, image_max: int = IMAGE_MAX) -> GvtImage:
    """Take an image apart and check all of it.

    :param image: starts with HEAD; what lies behind data_size is ignored.
    :raises ImageError: names the offset of the first thing that is wrong.
    """
    image = image.cast("B")
    data_size = data_size_of(image, image_max=image_max)
    found = list(_records(image[:data_size]))
    dialect = _dialect(found)
    names = {**_COMMON, **DIALECTS[dialect]}
    records = {names[kind]: Record(kind, names[kind], offset, payload) for kind, offset, payload in found}
    _check_sizes(records)
    pvinfo = _pvinfo(records["VREG"])
    _check_windows(pvinfo, records["VREG"].offset, records["GTT"])
    vendor, device = struct.unpack_from("<HH", records["CFG_SPACE"].payload)
    ppgtt = [PpgttRoot(level, tuple(pdp)) for level, *pdp in _entries(records, "PPGTT", _PPGTT_ENTRY)]
    workloads = [
        Workload(ring, tuple(elsp), index) for ring, *elsp, index in _entries(records, "WORKLOAD", _WORKLOAD_ENTRY)
    ]
    _check_workloads(workloads, records)
    ext = _ext(records)
    if ext is not None:
        gvt_ext.check_crc(image[:data_size], ext)
    new = GvtImage(data_size, dialect, records, pvinfo, vendor, device, ppgtt, workloads, [], ext)
    new.warnings.extend(_warnings(new))
    return new


class Comparison(NamedTuple):
    """One thing that must be the same: in the image, and here; None here is not known."""

    name: str
    saved: str
    here: str | None


def compare_target(image: GvtImage, *, vendor: int, device: int, gm: tuple[int, int] | None) -> list[Comparison]:
    """Compare an image with the device that it is to be loaded into.

    The format names no platform: across GPU generations a restore would be wrong although all sizes match. Where in the
    graphics memory a vGPU is may differ, how much it has may not.

    :param gm: sizes of the target's low and high graphics memory, bytes; None where they cannot be read.
    """
    saved = (image.pvinfo.low_size, image.pvinfo.high_size)
    return [
        Comparison("pci-ids", f"{image.vendor:04x}:{image.device:04x}", f"{vendor:04x}:{device:04x}"),
        Comparison("graphics-memory", _gm_text(saved), None if gm is None else _gm_text(gm)),
    ]


def _gm_text(sizes: tuple[int, int]) -> str:
    if any(size % (1 << 20) for size in sizes):  # of no vGPU, but of images
        return " + ".join(map(str, sizes)) + " bytes"
    return " + ".join(str(size >> 20) for size in sizes) + " MiB"


def _records(image: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (type, offset, payload), HEAD first, each type at most once, up to exactly the end."""
    offset = 0
    seen: set[int] = set()
    while offset < len(image):
        payload_at = offset + RECORD.size
        if payload_at > len(image):
            raise ImageError(f"record at {offset:#x}: header cut off")
        kind, size = RECORD.unpack_from(image, offset)
        if not HEAD <= kind <= WORKLOAD and kind != EXT:
            raise ImageError(f"record at {offset:#x}: unknown type {kind}")
        if kind in seen:
            raise ImageError(f"record at {offset:#x}: second one of type {kind}")
        if size > len(image) - payload_at:
            raise ImageError(f"record at {offset:#x}: {size} bytes promised, {len(image) - payload_at} left")
        seen.add(kind)
        yield kind, offset, image[payload_at : payload_at + size]
        offset = payload_at + size


def _dialect(found: list[tuple[int, int, memoryview]]) -> str:
    """With a record 7 the numbering is 6 PPGTT, 7 WORKLOAD; an image that ends with record 6 has 6 WORKLOAD."""
    kinds = [kind for kind, _, _ in found]
    if PPGTT in kinds and WORKLOAD not in kinds:
        if kinds[-1] != PPGTT:
            raise ImageError(f"record at {found[kinds.index(PPGTT)][1]:#x}: type 6 fits no known order of records")
        return "rfc-v1"
    return "rfc"


def _check_sizes(records: dict[str, Record]) -> None:
    for name in ("CFG_SPACE", *(() if "EXT" in records else ("SREG",)), "VREG", "GTT"):
        if name not in records:
            raise ImageError(f"no {name} record")
    for record in records.values():
        size = len(record.payload)
        good = {
            "CFG_SPACE": size in _CFG_SIZES,
            "SREG": size == _REG_SIZE,
            "VREG": size == _REG_SIZE,
            "GTT": size > 0 and size % 8 == 0,
            "PPGTT": size % _PPGTT_ENTRY.size == 0,
            "WORKLOAD": size % _WORKLOAD_ENTRY.size == 0,
        }
        if not good.get(record.name, True):
            raise ImageError(f"{record.name} record at {record.offset:#x}: {size} bytes are impossible")


def _ext(records: dict[str, Record]) -> gvt_ext.Ext | None:
    found = [
        gvt_ext.find(record.payload, record.offset + RECORD.size, own=name == "EXT")
        for name, record in records.items()
        if name in {"SREG", "EXT"}
    ]
    present = [ext for ext in found if ext is not None]
    if len(present) > 1:
        raise ImageError(f"EXT record at {records['EXT'].offset:#x}: SREG has the same")
    return present[0] if present else None


def _pvinfo(vreg: Record) -> PvInfo:
    magic, major, minor, vgt_id, caps = _PVINFO.unpack_from(vreg.payload, _PVINFO_AT)
    if magic != _PVINFO_MAGIC or major != 1:
        at = vreg.offset + RECORD.size + _PVINFO_AT
        raise ImageError(f"PVINFO at {at:#x}: magic {magic:#x}, version {major}.{minor}: not of a GVT-g guest")
    windows = _PVINFO_GM.unpack_from(vreg.payload, _PVINFO_AT + _PVINFO_GM_AT)
    return PvInfo(major, minor, vgt_id, caps, *windows)


def _check_windows(pvinfo: PvInfo, vreg_offset: int, gtt: Record) -> None:
    where = f"PVINFO at {vreg_offset + RECORD.size + _PVINFO_AT:#x}"
    low = (pvinfo.low_base, pvinfo.low_base + pvinfo.low_size)
    high = (pvinfo.high_base, pvinfo.high_base + pvinfo.high_size)
    for start, end in (low, high):
        if start % PAGE or end % PAGE or end > _GM_END:
            raise ImageError(f"{where}: impossible graphics memory {start:#x} to {end:#x}")
    if low[0] < high[1] and high[0] < low[1]:
        raise ImageError(f"{where}: low and high graphics memory overlap")
    entries = (pvinfo.low_size + pvinfo.high_size) // PAGE
    if len(gtt.payload) != entries * 8:
        raise ImageError(f"GTT record at {gtt.offset:#x}: {len(gtt.payload)} bytes, but PVINFO has {entries} pages")


def _entries(records: dict[str, Record], name: str, layout: struct.Struct) -> Iterator[tuple[int, ...]]:
    record = records.get(name)
    return layout.iter_unpack(record.payload) if record else iter(())


def _check_workloads(workloads: list[Workload], records: dict[str, Record]) -> None:
    for number, workload in enumerate(workloads):
        if not 0 <= workload.ring_id < _RINGS or workload.elsp_index > _ELSP_INDEX_MAX:
            at = records["WORKLOAD"].offset + RECORD.size + number * _WORKLOAD_ENTRY.size
            raise ImageError(f"workload at {at:#x}: impossible ring {workload.ring_id} or index {workload.elsp_index}")


def _warnings(image: GvtImage) -> Iterator[str]:
    """Yield what is unusual but breaks nothing that we know."""
    _, _, crc = _HEAD.unpack_from(image.records["HEAD"].payload)
    if crc:
        yield f"the image carries a checksum ({crc:#x}) of unknown kind, which is not checked"
    levels = sorted({root.level for root in image.ppgtt} - set(_PPGTT_LEVELS))
    if levels:
        yield f"page table levels {', '.join(map(str, levels))} are of another kernel than the RFC's"
    if image.type_number is None:
        low, high = image.pvinfo.low_size >> 20, image.pvinfo.high_size >> 20
        yield f"no known vGPU type has {low} + {high} MiB of graphics memory"
