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
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm import kvmgt, raw
from tests.vm.cli import run
from tests.vm.kvmgt import BATCH, CONTEXT, ENGINES, HWSP, MEMORY, RESULT, RING, TARGET, Engine, Vgpu
from tests.vm.raw import PAGE, Container, Memory
from tools.gpu.control import ControlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tools.gpu.control import Control

pytestmark = pytest.mark.gvt

RCS, BCS = ENGINES[:2]
MODULES: Final = Path(os.environ.get("VFIO_MIG_KVMGT") or "/nonexistent")
FLAG_MIGRATABLE: Final = 1 << 5
CAP_TYPE: Final = 2
FENCES: Final = 32
FENCE: Final = 0x100000
MAPPED_RESULT: Final = RESULT  # its page of the aperture is at the same offset
PIPE_CONTROL: Final = 0x7A00_0004
CSB_POINTER: Final = 0x3A0
ELSP: Final = 0x230
HWS_PGA: Final = 0x80
CRC_AT: Final = 0x1228 + 12  # in what is in SREG: tools/kvmgt/gvt/migrate_image.h
HOSTILE_IMAGES: Final = 150
VREG: Final = 0x201230  # of an image: where its registers are
HIGH_SPARE: Final = 0x5000  # a page of the hidden part

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


def modprobe(*arguments: str) -> None:
    subprocess.run(["modprobe", "-d", os.environ["VFIO_MIG_GVT_MODULES"], *arguments], check=True)


def load(name: str | None, *parameters: str) -> None:
    """Replace kvmgt: by the series, by a mutation of it, or (an empty name) by the distribution's."""
    kvmgt.remove_all()
    modprobe("-r", "kvmgt")
    if name == "":
        modprobe("kvmgt")
    else:
        file = MODULES / ("kvmgt.ko" if name is None else f"kvmgt-{name}.ko")
        subprocess.run(["insmod", file, *parameters], check=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load(None)
    yield
    load("")


@pytest.fixture
def gpu() -> Iterator[Control]:
    with kvmgt.gpu() as control:
        yield control
        control.behave()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as result:
        yield result


Make = "Callable[[], Vgpu]"


@pytest.fixture
def make(stack: contextlib.ExitStack) -> Callable[[], Vgpu]:
    """Make open vGPUs that go away with the test."""
    return lambda: stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance())))


@pytest.fixture
def vgpu(make: Callable[[], Vgpu]) -> Vgpu:
    return make()


def dma(gpu: Control, address: int) -> int | None:
    """Where the hardware's GGTT leads, None for an entry that is not present."""
    try:
        return gpu.translate(address)
    except ControlError as error:
        if error.name != "EFAULT":
            raise
        return None


def host_fences(gpu: Control) -> list[int]:
    return [gpu.register(FENCE + 8 * number) | gpu.register(FENCE + 8 * number + 4) << 32 for number in range(FENCES)]


def fence_of(gpu: Control, vgpu: Vgpu, low: int, high: int) -> int:
    """Write the vGPU's first fence; the one value that came into the GPU by it, 0 for none."""
    vgpu.device.set_fence(0, 0, 0)
    before = host_fences(gpu)
    vgpu.device.set_fence(0, low, high)
    return next((new for old, new in zip(before, host_fences(gpu), strict=True) if old != new), 0)


def host_low(gpu: Control, vgpu: Vgpu) -> int:
    """Where the vGPU's aperture is in the host's GGTT: its guest does not see that any more, a fence shows it."""
    fence = fence_of(gpu, vgpu, vgpu.low | 1, vgpu.low)
    vgpu.device.set_fence(0, 0, 0)
    return fence & 0xFFFF_F000


def copy_memory(source: Vgpu, target: Vgpu) -> None:
    target.memory.bytes[:] = source.memory.bytes[:]


def moved(make: Callable[[], Vgpu]) -> tuple[Vgpu, Vgpu, int]:
    """Give one vGPU another's state; both, and where the host has the other's hidden part."""
    source, target = make(), make()
    hidden = target.high  # a vGPU's guest has it where its first host has it
    assert source.high != hidden
    source.device.stop()
    copy_memory(source, target)
    target.device.stop()
    target.device.restore(source.device.save())
    target.device.start()
    return source, target, hidden


# (4) the guest's bases


def check_bases(make: Callable[[], Vgpu], gpu: Control) -> None:
    source, target, hidden = moved(make)
    assert target.device.guest_high() == source.high
    assert target.device.guest_low() == 0
    # what the guest calls its hidden part is this host's
    target.device.set_pte(source.high + HIGH_SPARE, MEMORY + TARGET | 1)
    assert dma(gpu, hidden + HIGH_SPARE) == target.at(TARGET)


def test_the_guest_s_bases_go_along_and_the_host_s_stay(make: Callable[[], Vgpu], gpu: Control) -> None:
    check_bases(make, gpu)


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


def check_gtt(make: Callable[[], Vgpu], gpu: Control) -> None:
    vgpu = make()
    low = host_low(gpu, vgpu)
    assert low
    before = dma(gpu, vgpu.low + 5 * PAGE)
    vgpu.device.set_pte(vgpu.low + 5 * PAGE, MEMORY + TARGET | 1)
    vgpu.device.set_pte(vgpu.high + 5 * PAGE, MEMORY + RESULT | 1)
    assert vgpu.device.pte(vgpu.low + 5 * PAGE) == MEMORY + TARGET | 1
    assert dma(gpu, low + 5 * PAGE) == vgpu.at(TARGET)
    assert dma(gpu, vgpu.high + 5 * PAGE) == vgpu.at(RESULT)
    assert dma(gpu, vgpu.low + 5 * PAGE) == before  # the host's own page, at the guest's address


def test_an_entry_is_where_the_guest_put_it_and_where_the_host_needs_it(make: Callable[[], Vgpu], gpu: Control) -> None:
    check_gtt(make, gpu)


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


def check_fence(make: Callable[[], Vgpu], gpu: Control) -> None:
    vgpu = make()
    low = host_low(gpu, vgpu)
    fence = fence_of(gpu, vgpu, 0x0010_0001, 0x001F_F003)
    assert fence == (low + 0x001F_F000 | 3) << 32 | (low + 0x0010_0000 | 1)
    assert vgpu.device.fence(0) == 0x001F_F003_0010_0001
    hidden = fence_of(gpu, vgpu, vgpu.high | 1, vgpu.high + 0x1F000 | 3)
    assert hidden == (vgpu.high + 0x1F000 | 3) << 32 | vgpu.high | 1


def test_a_fence_keeps_the_guest_s_addresses_and_has_the_host_s(make: Callable[[], Vgpu], gpu: Control) -> None:
    check_fence(make, gpu)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0x0010_0000, 0x001F_F003), (0x001F_F001, 0x0010_0003), (0x0010_0001, 0x7FFF_F003), (0x7FFF_F001, 0x7FFF_F003)],
    ids=["not valid", "backwards", "past the end", "outside"],
)
def test_a_fence_that_is_not_all_the_guest_s_is_off(vgpu: Vgpu, gpu: Control, low: int, high: int) -> None:
    assert fence_of(gpu, vgpu, low, high) == 0


def test_the_fences_of_an_image_are_the_host_s(make: Callable[[], Vgpu], gpu: Control) -> None:
    source, target = make(), make()
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
    submit_ring(vgpu, engine, ring)
    vgpu.await_u32(RESULT, 0x600D_D00D)
    assert [vgpu.u32(RING + 4 * number) for number in range(len(ring))] == ring  # the guest's own is not touched


def submit_ring(vgpu: Vgpu, engine: Engine, ring: list[int]) -> None:
    vgpu.put(RING, *ring)
    make_context(vgpu, engine, 4 * len(ring))
    for dword in (0, 0, 1, vgpu.low + CONTEXT | 0x119):
        vgpu.device.set_reg(engine.base + ELSP, dword)


def make_context(vgpu: Vgpu, engine: Engine, tail: int, *, context: int = CONTEXT, ring: int = RING) -> None:
    for offset in range(context + PAGE, context + 2 * PAGE, 4):
        vgpu.put(offset, 0)
    vgpu.put(context + PAGE, 0, 0x1100_101B)
    registers = {
        2: (0x244, 0x0009_0009), 4: (0x34, 0), 6: (0x30, tail), 8: (0x38, vgpu.low + ring), 10: (0x3C, 1),
        0x30: (0x274, 0), 0x32: (0x270, MEMORY + kvmgt.PML4),
    }  # fmt: skip
    for index, (register, value) in registers.items():
        vgpu.put(context + PAGE + 4 * index, engine.base + register, value)


def at(vgpu: Vgpu, offset: int) -> int:
    """The guest's graphics address of an offset in RESULT's page."""
    return vgpu.low + RESULT + offset


def check_commands(make: Callable[[], Vgpu], gpu: Control) -> None:
    vgpu = make()
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


def test_every_address_in_a_command_is_the_host_s_and_the_flags_stay(make: Callable[[], Vgpu], gpu: Control) -> None:
    check_commands(make, gpu)


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
    with contextlib.suppress(OSError):
        submit_ring(vgpu, engine, [*dwords, *[0] * (len(dwords) % 2), *vgpu.flush(engine, 0xBAD), 0, 0])
    with pytest.raises(TimeoutError):
        vgpu.await_u32(RESULT, 0xBAD, seconds=0.5)
    assert not any(value == 0xBAD for entry in gpu.record(since, engine.name) for _, value in entry["writes"])


# (5) the aperture at 0


def check_aperture(make: Callable[[], Vgpu], gpu: Control) -> None:
    one, other = make(), make()
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


def test_every_guest_has_its_aperture_at_0_and_reaches_its_own(make: Callable[[], Vgpu], gpu: Control) -> None:
    check_aperture(make, gpu)


def test_the_last_bytes_of_the_aperture_can_be_reached_and_none_behind(vgpu: Vgpu) -> None:
    last = vgpu.low_size - PAGE
    vgpu.device.set_pte(last, MEMORY + RESULT | 1)
    vgpu.device.write(raw.BAR2, last + PAGE - 4, b"\1\2\3\4")
    assert vgpu.memory.read(MEMORY + RESULT + PAGE - 4, 4) == b"\1\2\3\4"
    with pytest.raises(OSError):
        vgpu.device.read(raw.BAR2, vgpu.low_size, 4)
    with pytest.raises(OSError):
        vgpu.device.mmap(raw.BAR2, vgpu.low_size, PAGE)


def test_a_reset_keeps_the_bases_of_a_vgpu_that_was_moved(make: Callable[[], Vgpu], gpu: Control) -> None:
    source, target, hidden = moved(make)
    target.device.reset()
    assert target.device.guest_high() == source.high
    target.device.set_pte(source.high, MEMORY + TARGET | 1)
    assert dma(gpu, hidden) == target.at(TARGET)


# Mutations

MUTATIONS: Final = {
    "pvinfo_base": check_bases,
    "g2h_gtt": check_gtt,
    "g2h_fence": check_fence,
    "g2h_cmd": check_commands,
    "aperture_zero": check_aperture,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_check_fails_without_what_it_checks(
    name: str, make: Callable[[], Vgpu], gpu: Control, stack: contextlib.ExitStack
) -> None:
    load(name)
    try:
        with pytest.raises((AssertionError, TimeoutError, OSError)):
            MUTATIONS[name](make, gpu)
    finally:
        stack.close()
        load(None)


# (6) the flag, (7) stop and start


def test_the_flag_the_region_and_the_others_behind_it(vgpu: Vgpu) -> None:
    flags, regions, _ = vgpu.device.info()
    assert flags & FLAG_MIGRATABLE
    assert regions == 12
    state = vgpu.device.region(raw.STATE)
    assert (state.size, state.flags & 7) == (0x900000, 3)
    assert state.capability_ids == ()
    assert vgpu.device.region(10).capability_ids == (CAP_TYPE,)


def test_off_is_the_distribution_s_own(gpu: Control) -> None:
    load(None, "migration=off")
    try:
        with kvmgt.instance() as name, Vgpu.opened(name) as vgpu:
            flags, regions, _ = vgpu.device.info()
            assert flags & FLAG_MIGRATABLE == 0
            assert regions == 11
            assert vgpu.low != 0
            assert fence_of(gpu, vgpu, vgpu.low | 1, vgpu.low) == vgpu.low << 32 | vgpu.low | 1
            vgpu.prepare(BCS)
            vgpu.submit(BCS, 1, 2)
            vgpu.await_u32(RESULT, 2)
    finally:
        load(None)


@pytest.mark.parametrize("value", ["v2", "on", ""])
def test_another_value_of_the_parameter_is_refused(value: str) -> None:
    kvmgt.remove_all()
    modprobe("-r", "kvmgt")
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


def test_stop_waits_for_the_work_that_runs_and_another_vgpu_is_not_held_up(make: Callable[[], Vgpu]) -> None:
    vgpu, other = make(), make()
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
    assert vgpu.device.save() == one
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


def view(vgpu: Vgpu) -> bytes:
    """All that the guest can see, without what says which host it is on."""
    return b"".join(
        [
            vgpu.device.read(raw.CONFIG, 0, 256),
            vgpu.device.read(raw.BAR0, 0x78000, 0x100),
            *(vgpu.device.pte(gma).to_bytes(8, "little") for gma in range(0, 64 * PAGE, PAGE)),
            *(vgpu.device.pte(vgpu.device.guest_high() + page * PAGE).to_bytes(8, "little") for page in range(16)),
            *(vgpu.device.fence(number).to_bytes(8, "little") for number in range(4)),
            *(
                struct.pack("<I", vgpu.device.reg(engine.base + offset))
                for engine in (RCS, BCS)
                for offset in (0x30, 0x34, 0x38, 0x80, 0x234, 0x238, 0x29C, CSB_POINTER, *range(0x370, 0x3A0, 4))
            ),
        ]
    )


SECOND: Final = 0x60000  # another context, and its ring behind it: mapped at the same offsets
SECOND_RING: Final = SECOND + 22 * PAGE


def map_second(vgpu: Vgpu) -> None:
    for offset in range(SECOND, SECOND_RING + PAGE, PAGE):
        vgpu.device.set_pte(vgpu.low + offset, MEMORY + offset | 1)


def queue_everything(source: Vgpu) -> None:
    """Leave a pair of contexts and one more on two engines queued, and half a submission and half an entry pending."""
    for engine in (BCS, RCS):
        source.prepare(engine)
    map_second(source)
    source.submit(BCS, 0x11, 0x12)
    source.await_u32(RESULT, 0x12)
    source.device.stop()
    # BCS: the first context once more, with a second one in the same ELSP
    source.put(RING, *[0x1040_0002, at(source, 0x100), 0, 0xA1], *[0x1040_0002, at(source, 0x104), 0, 0xA2])
    make_context(source, BCS, 32)
    source.put(SECOND_RING, *[0x1040_0002, at(source, 0x108), 0, 0xA3], 0, 0, 0, 0)
    make_context(source, BCS, 32, context=SECOND, ring=SECOND_RING)
    for dword in (2, source.low + SECOND | 0x119, 1, source.low + CONTEXT | 0x119):
        source.device.set_reg(BCS.base + ELSP, dword)
    # half a submission
    source.device.set_reg(RCS.base + ELSP, 0)
    source.device.set_reg(RCS.base + ELSP, 0)
    # half an entry
    source.device.set_reg(raw.GTT + (source.low + 0x90000 >> 12) * 8, MEMORY + TARGET | 1)


def check_continues(source: Vgpu, target: Vgpu, gpu: Control, low: int) -> None:
    """See the target go on where the source was stopped, on its own memory and nowhere else.

    :param low: where the host has the target's aperture.
    """
    untouched = source.memory.bytes[:]
    since = gpu.last()
    target.device.start()
    target.await_u32(RESULT + 0x108, 0xA3)
    assert [target.u32(RESULT + 0x100), target.u32(RESULT + 0x104)] == [0xA1, 0xA2]
    stored = {value: address for entry in gpu.record(since, BCS.name) for address, value in entry["writes"]}
    assert [stored[value] for value in (0xA1, 0xA2, 0xA3)] == [target.at(RESULT + 0x100 + 4 * n) for n in range(3)]
    # the other half of the entry
    target.device.set_reg(raw.GTT + (target.low + 0x90000 >> 12) * 8 + 4, 0)
    assert dma(gpu, low + 0x90000) == target.at(TARGET)
    assert source.memory.bytes[:] == untouched


def test_the_state_moves_with_all_that_was_half_done(make: Callable[[], Vgpu], gpu: Control) -> None:
    source, target = make(), make()
    low = host_low(gpu, target)
    queue_everything(source)
    source.device.set_fence(0, 0x0010_0001, 0x001F_F003)
    before = view(source)
    image = source.device.save()
    assert source.device.save() == image
    copy_memory(source, target)
    target.device.stop()
    target.device.restore(image)
    assert view(target) == before
    assert target.device.save() == image
    check_continues(source, target, gpu, low)


def test_a_state_can_be_restored_by_a_process_that_did_not_map_the_memory(
    make: Callable[[], Vgpu], gpu: Control
) -> None:
    source, target = make(), make()
    low = host_low(gpu, target)
    queue_everything(source)
    before = view(source)
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
    assert view(target) == before
    check_continues(source, target, gpu, low)


@contextlib.contextmanager
def with_memory(file: Path) -> Iterator[Vgpu]:
    """Have an open vGPU whose guest memory is a file, as a VMM with shared memory has it."""
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(kvmgt.instance())
        memory = Memory(MEMORY, kvmgt.MEMORY_PAGES, file)
        container = Container(int((kvmgt.DEVICES / name / "iommu_group").readlink().name))
        stack.callback(container.close)
        container.map(memory)
        kvm = kvmgt.Kvm(memory, container.group_fd)
        stack.callback(kvm.close)
        vgpu = Vgpu(name, memory, container, kvm)
        stack.callback(vgpu.device.close)
        stack.callback(os.close, vgpu.eventfd)
        yield vgpu


def test_the_command_moves_a_vgpu_that_this_process_has(gpu: Control, stack: contextlib.ExitStack) -> None:
    shm = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    source = stack.enter_context(with_memory(shm / "source"))
    target = stack.enter_context(with_memory(shm / "target"))
    low = host_low(gpu, target)
    queue_everything(source)
    source.device.start()
    source.await_u32(RESULT + 0x108, 0xA3)
    abi = ("--abi", "gvt-rfc")
    run(*abi, "stop", source.name)
    queue_everything(source)
    before = view(source)
    run(*abi, "save", source.name, shm / "image", "--memory", f"{shm / 'source'}@{MEMORY:#x}", "--force")
    copy_memory(source, target)  # also what is not dirty: page tables are read by the GPU, and never written
    run(*abi, "restore", target.name, shm / "image", "--memory", f"{shm / 'target'}@{MEMORY:#x}", "--force")
    assert view(target) == before
    run(*abi, "start", target.name)
    target.await_u32(RESULT + 0x108, 0xA3)
    assert dma(gpu, low + RESULT) == target.at(RESULT)


def patched(image: bytes, offset: int, data: bytes) -> bytes:
    return image[:offset] + data + image[offset + len(data) :]


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
    assert vgpu.device.save() == image
    vgpu.device.restore(image)
    assert vgpu.device.save() == image


def test_one_flipped_bit_anywhere_is_noticed(vgpu: Vgpu) -> None:
    vgpu.device.stop()
    image = vgpu.device.save()
    for offset in range(24 + 512, len(image), 400_009):
        with pytest.raises(OSError):
            vgpu.device.restore(patched(image, offset, bytes([image[offset] ^ 4])))
    assert vgpu.device.save() == image


def sealed(image: bytearray) -> bytes:
    """Give an image the checksum that it needs, so that what is behind that is looked at."""
    image[CRC_AT : CRC_AT + 4] = bytes(4)
    image[CRC_AT : CRC_AT + 4] = zlib.crc32(image).to_bytes(4, "little")
    return bytes(image)


def test_the_checksum_is_the_one_that_these_tests_make(vgpu: Vgpu) -> None:
    vgpu.device.stop()
    image = vgpu.device.save()
    assert sealed(bytearray(image)) == image


def test_hostile_images_hurt_nobody(make: Callable[[], Vgpu]) -> None:
    vgpu, other = make(), make()
    other.prepare(BCS)
    queue_everything(vgpu)
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
    for one in (vgpu, other):
        one.prepare(BCS)
        one.submit(BCS, 0x51, 0x52)
        one.await_u32(RESULT, 0x52)
