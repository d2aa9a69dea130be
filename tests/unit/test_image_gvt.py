# SPDX-License-Identifier: MIT
import importlib
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.decode import gvt_image as gvt
from vfio_mig.decode.gvt_image import compare_target, data_size_of, parse
from vfio_mig.errors import ImageError

CDEFS = Path(__file__).parents[2] / "cdefs"
MIB = 1 << 20
REG_SIZE = 0x200000
PVINFO_AT = 0x78000
LOW, HIGH = 64 * MIB, 384 * MIB
HIGH_BASE = 0xE8000000


def record(kind: int, payload: bytes) -> bytes:
    return struct.pack("<II", kind, len(payload)) + payload


def head(data_size: int, *, version: int = 0, crc: int = 0) -> bytes:
    # global_data is uninitialised kernel stack in the original.
    return record(1, struct.pack("<iiQ", version, data_size, crc) + b"\xa5" * 512)


def vreg(low: tuple[int, int] = (0, LOW), high: tuple[int, int] = (HIGH_BASE, HIGH), **changes: int) -> bytes:
    values = {"magic": 0x4776544776544776, "major": 1, "minor": 0, **changes}
    pvinfo = struct.pack("<QHHII", values["magic"], values["major"], values["minor"], 2, 0x1C).ljust(0x40, b"\0")
    pvinfo += struct.pack("<5I", *low, *high, 4)
    payload = bytearray(REG_SIZE)
    payload[PVINFO_AT : PVINFO_AT + len(pvinfo)] = pvinfo
    return bytes(payload)


CFG = struct.pack("<HH", 0x8086, 0x1912).ljust(4096, b"\0")
SREG = bytes(REG_SIZE)
VREG = vreg()
GTT = bytes((LOW + HIGH) // 4096 * 8)
WORKLOAD = struct.pack("<i4II", 1, 10, 11, 12, 13, 3)
ROOT = struct.pack("<i4x4Q", 4, 0x1000, 0, 0, 0)
BODY = [(2, CFG), (4, SREG), (3, VREG), (5, GTT), (6, ROOT), (7, WORKLOAD)]


def image(body: list[tuple[int, bytes]] | None = None, **changes: int) -> bytes:
    records = b"".join(record(kind, payload) for kind, payload in (BODY if body is None else body))
    return head(changes.pop("data_size", 536 + len(records)), **changes) + records


def with_record(kind: int, payload: bytes | None) -> bytes:
    """The good image with one payload replaced, or its record left out."""
    changed = [(k, payload if k == kind else p) for k, p in BODY]
    return image([(k, p) for k, p in changed if p is not None])


GOOD = image()


def refused(data: bytes, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        parse(memoryview(data))


def test_a_good_image_is_taken_apart() -> None:
    parsed = parse(memoryview(GOOD))
    assert parsed.data_size == len(GOOD)
    assert parsed.dialect == "rfc"
    assert list(parsed.records) == ["HEAD", "CFG_SPACE", "SREG", "VREG", "GTT", "PPGTT", "WORKLOAD"]
    # Offsets from the table of the RFC's reference (cdefs/gvt_image.h has the structs).
    assert [r.offset for r in parsed.records.values()][:5] == [0, 0x218, 0x1220, 0x201228, 0x401230]
    assert parsed.records["PPGTT"].offset == 0x4E1238
    assert parsed.pvinfo == (1, 0, 2, 0x1C, 0, LOW, HIGH_BASE, HIGH, 4)
    assert (parsed.vendor, parsed.device) == (0x8086, 0x1912)
    assert parsed.ppgtt == [(4, (0x1000, 0, 0, 0))]
    assert parsed.workloads == [(1, (10, 11, 12, 13), 3)]
    assert parsed.type_number == "8"
    assert parsed.warnings == []


def test_an_empty_8_image_has_the_size_that_the_reference_names() -> None:
    empty = image([*BODY[:4], (6, b""), (7, b"")])
    assert len(empty) == 5_116_488
    assert empty[:24].hex() == "01000000100200000000000048124e000000000000000000"
    assert parse(memoryview(empty)).workloads == []


def test_leftovers_behind_the_image_are_cut_off() -> None:
    region = GOOD + record(7, WORKLOAD) + b"\xff" * 1000
    assert data_size_of(memoryview(region)) == len(GOOD)
    assert parse(memoryview(region)).data_size == len(GOOD)


def test_payloads_are_views_and_nothing_is_copied() -> None:
    buffer = bytearray(GOOD)
    parsed = parse(memoryview(buffer))
    assert parsed.records["GTT"].payload.obj is buffer


def test_the_first_rfc_had_no_ppgtt_and_a_short_config_space() -> None:
    parsed = parse(memoryview(image([(2, CFG[:256]), (4, SREG), (3, VREG), (5, GTT), (6, WORKLOAD * 5)])))
    assert parsed.dialect == "rfc-v1"
    assert len(parsed.workloads) == 5
    assert parsed.ppgtt == []


def test_records_may_come_in_another_order_and_be_absent() -> None:
    assert parse(memoryview(image([BODY[3], BODY[2], BODY[1], BODY[0]]))).workloads == []
    assert parse(memoryview(image([*BODY[:4], BODY[5]]))).dialect == "rfc"
    refused(image([BODY[4], *BODY[:4]]), "fits no known order")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "HEAD record at 0x0: 536 bytes needed, 0 there"),
        (GOOD[:535], "535 there"),
        (bytes(600), "type 0 with 0 bytes instead of HEAD"),
        (record(1, bytes(520)) + bytes(100), "HEAD with 528"),
        (image(version=1), "version 1 is unknown"),
        (image(data_size=-1), "data_size -1 is impossible"),
        (image(data_size=535), "data_size 535 is impossible"),
        (image(data_size=0x900000) + bytes(0x500000), "data_size 9437184 is impossible"),
        (image(data_size=536), "no CFG_SPACE record"),
        (image(data_size=len(GOOD) + 1), "cut off at"),
        (image(data_size=len(GOOD) - 1), "at 0x[0-9a-f]+: 24 bytes promised, 23 left"),
        (image(data_size=len(GOOD) - 28), "at 0x[0-9a-f]+: header cut off"),
        (image([*BODY, (0, b"")]), "unknown type 0"),
        (image([*BODY, (8, b"")]), "unknown type 8"),
        (image([*BODY, (7, b"")]), "second one of type 7"),
        (image([*BODY, (1, bytes(528))]), "second one of type 1"),
        (with_record(2, None), "no CFG_SPACE record"),
        (with_record(3, None), "no VREG record"),
        (with_record(4, None), "no SREG record"),
        (with_record(5, None), "no GTT record"),
        (with_record(2, CFG[:128]), "CFG_SPACE record at 0x218: 128 bytes are impossible"),
        (with_record(4, SREG[:-4]), "SREG record at 0x1220: 2097148 bytes are impossible"),
        (with_record(3, VREG + b"\0"), "VREG record"),
        (with_record(5, GTT[:-4]), "GTT record"),
        (with_record(5, b""), "GTT record"),
        (with_record(5, GTT[:-8]), "GTT record at 0x401230: 917496 bytes, but PVINFO has 114688 pages"),
        (with_record(6, ROOT[:-4]), "PPGTT record"),
        (with_record(7, WORKLOAD[:-4]), "WORKLOAD record"),
        (with_record(7, WORKLOAD + struct.pack("<i4II", 5, 0, 0, 0, 0, 3)), "workload at 0x4e1288: impossible ring 5"),
        (with_record(7, struct.pack("<i4II", -1, 0, 0, 0, 0, 3)), "impossible ring -1"),
        (with_record(7, struct.pack("<i4II", 0, 0, 0, 0, 0, 4)), "index 4"),
        (with_record(3, vreg(magic=1)), "PVINFO at 0x279230: magic 0x1"),
        (with_record(3, vreg(major=2)), r"version 2\.0"),
        (with_record(3, vreg(low=(0x800, LOW))), "impossible graphics memory 0x800 to"),
        (with_record(3, vreg(low=(0, LOW + 8))), "impossible graphics memory"),
        (with_record(3, vreg(high=(0xF8000000, HIGH))), "impossible graphics memory"),
        (with_record(3, vreg(high=(LOW - 4096, HIGH))), "overlap"),
        (with_record(3, vreg(low=(0, 128 * MIB))), "but PVINFO has"),
    ],
)
def test_what_the_rules_forbid_is_refused_with_its_place(data: bytes, match: str) -> None:
    refused(data, match)


@given(st.integers(0, len(GOOD) - 1))
def test_an_image_cut_anywhere_is_refused(cut: int) -> None:
    refused(GOOD[:cut], "0x")


@given(st.data())
def test_changed_bytes_raise_nothing_but_image_errors(data: st.DataObject) -> None:
    bad = bytearray(GOOD)
    places = [*range(24), *range(0x218, 0x220), *range(0x1220, 0x1228), *range(0x279230, 0x279290), 0x4E1238, 0x4E123C]
    for at in data.draw(st.lists(st.sampled_from(places), max_size=4)):
        bad[at] = data.draw(st.integers(0, 255))
    try:
        parse(memoryview(bad))
    except ImageError as error:
        assert re.search(r"at 0x[0-9a-f]+|^no [A-Z_]+ record", str(error))  # noqa: PT017 -- it may also be accepted


def test_what_is_unusual_is_a_warning() -> None:
    (warning,) = parse(memoryview(image(crc=5))).warnings
    assert "checksum (0x5)" in warning
    (warning,) = parse(memoryview(with_record(6, struct.pack("<i4x4Q", 12, 1, 0, 0, 0)))).warnings
    assert "page table levels 12" in warning
    # The first generation's smallest type had 64 + 512 MiB.
    odd = [(k, {3: vreg(high=(0x80000000, 512 * MIB)), 5: bytes(576 * 256 * 8)}.get(k, p)) for k, p in BODY]
    (warning,) = parse(memoryview(image(odd))).warnings
    assert "64 + 512 MiB" in warning


def test_the_largest_size_is_the_profiles() -> None:
    assert data_size_of(memoryview(GOOD), image_max=len(GOOD) + 1) == len(GOOD)
    with pytest.raises(ImageError, match="impossible"):
        data_size_of(memoryview(GOOD), image_max=len(GOOD))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ({"device": 0x5912}, ("pci-ids", "8086:1912", "8086:5912")),
        ({"vendor": 0x1234}, ("pci-ids", "8086:1912", "1234:1912")),
        ({"gm": (128 * MIB, HIGH)}, ("graphics-memory", "64 + 384 MiB", "128 + 384 MiB")),
        ({"gm": (LOW, 512 * MIB)}, ("graphics-memory", "64 + 384 MiB", "64 + 512 MiB")),
        ({"gm": (LOW, HIGH + 1)}, ("graphics-memory", "64 + 384 MiB", f"{LOW} + {HIGH + 1} bytes")),
    ],
)
def test_an_image_of_another_device_does_not_fit(target: dict[str, Any], match: tuple[str, str, str]) -> None:
    here = {"vendor": 0x8086, "device": 0x1912, "gm": (LOW, HIGH), **target}
    compared = compare_target(parse(memoryview(GOOD)), **here)
    assert [one for one in compared if one.saved != one.here] == [match]


def test_an_image_of_the_same_device_fits() -> None:
    parsed = parse(memoryview(GOOD))
    unknown = compare_target(parsed, vendor=0x8086, device=0x1912, gm=None)
    assert [one.here for one in unknown] == ["8086:1912", None]
    assert all(one.saved == one.here for one in compare_target(parsed, vendor=0x8086, device=0x1912, gm=(LOW, HIGH)))


@pytest.fixture(scope="module")
def headers() -> tuple[Any, dict[str, int]]:
    text = "".join((CDEFS / name).read_text() for name in ("gvt_image.h", "gvt_pvinfo.h", "gvt_rfc.h"))
    constants = {name: int(value, 0) for name, value in re.findall(r"^#define (\w+) (\w+)$", text, re.MULTILINE)}
    ffi = importlib.import_module("cffi").FFI()  # with or without type stubs
    types = "".join(f"typedef {c} __{k};" for k, c in (("u8", "uint8_t"), ("u16", "uint16_t"), ("s32", "int32_t")))
    types += "typedef uint32_t __u32; typedef uint64_t __u64;"
    ffi.cdef(types + re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    return ffi, constants


def test_layouts_and_numbers_are_those_of_the_headers(headers: tuple[Any, dict[str, int]]) -> None:
    ffi, constants = headers
    sizes: list[tuple[struct.Struct, str]] = [
        (gvt.RECORD, "struct gvt_region"),
        (gvt._HEAD, "struct gvt_image_header"),
        (gvt._PPGTT_ENTRY, "struct gvt_ppgtt_entry"),
        (gvt._WORKLOAD_ENTRY, "struct gvt_workload_entry"),
    ]
    for layout, name in sizes:
        assert layout.size == ffi.sizeof(name)

    def offset(field: str) -> int:
        return int(ffi.offsetof("struct vgt_if", field))

    assert offset("rsv1") == gvt._PVINFO.size
    assert offset("mappable_base") == gvt._PVINFO_GM_AT
    assert offset("rsv2") == gvt._PVINFO_GM_AT + gvt._PVINFO_GM.size
    assert ffi.offsetof("struct gvt_ppgtt_entry", "pdp") == 8
    for name in ("NONE", "HEAD", "CFG_SPACE", "VREG", "SREG", "GTT", "PPGTT", "WORKLOAD"):
        assert constants[f"GVT_MIGRATION_{name}"] == getattr(gvt, name)
    assert constants["GVT_IMAGE_REG_SIZE"] == gvt._REG_SIZE
    assert constants["GVT_IMAGE_CFG_SIZE"] in gvt._CFG_SIZES
    assert constants["MIGRATION_IMG_MAX_SIZE"] == gvt.IMAGE_MAX
    assert constants["VGT_PVINFO_PAGE"] == gvt._PVINFO_AT
    assert constants["VGT_MAGIC"] == gvt._PVINFO_MAGIC
    assert constants["GVT_RING_COUNT"] == gvt._RINGS
