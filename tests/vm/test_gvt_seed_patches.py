# SPDX-License-Identifier: MIT
"""The RFC's nine patches on the real kvmgt, one by one, with the GPU asked what it got.

``scripts/vm --gvt`` loads the distribution's kvmgt. These tests replace it by the one that scripts/kvmgt has built:
``VFIO_MIG_KVMGT`` is the directory with it and its mutations. Each check that translates fails under its own mutation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import BATCH, HWSP, MEMORY, RESULT, RING, SEMAPHORE, TARGET, Engine, Vgpu
from tools.lab.gvt.rfc import (
    BCS,
    CONTEXTS,
    HALF_PTE,
    MODULES,
    QUEUED,
    RCS,
    VCS,
    VREG,
    assert_same,
    at,
    dma,
    fence_of,
    host_fences,
    host_low,
    load_ours,
    load_stock,
    patched,
    queue_work,
    result_of,
    ring_of,
    rmmod,
    sealed,
    stored,
    view,
)
from tools.lab.sample.image import roots
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.conftest import MakeVgpu
    from tools.gpu.control import Control

pytestmark = pytest.mark.gvt

PIPE_CONTROL: Final = 0x7A00_0004
HOSTILE_IMAGES: Final = 40
HIGH_SPARE: Final = 0x5000  # a page of the hidden part

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours()
    yield
    load_stock()


def copy_memory(source: Vgpu, target: Vgpu) -> None:
    target.memory.bytes[:] = source.memory.bytes[:]


def moved(make_vgpu: MakeVgpu) -> tuple[Vgpu, Vgpu, int]:
    """Give one vGPU another's state; both, and where the host has the other's hidden part."""
    source, target = make_vgpu(), make_vgpu()
    hidden = target.high  # a vGPU's guest has it where its first host has it
    assert source.high != hidden
    source.device.stop()
    copy_memory(source, target)
    target.device.stop()
    target.device.restore(source.device.save())
    target.device.start()
    return source, target, hidden


# (4) the guest's bases


def check_bases(make_vgpu: MakeVgpu, gpu: Control) -> None:
    source, target, hidden = moved(make_vgpu)
    assert target.device.guest_high() == source.high
    assert target.device.guest_low() == 0
    # what the guest calls its hidden part is this host's
    target.device.set_pte(source.high + HIGH_SPARE, MEMORY + TARGET | 1)
    assert dma(gpu, hidden + HIGH_SPARE) == target.at(TARGET)


def test_the_guest_s_bases_go_along_and_the_host_s_stay(make_vgpu: MakeVgpu, gpu: Control) -> None:
    check_bases(make_vgpu, gpu)


def test_a_guest_in_failsafe_mode_overwrites_its_own_page_and_nothing_else(vgpu: Vgpu, gpu: Control) -> None:
    low = host_low(gpu, vgpu)
    vgpu.device.set_pte(vgpu.low, MEMORY + RESULT | 1)
    vgpu.device.set_reg(raw.PVINFO + 0x808, 1)  # out of resources: failsafe
    vgpu.device.set_reg(raw.PV_NONMAPPABLE_BASE, 0xFFFF_F000)
    vgpu.device.stop()
    image = vgpu.device.save()
    assert image[VREG + raw.PV_NONMAPPABLE_BASE :][:4] == b"\x00\xf0\xff\xff"
    with pytest.raises(OSError):
        vgpu.device.restore(image)
    assert dma(gpu, low) == vgpu.at(RESULT)
    vgpu.device.reset()
    assert vgpu.device.guest_high() == vgpu.high


# (1) GTT


def check_gtt(make_vgpu: MakeVgpu, gpu: Control) -> None:
    vgpu = make_vgpu()
    low = host_low(gpu, vgpu)
    assert low
    before = dma(gpu, vgpu.low + 5 * PAGE)
    vgpu.device.set_pte(vgpu.low + 5 * PAGE, MEMORY + TARGET | 1)
    vgpu.device.set_pte(vgpu.high + 5 * PAGE, MEMORY + RESULT | 1)
    assert vgpu.device.pte(vgpu.low + 5 * PAGE) == MEMORY + TARGET | 1
    assert dma(gpu, low + 5 * PAGE) == vgpu.at(TARGET)
    assert dma(gpu, vgpu.high + 5 * PAGE) == vgpu.at(RESULT)
    assert dma(gpu, vgpu.low + 5 * PAGE) == before  # the host's own page, at the guest's address


def test_an_entry_is_where_the_guest_put_it_and_where_the_host_needs_it(make_vgpu: MakeVgpu, gpu: Control) -> None:
    check_gtt(make_vgpu, gpu)


def test_half_an_entry_maps_nothing_and_the_other_half_all(vgpu: Vgpu, gpu: Control) -> None:
    low = host_low(gpu, vgpu)
    scratch = dma(gpu, low + 7 * PAGE)
    slot = raw.GTT + (vgpu.low + 6 * PAGE >> 12) * 8
    vgpu.device.set_reg(slot, MEMORY + TARGET | 1)
    assert dma(gpu, low + 6 * PAGE) != vgpu.at(TARGET)
    vgpu.device.set_reg(slot + 4, 0)
    assert dma(gpu, low + 6 * PAGE) == vgpu.at(TARGET)
    assert dma(gpu, low + 7 * PAGE) == scratch


# (2) fences


def check_fence(make_vgpu: MakeVgpu, gpu: Control) -> None:
    vgpu = make_vgpu()
    low = host_low(gpu, vgpu)
    vgpu.device.set_pte(vgpu.low + 0x0010_0000, MEMORY + TARGET | 1)
    fence = fence_of(gpu, vgpu, 0x0010_0001, 0x001F_F003)
    assert dma(gpu, fence & 0xFFFF_F000) == vgpu.at(TARGET)  # the GPU's fence is over the guest's page
    assert fence == (low + 0x001F_F000 | 3) << 32 | (low + 0x0010_0000 | 1)
    assert vgpu.device.fence(0) == 0x001F_F003_0010_0001
    hidden = fence_of(gpu, vgpu, vgpu.high | 1, vgpu.high + 0x1F000 | 3)
    assert hidden == (vgpu.high + 0x1F000 | 3) << 32 | vgpu.high | 1


def test_a_fence_keeps_the_guest_s_addresses_and_has_the_host_s(make_vgpu: MakeVgpu, gpu: Control) -> None:
    check_fence(make_vgpu, gpu)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0x0010_0000, 0x001F_F003), (0x001F_F001, 0x0010_0003), (0x0010_0001, 0x7FFF_F003), (0x7FFF_F001, 0x7FFF_F003)],
    ids=["not valid", "backwards", "past the end", "outside"],
)
def test_a_fence_that_is_not_all_the_guest_s_is_off(vgpu: Vgpu, gpu: Control, low: int, high: int) -> None:
    assert fence_of(gpu, vgpu, low, high) == 0


def test_the_fences_of_an_image_are_the_host_s(make_vgpu: MakeVgpu, gpu: Control) -> None:
    source, target = make_vgpu(), make_vgpu()
    low = host_low(gpu, target)
    source.device.set_fence(0, 0x0010_0001, 0x001F_F003)
    source.device.stop()
    target.device.stop()
    target.device.restore(source.device.save())
    assert (low + 0x001F_F000 | 3) << 32 | (low + 0x0010_0000 | 1) in host_fences(gpu)


# (3) commands


def commands(vgpu: Vgpu, engine: Engine, dwords: list[int]) -> None:
    """Run a ring with *dwords* and a store that says that they are done."""
    vgpu.prepare(engine)
    ring = [*dwords, *vgpu.flush(engine, 0x600D_D00D), 2 << 23]
    ring += [0] * (len(ring) % 2)
    vgpu.put(BATCH, 0x0A << 23)
    vgpu.make_context(engine, ring)
    vgpu.run_contexts(engine)
    vgpu.await_u32(RESULT, 0x600D_D00D)
    assert [vgpu.u32(RING + 4 * number) for number in range(len(ring))] == ring  # the guest's own is not touched


def check_commands(make_vgpu: MakeVgpu, gpu: Control) -> None:
    vgpu = make_vgpu()
    assert host_low(gpu, vgpu) != vgpu.low
    since = gpu.last()
    commands(
        vgpu,
        BCS,
        [
            *(0x1040_0002, at(vgpu, 0x10), 0, 0x1111),  # MI_STORE_DATA_IMM
            *(0x1060_0003, at(vgpu, 0x18), 0, 0x2222, 0x3333),  # of 8 bytes
            *(0x1300_4003, at(vgpu, 0x20) | 4, 0, 0x4444, 0x5555, 0),  # MI_FLUSH_DW of 5 dwords
            *(0x1300_4002 | 1 << 21, 0x300 | 4, 0, 0x6666),  # into the status page
        ],
    )
    stored = {value: address for entry in gpu.record(since, BCS.name) for address, value in entry["writes"]}
    assert [vgpu.u32(RESULT + offset) for offset in (0x10, 0x18, 0x1C, 0x20)] == [0x1111, 0x2222, 0x3333, 0x4444]
    assert vgpu.u32(HWSP + 0x300) == 0x6666
    assert stored[0x1111] == vgpu.at(RESULT + 0x10)


def test_every_address_in_a_command_is_the_host_s_and_the_flags_stay(make_vgpu: MakeVgpu, gpu: Control) -> None:
    check_commands(make_vgpu, gpu)


def test_a_pipe_control_s_address_is_translated_for_every_operation(vgpu: Vgpu) -> None:
    store, stamp = 1 << 14, 3 << 14
    flags = 1 << 24 | 1 << 20
    commands(
        vgpu,
        RCS,
        [
            *(PIPE_CONTROL, flags | store, at(vgpu, 0x40), 0, 0x7777, 0),
            *(PIPE_CONTROL, flags | store | 1 << 21, 0x308, 0, 0x8888, 0),
            *(PIPE_CONTROL, flags | stamp, at(vgpu, 0x48), 0, 0, 0),
        ],
    )
    assert vgpu.u32(RESULT + 0x40) == 0x7777
    assert vgpu.u32(HWSP + 0x308) == 0x8888
    assert vgpu.u32(RESULT + 0x48) != 0  # the time


@pytest.mark.parametrize(
    ("engine", "dwords"),
    [
        (BCS, [0x1040_0002, 0x7FFF_F000, 0, 1]),
        (BCS, [0x1300_4003, 0x7FFF_F004, 0, 1, 1, 0]),
        (RCS, [PIPE_CONTROL, 3 << 14 | 1 << 24, 0x7FFF_F000, 0, 0, 0]),
        (RCS, [0x1100_0001, 0x2180, 0x7FFF_F001]),
    ],
    ids=["SDI", "FLUSH_DW of 5 dwords", "PIPE_CONTROL's time", "LRI of CCID"],
)
def test_an_address_that_is_not_the_guest_s_is_never_executed(
    vgpu: Vgpu, gpu: Control, engine: Engine, dwords: list[int]
) -> None:
    vgpu.prepare(engine)
    since = gpu.last()
    # the fourth write submits, and is refused or not; executed it must never be
    vgpu.make_context(engine, [*dwords, *[0] * (len(dwords) % 2), *vgpu.flush(engine, 0xBAD), 0, 0])
    with contextlib.suppress(OSError):
        vgpu.run_contexts(engine)
    with pytest.raises(TimeoutError):
        vgpu.await_u32(RESULT, 0xBAD, seconds=0.5)
    assert not any(value == 0xBAD for entry in gpu.record(since, engine.name) for _, value in entry["writes"])


def test_a_submission_to_an_engine_that_the_guest_has_not_turned_on_is_refused(vgpu: Vgpu) -> None:
    vgpu.prepare(BCS)
    vgpu.make_context(RCS, vgpu.flush(RCS, 0xBAD))
    with pytest.raises(OSError):
        vgpu.run_contexts(RCS)
    vgpu.submit(BCS, 1, 2)
    vgpu.await_u32(RESULT, 2)


def test_a_vgpu_works_again_after_queued_work_was_refused_and_a_reset(vgpu: Vgpu) -> None:
    """What is queued behind other work is looked at when its turn comes. Refused, it kept a lock for ever."""
    queue_work(vgpu)
    for context in CONTEXTS[1::2]:
        vgpu.put(ring_of(context), 0x1040_0002, 0x7FFF_F000, 0, 1)
    vgpu.device.start()
    for engine, values in QUEUED.items():
        vgpu.await_u32(result_of(engine, 0), values[0])
    vgpu.device.stop()
    assert [vgpu.u32(result_of(engine, 1)) for engine in QUEUED] == [0, 0]
    vgpu.device.reset()
    assert vgpu.device.reg64(raw.PVINFO) == kvmgt.PV_MAGIC  # or its driver does not know that it is a vGPU
    for engine in QUEUED:
        vgpu.prepare(engine)
        vgpu.submit(engine, 0x600D, 0x900D)
        vgpu.await_u32(TARGET, 0x600D)
        vgpu.await_u32(RESULT, 0x900D)
        vgpu.put(TARGET, 0)
        vgpu.put(RESULT, 0)


# (5) the aperture at 0


def check_aperture(make_vgpu: MakeVgpu, gpu: Control) -> None:
    one, other = make_vgpu(), make_vgpu()
    for vgpu in (one, other):
        assert vgpu.low == 0
        vgpu.device.set_pte(3 * PAGE, MEMORY + RESULT | 1)
        vgpu.device.write(raw.CONFIG, 4, b"\6\0")
        vgpu.device.write(raw.BAR2, 3 * PAGE, b"\x44\x33\x22\x11")
        assert vgpu.u32(RESULT) == 0x1122_3344
        assert vgpu.device.read(raw.BAR2, 3 * PAGE, 4) == b"\x44\x33\x22\x11"
        with vgpu.device.mmap(raw.BAR2, 3 * PAGE, PAGE) as aperture:
            aperture[4:8] = b"\x88\x77\x66\x55"
        assert vgpu.u32(RESULT + 4) == 0x5566_7788
        assert vgpu.device.region(raw.BAR2).sparse == ((0, vgpu.low_size),)
    assert host_low(gpu, one) != host_low(gpu, other)


def test_every_guest_has_its_aperture_at_0_and_reaches_its_own(make_vgpu: MakeVgpu, gpu: Control) -> None:
    check_aperture(make_vgpu, gpu)


def test_the_last_bytes_of_the_aperture_can_be_reached_and_none_behind(vgpu: Vgpu) -> None:
    last = vgpu.low_size - PAGE
    vgpu.device.set_pte(last, MEMORY + RESULT | 1)
    vgpu.device.write(raw.BAR2, last + PAGE - 4, b"\1\2\3\4")
    assert vgpu.memory.read(MEMORY + RESULT + PAGE - 4, 4) == b"\1\2\3\4"
    with pytest.raises(OSError):
        vgpu.device.read(raw.BAR2, vgpu.low_size, 4)
    with pytest.raises(OSError):
        vgpu.device.mmap(raw.BAR2, vgpu.low_size, PAGE)


def test_a_reset_keeps_the_bases_of_a_vgpu_that_was_moved(make_vgpu: MakeVgpu, gpu: Control) -> None:
    source, target, hidden = moved(make_vgpu)
    target.device.reset()
    assert target.device.guest_high() == source.high
    target.device.set_pte(source.high, MEMORY + TARGET | 1)
    assert dma(gpu, hidden) == target.at(TARGET)


def test_a_reset_forgets_a_page_table_that_was_announced_twice_and_half_an_entry(vgpu: Vgpu, gpu: Control) -> None:
    low = host_low(gpu, vgpu)
    for engine in (BCS, RCS):
        vgpu.prepare(engine)
    slot = raw.GTT + (HALF_PTE >> 12) * 8
    vgpu.device.set_reg(slot, MEMORY + TARGET | 1)
    vgpu.device.stop()
    assert [root[:1] + root[2:] for root in roots(vgpu.device.save())] == [(4, MEMORY + kvmgt.PML4, 0, 0, 0)]
    vgpu.device.reset()
    vgpu.device.set_reg(slot + 4, 0)
    assert dma(gpu, low + HALF_PTE) != vgpu.at(TARGET)
    vgpu.device.stop()
    assert roots(vgpu.device.save()) == []


# Mutations

MUTATIONS: Final = {
    "pvinfo_base": check_bases,
    "g2h_gtt": check_gtt,
    "g2h_fence": check_fence,
    "g2h_cmd": check_commands,
    "aperture_zero": check_aperture,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_each_check_fails_without_what_it_checks(
    name: str, make_vgpu: MakeVgpu, gpu: Control, resources: contextlib.ExitStack
) -> None:
    load_ours(name)
    try:
        with pytest.raises((AssertionError, TimeoutError, OSError)):
            MUTATIONS[name](make_vgpu, gpu)
    finally:
        resources.close()
        load_ours()


# (6) the flag, (7) stop and start


def test_the_flag_the_region_and_the_others_behind_it(vgpu: Vgpu) -> None:
    flags, regions, _ = vgpu.device.info()
    assert flags & raw.FLAG_MIGRATABLE
    assert regions == 12
    state = vgpu.device.region(raw.STATE)
    assert (state.size, state.flags & 7) == (0x900000, 3)
    assert state.capability_ids == ()
    assert vgpu.device.region(10).capability_ids == (raw.CAP_TYPE,)


def test_off_is_the_distribution_s_own(gpu: Control) -> None:
    load_ours(None, "migration=off")
    try:
        with kvmgt.instance() as name, Vgpu.opened(name) as vgpu:
            flags, regions, _ = vgpu.device.info()
            assert flags & raw.FLAG_MIGRATABLE == 0
            assert regions == 11
            assert vgpu.low != 0
            assert fence_of(gpu, vgpu, vgpu.low | 1, vgpu.low) == vgpu.low << 32 | vgpu.low | 1
            vgpu.prepare(BCS)
            vgpu.submit(BCS, 1, 2)
            vgpu.await_u32(RESULT, 2)
    finally:
        load_ours()


@pytest.mark.parametrize("value", ["v1", "on", ""])
def test_another_value_of_the_parameter_is_refused(value: str) -> None:
    rmmod()
    try:
        done = subprocess.run(["insmod", MODULES / "kvmgt.ko", f"migration={value}"], capture_output=True, check=False)
        assert done.returncode != 0
        assert not Path("/sys/module/kvmgt").exists()
    finally:
        subprocess.run(["insmod", MODULES / "kvmgt.ko"], check=True)


def test_a_stopped_vgpu_keeps_its_work_and_a_started_one_does_it(vgpu: Vgpu) -> None:
    vgpu.prepare(BCS)
    vgpu.device.stop()
    vgpu.device.stop()
    vgpu.submit(BCS, 0xAA, 0xBB)
    with pytest.raises(TimeoutError):
        vgpu.await_u32(RESULT, 0xBB, seconds=1.0)
    assert vgpu.u32(TARGET) == 0
    vgpu.device.start()
    vgpu.await_u32(RESULT, 0xBB)
    assert vgpu.u32(TARGET) == 0xAA


def test_stop_waits_for_the_work_that_runs_and_for_no_other(vgpu: Vgpu) -> None:
    vgpu.prepare(BCS)
    vgpu.put(SEMAPHORE, 0)
    vgpu.submit(BCS, 1, 2, wait=True)
    waiter = threading.Thread(target=vgpu.device.stop)
    waiter.start()
    time.sleep(1)
    assert waiter.is_alive()
    assert vgpu.u32(RESULT) == 0
    vgpu.put(SEMAPHORE, 1)
    waiter.join(20)
    assert not waiter.is_alive()
    assert [vgpu.u32(TARGET), vgpu.u32(RESULT)] == [1, 2]


def test_a_stopped_vgpu_does_not_hold_up_another(make_vgpu: MakeVgpu) -> None:
    vgpu, other = make_vgpu(), make_vgpu()
    for one in (vgpu, other):
        one.prepare(BCS)
    vgpu.device.stop()
    vgpu.submit(BCS, 1, 2)
    other.submit(BCS, 3, 4)
    other.await_u32(RESULT, 4)
    assert vgpu.u32(RESULT) == 0


def test_nothing_of_a_stopped_vgpu_changes(vgpu: Vgpu) -> None:
    vgpu.prepare(BCS)
    vgpu.device.set_reg(0x70008, 1 << 31)  # its pipe is on: vblanks are counted
    vgpu.device.stop()
    one = vgpu.device.save()
    stamp = vgpu.device.reg(BCS.base + 0x358)
    subprocess.run(["sleep", "0.3"], check=True)
    assert vgpu.device.reg(BCS.base + 0x358) == stamp
    assert_same(vgpu.device.save(), one)
    vgpu.device.start()
    count = vgpu.device.reg(0x70040)
    subprocess.run(["sleep", "0.3"], check=True)
    assert vgpu.device.reg(0x70040) > count


@pytest.mark.parametrize("flags", [0, 3, 4, 1 << 31 | 1])
def test_other_flags_are_refused(vgpu: Vgpu, flags: int) -> None:
    with pytest.raises(OSError) as caught:
        vgpu.device.status(flags)
    assert caught.value.errno == errno.EINVAL


# (8) dirty pages


def test_exactly_the_pages_that_the_gpu_can_write_are_dirty(vgpu: Vgpu) -> None:
    assert vgpu.device.dirty(vgpu.memory) == set()
    for number, page in enumerate((RESULT, TARGET, BATCH)):
        vgpu.device.set_pte(vgpu.low + number * PAGE, MEMORY + page | 1)
    three = {MEMORY + page for page in (RESULT, TARGET, BATCH)}
    assert vgpu.device.dirty(vgpu.memory) == three
    assert vgpu.device.dirty(vgpu.memory) == three  # asking changes nothing
    vgpu.device.set_pte(vgpu.low, 0)
    assert vgpu.device.dirty(vgpu.memory) == three  # the GPU may have written it before
    vgpu.device.reset()
    assert vgpu.device.dirty(vgpu.memory) == set()


def test_the_container_knows_of_the_same_pages(vgpu: Vgpu) -> None:
    vgpu.container.dirty_tracking(raw.DIRTY_START)
    vgpu.prepare(BCS)
    vgpu.submit(BCS, 1, 2)
    vgpu.await_u32(RESULT, 2)
    vgpu.device.stop()
    assert vgpu.container.dirty_pages(vgpu.memory) <= vgpu.device.dirty(vgpu.memory)


# (9) the state


def check_continues(source: Vgpu, target: Vgpu, gpu: Control, low: int) -> None:
    """See the target go on where the source was stopped, on its own memory and nowhere else.

    :param low: where the host has the target's aperture.
    """
    untouched = source.memory.bytes[:]
    since = gpu.last()
    target.device.start()
    for engine, values in QUEUED.items():
        for number, value in enumerate(values):
            target.await_u32(result_of(engine, number), value)
            assert stored(gpu, since)[value] == target.at(result_of(engine, number))
    # the other half of the entry
    target.device.set_reg(raw.GTT + (target.low + HALF_PTE >> 12) * 8 + 4, 0)
    assert dma(gpu, low + HALF_PTE) == target.at(TARGET)
    # the other half of the submission is of nothing: refused, but not taken for the first half of another one
    for dword in (0, 0):
        with contextlib.suppress(OSError):
            target.device.set_reg(VCS.base + kvmgt.ELSP, dword)
    target.submit(VCS, 0x61, 0x62)
    target.await_u32(RESULT, 0x62)
    assert source.memory.bytes[:] == untouched


def test_the_state_moves_with_all_that_was_half_done(make_vgpu: MakeVgpu, gpu: Control) -> None:
    source, target = make_vgpu(), make_vgpu()
    low = host_low(gpu, target)
    queue_work(source)
    source.device.set_fence(0, 0x0010_0001, 0x001F_F003)
    before = view(source.device)
    image = source.device.save()
    assert_same(source.device.save(), image)
    copy_memory(source, target)
    target.device.stop()
    target.device.restore(image)
    assert view(target.device) == before
    assert_same(target.device.save(), image)
    check_continues(source, target, gpu, low)


def test_a_state_can_be_restored_by_a_process_that_did_not_map_the_memory(make_vgpu: MakeVgpu, gpu: Control) -> None:
    source, target = make_vgpu(), make_vgpu()
    low = host_low(gpu, target)
    queue_work(source)
    before = view(source.device)
    image = source.device.save()
    copy_memory(source, target)
    target.device.stop()
    child = os.fork()
    if not child:
        try:
            target.device.restore(image)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert view(target.device) == before
    check_continues(source, target, gpu, low)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"\x02"),
        (12, b"\xff\xff\xff\xff"),
        (0x21C, b"\x01"),
        (0x220 + 2, b"\x34\x12"),
        (0x220 + 0x0B, b"\x02"),
        (VREG + 0x78000, b"\x00"),
        (VREG + 0x78044, b"\x00\x00\x00\x01"),
        (VREG + 0x78048, b"\x00\x00\x00\xff"),
        (VREG + 0x78048, b"\x00\x10\x00\x00"),
        (VREG + 0x24D0, b"\x80\x20\x00\x00"),
    ],
    ids=[
        "no HEAD", "no size", "a record's size", "another GPU", "another class", "PVINFO", "another type",
        "hidden past the GGTT", "hidden in BAR2", "a register opened to batches",
    ],
)  # fmt: skip
def test_an_image_that_no_vgpu_of_this_host_can_be_is_refused_and_changes_nothing(
    vgpu: Vgpu, offset: int, data: bytes
) -> None:
    vgpu.prepare(BCS)
    vgpu.device.stop()
    image = vgpu.device.save()
    with pytest.raises(OSError) as caught:
        vgpu.device.restore(patched(image, offset, data))
    assert caught.value.errno == errno.EFAULT
    assert_same(vgpu.device.save(), image)
    vgpu.device.restore(image)
    assert_same(vgpu.device.save(), image)


def test_one_flipped_bit_anywhere_is_noticed(vgpu: Vgpu) -> None:
    vgpu.device.stop()
    image = vgpu.device.save()
    for offset in range(24 + 512, len(image), 400_009):
        with pytest.raises(OSError):
            vgpu.device.restore(patched(image, offset, bytes([image[offset] ^ 4])))
    assert_same(vgpu.device.save(), image)


def test_the_checksum_is_the_one_that_these_tests_make(vgpu: Vgpu) -> None:
    vgpu.device.stop()
    image = vgpu.device.save()
    assert_same(sealed(image), image)


def test_hostile_images_hurt_nobody(make_vgpu: MakeVgpu) -> None:
    vgpu, other = make_vgpu(), make_vgpu()
    other.prepare(BCS)
    queue_work(vgpu)
    image = vgpu.device.save()
    areas = [
        (0, 24), (0x218, 72), (0x1220, 8 + 56), (0x1228 + 56, 5 * 72), (0x1228 + 56 + 5 * 72, 0xA00),
        (VREG - 8, 8), (VREG + 0x78000, 0x60), (VREG + 0x24D0, 48), (VREG + 0x22000 + 0x230, 16),
        (0x401230, 8 + 0x200), (len(image) - 200, 200),
    ]  # fmt: skip
    chance = random.Random(2017)  # noqa: S311 -- the same ones each time
    refused = 0
    for _ in range(HOSTILE_IMAGES):
        bad = bytearray(image)
        start, length = chance.choice(areas)
        for _ in range(chance.randint(1, 3)):
            bad[start + chance.randrange(length)] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        try:
            vgpu.device.restore(sealed(bad))
        except OSError as error:
            assert error.errno == errno.EFAULT  # noqa: PT017
            refused += 1
    assert refused > HOSTILE_IMAGES // 3
    vgpu.device.reset()
    assert vgpu.device.reg64(raw.PVINFO) == kvmgt.PV_MAGIC  # or its driver does not know that it is a vGPU
    for one in (vgpu, other):
        one.prepare(BCS)
        one.submit(BCS, 0x51, 0x52)
        one.await_u32(RESULT, 0x52)
