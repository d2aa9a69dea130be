# SPDX-License-Identifier: MIT
"""The RFC's state image as bytes (cdefs/gvt_image.h): where its records are, and images with one thing wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

HEAD, CFG, VREG, SREG, TABLE, PPGTT, WORKLOAD = range(1, 8)
NAMES: Final = {HEAD: "HEAD", CFG: "CFG", VREG: "VREG", SREG: "SREG", TABLE: "GTT", PPGTT: "PPGTT", WORKLOAD: "WORK"}
ORDER: Final = (HEAD, CFG, SREG, VREG, TABLE, PPGTT, WORKLOAD)
HEAD_SIZE: Final = 536

# Offsets in every image with a configuration space of 4096 bytes
CFG_AT: Final = 0x218
PVINFO_AT: Final = 0x279230
FENCES_AT: Final = 0x301230


@dataclass(frozen=True)
class Record:
    kind: int
    at: int  # of the header
    size: int  # of the payload

    @property
    def payload(self) -> int:
        return self.at + 8

    @property
    def end(self) -> int:
        return self.payload + self.size


def data_size(image: bytes | bytearray) -> int:
    return int(struct.unpack_from("<i", image, 12)[0])


def records(image: bytes | bytearray) -> list[Record]:
    found: list[Record] = []
    at = 0
    while at < data_size(image):
        kind, size = struct.unpack_from("<II", image, at)
        found.append(Record(kind, at, size))
        at = found[-1].end
    return found


def record(image: bytes | bytearray, kind: int) -> Record:
    return next(one for one in records(image) if one.kind == kind)


def payload(image: bytes | bytearray, kind: int) -> bytes:
    one = record(image, kind)
    return bytes(image[one.payload : one.end])


def workloads(image: bytes | bytearray) -> list[tuple[int, ...]]:
    """Ring, four ELSP words, index, per queued workload."""
    return list(struct.iter_unpack("<i5I", payload(image, WORKLOAD)))


def roots(image: bytes | bytearray) -> list[tuple[int, ...]]:
    """Level, padding, four root pointers, per PPGTT."""
    return list(struct.iter_unpack("<iI4Q", payload(image, PPGTT)))


def joined(parts: list[tuple[int, bytes]], *, size: int | None = None) -> bytes:
    """Make an image of records; the first must be HEAD, whose data_size is set to what it is, or to *size*."""
    image = bytearray().join(struct.pack("<II", kind, len(data)) + data for kind, data in parts)
    struct.pack_into("<i", image, 12, len(image) if size is None else size)
    return bytes(image)


def parts(image: bytes) -> list[tuple[int, bytes]]:
    return [(one.kind, image[one.payload : one.end]) for one in records(image)]
