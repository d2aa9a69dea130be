# SPDX-License-Identifier: MIT
"""The kernel's own kvmgt on the emulated GPU, step by step, each seen from the guest's side and the hardware's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tools.gpu.control import ControlError
from tools.lab.cli import run
from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import ENGINES, MEMORY, RESULT, SEMAPHORE, TARGET, Engine, Vgpu
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE, Container

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tools.gpu.control import Control

pytestmark = pytest.mark.gvt

BCS = ENGINES[1]


@pytest.fixture
def gpu() -> Iterator[Control]:
    with kvmgt.gpu() as control:
        yield control
        control.behave()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as result:
        yield result


@pytest.fixture
def make(stack: contextlib.ExitStack) -> Callable[[], Vgpu]:
    """Make open vGPUs that go away with the test."""
    return lambda: stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance())))


@pytest.fixture
def vgpu(make: Callable[[], Vgpu]) -> Vgpu:
    return make()


def stores(gpu: Control, since: int, engine: Engine) -> list[dict[str, Any]]:
    """Return the commands that stored something since then."""
    return [entry for entry in gpu.record(since, engine.name) if entry["writes"] and not entry["name"].islower()]


# mdevs


def test_all_four_types_are_there_and_the_command_lists_them() -> None:
    assert set(kvmgt.types()) == {f"i915-GVTg_V5_{number}" for number in (1, 2, 4, 8)}
    assert all(kvmgt.types().values())
    listed = run("mdev", "types").stdout.decode().splitlines()
    assert [line.split()[1] for line in listed if line.startswith("0000:00:02.0 ")] == sorted(kvmgt.types())


def test_a_vgpu_is_created_and_removed_and_takes_its_share() -> None:
    before = kvmgt.types()[kvmgt.SMALL]
    with kvmgt.instance() as name:
        assert (kvmgt.DEVICES / name).is_dir()
        assert kvmgt.types()[kvmgt.SMALL] == before - 1
    assert kvmgt.types()[kvmgt.SMALL] == before


def test_the_command_creates_one_and_shows_it() -> None:
    name = run("mdev", "create", "GVTg_V5_8").stdout.decode().strip()
    assert name in run("list").stdout.decode()
    run("mdev", "remove", name)
    assert not (kvmgt.DEVICES / name).exists()


# Opening


def test_nobody_without_kvm_gets_in() -> None:
    with kvmgt.instance() as name:
        container = Container(int((kvmgt.DEVICES / name / "iommu_group").readlink().name))
        try:
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(container.group_fd, raw.GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"))
            assert caught.value.errno == errno.ESRCH
        finally:
            container.close()


def test_with_kvm_it_opens_and_describes_itself(vgpu: Vgpu) -> None:
    flags, regions, irqs = vgpu.device.info()
    assert flags == raw.FLAG_PCI | 1  # and RESET
    assert (regions, irqs) == (11, 5)
    assert vgpu.device.region(raw.BAR0).size == 16 << 20
    assert vgpu.device.region(raw.BAR2).flags & raw.REGION_MMAP
    assert vgpu.device.region(raw.CONFIG).size == 256 or vgpu.device.region(raw.CONFIG).size == PAGE
    assert vgpu.device.irq(raw.IRQ_MSI)[1] == 1


def test_the_configuration_is_the_gpu_s(vgpu: Vgpu) -> None:
    device = {"skl": 0x1912, "kbl": 0x5912}[os.environ["VFIO_MIG_GPU"]]
    assert vgpu.device.read(raw.CONFIG, 0, 4) == (0x8086).to_bytes(2, "little") + device.to_bytes(2, "little")
    assert vgpu.device.read(raw.CONFIG, 8, 4)[1:] == b"\x00\x00\x03"  # a display controller


def test_pvinfo_tells_the_guest_its_share(vgpu: Vgpu) -> None:
    assert vgpu.device.reg64(raw.PVINFO) == kvmgt.PV_MAGIC
    assert vgpu.device.reg(raw.PVINFO + 8) & 0xFFFF == 1  # version 1.0
    assert vgpu.low_size >= 64 << 20
    assert vgpu.high_size >= 256 << 20
    assert vgpu.fences == 4


# Graphics memory


def test_what_the_guest_maps_is_pinned_and_mapped_in_hardware(vgpu: Vgpu, gpu: Control) -> None:
    vgpu.container.dirty_tracking(raw.DIRTY_START)
    assert vgpu.container.dirty_pages(vgpu.memory) == set()
    vgpu.device.set_pte(vgpu.low, MEMORY + RESULT | 1)
    vgpu.device.set_pte(vgpu.high, MEMORY + TARGET | 1)
    assert vgpu.device.pte(vgpu.low) == MEMORY + RESULT | 1
    assert gpu.translate(vgpu.low) == vgpu.at(RESULT)
    assert gpu.translate(vgpu.high) == vgpu.at(TARGET)
    assert vgpu.container.dirty_pages(vgpu.memory) == {MEMORY + RESULT, MEMORY + TARGET}
    vgpu.device.set_pte(vgpu.low, 0)
    with pytest.raises(ControlError, match="not present"):
        gpu.translate(vgpu.low)


def test_the_aperture_leads_to_guest_memory_written_and_mapped(vgpu: Vgpu) -> None:
    vgpu.device.set_pte(vgpu.low, MEMORY + RESULT | 1)
    vgpu.device.write(raw.CONFIG, 4, b"\6\0")
    vgpu.device.write(raw.BAR2, vgpu.low, b"\x44\x33\x22\x11")
    assert vgpu.u32(RESULT) == 0x1122_3344
    with vgpu.device.mmap(raw.BAR2, vgpu.low, PAGE) as aperture:
        aperture[4:8] = b"\x88\x77\x66\x55"
        assert vgpu.u32(RESULT + 4) == 0x5566_7788
        vgpu.put(RESULT + 8, 0xCAFE)
        assert aperture[8:12] == b"\xfe\xca\0\0"


def test_the_guest_s_page_tables_are_shadowed(vgpu: Vgpu) -> None:
    vgpu.container.dirty_tracking(raw.DIRTY_START)
    vgpu.make_ppgtt()
    assert vgpu.container.dirty_pages(vgpu.memory) == {MEMORY + page for page in (kvmgt.BATCH, TARGET, SEMAPHORE)}


# Work


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_work_is_executed_with_the_host_s_addresses_and_tells_the_guest(
    vgpu: Vgpu, gpu: Control, engine: Engine
) -> None:
    vgpu.prepare(engine)
    since = gpu.last()
    vgpu.submit(engine, 0xCAFE_F00D, 0x600D_D00D)
    vgpu.await_u32(RESULT, 0x600D_D00D)
    assert vgpu.u32(TARGET) == 0xCAFE_F00D
    assert vgpu.await_interrupt() >= 1
    written = [tuple(write) for entry in stores(gpu, since, engine) for write in entry["writes"]]
    assert (vgpu.at(TARGET), 0xCAFE_F00D) in written
    assert (vgpu.at(RESULT), 0x600D_D00D) in written
    # what the guest's driver looks at: the ring's head, and the status buffer in its own page
    assert vgpu.u32(kvmgt.STATE + 4 * 5) == vgpu.u32(kvmgt.STATE + 4 * 7)
    assert any(vgpu.u32(kvmgt.HWSP + 0x40 + 8 * number) for number in range(6))


def test_a_vgpu_is_busy_until_its_semaphore_is_signalled(vgpu: Vgpu, gpu: Control) -> None:
    vgpu.prepare(BCS)
    vgpu.submit(BCS, 1, 2, wait=True)
    with pytest.raises(TimeoutError):
        vgpu.await_u32(RESULT, 2, seconds=1.0)
    assert vgpu.u32(TARGET) == 0
    assert gpu.state()["engines"][BCS.name]["state"] != "hung"
    vgpu.put(SEMAPHORE, 1)
    vgpu.await_u32(RESULT, 2)
    assert vgpu.u32(TARGET) == 1


def test_two_vgpus_never_reach_each_other_s_memory(make: Callable[[], Vgpu], gpu: Control) -> None:
    first, second = make(), make()
    low = range(first.low, first.low + first.low_size)
    high = range(first.high, first.high + first.high_size)
    assert second.low not in low
    assert second.high not in high
    for vgpu in (first, second):
        vgpu.prepare(BCS)
    since = gpu.last()
    first.submit(BCS, 0x1111, 0x1112)
    second.submit(BCS, 0x2221, 0x2222)
    first.await_u32(RESULT, 0x1112)
    second.await_u32(RESULT, 0x2222)
    assert (first.u32(TARGET), second.u32(TARGET)) == (0x1111, 0x2221)
    for vgpu, other, values in ((first, second, {0x1111, 0x1112}), (second, first, {0x2221, 0x2222})):
        at = [address for entry in stores(gpu, since, BCS) for address, value in entry["writes"] if value in values]
        assert sorted(at) == sorted([vgpu.at(TARGET), vgpu.at(RESULT)])
        assert not any(other.has_page(address) for address in at)


# Life


def test_a_closed_vgpu_can_be_opened_again_and_works(gpu: Control) -> None:
    with kvmgt.instance() as name:
        for round_ in (1, 2):
            with Vgpu.opened(name) as vgpu:
                vgpu.prepare(BCS)
                vgpu.submit(BCS, 0x100 + round_, 0x200 + round_)
                vgpu.await_u32(RESULT, 0x200 + round_)
                at = vgpu.at(TARGET)
                assert [at, 0x100 + round_] in [write for entry in gpu.record(0, BCS.name) for write in entry["writes"]]


def test_a_reset_forgets_the_guest_s_mappings(vgpu: Vgpu, gpu: Control) -> None:
    vgpu.prepare(BCS)
    assert gpu.translate(vgpu.low + RESULT) == vgpu.at(RESULT)
    vgpu.device.reset()
    assert vgpu.device.reg64(raw.PVINFO) == kvmgt.PV_MAGIC
    assert vgpu.device.reg(raw.PV_MAPPABLE_BASE) == vgpu.low
    vgpu.prepare(BCS)
    vgpu.submit(BCS, 3, 4)
    vgpu.await_u32(RESULT, 4)


def test_completion_is_told_the_guest_when_the_hardware_tells_it_and_not_before(vgpu: Vgpu, gpu: Control) -> None:
    vgpu.prepare(BCS)
    gpu.misbehave(delay={BCS.name: 2.0})
    began = time.monotonic()
    vgpu.submit(BCS, 5, 6)
    vgpu.await_u32(RESULT, 6)
    tail = vgpu.u32(kvmgt.STATE + 4 * 7)
    assert vgpu.u32(kvmgt.STATE + 4 * 5) != tail
    vgpu.await_u32(kvmgt.STATE + 4 * 5, tail)
    assert time.monotonic() - began >= 2.0
    assert vgpu.await_interrupt() >= 1


def modprobe(*arguments: str) -> None:
    subprocess.run(["modprobe", "-d", os.environ["VFIO_MIG_GVT_MODULES"], *arguments], check=True)


def works(value: int) -> None:
    with kvmgt.instance() as name, Vgpu.opened(name) as vgpu:
        vgpu.prepare(BCS)
        vgpu.submit(BCS, value, value + 1)
        vgpu.await_u32(RESULT, value + 1)


def test_the_host_driver_is_unloaded_with_its_idle_vgpus_and_loaded_again() -> None:
    with kvmgt.instance() as name:
        subprocess.run(["rmmod", "kvmgt"], check=True)
        assert not (kvmgt.DEVICES / name).exists()
        assert not kvmgt.TYPES.exists()
        modprobe("kvmgt")
    works(7)
    subprocess.run(["rmmod", "kvmgt", "i915"], check=True)
    modprobe("i915", "enable_gvt=1")
    modprobe("kvmgt")
    works(9)


def test_guest_memory_is_let_go_when_the_vgpu_is_closed() -> None:
    with kvmgt.instance() as name:
        with Vgpu.opened(name) as vgpu:
            vgpu.map_ggtt()
        with Vgpu.opened(name) as again:
            again.container.dirty_tracking(raw.DIRTY_START)
            assert again.container.dirty_pages(again.memory) == set()


def test_memory_that_is_unmapped_is_unpinned_and_stays_in_hardware(vgpu: Vgpu, gpu: Control) -> None:
    """A VMM unmaps memory that its guest does not use any more; the hardware's entry waits for the guest's next."""
    vgpu.device.set_pte(vgpu.low, MEMORY + RESULT | 1)
    at = vgpu.at(RESULT)
    vgpu.container.dirty_tracking(raw.DIRTY_START)
    assert vgpu.container.unmap(vgpu.memory) == vgpu.memory.size
    assert vgpu.container.dirty_pages(vgpu.memory) == set()
    assert gpu.translate(vgpu.low) == at
