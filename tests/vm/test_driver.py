# SPDX-License-Identifier: MIT
"""The sample driver itself and its hardware, outside of migration; test_both_drivers.py has what kvmgt does as well."""

from __future__ import annotations

import errno
import itertools
import os
import select
import struct
from typing import TYPE_CHECKING

import pytest

from tools.lab.sample import gpu, host, image
from tools.lab.sample.guest import Guest
from tools.lab.vfio.raw import (
    BAR0,
    BAR2,
    CONFIG,
    FENCE,
    GTT,
    IRQ_ACTION_MASK,
    IRQ_ACTION_TRIGGER,
    IRQ_ACTION_UNMASK,
    IRQ_DATA_NONE,
    IRQ_INTX,
    IRQ_MSI,
    PV_G2V_NOTIFY,
    PVINFO,
    REGION_CAPS,
    REGION_MMAP,
    STATE,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.conftest import MakeGuest, MakeInstance

PAGE = 4096
MIB = 1 << 20
TYPES = {"GVTg_V4_8": (64, 384), "GVTg_V4_4": (128, 512), "GVTg_V4_2": (256, 1024), "GVTg_V4_1": (512, 2048)}


# --- sysfs


def test_instances_never_share_host_memory_fences_or_numbers(make_instance: MakeInstance) -> None:
    layouts = [make_instance(kind).layout() for kind in ["GVTg_V4_8", "GVTg_V4_4", "GVTg_V4_8", "GVTg_V4_4"]]
    spans = sorted((span.start, span.stop) for layout in layouts for span in layout.host_ranges())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[0][0] >= 128 * MIB
    assert spans[-1][1] <= 1 << 32
    assert all(layout.host_low + layout.low_size <= 1024 * MIB for layout in layouts)
    assert all(layout.host_high >= (1024 + 384) * MIB for layout in layouts)
    fences = sorted(layout.fence_first for layout in layouts)
    assert fences == [4, 8, 12, 16]
    assert len({layout.vgpu_id for layout in layouts}) == 4
    assert all(1 <= layout.vgpu_id <= 7 for layout in layouts)


def test_the_first_instances_lie_where_i915_would_put_them(make_instance: MakeInstance) -> None:
    first, second = make_instance().layout(), make_instance().layout()
    assert (first.host_low, first.host_high) == (0x08000000, 0xE8000000)
    assert (second.host_low, second.host_high) == (0x0C000000, 0xD0000000)
    assert (first.guest_low, first.guest_high) == (0, first.host_high)
    assert (first.low_size, first.high_size) == (64 * MIB, 384 * MIB)


def test_module_parameters_lay_out_the_pool() -> None:
    with (
        host.loaded(aperture_mb=512, host_low_mb=64, host_high_mb=256, top_reserved_mb=128, host_fences=8),
        host.instance() as one,
    ):
        layout = one.layout()
        assert layout.host_low == 64 * MIB
        assert layout.host_high == (4096 - 128 - 384) * MIB
        assert layout.fence_first == 8
        assert host.available("GVTg_V4_8") == min((512 - 64) // 64, (4096 - 512 - 256 - 128) // 384, 6) - 1
        assert not host.type_directory("GVTg_V4_1").exists()
    with host.instance() as one:
        assert one.layout().host_low == 128 * MIB


# --- configuration space


def cfg(guest: Guest, offset: int, size: int = 4) -> int:
    return int.from_bytes(guest.device.read(CONFIG, offset, size), "little")


def set_cfg(guest: Guest, offset: int, value: int, size: int = 4) -> None:
    guest.device.write(CONFIG, offset, value.to_bytes(size, "little"))


def capability(guest: Guest, wanted: int) -> int:
    assert cfg(guest, 6, 2) & 0x10
    at = cfg(guest, 0x34, 1)
    for _ in range(48):
        if not at or cfg(guest, at, 1) == wanted:
            return at
        at = cfg(guest, at + 1, 1)
    return 0


def test_configuration_space_shows_an_intel_vga_function(make_guest: MakeGuest) -> None:
    guest = make_guest()
    assert cfg(guest, 0) == 0x16128086
    assert cfg(guest, 8) >> 8 == 0x030000
    set_cfg(guest, 0, 0xFFFFFFFF)
    assert cfg(guest, 0) == 0x16128086
    assert guest.device.region(CONFIG).size == 4096
    with host.parameter_set("device_id", 0x1912):
        assert cfg(make_guest(), 0) == 0x19128086


def test_there_is_an_msi_capability(guest: Guest) -> None:
    at = capability(guest, 0x05)
    assert at >= 0x40
    control = cfg(guest, at + 2, 2)
    assert control & 1 == 0
    set_cfg(guest, at + 2, control | 1, 2)
    assert cfg(guest, at + 2, 2) & 1 == 1


# --- BAR0


def test_a_ggtt_entry_may_come_in_two_halves(guest: Guest) -> None:
    device, at, hgma = guest.device, GTT + 0x30 * 8, guest.instance.layout().host_low + 0x30 * PAGE
    first, second = guest.page() | 1, guest.page() | 1
    halves = {0: first.to_bytes(8, "little")[:4], 4: first.to_bytes(8, "little")[4:]}
    for order in ((0, 4), (4, 0)):
        device.set_pte(0x30 * PAGE, second)
        device.write(BAR0, at + order[0], halves[order[0]])
        assert guest.instance.hw_entry(hgma) == 0
        assert guest.instance.pinned() == []
        device.write(BAR0, at + order[1], halves[order[1]])
        assert device.pte(0x30 * PAGE) == first
        assert guest.instance.hw_entry(hgma) == first
    device.write(BAR0, at, (second & 0xFFFFFFFF).to_bytes(4, "little"))
    device.write(BAR0, at, halves[0])  # the same half again replaces it
    device.write(BAR0, at + 4, halves[4])
    assert guest.instance.hw_entry(hgma) == first


def test_an_entry_whose_page_is_no_guest_memory_shows_scratch(guest: Guest) -> None:
    beyond = guest.memory.iova + guest.memory.size
    guest.device.set_pte(0x1000, beyond | 1)
    assert guest.device.pte(0x1000) == beyond | 1
    assert guest.instance.hw_entry(guest.instance.layout().host_low + 0x1000) == 0
    assert guest.instance.pinned() == []


def test_a_fence_that_the_vgpu_does_not_have_is_refused(guest: Guest) -> None:
    for number in (4, 31):
        with pytest.raises(OSError):
            guest.device.set_reg(FENCE + 8 * number, 0x1001)
        assert guest.device.fence(number) == 0
    assert guest.instance.hw_fence() == [0] * 4


def test_pvinfo_describes_the_vgpu_and_is_mostly_read_only(guest: Guest) -> None:
    layout = guest.instance.layout()
    page = guest.device.read(BAR0, PVINFO, PAGE)
    assert struct.unpack_from("<QHHII", page) == (0x4776544776544776, 1, 0, layout.vgpu_id, 0x1C)
    assert struct.unpack_from("<5I", page, 0x40) == (0, layout.low_size, layout.host_high, layout.high_size, 4)
    assert struct.unpack_from("<II", page, 0x830) == (0xFFFFFFFF, 0xFFFFFFFF)
    writable = {0x804, 0x830, 0x834, *range(0x838, 0x860, 4)}
    for offset in (0, 8, 0xC, 0x10, 0x40, 0x44, 0x48, 0x4C, 0x50, 0x400, *writable):
        guest.device.set_reg(PVINFO + offset, 0x5A5A5A5A)
    after = guest.device.read(BAR0, PVINFO, PAGE)
    changed = {at for at in range(0, PAGE, 4) if page[at : at + 4] != after[at : at + 4]}
    assert changed == writable


def test_ppgtt_roots_come_and_go_by_the_guest_s_messages(guest: Guest) -> None:
    def roots() -> list[tuple[int, ...]]:
        return image.roots(guest.device.save())

    guest.device.make_ppgtt(4, [0x5000])
    guest.device.make_ppgtt(4, [0x5000])  # known already
    guest.device.make_ppgtt(3, [0x5000, 1, 2, 3])
    assert roots() == [(4, 0, 0x5000, 0, 0, 0), (3, 0, 0x5000, 1, 2, 3)]
    guest.device.set_reg(PV_G2V_NOTIFY, 3)
    assert roots() == [(4, 0, 0x5000, 0, 0, 0)]
    for message in (3, 0, 1, 8, 0xFFFFFFFF):  # destroyed already; unknown
        with pytest.raises(OSError):
            guest.device.set_reg(PV_G2V_NOTIFY, message)
    with pytest.raises(OSError):
        guest.device.make_ppgtt(4, [0])
    for number in range(1, 64):
        guest.device.make_ppgtt(4, [number << 12 | 0x1000000])
    with pytest.raises(OSError):
        guest.device.make_ppgtt(4, [0x7777000])
    assert len(roots()) == 64
    guest.device.reset()
    assert roots() == []


# --- BAR2


def test_the_aperture_shows_guest_memory_where_the_ggtt_has_an_entry(guest: Guest) -> None:
    gma, iova = guest.bind(2)
    guest.memory.write(iova + PAGE - 4, b"abcdefgh")
    assert guest.device.read(BAR2, gma + PAGE - 4, 8) == b"abcdefgh"
    assert guest.device.write(BAR2, gma + PAGE - 2, b"XYZ!") == 4
    assert guest.memory.read(iova + PAGE - 4, 8) == b"abXYZ!gh"


def test_the_aperture_without_an_entry_is_memory_that_mmap_shows_too(guest: Guest) -> None:
    size = guest.instance.layout().low_size
    region = guest.device.region(BAR2)
    assert region.flags & (REGION_MMAP | REGION_CAPS) == REGION_MMAP | REGION_CAPS
    with guest.device.mmap(BAR2, 0, size) as aperture:
        for offset in (0, 5 * PAGE + 17, size - 8):
            assert guest.device.read(BAR2, offset, 8) == bytes(8)
            aperture[offset : offset + 8] = b"mappedby"
            assert guest.device.read(BAR2, offset, 8) == b"mappedby"
            guest.device.write(BAR2, offset, b"written!")
            assert aperture[offset : offset + 8] == b"written!"
    for offset, length in ((size, PAGE), (size - PAGE, 2 * PAGE)):
        with pytest.raises(OSError):
            guest.device.mmap(BAR2, offset, length)
    for index in (BAR0, CONFIG, STATE):
        with pytest.raises(OSError):
            guest.device.mmap(index, 0, PAGE)
    with pytest.raises(OSError):
        guest.device.read(BAR2, size, 4)


# --- interrupts


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def signals(fd: int, seconds: float = 0.0) -> int:
    """How often the eventfd was signalled since the last call; waits for the first up to *seconds*."""
    return os.eventfd_read(fd) if select.select([fd], [], [], seconds)[0] else 0


def enable_user_interrupt(guest: Guest) -> gpu.Engine:
    engine = gpu.Engine(guest)
    guest.device.set_reg(gpu.GT_IMR, 0xFFFFFFFE)
    guest.device.set_reg(gpu.GT_IER, 1)
    guest.device.set_reg(gpu.MASTER_IRQ, 1 << 31)
    return engine


def test_a_user_interrupt_signals_msi_only_when_everything_is_enabled(guest: Guest, event: int) -> None:
    engine = enable_user_interrupt(guest)
    guest.device.set_eventfd(IRQ_MSI, event)
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event) == 0  # MSI is off in configuration space
    assert guest.device.reg(gpu.GT_IIR) == 1
    guest.device.set_reg(gpu.GT_IIR, 1)
    assert guest.device.reg(gpu.GT_IIR) == 0

    control = capability(guest, 0x05) + 2
    set_cfg(guest, control, cfg(guest, control, 2) | 1, 2)
    irqs = guest.instance.counters()["irqs"]
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event, 5) == 1
    assert guest.instance.counters()["irqs"] == irqs + 1

    for register, value in ((gpu.GT_IER, 0), (gpu.MASTER_IRQ, 0), (gpu.GT_IMR, 0xFFFFFFFF)):
        guest.device.set_reg(gpu.GT_IIR, 0xFFFFFFFF)
        old = guest.device.reg(register)
        guest.device.set_reg(register, value)
        assert engine.run(gpu.USER_INTERRUPT)[1]
        assert signals(event, 0.05) == 0
        if register == gpu.GT_IMR:
            assert guest.device.reg(gpu.GT_IIR) == 0
        guest.device.set_reg(gpu.GT_IIR, 0xFFFFFFFF)
        guest.device.set_reg(register, old)
        signals(event, 0.05)  # enabling what is pending may signal

    guest.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_TRIGGER, IRQ_MSI, 0)
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event, 0.05) == 0


def test_a_user_interrupt_signals_intx_until_it_is_masked(guest: Guest, event: int) -> None:
    engine = enable_user_interrupt(guest)
    guest.device.set_eventfd(IRQ_INTX, event)
    set_cfg(guest, 4, 0, 2)
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event, 5) == 1
    guest.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_MASK, IRQ_INTX, 1)
    guest.device.set_reg(gpu.GT_IIR, 0xFFFFFFFF)
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event, 0.05) == 0
    guest.device.set_reg(gpu.GT_IIR, 0xFFFFFFFF)
    guest.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_UNMASK, IRQ_INTX, 1)
    signals(event, 0.05)
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event, 5) == 1
    guest.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_UNMASK, IRQ_INTX, 1)
    signals(event, 0.05)
    guest.device.set_reg(gpu.GT_IIR, 0xFFFFFFFF)
    set_cfg(guest, 4, 0x0400, 2)  # INTx disable
    assert engine.run(gpu.USER_INTERRUPT)[1]
    assert signals(event, 0.05) == 0


def test_bad_interrupt_requests_are_refused(guest: Guest, event: int) -> None:
    assert guest.device.irq(IRQ_INTX)[1] == 1
    assert guest.device.irq(IRQ_MSI)[1] == 1
    for index in (2, 3, 4, 5):
        with pytest.raises(OSError) as caught:
            guest.device.irq(index)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError):
        guest.device.set_eventfd(2, event)
    with pytest.raises(OSError):
        guest.device.set_eventfd(IRQ_MSI, 9999)
    with pytest.raises(OSError):
        guest.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_MASK, IRQ_MSI, 2)


# --- reset, close, unmap


def test_a_device_reset_clears_the_hardware_and_keeps_the_guest_bases(guest: Guest) -> None:
    gpu.Engine(guest)
    guest.bind()
    guest.device.set_fence(0, 0x1001, 0x2000)
    guest.device.set_reg(0x5000, 0x1234)
    guest.device.make_ppgtt(4, [0x5000])
    set_cfg(guest, 4, 7, 2)
    table = guest.device.read(BAR0, GTT + 0x80, 0x100)
    bases = guest.device.read(BAR0, PVINFO + 0x40, 20)
    guest.device.reset()
    assert not any(guest.instance.hw_ggtt())
    assert guest.instance.hw_fence() == [0] * 4
    assert guest.instance.pinned() == []
    assert guest.device.reg(0x5000) == 0
    assert cfg(guest, 4, 2) & 7 == 0
    assert guest.device.read(BAR0, PVINFO + 0x40, 20) == bases
    assert guest.device.read(BAR0, GTT + 0x80, 0x100) == table  # the guest's own table stays
    assert guest.instance.run_state() == "running"


def test_a_gt_reset_keeps_fences_and_the_ggtt(guest: Guest) -> None:
    guest.bind()
    guest.device.set_fence(0, 0x1001, 0x2000)
    guest.device.set_reg(0x5000, 0x1234)
    guest.device.set_reg(0x50000, 0x5678)
    before = guest.instance.hw_fence(), guest.instance.hw_ggtt().tobytes()
    guest.device.set_reg(gpu.RESET_REGISTER, 1)
    assert guest.device.reg(gpu.RESET_REGISTER) == 0
    assert guest.device.reg(0x5000) == 0
    assert guest.device.reg(0x50000) == 0x5678
    assert (guest.instance.hw_fence(), guest.instance.hw_ggtt().tobytes()) == before


def test_closing_stops_and_unpins_and_the_next_open_runs_with_the_old_registers(make_instance: MakeInstance) -> None:
    one = make_instance()
    with Guest.opened(one) as guest:
        gma, iova = guest.bind()
        guest.device.set_reg(0x5000, 0x1234)
        guest.device.stop()
        engine = gpu.Engine(guest)
        engine.submit(engine.context(gpu.store_dword(gma, 1)))
        assert len(one.queue()) == 1
    assert one.queue() == []
    assert not any(one.hw_ggtt())
    assert one.pinned() == []
    with Guest.opened(one) as guest:
        assert one.run_state() == "running"
        assert guest.device.reg(0x5000) == 0x1234
        assert guest.device.pte(gma) == iova | 1
        assert not any(one.hw_ggtt())  # not pinned again until written


def test_memory_that_is_unmapped_is_out_of_the_gpu_s_reach(guest: Guest) -> None:
    engine = gpu.Engine(guest)
    gma, iova = guest.bind()
    context = engine.context(gpu.store_dword(gma, 7))
    assert guest.container.unmap(guest.memory) == guest.memory.size
    assert not any(guest.instance.hw_ggtt())
    before = guest.instance.counters()
    engine.submit(context)
    gpu.wait_ended(guest, before, 1)
    assert guest.instance.counters()["workloads_failed"] == before["workloads_failed"] + 1
    assert guest.memory.u32(iova) == 0
    assert guest.device.pte(gma) == iova | 1
