# SPDX-License-Identifier: MIT
"""A GVT-g state in words: expected values are written down here, never computed by what is tested."""

from __future__ import annotations

import importlib
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_image_gvt import CFG, GTT, HIGH, HIGH_BASE, LOW, ROOT, SREG, VREG, image, record
from tools.lab.sample import gpu
from vfio_mig.decode import commands, pci, registers
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.decode.gtt import Table, present_runs
from vfio_mig.decode.gvt import decode

if TYPE_CHECKING:
    from vfio_mig.decode.section import Decoded

PAGE = 4096
CDEFS = Path(__file__).parents[2] / "cdefs"


def table_with(*entries: tuple[int, int]) -> bytes:
    """Return a GTT payload with present entries at indexes of the record."""
    table = bytearray(GTT)
    for index, gpa in entries:
        struct.pack_into("<Q", table, index * 8, gpa | 1)
    return bytes(table)


def image_with(**payloads: bytes) -> bytes:
    kinds = {"cfg": 2, "sreg": 4, "vreg": 3, "gtt": 5, "ppgtt": 6, "workload": 7}
    whole = {"cfg": CFG, "sreg": SREG, "vreg": VREG, "gtt": GTT, "ppgtt": b"", "workload": b"", **payloads}
    return image([(kinds[name], payload) for name, payload in whole.items()])


def values(decoded: Decoded, name: str) -> dict[str, Any]:
    (section,) = [one for one in decoded.sections if one.name == name]
    return section.values


def test_the_sections_of_an_image_are_its_records_and_what_is_inside_the_registers() -> None:
    decoded = decode(image_with())
    assert decoded.problems == []
    assert [(one.name, one.offset, one.size) for one in decoded.sections] == [
        ("header", 8, 528),
        ("cfg", 0x220, 4096),
        ("sreg", 0x1228, 0x200000),
        ("vreg", 0x201230, 0x200000),
        ("pvinfo", 0x279230, 4096),
        ("fences", 0x301230, 32),
        ("engines", 0x201230, 0),
        ("gtt", 0x401238, 917504),
        ("ppgtt", 0x4E1240, 0),
        ("workload", 0x4E1248, 0),
    ]
    assert values(decoded, "header")["vgpu_type"] == "8"
    assert values(decoded, "pvinfo")["nonmappable_base"] == HIGH_BASE
    assert values(decoded, "pvinfo")["vgt_caps_bits"] == ["full-ppgtt", "hwsp-emulation", "huge-gtt"]


def test_configuration_space_is_decoded() -> None:
    config = bytearray(4096)
    struct.pack_into("<HHHH", config, 0, 0x8086, 0x1912, 0x0407, 0x2010)
    config[0x08:0x0C] = bytes((6, 0, 0, 3))
    struct.pack_into("<6I", config, 0x10, 0xF0000004, 1, 0xE000000C, 0, 0xC001, 0)
    struct.pack_into("<HH", config, 0x2C, 0x1028, 0x07A1)
    config[0x34] = 0x90
    config[0x90:0x9A] = struct.pack("<BBHIH", 5, 0xAC, 0x0001, 0xFEE00000, 0x4021)
    config[0xAC:0xB8] = struct.pack("<BBHII", 0x11, 0xD0, 0xC00F, 0x2003, 0x3004)
    config[0xD0:0xD2] = bytes((1, 0x90))  # back to the first: a circle
    struct.pack_into("<IIII", config, 0x100, 0x14010001, 0, 0, 0)
    struct.pack_into("<I", config, 0x140, 0x10010003)  # and another
    found = pci.decode(bytes(config))
    assert (found["vendor"], found["device"], found["revision"], found["class"]) == (0x8086, 0x1912, 6, 0x030000)
    assert found["command_bits"] == ["io", "memory", "master", "intx-off"]
    assert found["status_bits"] == ["capabilities", "received-master-abort"]
    assert found["bars"] == [
        {"number": 0, "kind": "memory64", "address": 0x1F0000000, "prefetchable": False},
        {"number": 2, "kind": "memory64", "address": 0xE0000000, "prefetchable": True},
        {"number": 4, "kind": "io", "address": 0xC000, "prefetchable": False},
    ]
    msi, msi_x, power = found["capabilities"]
    assert msi == {
        "id": 5,
        "name": "msi",
        "offset": 0x90,
        "enabled": True,
        "vectors": 1,
        "address": 0xFEE00000,
        "data": 0x4021,
    }
    assert (msi_x["vectors"], msi_x["table_bar"], msi_x["table_offset"]) == (16, 3, 0x2000)
    assert (msi_x["enabled"], msi_x["masked"], power["name"]) == (True, True, "power-management")
    assert [(one["name"], one["offset"]) for one in found["extended_capabilities"]] == [
        ("aer", 0x100),
        ("serial-number", 0x140),
    ]


@pytest.mark.parametrize(
    ("control", "enabled", "masked"),
    [(0x8001, True, False), (0x4000, False, True), (0x3FFF, False, False), (0xC000, True, True)],
)
def test_msi_x_is_enabled_and_masked_by_a_bit_each(control: int, enabled: bool, masked: bool) -> None:
    config = bytearray(256)
    config[6], config[0x34] = 0x10, 0x40
    struct.pack_into("<BBHII", config, 0x40, 0x11, 0, control, 0x2003, 0x3004)
    (msi_x,) = pci.decode(bytes(config))["capabilities"]
    assert (msi_x["enabled"], msi_x["masked"], msi_x["vectors"]) == (enabled, masked, (control & 0x7FF) + 1)


@pytest.mark.parametrize("number", range(0x17))
def test_a_capability_may_stand_at_the_very_end(number: int) -> None:
    """What of it would be behind the end is left out, with every bit set that could ask for more."""
    for at in range(0xC0, 0x100, 4):
        config = bytearray(b"\xff" * 256)
        config[6], config[0x34] = 0x10, at
        config[at : at + 2] = bytes((number, 0))
        (found,) = pci.decode(bytes(config))["capabilities"]
        assert (found["id"], found["offset"]) == (number, at)


@settings(deadline=None)
@given(st.binary(min_size=256, max_size=4096))
def test_any_configuration_space_is_decoded(config: bytes) -> None:
    found = pci.decode(config)
    assert len(found["capabilities"]) <= 48
    assert found["vendor"] == config[0] + 256 * config[1]


def test_fences_are_addresses_and_bytes() -> None:
    vreg = bytearray(VREG)
    struct.pack_into("<IIII", vreg, 0x100000, 0x00100001, 0x001FF003, 0xE8000003, 0xE8FFF07F)
    fences = values(decode(image_with(vreg=bytes(vreg))), "fences")["fences"]
    assert len(fences) == 4
    assert fences[0] == {
        "number": 0,
        "value": 0x001FF00300100001,
        "valid": True,
        "tiling": "x",
        "start": 0x100000,
        "end": 0x200000,
        "pitch": 512,
    }
    assert [fences[1][key] for key in ("tiling", "start", "end", "pitch")] == ["y", 0xE8000000, 0xE9000000, 16384]
    assert not fences[2]["valid"]


def test_engines_and_registers_have_names() -> None:
    vreg = bytearray(VREG)
    for offset, value in ((0x229C, 0x8200), (0x22080, 0x3000), (0x5000, 0x1234), (0x44200, 1 << 31)):
        struct.pack_into("<I", vreg, offset, value)
    decoded = decode(image_with(vreg=bytes(vreg)))
    engines = {one["engine"]: one for one in values(decoded, "engines")["engines"]}
    assert engines["rcs"]["mode_bits"] == ["ppgtt", "execlist"]
    assert engines["bcs"]["registers"] == {"hws_pga": 0x3000}
    listed = values(decoded, "vreg")["registers"]["listed"]
    assert [(one["register"], one["value"]) for one in listed] == [
        ("rcs.mode", 0x8200),
        ("0x5000", 0x1234),
        ("bcs.hws_pga", 0x3000),
        ("master_irq", 1 << 31),
    ]
    names = {0x78040: "pvinfo.mappable_base", 0x78004: "pvinfo.magic+4", 0x78100: "pvinfo+0x100"}
    names |= {0x100014: "fence2.hi", 0x7000C: "0x7000c", 0x22230: "bcs.elsp", 0x2604: "rcs.gpr0_hi"}
    assert {offset: registers.register_name(offset) for offset in names} == names


def test_capabilities_of_the_guest_s_view_are_named_by_their_bits() -> None:
    (at,) = [at for at, (name, _) in registers.PVINFO_FIELDS.items() if name == "vgt_caps"]
    for caps, names in ((0, []), (1 << 3, ["hwsp-emulation"]), (1 << 2 | 1 << 4 | 1 << 9, ["full-ppgtt", "huge-gtt"])):
        page = bytearray(PAGE)
        struct.pack_into("<I", page, at, caps)
        assert registers.pvinfo(bytes(page))["vgt_caps_bits"] == names


def test_mapped_ranges_are_runs_on_both_sides() -> None:
    high = LOW // PAGE
    entries = [
        (0x10, 0x40000),
        (0x11, 0x41000),
        (0x12, 0x50000),  # the page after the next: another run
        (0x14, 0x51000),  # a hole
        (high - 1, 0x60000),
        (high, 0x61000),  # follows, but in high graphics memory
        (high + 5, 0x3FFFFFFFF000),
    ]
    table = bytearray(table_with(*entries))
    struct.pack_into("<Q", table, 0x20 * 8, 0x70000)  # not present
    low_part, high_part = values(decode(image_with(gtt=bytes(table))), "gtt")["parts"]
    assert low_part["runs"]["listed"] == [
        {"gma": 0x10000, "gpa": 0x40000, "size": 0x2000},
        {"gma": 0x12000, "gpa": 0x50000, "size": 0x1000},
        {"gma": 0x14000, "gpa": 0x51000, "size": 0x1000},
        {"gma": LOW - PAGE, "gpa": 0x60000, "size": 0x1000},
    ]
    assert (low_part["present"], low_part["not_present"], low_part["entries"]) == (5, 1, high)
    assert high_part["runs"]["listed"] == [
        {"gma": HIGH_BASE, "gpa": 0x61000, "size": 0x1000},
        {"gma": HIGH_BASE + 0x5000, "gpa": 0x3FFFFFFFF000, "size": 0x1000},
    ]
    assert high_part["size"] == HIGH


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=30))
def test_runs_are_what_a_loop_finds(pairs: list[tuple[int, int]]) -> None:
    import numpy as np

    entries = np.zeros(41, "<u8")
    for index, page in pairs:
        entries[index] = (index + page % 2) << 12 | (page > 1)
    expected: list[list[int]] = []
    for index, entry in enumerate(map(int, entries)):
        if not entry & 1:
            continue
        if expected and index == sum(expected[-1]) and entry >> 12 == (int(entries[index - 1]) >> 12) + 1:
            expected[-1][1] += 1
        else:
            expected.append([index, 1])
    starts, lengths = present_runs(entries)
    assert [[int(start), int(length)] for start, length in zip(starts, lengths, strict=True)] == expected


def test_an_address_is_translated_in_both_parts_and_nowhere_else() -> None:
    table = Table(gvt.parse(memoryview(image_with(gtt=table_with((1, 0x9000), (LOW // PAGE + 2, 0xA000))))))
    assert table.translate(0x1234) == 0x9234
    assert table.translate(HIGH_BASE + 0x2FFF) == 0xAFFF
    for nowhere in (0, 0x2000, LOW, HIGH_BASE, HIGH_BASE + HIGH, HIGH_BASE - 1):
        assert table.translate(nowhere) is None


def test_page_table_roots_have_as_many_pointers_as_their_level() -> None:
    three = struct.pack("<i4x4Q", 3, 1, 2, 3, 4)
    assert values(decode(image_with(ppgtt=ROOT + three)), "ppgtt")["roots"] == {
        "count": 2,
        "listed": [{"level": 4, "pdp": [0x1000]}, {"level": 3, "pdp": [1, 2, 3, 4]}],
    }


CONTEXT_AT, RING_AT, BATCH_AT = 0x20000, 0x23000, 0x24000


def queued(
    words: list[int], batch: list[int], *, head: int = 0, tail: int | None = None
) -> tuple[bytes, dict[int, bytes]]:
    """Return an image with one queued workload, and the pages of guest memory that it needs."""
    gtt = table_with(*((gma // PAGE, gma + 0x100000) for gma in range(CONTEXT_AT, BATCH_AT + PAGE, PAGE)))
    context = bytearray(PAGE)
    end = len(words) * 4 if tail is None else tail
    for offset, value in ((0x14, head), (0x1C, end), (0x24, RING_AT), (0x2C, 1)):
        struct.pack_into("<I", context, offset, value)
    pages = {
        CONTEXT_AT + PAGE: bytes(context),
        RING_AT: struct.pack(f"<{len(words)}I", *words).ljust(PAGE, b"\0"),
        BATCH_AT: struct.pack(f"<{len(batch)}I", *batch).ljust(PAGE, b"\0"),
    }
    elsp = struct.pack("<i4II", 1, 5, CONTEXT_AT | 0x119, 9, CONTEXT_AT | 0x109, 3) + struct.pack(
        "<i4II", 1, 0, 0, 0, 0, 3
    )
    return image_with(gtt=gtt, workload=elsp), {gma + 0x100000: page for gma, page in pages.items()}


def test_a_queued_workload_is_followed_to_its_commands() -> None:
    ring = [
        *gpu.store_dword(0x10004, 0xABCD),
        *gpu.flush_dword(0x11000, 5),
        *gpu.pipe_control(0x12000, 7),
        *gpu.load_register_mem(0x2600, 0x13000),
        *gpu.batch_start(BATCH_AT),
        gpu.USER_INTERRUPT,
    ]
    state, pages = queued(ring, [*gpu.load_register(0x2600, 1), gpu.BATCH_END, 0xDEAD])
    found = values(decode(state, pages.get), "workload")["workloads"]
    assert found["count"] == 2
    first, covered = found["listed"]
    assert covered["elements"] == []
    assert first["engine"] == "bcs"
    one, two = first["elements"]
    assert {key: one[key] for key in ("valid", "mode", "privileged", "lrca", "context_id")} == {
        "valid": True,
        "mode": "32-bit",
        "privileged": True,
        "lrca": CONTEXT_AT,
        "context_id": 9,
    }
    assert (two["mode"], two["context_id"]) == ("48-bit", 5)
    assert one["ring"] == {"head": 0, "tail": len(ring) * 4, "start": RING_AT, "ctl": 1, "size": PAGE}
    assert [(c["name"], c.get("space"), c.get("address")) for c in one["commands"]] == [
        ("MI_STORE_DATA_IMM", "ggtt", 0x10004),
        ("MI_FLUSH_DW", "ggtt", 0x11000),
        ("PIPE_CONTROL", "ggtt", 0x12000),
        ("MI_LOAD_REGISTER_MEM", "ggtt", 0x13000),
        ("MI_BATCH_BUFFER_START", "ggtt", BATCH_AT),
        ("MI_USER_INTERRUPT", None, None),
    ]
    assert one["commands"][0]["words"] == ring[:4]
    batch = one["commands"][4]["batch"]["commands"]
    assert [c["name"] for c in batch] == ["MI_LOAD_REGISTER_IMM", "MI_BATCH_BUFFER_END"]
    assert "problem" not in one


def test_a_ring_that_wraps_is_read_from_head_over_its_end() -> None:
    ring = [0] * 1024
    ring[1022:] = [gpu.ARB_CHECK, gpu.USER_INTERRUPT]
    ring[:2] = [gpu.USER_INTERRUPT, gpu.ARB_CHECK]
    state, pages = queued(ring, [], head=1022 * 4, tail=8)
    (one, _), _ = (work["elements"] for work in values(decode(state, pages.get), "workload")["workloads"]["listed"])
    names = ["MI_ARB_CHECK", "MI_USER_INTERRUPT", "MI_USER_INTERRUPT", "MI_ARB_CHECK"]
    assert [c["name"] for c in one["commands"]] == names


@pytest.mark.parametrize(
    ("words", "missing", "problem"),
    [
        ([0x0F800000, 0], None, "ring: unknown command 0xf800000"),
        ([0x11000011, 0], None, "ring: MI_LOAD_REGISTER_IMM is cut off"),
        ([0] * 600, None, "ring: more than 256 commands"),
        ([0, 0], RING_AT, "ring: the image has no page 0x123000"),
        ([0, 0], CONTEXT_AT + PAGE, "context image: the image has no page 0x121000"),
    ],
)
def test_what_cannot_be_followed_is_said(words: list[int], missing: int | None, problem: str) -> None:
    state, pages = queued(words, [])
    pages.pop((missing or 0) + 0x100000, None)
    found = values(decode(state, pages.get), "workload")["workloads"]["listed"][0]["elements"][0]
    assert problem in found["problem"]


def test_a_short_pipe_control_has_no_address() -> None:
    writes = 1 << 14
    found, problem = commands.listing((0x7A000000, writes, 0x7A000002, writes, 0x1004, 0))
    assert problem is None
    assert [(one["name"], one.get("address")) for one in found] == [("PIPE_CONTROL", None), ("PIPE_CONTROL", 0x1004)]


@pytest.mark.parametrize(("head", "tail"), [(PAGE, 0), (0, PAGE), (PAGE + 8, 8)])
def test_a_ring_is_not_read_outside_of_itself(head: int, tail: int) -> None:
    state, pages = queued([gpu.USER_INTERRUPT] * 1024, [], head=head, tail=tail)
    (element, _), _ = (one["elements"] for one in values(decode(state, pages.get), "workload")["workloads"]["listed"])
    assert element["problem"] == f"head {head:#x} or tail {tail:#x} is outside the ring"
    assert element["commands"] == []


def test_a_context_that_is_not_mapped_is_said() -> None:
    state = image_with(workload=struct.pack("<i4II", 0, 0, 0, 1, 0x30109, 3))
    (element,) = values(decode(state), "workload")["workloads"]["listed"][0]["elements"]
    assert element["problem"] == "context image: graphics address 0x31014 is not mapped"


@settings(deadline=None)
@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=40))
def test_any_words_are_a_list_of_commands_and_perhaps_a_problem(words: list[int]) -> None:
    found, problem = commands.listing(tuple(words))
    taken = sum(len(one["words"]) for one in found)
    assert taken <= len(words)
    assert problem or taken == len(words) or found[-1]["name"] == "MI_BATCH_BUFFER_END"


def test_a_broken_image_is_shown_as_far_as_its_records_go() -> None:
    whole = image_with()
    decoded = decode(whole[:0x201230])
    assert [one.name for one in decoded.sections] == ["header", "cfg", "sreg"]
    (problem,) = decoded.problems
    assert "cut off at 0x201230" in problem
    decoded = decode(image([(2, CFG), (2, CFG)]))
    assert "second one of type 2" in decoded.problems[0]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_changed_bytes_give_a_report(data: st.DataObject) -> None:
    state = bytearray(queued([*gpu.store_dword(0x10000, 1)], [])[0])
    places = [*range(24), *range(0x218, 0x230), *range(0x279230, 0x279290), *range(len(state) - 48, len(state))]
    for at in data.draw(st.lists(st.sampled_from(places), max_size=4)):
        state[at] = data.draw(st.integers(0, 255))
    decoded = decode(bytes(state), lambda _: bytes(PAGE))
    assert decoded.problems or len(decoded.sections) == 10


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_give_a_report_of_records(content: bytes) -> None:
    decoded = decode(record(1, bytes(528)) + content)
    assert decoded.problems


def test_names_and_places_of_pvinfo_are_those_of_the_header() -> None:
    text = (CDEFS / "gvt_pvinfo.h").read_text()
    ffi = importlib.import_module("cffi").FFI()
    ffi.cdef(
        "typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64;"
        + re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    )
    fields = {name: field.offset for name, field in ffi.typeof("struct vgt_if").fields}
    for offset, (name, size) in registers.PVINFO_FIELDS.items():
        if name.startswith("pdp"):
            number = int(name[3]) * 2 + name.endswith("hi")
            assert offset == fields["pdp"] + 4 * number
        else:
            assert offset == fields[name]
            assert size == ffi.sizeof(dict(ffi.typeof("struct vgt_if").fields)[name].type)
    numbered = {name for name in fields if not name.startswith(("rsv", "pdp"))}
    assert numbered <= {name for name, _ in registers.PVINFO_FIELDS.values()}
    constants = dict(re.findall(r"^#define (\w+) (0x[0-9a-f]+)$", text, re.MULTILINE))
    assert int(constants["GVT_FENCE_OFFSET"], 0) == registers.FENCES_AT
    assert int(constants["VGT_PVINFO_PAGE"], 0) == registers.PVINFO_AT
    rings = dict(re.findall(r"^#define GVT_RING_(\w+) (\d)$", (CDEFS / "gvt_image.h").read_text(), re.MULTILINE))
    assert {name.lower(): int(number) for name, number in rings.items() if name != "COUNT"} == {
        name: number for number, name in enumerate(registers.ENGINES)
    }
