# SPDX-License-Identifier: MIT
"""What our kvmgt adds to the RFC's image: ``struct gvt_ext`` of ``tools/kvmgt/gvt/migrate_image.h``, little-endian.

An image of the RFC's state region has it in SREG, one of protocol v2 in a record of its own, EXT.
"""

import struct
import zlib
from typing import Any, Final, NamedTuple

from vfio_mig.decode import registers
from vfio_mig.decode.section import LISTED_MAX, listed
from vfio_mig.errors import ImageError

MAGIC: Final = b"GVT-EXT1"
NONE: Final = 0xFFFFFFFF

_HEAD: Final = struct.Struct("<8sIIIIQQIIII")
_EXECLIST: Final = struct.Struct("<4I8I4III")
_DISPLAY: Final = struct.Struct("<96s8I128s1792sII160s")
_WORKLOAD: Final = struct.Struct("<II2I4I")
_PARTIAL_PTE: Final = struct.Struct("<QQ")
_RINGS: Final = 5
_CRC_AT: Final = 12
_FLAGS: Final = {1: "pv-notified", 2: "failsafe", 4: "d3-entered", 8: "vblank"}
FIXED_SIZE: Final = _HEAD.size + _RINGS * _EXECLIST.size + _DISPLAY.size
"""Bytes without workloads and half-written entries."""


class Ext(NamedTuple):
    """Where it is in the image, and its bytes without what is behind it."""

    offset: int
    content: bytes

    @property
    def counts(self) -> tuple[int, int]:
        """How many workloads are queued, and how many GGTT entries are half written."""
        *_, workloads, partial = _HEAD.unpack_from(self.content)
        return workloads, partial


def find(payload: memoryview, offset: int, *, own: bool) -> Ext | None:
    """Return what a record has of it; None for a SREG that has none.

    :param offset: of the payload in the image.
    :param own: the record is EXT, which has nothing else.
    :raises ImageError: its sizes contradict each other.
    """
    if bytes(payload[: len(MAGIC)]) != MAGIC:
        if own:
            raise ImageError(f"EXT record at {offset:#x}: it does not begin with {MAGIC.decode()}")
        return None
    if len(payload) < FIXED_SIZE:
        raise ImageError(f"EXT record at {offset:#x}: {len(payload)} bytes are too few")
    _, size, *_, workloads, partial = _HEAD.unpack_from(payload)
    if size != FIXED_SIZE + workloads * _WORKLOAD.size + partial * _PARTIAL_PTE.size or size > len(payload):
        raise ImageError(f"{MAGIC.decode()} at {offset:#x}: {size} bytes are impossible")
    if own and size != len(payload):
        raise ImageError(f"EXT record at {offset:#x}: {len(payload) - size} bytes too many")
    return Ext(offset, bytes(payload[:size]))


def check_crc(image: memoryview, ext: Ext) -> None:
    """Compare the checksum with the image's bytes; the checksum's own count as 0.

    :param image: all of it, without what is behind data_size.
    :raises ImageError: it was damaged.
    """
    at = ext.offset + _CRC_AT
    crc = zlib.crc32(image[at + 4 :], zlib.crc32(bytes(4), zlib.crc32(image[:at])))
    (saved,) = struct.unpack_from("<I", ext.content, _CRC_AT)
    if crc != saved:
        raise ImageError(f"checksum at {at:#x}: CRC-32 {saved:#x}, but {crc:#x} of the image: it was damaged")


def words(ext: Ext) -> dict[str, Any]:
    """Return it for people."""
    _, size, crc, version, engine_mask, ggtt, bar2, flags, _, workloads, partial = _HEAD.unpack_from(ext.content)
    return {
        "size": size,
        "crc": crc,
        "graphics_version": version,
        "engine_mask": engine_mask,
        "ggtt_bytes": ggtt,
        "bar2_bytes": bar2,
        "flags": [name for bit, name in _FLAGS.items() if flags & bit],
        "execlists": [_execlist(ext, ring) for ring in range(_RINGS)],
        "display": _display(ext),
        "queued": listed([_workload(ext, number) for number in range(min(workloads, LISTED_MAX))], workloads),
        "half_entries": listed([_half(ext, workloads, number) for number in range(min(partial, LISTED_MAX))], partial),
    }


def _slot(value: int) -> int | None:
    return None if value == NONE else value


def _execlist(ext: Ext, ring: int) -> dict[str, Any]:
    at = _HEAD.size + ring * _EXECLIST.size
    enabled, running, pending, context, *rest = _EXECLIST.unpack_from(ext.content, at)
    slots, elsp, index = rest[:8], rest[8:12], rest[12]
    return {
        "engine": registers.ENGINES[ring],
        "enabled": bool(enabled),
        "running": _slot(running),
        "pending": _slot(pending),
        "running_context": _slot(context),
        "slots": [slots[:4], slots[4:]],
        "elsp": elsp,
        "elsp_index": index,
    }


def _display(ext: Ext) -> dict[str, Any]:
    at = _HEAD.size + _RINGS * _EXECLIST.size
    flips, vrefresh, i2c, port, i2c_flags, *_, edid, dpcd, sbi, _, _ = _DISPLAY.unpack_from(ext.content, at)
    return {
        "flips_done": sum(byte.bit_count() for byte in flips),
        "refresh_millihertz": vrefresh,
        "i2c_state": i2c,
        "i2c_port": port,
        "i2c_flags": i2c_flags,
        "edid_crc": zlib.crc32(edid),
        "dpcd_crc": zlib.crc32(dpcd),
        "sbi_registers": sbi,
    }


def _workload(ext: Ext, number: int) -> dict[str, Any]:
    ring, first, *rest = _WORKLOAD.unpack_from(ext.content, FIXED_SIZE + number * _WORKLOAD.size)
    engine = registers.ENGINES[ring] if ring < _RINGS else None
    return {"engine": engine, "first_of_pair": bool(first), "descriptor": rest[:2], "elsp": rest[2:]}


def _half(ext: Ext, workloads: int, number: int) -> dict[str, Any]:
    at = FIXED_SIZE + workloads * _WORKLOAD.size + number * _PARTIAL_PTE.size
    offset, data = _PARTIAL_PTE.unpack_from(ext.content, at)
    return {"offset": offset, "value": data}
