# SPDX-License-Identifier: MIT
"""The RFC's dirty bitmap and state region at their limits, and images that lie."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from tools.lab.sample import gpu, host, image
from tools.lab.vfio.raw import STATE, STATE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.vm.conftest import MakeGuest
    from tools.lab.sample.guest import Guest

PAGE = 4096


# --- dirty bitmap


@pytest.mark.parametrize("pages", [0, 1, 63, 64, 65, 512, 1 << 17, 1 << 20])
def test_the_dirty_bitmap_is_one_word_longer_than_needed_and_no_more(guest: Guest, pages: int) -> None:
    guest.device.set_pte(0, guest.memory.iova | 1)
    last = guest.memory.iova + 64 * PAGE
    guest.device.set_pte(PAGE, last | 1)
    size = (-(-pages // 64) + 1) * 8
    reply = guest.device.dirty_bytes(guest.memory.iova, pages, fill=0xFF)
    assert len(reply) == size
    expected = (1 if pages else 0) | (1 << 64 if pages > 64 else 0)
    assert int.from_bytes(reply, "little") == expected
    assert {1: 16, 64: 16, 65: 24, 512: 72, 1 << 17: 16392, 1 << 20: 131080}.get(pages, size) == size


def test_the_dirty_bitmap_counts_from_the_page_of_any_start(guest: Guest) -> None:
    iova = guest.memory.iova
    guest.device.set_pte(0, iova + 3 * PAGE | 1)
    assert guest.device.dirty_bytes(iova + PAGE + 0xABC, 8)[0] == 1 << 2
    assert guest.device.dirty_bytes(0, iova // PAGE + 4)[-9:] == bytes(9)
    for start in (1 << 40, (1 << 64) - PAGE, (1 << 64) - 1):
        assert not any(guest.device.dirty_bytes(start, 1024, fill=0xFF))


def test_the_dirty_bitmap_refuses_more_pages_than_its_limit(guest: Guest) -> None:
    for pages, limit in (((1 << 20) + 1, 1 << 20), (1 << 31, 1 << 20), (1 << 63, 1 << 20), ((1 << 64) - 1, 1 << 20)):
        assert host.parameter("dirty_max_pages") == limit
        with pytest.raises(OSError) as caught:
            # no room is needed: the refusal comes first
            guest.device.dirty_request(pages)
        assert caught.value.errno == errno.EINVAL
    with host.parameter_set("dirty_max_pages", 64):
        guest.device.dirty_bytes(0, 64)
        with pytest.raises(OSError) as caught:
            guest.device.dirty_bytes(0, 65)
        assert caught.value.errno == errno.EINVAL


# --- state region


def observed(guest: Guest) -> tuple[object, ...]:
    """Everything of a vGPU that an image may change: the guest's side, and the host's."""
    one = guest.instance
    return (
        guest.device.save(),
        one.hw_ggtt().tobytes(),
        one.hw_fence(),
        one.queue(),
        one.pinned(),
        one.run_state(),
        one.layout(),
    )


@pytest.fixture
def busy(guest: Guest) -> Guest:
    """Give a stopped vGPU with something in every record."""
    guest.device.stop()
    engine = gpu.Engine(guest)
    gma, _ = guest.bind(2)
    guest.bind(high=True)
    guest.device.set_fence(2, 0x1001, 0x5000)
    guest.device.set_reg(0x5000, 0x12345678)
    guest.device.make_ppgtt(3, [0x1000, 0x2000, 0x3000, 0x4000])
    guest.device.make_ppgtt(4, [0x123456789000])
    engine.submit(engine.context(gpu.store_dword(gma, 1)), engine.context(gpu.NOOP))
    return guest


def test_a_second_read_of_the_state_is_equal(busy: Guest) -> None:
    first = busy.device.save()
    assert busy.device.save() == first
    assert len(image.workloads(first)) == 2
    assert image.roots(first) == [
        (3, 0, 0x1000, 0x2000, 0x3000, 0x4000),
        (4, 0, 0x123456789000, 0, 0, 0),
    ]
    assert len(busy.instance.queue()) == 2  # saving takes nothing away


def test_the_records_of_an_image_are_where_the_facts_say(busy: Guest) -> None:
    saved = busy.device.save()
    found = {one.kind: (one.at, one.size) for one in image.records(saved)}
    assert found == {
        image.HEAD: (0, 0x210),
        image.CFG: (0x218, 0x1000),
        image.SREG: (0x1220, 0x200000),
        image.VREG: (0x201228, 0x200000),
        image.TABLE: (0x401230, 0xE0000),
        image.PPGTT: (0x4E1238, 80),
        image.WORKLOAD: (0x4E1240 + 80, 48),
    }
    assert struct.unpack_from("<Q", saved, image.PVINFO_AT) == (0x4776544776544776,)
    assert struct.unpack_from("<II", saved, image.FENCES_AT + 16) == (0x1001, 0x5000)
    assert saved[image.CFG_AT + 8 : image.CFG_AT + 12] == bytes.fromhex("86801216")
    assert struct.unpack_from("<Q", saved, 0x421238 + 8 * 0x10)[0] & 1  # the first high entry that was bound


@pytest.mark.parametrize(("kind", "size"), [("GVTg_V4_4", 0x541248), ("GVTg_V4_2", 0x681248)])
def test_an_image_has_the_size_of_its_type(make_guest: MakeGuest, kind: str, size: int) -> None:
    saved = make_guest(kind).device.save()
    assert len(saved) == size
    assert image.records(saved)[-1].end == size


def test_the_largest_type_cannot_be_saved(make_guest: MakeGuest) -> None:
    guest = make_guest("GVTg_V4_1")
    with pytest.raises(OSError) as caught:
        guest.device.read(STATE, 0, STATE_SIZE)
    assert caught.value.errno == errno.EFAULT
    assert "9441864" in guest.instance.last_error()
    assert guest.device.guest_low() == 0


def test_a_vgpu_takes_no_image_of_another_type(busy: Guest, make_guest: MakeGuest) -> None:
    foreign = make_guest("GVTg_V4_4").device.save()
    assert_refused(busy, observed(busy), "another type's image", foreign)


def test_the_state_is_read_and_written_at_offset_0_only(busy: Guest) -> None:
    before = observed(busy)
    saved = busy.device.save()
    whole = saved + bytes(STATE_SIZE - len(saved))
    for offset in (1, 4, 8, 536, STATE_SIZE - 8):
        with pytest.raises(OSError) as caught:
            busy.device.read(STATE, offset, STATE_SIZE - offset)
        assert caught.value.errno == errno.EFAULT
        with pytest.raises(OSError) as caught:
            busy.device.write(STATE, offset, whole[: STATE_SIZE - offset])
        assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError) as caught:
        busy.device.write(STATE, 0, whole + bytes(1))
    assert caught.value.errno == errno.EFAULT
    assert observed(busy) == before
    assert busy.device.read(STATE, 0, 100) == saved[:100]  # a short read is a cut image


def test_a_short_write_is_good_enough_when_it_holds_the_whole_image(busy: Guest) -> None:
    before = observed(busy)
    saved = busy.device.save()
    assert busy.device.write(STATE, 0, saved) == len(saved)
    assert observed(busy) == before
    for count in (0, 1, 8, 535, 536, 4096, len(saved) - 1):
        if count:
            with pytest.raises(OSError) as caught:
                busy.device.write(STATE, 0, saved[:count])
            assert caught.value.errno == errno.EFAULT
    assert observed(busy) == before


def test_an_image_restores_over_what_was_there(busy: Guest) -> None:
    before = observed(busy)
    saved = busy.device.save()
    busy.device.reset()
    busy.device.stop()
    busy.bind(8)
    busy.device.set_fence(0, 0x7001, 0x8000)
    busy.device.make_ppgtt(4, [0x777000])
    busy.device.restore(saved)
    assert observed(busy) == before


# --- images with one thing wrong: each is refused and changes nothing


def restore_errno(guest: Guest, wrong: bytes | bytearray) -> int:
    try:
        guest.device.restore(wrong)
    except OSError as error:
        return error.errno or 0
    return 0


def assert_refused(guest: Guest, before: tuple[object, ...], what: str, wrong: bytes | bytearray) -> None:
    assert restore_errno(guest, wrong) == errno.EFAULT, what
    assert guest.instance.last_error(), what
    assert observed(guest) == before, what


def refuse_all(guest: Guest, make: Callable[[bytes], Iterator[tuple[str, bytes | bytearray]]]) -> None:
    before = observed(guest)
    saved = guest.device.save()
    number = 0
    for what, wrong in make(saved):
        assert_refused(guest, before, what, wrong)
        number += 1
    assert number
    guest.device.restore(saved)  # and the good one is still good
    assert observed(guest) == before


def patched(saved: bytes, offset: int, layout: str, *values: int) -> bytearray:
    changed = bytearray(saved)
    struct.pack_into(layout, changed, offset, *values)
    return changed


def test_images_with_a_wrong_header_are_refused(busy: Guest) -> None:
    def wrong(saved: bytes) -> Iterator[tuple[str, bytearray]]:
        for kind in (0, 2, 7, 0x80000001):
            yield f"first record of type {kind}", patched(saved, 0, "<I", kind)
        for size in (0, 520, 536, 0xFFFFFFFF):
            yield f"HEAD of {size} bytes", patched(saved, 4, "<I", size)
        for version in (1, -1):
            yield f"version {version}", patched(saved, 8, "<i", version)
        good = len(saved)
        for size in (
            0,
            1,
            535,
            536,
            good - 24,
            good - 1,
            good + 1,
            good + 8,
            STATE_SIZE,
            STATE_SIZE - 1,
            -1,
            -(1 << 31),
        ):
            yield f"data_size {size}", patched(saved, 12, "<i", size)

    refuse_all(busy, wrong)


def test_images_with_records_in_another_order_missing_or_twice_are_refused(busy: Guest) -> None:
    def wrong(saved: bytes) -> Iterator[tuple[str, bytes]]:
        whole = image.parts(saved)
        for at in range(1, len(whole)):
            name = image.NAMES[whole[at][0]]
            yield f"{name} missing", image.joined(whole[:at] + whole[at + 1 :])
            twice = image.joined(whole[: at + 1] + whole[at:])
            if len(twice) < STATE_SIZE:
                yield f"{name} twice", twice
            if at + 1 < len(whole):
                swapped = [*whole[:at], whole[at + 1], whole[at], *whole[at + 2 :]]
                yield f"{name} after its successor", image.joined(swapped)
        yield "a second HEAD", image.joined([whole[0], *whole])
        yield "a NONE record", image.joined([*whole[:4], (0, b""), *whole[4:]])
        yield "a record of an unknown type at the end", image.joined([*whole, (8, bytes(16))])
        yield "only the header", image.joined(whole[:1])

    refuse_all(busy, wrong)


@pytest.mark.core
def test_images_whose_lengths_lie_are_refused(busy: Guest) -> None:
    def wrong(saved: bytes) -> Iterator[tuple[str, bytearray]]:
        for one in image.records(saved)[1:]:
            entry = {image.PPGTT: 40, image.WORKLOAD: 24}.get(one.kind, 8)
            for size in (0, one.size - entry, one.size - 1, one.size + 1, one.size + entry, 1 << 31, (1 << 32) - 8):
                yield f"{image.NAMES[one.kind]} of {size:#x} bytes", patched(saved, one.at + 4, "<I", size)

    refuse_all(busy, wrong)


def test_images_of_another_device_or_with_impossible_bases_are_refused(busy: Guest) -> None:
    low, high = busy.instance.layout().low_size, busy.instance.layout().high_size

    def wrong(saved: bytes) -> Iterator[tuple[str, bytearray]]:
        for what, offset, layout, value in (
            ("vendor", 0, "<H", 0x8087),
            ("device", 2, "<H", 0x1912),
            ("class", 11, "<B", 0x02),
        ):
            yield what, patched(saved, image.CFG_AT + 8 + offset, layout, value)
        for what, offset, layout, value in (
            ("magic", 0, "<Q", 0x4776544776544777),
            ("major version", 8, "<H", 2),
            ("low base not a page", 0x40, "<I", 0x800),
            ("low base over 4 GiB", 0x40, "<I", 0xFE000000),
            ("low over high", 0x40, "<I", busy.device.guest_high()),
            ("low size", 0x44, "<I", low * 2),
            ("high base not a page", 0x48, "<I", 0xD0000001),
            ("high base over 4 GiB", 0x48, "<I", (1 << 32) - high + PAGE),
            ("high over low", 0x48, "<I", low - PAGE),
            ("high size", 0x4C, "<I", high - PAGE),
            ("fences", 0x50, "<I", 5),
        ):
            yield what, patched(saved, image.PVINFO_AT + offset, layout, value)

    refuse_all(busy, wrong)


def test_images_with_bad_tables_are_refused(busy: Guest) -> None:
    def wrong(saved: bytes) -> Iterator[tuple[str, bytes]]:
        whole = dict(image.parts(saved))
        root = struct.pack("<iI4Q", 4, 0, 0x1000, 0, 0, 0)
        ring, *words = image.workloads(saved)[0]
        work = struct.pack("<i5I", ring, *words)
        table: list[tuple[str, int, bytes]] = [
            (f"a PPGTT of level {level}", image.PPGTT, struct.pack("<iI4Q", level, 0, 0x1000, 0, 0, 0))
            for level in (0, 2, 5, 12, -1)
        ]
        table += [
            ("a PPGTT without root", image.PPGTT, struct.pack("<iI4Q", 4, 0, 0, 0, 0, 0)),
            ("a bad PPGTT behind a good one", image.PPGTT, root + struct.pack("<iI4Q", 7, 0, 1, 0, 0, 0)),
            ("65 PPGTTs", image.PPGTT, root * 65),
            ("a cut PPGTT", image.PPGTT, root[:39]),
            ("a cut workload", image.WORKLOAD, work[:23]),
            ("257 workloads", image.WORKLOAD, work * 257),
            ("a workload that continues nothing", image.WORKLOAD, bytes(24)),
            ("a bad workload behind a good one", image.WORKLOAD, work + struct.pack("<i5I", 5, *words)),
        ]
        table += [
            (f"a workload on engine {bad}", image.WORKLOAD, struct.pack("<i5I", bad, *words))
            for bad in (5, 18, -1, -(1 << 31))
        ]
        table += [
            (f"ELSP words {bad}", image.WORKLOAD, struct.pack("<i5I", 0, *bad, 3))
            for bad in (
                (0, 0, 1, 0x10108),  # element 0 is not valid
                (0, 0, 1, 0x10009),  # nor privileged
                (0, 0, 1, 0x10101),  # nor of a known addressing mode
                (1, 0x10009, 1, 0x10109),  # element 1 is not privileged
            )
        ]
        table += [
            (f"ELSP index {bad}", image.WORKLOAD, struct.pack("<i5I", 0, *words[:4], bad)) for bad in (4, 1 << 31)
        ]
        for what, kind, data in table:
            yield what, image.joined(list({**whole, kind: data}.items()))

    refuse_all(busy, wrong)
