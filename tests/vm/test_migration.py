# SPDX-License-Identifier: MIT
"""A vGPU moves to another with other host bases: the RFC's order of operations, by raw system calls."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest

from tools.lab import waiting
from tools.lab.sample import gpu, image
from tools.lab.vfio.raw import BAR0, CONFIG, GTT, MMIO_SIZE

if TYPE_CHECKING:
    from tools.lab.sample.guest import Guest

PAGE = 4096
GPR = gpu.RING_BASE[gpu.RCS] + gpu.RING_GPR


def copy_pages(source: Guest, target: Guest, pages: set[int]) -> None:
    for iova in pages:
        target.memory.write(iova, source.memory.read(iova, PAGE))


def copy_all(source: Guest, target: Guest) -> None:
    target.memory.bytes[:] = source.memory.bytes[:]


def guest_view(guest: Guest) -> dict[str, bytes]:
    """Everything that the guest can read without changing it; the windows are those of its own PVINFO."""
    device, sizes = guest.device, guest.instance.layout()
    return {
        "registers": device.read(BAR0, 0, MMIO_SIZE),
        "low GGTT": device.read(BAR0, GTT + (device.guest_low() >> 12) * 8, sizes.low_size >> 9),
        "high GGTT": device.read(BAR0, GTT + (device.guest_high() >> 12) * 8, sizes.high_size >> 9),
        "configuration space": device.read(CONFIG, 0, 4096),
        "memory": guest.memory.bytes[:],
    }


def test_a_round_trip_keeps_the_guest_s_view_and_moves_the_host_s(  # noqa: PLR0915  # one story
    guest: Guest, other: Guest
) -> None:
    rng = random.Random(2017)  # noqa: S311
    device, memory = guest.device, guest.memory
    source, target = guest.instance.layout(), other.instance.layout()
    assert {source.host_low, source.host_high, source.fence_first}.isdisjoint(
        {target.host_low, target.host_high, target.fence_first}
    )

    # A guest at work: memory, entries in both windows, fences, registers, page tables, work done and work queued
    memory.bytes[:] = rng.randbytes(memory.size)
    copy_all(guest, other)  # pre-copy: what changes from now on must be found dirty
    engine = gpu.Engine(guest)
    blitter = gpu.Engine(guest, gpu.BCS)
    low_gma, low_iova = guest.bind(2)
    high_gma, high_iova = guest.bind(2, high=True)
    for _ in range(50):
        slot = rng.randrange(0x100, source.low_size // PAGE)
        device.set_pte(slot * PAGE, memory.iova + rng.randrange(256) * PAGE | rng.randrange(2))
    device.set_fence(0, low_gma | 1, low_gma + PAGE | 3)
    device.set_fence(3, high_gma | 3, high_gma + PAGE)
    for _ in range(50):
        device.set_reg(0x60000 + 4 * rng.randrange(0x1000), rng.getrandbits(32))
    device.make_ppgtt(4, [0xABCDE000])
    device.make_ppgtt(3, [0x1000, 0x2000, 0x3000, 0x4000])
    device.write(CONFIG, 4, b"\x07\x04")
    assert engine.run(gpu.store_dword(low_gma, 0x0A11D0E5), gpu.load_register(GPR, 0xFACE))[1]

    device.stop()
    pending = engine.context(
        gpu.store_qword(low_gma + 0x80, 0x1122334455667788),
        gpu.store_register_mem(GPR, high_gma + PAGE),
        gpu.load_register(GPR + 8, 1),
    )
    engine.submit(pending)
    second = blitter.context(gpu.flush_qword(high_gma + 8, 0xB11 << 32))
    blitter.submit(second)
    queued = [(gpu.RCS, *pending.descriptor), (gpu.BCS, *second.descriptor)]
    assert guest.instance.queue() == queued

    # STOP, dirty bitmap, copy, one read, one write
    dirty = device.dirty(memory)
    assert dirty == set(guest.instance.pinned())
    copy_pages(guest, other, dirty)
    saved = device.save()
    other.device.stop()
    other.device.restore(saved)
    assert other.instance.run_state() == "stopped"

    view = guest_view(guest)
    assert guest_view(other) == view
    assert other.device.save() == saved
    assert other.instance.queue() == queued
    assert [entry[0] for entry in image.workloads(saved)] == [gpu.RCS, gpu.BCS]
    assert len(image.roots(saved)) == 2
    assert other.instance.pinned() == guest.instance.pinned()

    # The host's side is the other vGPU's own
    assert other.instance.layout().host_low == target.host_low
    assert other.instance.layout().host_high == target.host_high
    assert other.instance.hw_ggtt() == guest.instance.hw_ggtt()  # the same pages, from another host base on
    for gma, iova in ((low_gma, low_iova), (high_gma, high_iova)):
        for vgpu, layout in ((guest, source), (other, target)):
            hgma = gma + layout.host_low if gma == low_gma else layout.host_high + gma - source.guest_high
            assert vgpu.instance.hw_entry(hgma) == iova | 1
    shift = target.host_low - source.host_low
    assert other.instance.hw_fence()[0] == guest.instance.hw_fence()[0] + (shift << 32) + shift
    assert other.instance.hw_fence()[3] != guest.instance.hw_fence()[3]

    # START: the queued work runs there, on that guest's pages
    before = other.instance.counters()
    other.device.start()
    gpu.wait_ended(other, before, 2)
    assert other.instance.counters()["workloads_failed"] == before["workloads_failed"], other.instance.last_error()
    assert other.memory.u64(low_iova + 0x80) == 0x1122334455667788
    assert other.memory.u32(high_iova + PAGE) == 0xFACE
    assert other.memory.u64(high_iova + 8) == 0xB11 << 32
    assert other.memory.u32(low_iova) == 0x0A11D0E5
    assert other.device.reg(GPR + 8) == 1
    assert other.instance.queue() == []
    written = {low_iova, high_iova, high_iova + PAGE, engine.status_iova, blitter.status_iova}
    written |= {pending.image + PAGE, second.image + PAGE}
    changed = {
        iova
        for iova in range(memory.iova, memory.iova + memory.size, PAGE)
        if other.memory.read(iova, PAGE) != memory.read(iova, PAGE)
    }
    assert changed <= written
    assert changed >= {low_iova, high_iova, high_iova + PAGE}
    assert guest.instance.queue() == queued  # and the source has not moved
    assert guest_view(guest) == view


def test_the_pages_the_gpu_wrote_are_dirty(guest: Guest, other: Guest) -> None:
    engine = gpu.Engine(guest)
    rng = random.Random(8)  # noqa: S311
    pages = [guest.bind(high=bool(number % 2)) for number in range(12)]
    copy_all(guest, other)
    for gma, _ in pages:
        assert engine.run(gpu.store_dword(gma + 4 * rng.randrange(1024), rng.getrandbits(32) | 1))[1]
    guest.device.stop()
    dirty = guest.device.dirty(guest.memory)
    # the contexts are the guest's own writes: a VMM's dirty log has them, and here the bitmap, as they are bound
    copy_pages(guest, other, dirty)
    unbound = set(range(guest.memory.iova, guest.memory.iova + guest.memory.size, PAGE)) - dirty
    assert unbound
    assert other.memory.bytes[:] == guest.memory.bytes[:]


@pytest.mark.parametrize("started", [False, True], ids=["both elements pending", "the first element done"])
def test_an_elsp_pair_is_finished_exactly_once(guest: Guest, other: Guest, *, started: bool) -> None:
    engine = gpu.Engine(guest)
    gma, iova = guest.bind()
    # Each element adds its mark in its own place: what ran twice would overwrite the sentinel of the copy
    contexts = [engine.context(gpu.store_dword(gma + 4 * number, 0x11 + number)) for number in range(2)]
    if started:
        guest.instance.set_exec_delay(300)
        engine.submit(*contexts)
        waiting.wait_until("the first element at work", lambda: len(guest.instance.queue()) == 1)
        guest.device.stop()
        assert guest.memory.read(iova, 8) == struct.pack("<II", 0x11, 0)
    else:
        guest.device.stop()
        engine.submit(*contexts)
    left = [(gpu.RCS, *one.descriptor) for one in contexts[started:]]
    assert guest.instance.queue() == left

    saved = guest.device.save()
    if not started:  # the first entry carries both elements, the second stands for it
        assert image.workloads(saved) == [
            (gpu.RCS, *contexts[1].descriptor, *contexts[0].descriptor, 3),
            (gpu.RCS, 0, 0, 0, 0, image.workloads(saved)[1][5]),
        ]
    other.device.stop()
    copy_all(guest, other)
    other.memory.write(iova, bytes(8))
    other.device.restore(saved)
    assert other.instance.queue() == left
    assert other.device.save() == saved
    before = other.instance.counters()
    other.device.start()
    gpu.wait_ended(other, before, len(left))
    assert other.memory.read(iova, 8) == struct.pack("<II", 0 if started else 0x11, 0x12)
    assert other.instance.counters()["workloads_completed"] == before["workloads_completed"] + len(left)


def test_a_full_queue_moves(guest: Guest, other: Guest) -> None:
    engine = gpu.Engine(guest)
    gma, iova = guest.bind()
    guest.device.stop()
    contexts = [engine.context(gpu.store_dword(gma + 4 * number, number + 1)) for number in range(40)]
    for one in contexts:
        engine.submit(one)
    other.device.stop()
    copy_all(guest, other)
    other.device.restore(guest.device.save())
    assert other.instance.queue() == guest.instance.queue()
    before = other.instance.counters()
    other.device.start()
    gpu.wait_ended(other, before, 40)
    assert memoryview(other.memory.read(iova, 160)).cast("I").tolist() == list(range(1, 41))


def test_a_reset_after_a_restore_moves_nothing_of_the_guest_s(guest: Guest, other: Guest) -> None:
    high = guest.device.guest_high()
    guest.bind()
    other.device.stop()
    other.device.restore(guest.device.save())
    other.device.start()
    for reset in (other.device.reset, lambda: other.device.set_reg(gpu.RESET_REGISTER, 1)):
        reset()
        assert (other.device.guest_low(), other.device.guest_high()) == (0, high)
        entry = other.memory.iova + 7 * PAGE | 1
        other.device.set_pte(high + PAGE, entry)
        assert other.instance.hw_entry(other.instance.layout().host_high + PAGE) == entry


def test_a_vgpu_that_moved_twice_is_the_same(guest: Guest, other: Guest) -> None:
    guest.bind(4)
    guest.bind(4, high=True)
    guest.device.set_fence(1, 0x10001, 0x11000)
    guest.device.stop()
    first = guest.device.save()
    other.device.stop()
    other.device.restore(first)
    guest.device.reset()
    guest.device.stop()
    guest.device.restore(other.device.save())
    assert guest.device.save() == first
    assert guest.instance.hw_fence()[1] == (guest.instance.layout().host_low + 0x11000) << 32 | (
        guest.instance.layout().host_low + 0x10001
    )
