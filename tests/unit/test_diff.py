# SPDX-License-Identifier: MIT
"""`diff` on images made here, and the page maps that it compares."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.saved_images import HEADER, Memory, gvt_state, js, patched, run, text, write
from tests.unit.test_image_archive import PAGE
from tests.unit.test_image_gvt import CFG, GTT, SREG, VREG
from tools.fuzz import builders
from vfio_mig.decode.differences import _values, state_differences
from vfio_mig.decode.pagemap import PageMap
from vfio_mig.errors import UsageError
from vfio_mig.image.archive import read_archive
from vfio_mig.image.bytesource import BufferSource
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.ranges import intersect, length, merge, runs, subtract

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_mig.ranges import Range


def differences(first: Path, second: Path) -> list[tuple[str, str, int, Any, Any]]:
    report = js("diff", first, second)
    assert report["equal"] == (not report["differences"])
    return [tuple(one[key] for key in ("section", "name", "size", "old", "new")) for one in report["differences"]]


def test_what_only_one_has_differs_as_a_whole_whatever_is_in_it() -> None:
    one, other = {"same": {"x": 1}, "gone": {"y": 2}, "was": {"z": 3}}, {"same": {"x": 1}, "was": 4, "new": {"v": 5}}
    assert [(found.name, found.old, found.new) for found in _values("s", one, other)] == [
        ("gone", {"y": 2}, None),
        ("was", {"z": 3}, 4),
        ("new", None, {"v": 5}),
    ]


def test_an_image_does_not_differ_from_itself_saved_later_under_another_name(tmp_path: Path) -> None:
    header = {**HEADER, "time": 2, "device": {**HEADER["device"], "name": "other"}, "program": "x"}
    memory: Memory = [(0x10000, b"\1" * PAGE)]
    one = write(tmp_path / "one", gvt_state(), memory, (0, 8, b"\1"))
    other = write(tmp_path / "other", [gvt_state()[:9], gvt_state()[9:]], memory, (0, 8, b"\1"), header)
    assert differences(one, other) == []
    assert text("diff", one, other) == ""
    assert run("diff", "--exit-code", one, other).exit_code == 0


def test_what_no_kernel_sets_on_purpose_is_not_compared(tmp_path: Path) -> None:
    state = gvt_state()
    other = bytearray(state)
    other[0x30:0x50] = b"\xee" * 32  # global data
    other[0x4E1240 + 4 : 0x4E1240 + 8] = b"\xee" * 4  # padding of the PPGTT entry
    (tmp_path / "one").write_bytes(state)
    (tmp_path / "other").write_bytes(bytes(other) + b"left over")
    assert differences(tmp_path / "one", tmp_path / "other") == []


STATE = gvt_state()
LEFT_TO_CHANCE = {*range(0x18, 0x218), *range(0x4E1244, 0x4E1248)}  # global data, padding of the PPGTT entry
WORTH_CHANGING = [  # HEAD and CFG_SPACE, the beginnings of other records, PVINFO, fences, PPGTT and WORKLOAD
    (0, 0x600),
    (0x1220, 0x1240),
    (0x201220, 0x201240),
    (0x279220, 0x279300),
    (0x301230, 0x301260),
    (0x401220, 0x401260),
    (0x4E1220, len(STATE) - 1),
]


@settings(deadline=None, max_examples=80)
@given(st.one_of(*(st.integers(*places) for places in WORTH_CHANGING)), st.integers(1, 255))
def test_every_byte_counts_but_those_left_to_chance(at: int, flip: int) -> None:
    changed = bytearray(STATE)
    changed[at] ^= flip
    found = list(state_differences(BufferSource(STATE), BufferSource(bytes(changed))))
    assert bool(found) == (at not in LEFT_TO_CHANCE)


def test_registers_fields_and_entries_that_changed_are_named(tmp_path: Path) -> None:
    gtt = bytearray(GTT)
    for index in range(4):
        struct.pack_into("<Q", gtt, (0x10 + index) * 8, 0x40000 + index * PAGE | 1)
    struct.pack_into("<Q", gtt, 0x20 * 8, 0x90000 | 1)
    moved = bytearray(gtt)
    for index in range(2, 6):
        struct.pack_into("<Q", moved, (0x10 + index) * 8, 0x70000 + index * PAGE | 1)
    struct.pack_into("<Q", moved, 0x20 * 8, 0)
    vreg = patched(VREG, at_229c=0x8000, at_5000=1, at_5004=2, at_100008=0x00100001, at_10000c=0x001FF003, at_78804=1)
    config = patched(CFG, at_4=0x00100006, at_44=7)
    old = write(tmp_path / "old", gvt_state(gtt=bytes(gtt)))
    new = write(
        tmp_path / "new", gvt_state(gtt=bytes(moved), vreg=vreg, cfg=config, workload=b"", sreg=patched(SREG, at_8=9))
    )
    found = differences(old, new)
    assert found[:3] == [
        ("cfg", "command", 2, 0, 6),
        ("cfg", "status", 2, 0, 0x10),
        ("cfg", "0x44", 1, 0, 7),
    ]
    assert found[3:5] == [("sreg", "0x8", 4, 0, 9), ("vreg", "rcs.mode", 4, 0, 0x8000)]
    assert found[5] == ("vreg", "0x5000", 8, "00" * 8, "0100000002000000")
    assert found[6] == ("vreg", "pvinfo.display_ready", 4, 0, 1)
    assert found[7][:3] == ("vreg", "fence1", 8)
    assert (found[7][4]["start"], found[7][4]["end"], found[7][4]["pitch"]) == (0x100000, 0x200000, 512)
    assert [(name, size, old and old["gpa"], new and new["gpa"]) for _, name, size, old, new in found[8:-1]] == [
        ("gma 0x12000", 0x2000, 0x42000, 0x72000),
        ("gma 0x14000", 0x2000, None, 0x74000),
        ("gma 0x20000", 0x1000, 0x90000, None),
    ]
    assert found[-1] == ("workload", "workload 0", 0, {"ring_id": 1, "elsp": [10, 11, 12, 13], "elsp_index": 3}, None)
    lines = text("diff", old, new).splitlines()
    assert lines[0] == "cfg command: 0x0 -> 0x6"
    assert "gtt gma 0x12000 8192 bytes: gpa 0x42000  entry 0x42001 -> gpa 0x72000  entry 0x72001" in lines
    assert run("diff", old, new).exit_code == 0
    assert run("diff", "--exit-code", old, new).exit_code == 1


def test_bitmaps_and_pages_that_differ_are_summed_up(tmp_path: Path) -> None:
    one, two = b"\1" * PAGE, b"\2" * PAGE
    old = write(tmp_path / "old", b"s", [(0, one * 4), (0x10000, PAGE * 2), (0x80000, one)], (0, 16, b"\x0f\0"))
    memory: Memory = [
        (0, one),
        (0x1000, two * 2),
        (0x3000, PAGE),
        (0x10000, bytes(PAGE)),
        (0x11000, one),
        (0x20000, PAGE),
    ]
    new = write(tmp_path / "new", b"s", memory, (0, 16, b"\x3c\0"))
    report = js("diff", old, new)
    assert report["counts"] == {"dirty": 1, "pages": 6}
    dirty, *pages = report["differences"]
    assert dirty["old"] == {"pages": 4, "only_here": 2, "ranges": [[0, 0x2000]]}
    assert dirty["new"] == {"pages": 4, "only_here": 2, "ranges": [[0x4000, 0x2000]]}
    assert [(page["name"], page["size"], page["old"], page["new"]) for page in pages] == [
        ("gpa 0x80000", PAGE, "there", None),
        ("gpa 0x20000", PAGE, None, "there"),
        ("gpa 0x1000", 3 * PAGE, "content", "other content"),
        ("gpa 0x11000", PAGE, "content", "other content"),
    ]
    other = write(tmp_path / "other", b"s", [], (8, 8, b"\0"))
    assert differences(old, other)[0] == ("dirty", "ranges", 0, [[0, 16]], [[8, 8]])


def test_states_of_drivers_that_are_known_differ_by_field_and_others_by_byte(tmp_path: Path) -> None:
    content = bytearray(builders.mtty())
    content[24 + 7] = 0x77
    one, other = write(tmp_path / "one", builders.mtty()), write(tmp_path / "other", bytes(content))
    assert differences(one, other) == [("state", "port0.registers.scr", 0, 0x5A, 0x77)]
    one.write_bytes(b"some bytes, and more")
    other.write_bytes(b"some BYTES, or")
    assert differences(one, other) == [
        ("state", "0x5", 5, b"bytes".hex(), b"BYTES".hex()),
        ("state", "0xc", 2, b"an".hex(), b"or".hex()),
        ("state", "size", 0, 20, 14),
    ]
    inner = gvt_state(cfg=patched(CFG, at_44=1))
    one.write_bytes(builders.gvt_sample(gvt_state(), filler=32))
    other.write_bytes(builders.gvt_sample(inner, filler=32, pages=1))
    names = [(section, name) for section, name, *_ in differences(one, other)]
    assert ("cfg", "0x44") in names
    assert ("stream", "records.dirty_pages") in names


def test_bytes_that_no_field_names_are_differences_too(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", builders.mtty()), write(tmp_path / "other", builders.mtty() + b"\0")
    assert differences(one, other) == [("state", "size", 0, 96, 97)]
    stream = builders.gvt_sample(gvt_state(), filler=32)
    write(one, stream)
    write(other, stream[:70] + b"?" + stream[71:])
    assert differences(one, other) == [("stream", "0x46", 1, b"\x5a".hex(), b"?".hex())]
    write(other, stream + b"\0")
    assert [name for _, name, *_ in differences(one, other)] == ["size"]


def test_another_device_is_a_difference(tmp_path: Path) -> None:
    header = {"protocol": "x", "device": {**HEADER["device"], "type": "GVTg_V4_4"}}
    found = differences(write(tmp_path / "one"), write(tmp_path / "other", header=header))
    assert found == [("image", "protocol", 0, "gvt-rfc", "x"), ("image", "device.type", 0, "GVTg_V4_8", "GVTg_V4_4")]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(builders.qemu_stream([b"x"]))
    one = write(tmp_path / "one")
    assert "is a QEMU stream; 'vfio-mig extract'" in str(run("diff", one, tmp_path / "stream").exception)
    assert isinstance(run("diff", "-", "-").exception, UsageError)


# pages ---------------------------------------------------------------------------------------------------------------

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), max_size=8)


def pages_of(ranges: list[Range]) -> set[int]:
    return {page for start, end in ranges for page in range(start, end)}


@settings(deadline=None)
@given(RANGES, RANGES)
def test_ranges_are_sets_of_pages(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    first, second = (merge((start, start + size) for start, size in each if size) for each in (one, other))
    for found, expected in (
        (list(intersect(first, second)), pages_of(first) & pages_of(second)),
        (subtract(first, second), pages_of(first) - pages_of(second)),
    ):
        assert pages_of(found) == expected
        assert length(found) == len(expected)
    assert runs(sorted(pages_of(first))) == first


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(1, 4)), max_size=12))
def test_a_map_of_pages_is_what_writing_them_in_order_leaves(writes: list[tuple[int, int, int]]) -> None:
    file = io.BytesIO()
    writer = ArchiveWriter(file, {})
    expected: dict[int, int] = {}
    for start, value, number in writes:
        if value:
            writer.add_pages([(start * PAGE, bytes([value - 1]) * PAGE * number)])
        else:
            writer.add_zero([(start * PAGE, PAGE * number)])
        expected |= dict.fromkeys(range(start, start + number), max(0, value - 1))
    writer.finish()
    file.seek(0)
    with read_archive(file) as archive:
        found = PageMap(archive)
        assert found.difference(PageMap(archive)) == ([], [], [])
    assert pages_of(found.zero) == {page for page, value in expected.items() if not value}
    assert pages_of(found.written) == {page for page, value in expected.items() if value}


def test_a_huge_zero_range_is_no_work(tmp_path: Path) -> None:
    memory: Memory = [(0x1000, b"\1" * PAGE), (0, 1 << 62), (0x2000, b"\1" * PAGE)]
    path = write(tmp_path / "image", b"s", memory)
    with path.open("rb") as file, read_archive(file) as archive:
        found = PageMap(archive)
    assert found.written == [(2, 3)]
    assert found.zero == [(0, 2), (3, 1 << 50)]
