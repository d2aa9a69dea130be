# SPDX-License-Identifier: MIT
"""One test for each of the nine RFC patches; the first five are also run on a driver that lacks the mechanism."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tools.lab.sample import gpu, host, image
from tools.lab.vfio.raw import (
    BAR2,
    CAP_TYPE,
    FLAG_MIGRATABLE,
    FLAG_PCI,
    GTT,
    PV_MAPPABLE_BASE,
    PV_NONMAPPABLE_BASE,
    PVINFO,
    REGION_READ,
    REGION_WRITE,
    STATE,
    STATE_SIZE,
)

if TYPE_CHECKING:
    from tools.lab.sample.guest import Guest

pytestmark = pytest.mark.core

PAGE = 4096
MIB = 1 << 20


def test_patch_1_a_ggtt_write_reaches_the_host_entries_of_this_vgpu_alone(guest: Guest, other: Guest) -> None:
    for vgpu, bystander in ((guest, other), (other, guest)):
        device, layout = vgpu.device, vgpu.instance.layout()
        untouched = bystander.instance.hw_ggtt().tobytes()
        for gma, hgma in (
            (0x10 * PAGE, layout.host_low + 0x10 * PAGE),
            (device.guest_high() + 3 * PAGE, layout.host_high + 3 * PAGE),
        ):
            entry = vgpu.page() | 1
            device.set_pte(gma, entry)
            assert device.pte(gma) == entry
            assert vgpu.instance.hw_entry(hgma) == entry
        table = vgpu.instance.hw_ggtt()
        assert [slot for slot, value in enumerate(table) if value] == [0x10, layout.low_size // PAGE + 3]
        assert bystander.instance.hw_ggtt().tobytes() == untouched

    outside = guest.instance.layout().low_size  # between the two windows: ballooned out
    guest.device.set_pte(outside, guest.memory.iova | 1)
    assert guest.device.pte(outside) == 0
    assert guest.instance.hw_entry(guest.instance.layout().host_low + outside) == 0


def test_patch_2_a_fence_holds_host_addresses_and_reads_back_the_guests(guest: Guest, other: Guest) -> None:
    for vgpu in (guest, other):
        layout = vgpu.instance.layout()
        vgpu.device.set_fence(1, 0x00100001, 0x001FF003)
        assert vgpu.device.fence(1) == 0x001FF003_00100001
        expected = (layout.host_low + 0x1FF000 | 3) << 32 | layout.host_low + 0x100000 | 1
        assert vgpu.instance.hw_fence() == [0, expected, 0, 0]
        assert host.host_fences()[layout.fence_first + 1] == expected

        high = vgpu.device.guest_high()
        vgpu.device.set_fence(3, high + 0x2000 | 3, high + 0x5000 | 7)
        assert vgpu.instance.hw_fence()[3] == (layout.host_high + 0x5000 | 7) << 32 | layout.host_high + 0x2000 | 3

        vgpu.device.set_fence(1, 1, 0)  # start 0 and valid is an address; 0 is none
        assert vgpu.instance.hw_fence()[1] == layout.host_low | 1

        errors = vgpu.instance.counters()["fence_errors"]
        vgpu.device.set_fence(1, layout.low_size | 1, 0x3000)
        assert vgpu.device.fence(1) == 0x3000 << 32 | layout.low_size | 1
        assert vgpu.instance.hw_fence()[1] == 0
        assert vgpu.instance.counters()["fence_errors"] > errors


def test_patch_3_a_gpu_command_writes_through_the_host_address(guest: Guest, other: Guest) -> None:
    for vgpu in (guest, other):
        layout = vgpu.instance.layout()
        engine = gpu.Engine(vgpu)
        for high in (False, True):
            gma, iova = vgpu.bind(high=high)
            hgma = layout.host_high + gma - vgpu.device.guest_high() if high else layout.host_low + gma
            context, completed = engine.run(gpu.store_dword(gma + 0x20, 0xC0FFEE))
            assert vgpu.memory.u32(iova + 0x20) == 0xC0FFEE
            assert completed
            assert vgpu.instance.last_ring()[:4] == [0x10400002, hgma + 0x20, 0, 0xC0FFEE]
            assert vgpu.memory.u32(context.ring + 4) == gma + 0x20  # the guest's own ring is untouched
            assert iova in vgpu.device.dirty(vgpu.memory)


def test_patch_4_guest_addresses_count_from_pvinfo_after_a_migration(guest: Guest, other: Guest) -> None:
    source, target = guest.instance.layout(), other.instance.layout()
    assert source.host_high != target.host_high
    high = guest.device.guest_high()
    assert high == source.host_high
    entry = other.page() | 1
    guest.device.set_pte(high + 5 * PAGE, entry)

    other.device.stop()
    other.device.restore(guest.device.save())
    other.device.start()
    assert other.device.guest_high() == high
    assert other.instance.layout().host_high == target.host_high
    assert other.instance.layout().guest_high == high
    assert other.instance.hw_entry(target.host_high + 5 * PAGE) == entry

    other.device.set_pte(high + 6 * PAGE, entry)
    assert other.device.pte(high + 6 * PAGE) == entry
    assert other.instance.hw_entry(target.host_high + 6 * PAGE) == entry
    only_unmigrated = target.host_high + 7 * PAGE
    assert only_unmigrated not in range(high, high + target.high_size)
    other.device.set_pte(only_unmigrated, entry)
    assert other.device.pte(only_unmigrated) == 0

    for register in (PV_MAPPABLE_BASE, PV_NONMAPPABLE_BASE):
        before = other.device.reg(register)
        other.device.set_reg(register, 0x12345000)
        assert other.device.reg(register) == before


def test_patch_5_the_aperture_starts_at_zero_and_a_reset_moves_nothing(guest: Guest, other: Guest) -> None:
    for vgpu in (guest, other):
        layout = vgpu.instance.layout()
        assert vgpu.device.guest_low() == 0
        assert layout.guest_low == 0
        assert layout.host_low != 0
        region = vgpu.device.region(BAR2)
        assert region.sparse == ((0, layout.low_size),)
        vgpu.device.mmap(BAR2, 0, PAGE).close()
        with pytest.raises(OSError):  # any errno
            vgpu.device.mmap(BAR2, layout.low_size, PAGE)

    high = guest.device.guest_high()
    other.device.restore(guest.device.save())
    for reset in (other.device.reset, lambda: other.device.set_reg(gpu.RESET_REGISTER, 1)):
        reset()
        assert other.device.guest_low() == 0
        assert other.device.guest_high() == high
        assert other.instance.layout().host_high != high


def test_patch_6_the_device_says_that_it_is_migratable_unless_it_is_not(guest: Guest) -> None:
    flags, regions, irqs = guest.device.info()
    assert flags & (FLAG_MIGRATABLE | FLAG_PCI) == FLAG_MIGRATABLE | FLAG_PCI
    assert regions == 10
    assert irqs == 5
    with host.parameter_set("migratable", 0):
        assert guest.device.info()[0] == flags & ~FLAG_MIGRATABLE
    with host.parameter_set("report_pci", 0):
        assert guest.device.info()[0] == flags & ~FLAG_PCI
    with host.parameter_set("extra_flags", 0x10):
        assert guest.device.info()[0] == flags | 0x10
    assert guest.device.info()[0] == flags


def test_patch_7_stop_keeps_queued_work_and_start_runs_it(guest: Guest) -> None:
    engine = gpu.Engine(guest)
    gma, iova = guest.bind()
    before = guest.instance.counters()
    assert guest.instance.run_state() == "running"
    for _ in range(2):
        guest.device.stop()
        assert guest.instance.run_state() == "stopped"
    context = engine.context(gpu.store_dword(gma, 0x600D))
    engine.submit(context)
    assert guest.instance.queue() == [(gpu.RCS, context.high, context.low)]
    assert len(image.workloads(guest.device.save())) == 1
    assert guest.memory.u32(iova) == 0
    assert guest.instance.counters()["workloads_completed"] == before["workloads_completed"]
    for _ in range(2):
        guest.device.start()
        assert guest.instance.run_state() == "running"
    gpu.wait_ended(guest, before, 1)
    assert guest.memory.u32(iova) == 0x600D
    assert guest.instance.queue() == []
    assert guest.instance.counters()["status_set"] == before["status_set"] + 4

    for flags, argsz in ((0, 8), (3, 8), (4, 8), (1 << 31 | 1, 8), (1, 7), (2, 0)):
        with pytest.raises(OSError) as caught:
            guest.device.status(flags, argsz)
        assert caught.value.errno == errno.EINVAL
        assert guest.instance.run_state() == "running"


def test_patch_8_the_dirty_bitmap_has_the_pages_behind_present_entries(guest: Guest) -> None:
    device, memory = guest.device, guest.memory
    pages = [memory.iova + number * PAGE for number in (1, 9, 255)]
    for number, iova in enumerate(pages):
        device.set_pte(number * PAGE, iova | 1)
    device.set_pte(device.guest_high(), pages[0] | 1)  # a second entry for the first page
    for _ in range(2):  # reading clears nothing
        assert device.dirty(memory) == set(pages)
    assert guest.instance.pinned() == pages
    device.set_pte(0, 0)
    assert device.dirty(memory) == set(pages)
    device.set_pte(device.guest_high(), 0)
    assert device.dirty(memory) == set(pages[1:])
    device.stop()
    assert device.dirty(memory) == set(pages[1:])
    guest.container.unmap(memory)
    assert device.dirty(memory) == set()
    assert guest.instance.pinned() == []
    assert not any(guest.instance.hw_ggtt())


def test_patch_9_one_read_saves_and_one_write_restores(guest: Guest, other: Guest) -> None:
    region = guest.device.region(STATE)
    assert region.size == STATE_SIZE
    assert region.flags & (REGION_READ | REGION_WRITE) == REGION_READ | REGION_WRITE
    assert CAP_TYPE not in region.capability_ids

    entry = guest.page() | 1
    guest.device.set_pte(0x10 * PAGE, entry)
    guest.device.set_fence(0, 0x1001, 0x2000)
    guest.device.make_ppgtt(4, [0x123000])
    saved = guest.device.save()
    assert guest.device.save() == saved
    assert saved[:24] == bytes.fromhex("01000000 10020000 00000000") + len(saved).to_bytes(4, "little") + bytes(8)
    assert [one.kind for one in image.records(saved)] == list(image.ORDER)
    assert len(saved) == 0x4E1248 + 40
    assert image.roots(saved) == [(4, 0, 0x123000, 0, 0, 0)]

    other.device.restore(saved)
    for offset, size in ((PVINFO, PAGE), (GTT + 0x10 * 8, 8), (0x100000, 32)):
        assert other.device.read(0, offset, size) == guest.device.read(0, offset, size)
    assert other.instance.hw_entry(other.instance.layout().host_low + 0x10 * PAGE) == entry
    assert other.instance.hw_fence() != guest.instance.hw_fence()
    assert other.device.save() == saved

    with pytest.raises(OSError) as caught:
        guest.device.read(STATE, 4, STATE_SIZE - 4)
    assert caught.value.errno == errno.EFAULT
    broken = bytearray(saved)
    broken[0] = 2
    with pytest.raises(OSError) as caught:
        other.device.restore(broken)
    assert caught.value.errno == errno.EFAULT
    assert other.device.save() == saved
