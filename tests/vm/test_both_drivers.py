# SPDX-License-Identifier: MIT
"""What the sample driver and the kernel's own kvmgt do alike; each test runs on whichever is loaded.

What they do not do alike is listed in tools/kmod/README.md.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import struct
import uuid
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab import drivers
from tools.lab.drivers import SHARES, Driver, Opened
from tools.lab.gvt import kvmgt
from tools.lab.vfio.raw import (
    BAR0,
    BAR2,
    CONFIG,
    FENCE,
    FLAG_PCI,
    GTT,
    IRQ_ACTION_MASK,
    IRQ_ACTION_TRIGGER,
    IRQ_DATA_NONE,
    IRQ_INTX,
    IRQ_MSI,
    PAGE,
    PV_MAPPABLE_BASE,
    PV_NONMAPPABLE_BASE,
    PVINFO,
    REGION_CAPS,
    REGION_MMAP,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.both

MIB: Final = 1 << 20
SIZES: Final = {8: (64, 384), 4: (128, 512), 2: (256, 1024), 1: (512, 2048)}
PV_MAGIC: Final = 0x4776_5447_7654_4776
GDRST: Final = 0x941C
BCS_MODE: Final = 0x22000 + 0x29C
PLAIN, PLAIN_DISPLAY = 0x48D0, 0x50000
"""Registers without a meaning, one of them among the display's, which a GT reset does not reach."""

Make = "Callable[..., Opened]"


@pytest.fixture
def driver() -> Iterator[Driver]:
    with drivers.driver() as made:
        yield made


@pytest.fixture
def names(driver: Driver) -> Iterator[Callable[..., str]]:
    """Make mdevs that go away with the test."""
    made: list[str] = []

    def make(share: int = 8) -> str:
        made.append(str(uuid.uuid4()))
        driver.create(share, made[-1])
        return made[-1]

    yield make
    for name in made:
        if (kvmgt.DEVICES / name).exists():
            (kvmgt.DEVICES / name / "remove").write_text("1")


@pytest.fixture
def make(driver: Driver, names: Callable[..., str]) -> Iterator[Callable[..., Opened]]:
    """Make vGPUs, open and with guest memory."""
    with contextlib.ExitStack() as stack:
        yield lambda share=8: stack.enter_context(driver.opened(names(share)))


@pytest.fixture
def vgpu(make: Callable[..., Opened]) -> Opened:
    return make()


def cfg(vgpu: Opened, offset: int, size: int = 4) -> int:
    return int.from_bytes(vgpu.device.read(CONFIG, offset, size), "little")


def set_cfg(vgpu: Opened, offset: int, value: int, size: int = 4) -> None:
    vgpu.device.write(CONFIG, offset, value.to_bytes(size, "little"))


def capability(vgpu: Opened, wanted: int) -> int:
    at = cfg(vgpu, 0x34, 1)
    for _ in range(48):
        if not at or cfg(vgpu, at, 1) == wanted:
            return at
        at = cfg(vgpu, at + 1, 1)
    return 0


# --- sysfs


@pytest.mark.parametrize("share", SHARES)
def test_a_type_describes_its_share_of_graphics_memory(driver: Driver, share: int) -> None:
    low, high = SIZES[share]
    text = driver.description(share)
    assert text["low_gm_size"] == f"{low}MB"
    assert text["high_gm_size"] == f"{high}MB"
    assert text["fence"] == "4"
    assert text["weight"] == str(16 // share)
    assert text["resolution"] == ("1024x768" if share == 8 else "1920x1200")
    assert driver.text(share, "device_api") == "vfio-pci"
    assert driver.text(share, "name").startswith("GVTg_V")


def test_available_instances_count_what_is_left_of_memory_and_fences(driver: Driver, names: Callable[..., str]) -> None:
    assert driver.available() == [7, 5, 2, 1]
    first = names(8)
    assert driver.available() == [6, 4, 2, 1]
    names(2)
    assert driver.available() == [3, 2, 1, 0]
    (kvmgt.DEVICES / first / "remove").write_text("1")
    assert driver.available() == [4, 3, 1, 0]
    names(2)
    assert driver.available() == [1, 1, 0, 0]
    with pytest.raises(OSError) as caught:
        names(2)
    assert caught.value.errno == errno.ENOSPC
    assert driver.available() == [1, 1, 0, 0]


def test_a_uuid_is_used_once(driver: Driver, names: Callable[..., str]) -> None:
    name = names()
    with pytest.raises(OSError) as caught:
        driver.create(8, name)
    assert caught.value.errno == errno.EEXIST


# --- the device


def test_it_describes_itself_as_a_pci_device_that_can_be_reset(vgpu: Opened) -> None:
    flags, _, irqs = vgpu.device.info()
    assert flags & (FLAG_PCI | 1) == FLAG_PCI | 1
    assert irqs == 5


def test_configuration_space_shows_an_intel_vga_function(vgpu: Opened) -> None:
    assert cfg(vgpu, 0, 2) == 0x8086
    assert cfg(vgpu, 8) >> 8 == 0x030000
    before = cfg(vgpu, 0)
    set_cfg(vgpu, 0, 0xFFFFFFFF)
    assert cfg(vgpu, 0) == before


def test_bars_tell_the_sizes_of_their_regions(vgpu: Opened) -> None:
    for offset, flags, size in ((0x10, 0x4, 0x1000000), (0x18, 0xC, vgpu.device.region(BAR2).size)):
        set_cfg(vgpu, offset, 0xFFFFFFFF)
        set_cfg(vgpu, offset + 4, 0xFFFFFFFF)
        mask = cfg(vgpu, offset + 4) << 32 | cfg(vgpu, offset) & ~0xF
        assert -mask % (1 << 64) == size
        assert cfg(vgpu, offset) & 0xF == flags
        set_cfg(vgpu, offset, 0xA0000000)
        assert cfg(vgpu, offset) == 0xA0000000 | flags
    assert vgpu.device.region(BAR0).size == 0x1000000


def test_command_and_interrupt_line_are_writable_and_status_is_not(vgpu: Opened) -> None:
    assert cfg(vgpu, 4, 2) & 7 == 0
    set_cfg(vgpu, 4, 0x0407, 2)
    assert cfg(vgpu, 4, 2) == 0x0407
    set_cfg(vgpu, 0x3C, 0xAB, 1)
    assert cfg(vgpu, 0x3C, 1) == 0xAB
    status = cfg(vgpu, 6, 2)
    set_cfg(vgpu, 6, 0x0010, 2)
    assert cfg(vgpu, 6, 2) == status


def test_there_is_an_msi_capability(driver: Driver, vgpu: Opened) -> None:
    at = capability(vgpu, 0x05)
    assert at >= 0x40
    control = cfg(vgpu, at + 2, 2)
    assert control & 1 == driver.msi_at_first
    for value in (1, 0, 1):
        set_cfg(vgpu, at + 2, control & ~1 | value, 2)
        assert cfg(vgpu, at + 2, 2) & 1 == value


def test_accesses_past_a_region_or_in_a_region_that_is_not_there_fail(driver: Driver, vgpu: Opened) -> None:
    for region in () if driver.warns else (CONFIG, BAR0):
        size = vgpu.device.region(region).size
        with pytest.raises(OSError):  # kernels differ in the errno, and so may drivers
            vgpu.device.read(region, size, 4)
        with pytest.raises(OSError):
            vgpu.device.write(region, size, bytes(4))
    for index in (1, 3, 4, 5, 8):
        with pytest.raises(OSError):
            os.pread(vgpu.device.fd, 4, index << 40)
    with pytest.raises(OSError) as caught:
        vgpu.device.region(vgpu.device.info()[1])
    assert caught.value.errno == errno.EINVAL


# --- graphics memory


def test_pvinfo_describes_the_vgpu(vgpu: Opened) -> None:
    page = vgpu.device.read(BAR0, PVINFO, 8)
    assert struct.unpack("<Q", page) == (PV_MAGIC,)
    assert [vgpu.device.reg(PVINFO + at) for at in (8, 0x10)] == [1, 0x1C]  # version 1.0; what the host understands
    assert vgpu.device.reg(PVINFO + 0xC) in range(1, 8)
    low, low_size, high, high_size, fences = (vgpu.device.reg(PVINFO + 0x40 + at) for at in range(0, 20, 4))
    assert (low_size, high_size, fences) == (64 * MIB, 384 * MIB, 4)
    assert low + low_size <= 1024 * MIB <= high
    assert [vgpu.device.reg(PVINFO + at) for at in (0x830, 0x834)] == [0xFFFFFFFF] * 2  # the cursor's hot spot


def test_pvinfo_is_mostly_read_only(vgpu: Opened) -> None:
    writable = {0x830, 0x834, *range(0x838, 0x860, 4)}
    before = {at: vgpu.device.reg(PVINFO + at) for at in range(0, PAGE, 4)}
    for at in (0, 8, 0xC, 0x10, 0x40, 0x44, 0x48, 0x4C, 0x50, 0x400, *writable):
        vgpu.device.set_reg(PVINFO + at, 0x5A5A5A5A)
    assert {at for at in before if vgpu.device.reg(PVINFO + at) != before[at]} == writable


def test_two_vgpus_never_share_graphics_memory_or_numbers(make: Callable[..., Opened]) -> None:
    found = [make(share) for share in (8, 4, 8)]
    highs = [
        range(start, start + vgpu.device.reg(PVINFO + 0x4C))
        for vgpu in found
        for start in [vgpu.device.reg(PV_NONMAPPABLE_BASE)]
    ]
    for one, other in itertools.combinations(highs, 2):
        assert one.stop <= other.start or other.stop <= one.start
    assert len({vgpu.device.reg(PVINFO + 0xC) for vgpu in found}) == 3


@pytest.mark.parametrize("base", [PV_MAPPABLE_BASE, PV_NONMAPPABLE_BASE], ids=["low", "high"])
def test_an_entry_leads_the_hardware_to_the_guest_s_page(driver: Driver, vgpu: Opened, base: int) -> None:
    gma = vgpu.device.reg(base) + 0x10 * PAGE
    assert driver.reached(vgpu, gma) is None
    vgpu.device.set_pte(gma, vgpu.page(3) | 1)
    assert vgpu.device.pte(gma) == vgpu.page(3) | 1
    assert driver.reached(vgpu, gma) == vgpu.page(3)
    vgpu.device.set_pte(gma, vgpu.page(5) | 1)
    assert driver.reached(vgpu, gma) == vgpu.page(5)
    vgpu.device.set_pte(gma, 0)
    assert driver.reached(vgpu, gma) is None


def test_an_entry_may_come_in_two_halves(driver: Driver, vgpu: Opened) -> None:
    gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x30 * PAGE
    at = GTT + (gma >> 12) * 8
    first, second = vgpu.page(1) | 1, vgpu.page(2) | 1
    halves = {0: first.to_bytes(8, "little")[:4], 4: first.to_bytes(8, "little")[4:]}
    for order in ((0, 4), (4, 0)):
        vgpu.device.set_pte(gma, second)
        vgpu.device.write(BAR0, at + order[0], halves[order[0]])
        assert driver.reached(vgpu, gma) is None
        vgpu.device.write(BAR0, at + order[1], halves[order[1]])
        assert vgpu.device.pte(gma) == first
        assert driver.reached(vgpu, gma) == vgpu.page(1)


def test_an_entry_whose_page_is_not_guest_memory_leads_nowhere(driver: Driver, vgpu: Opened) -> None:
    gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x1000
    beyond = vgpu.memory.iova + vgpu.memory.size
    vgpu.device.set_pte(gma, beyond | 1)
    assert vgpu.device.pte(gma) == beyond | 1
    assert driver.reached(vgpu, gma) is None


def test_pages_behind_entries_are_pinned_and_let_go(vgpu: Opened) -> None:
    low = vgpu.device.reg(PV_MAPPABLE_BASE)
    for number in range(3):
        vgpu.device.set_pte(low + number * PAGE, vgpu.page(number) | 1)
    vgpu.container.dirty_tracking(1)
    assert vgpu.container.dirty_pages(vgpu.memory) == {vgpu.page(number) for number in range(3)}
    for number in range(3):
        vgpu.device.set_pte(low + number * PAGE, 0)
    vgpu.container.dirty_pages(vgpu.memory)  # what was pinned since the last time counts once more
    assert vgpu.container.dirty_pages(vgpu.memory) == set()
    vgpu.container.dirty_tracking(2)


def test_a_fence_reaches_one_of_the_hardware_s_and_no_other(driver: Driver, make: Callable[..., Opened]) -> None:
    for vgpu in (make(), make()):
        before = driver.hardware_fences(vgpu)
        start = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x100000
        vgpu.device.set_fence(1, start | 1, start + 0xFF000 | 3)
        assert vgpu.device.fence(1) == (start + 0xFF000 | 3) << 32 | start | 1
        after = driver.hardware_fences(vgpu)
        (changed,) = [number for number in range(32) if before[number] != after[number]]
        value = after[changed]
        assert (value >> 32) - (value & 0xFFFFFFFF) == 0xFF000 + 2
        assert value & 1


def test_a_fence_that_the_vgpu_does_not_have_is_refused(driver: Driver, vgpu: Opened) -> None:
    assert vgpu.device.reg64(PVINFO) == PV_MAGIC  # else kvmgt takes the guest for one that knows nothing of GVT-g
    before = driver.hardware_fences(vgpu)
    for number in (4, 15):
        with pytest.raises(OSError):
            vgpu.device.set_reg(FENCE + 8 * number, 0x1001)
    assert driver.hardware_fences(vgpu) == before


# --- registers


def test_registers_with_a_mode_mask_change_by_mask(vgpu: Opened) -> None:
    assert vgpu.device.reg64(PVINFO) == PV_MAGIC
    vgpu.device.set_reg(BCS_MODE, 0x8080_8080)
    assert vgpu.device.reg(BCS_MODE) == 0x8080
    vgpu.device.set_reg(BCS_MODE, 0x0080_0000)
    assert vgpu.device.reg(BCS_MODE) == 0x8000


def test_a_register_that_means_nothing_keeps_what_is_written(vgpu: Opened) -> None:
    vgpu.device.set_reg(PLAIN, 0xDEADBEEF)
    assert vgpu.device.reg(PLAIN) == 0xDEADBEEF


def test_a_gt_reset_takes_the_engines_registers_back_and_no_other(vgpu: Opened) -> None:
    first = vgpu.device.reg(PLAIN), vgpu.device.reg(PLAIN_DISPLAY)
    for register in (PLAIN, PLAIN_DISPLAY):
        vgpu.device.set_reg(register, 0x1234)
    vgpu.device.set_reg(GDRST, 1)
    assert vgpu.device.reg(PLAIN) == first[0]
    assert vgpu.device.reg(PLAIN_DISPLAY) == 0x1234
    vgpu.device.reset()
    assert (vgpu.device.reg(PLAIN), vgpu.device.reg(PLAIN_DISPLAY)) == first


# --- BAR2


def test_the_aperture_shows_guest_memory_where_there_is_an_entry(vgpu: Opened) -> None:
    gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x10 * PAGE
    for number in range(2):
        vgpu.device.set_pte(gma + number * PAGE, vgpu.page(number) | 1)
    vgpu.memory.write(vgpu.page(1) - 8, b"abcdefghijklmnop")
    assert vgpu.device.read(BAR2, gma + PAGE - 8, 8) == b"abcdefgh"
    assert vgpu.device.write(BAR2, gma + PAGE - 4, b"XYZ!") == 4
    assert vgpu.memory.read(vgpu.page(1) - 8, 8) == b"abcdXYZ!"


def test_the_aperture_is_mapped_in_its_own_bounds_only(vgpu: Opened) -> None:
    region = vgpu.device.region(BAR2)
    assert region.flags & (REGION_MMAP | REGION_CAPS) == REGION_MMAP | REGION_CAPS
    low, size = vgpu.device.reg(PV_MAPPABLE_BASE), vgpu.device.reg(PVINFO + 0x44)
    assert region.sparse == ((low, size),)
    vgpu.device.mmap(BAR2, low, PAGE).close()
    vgpu.device.mmap(BAR2, low + size - PAGE, PAGE).close()
    for offset, length in ((low + size, PAGE), (low + size - PAGE, 2 * PAGE)):
        with pytest.raises(OSError):
            vgpu.device.mmap(BAR2, offset, length)
    for index in (BAR0, CONFIG):
        with pytest.raises(OSError):
            vgpu.device.mmap(index, 0, PAGE)


# --- interrupts


def test_bad_interrupt_requests_are_refused(vgpu: Opened) -> None:
    assert vgpu.device.irq(IRQ_INTX)[1] == 1
    assert vgpu.device.irq(IRQ_MSI)[1] == 1
    for index in (2, 3, 4, 5):
        with pytest.raises(OSError) as caught:
            vgpu.device.irq(index)
        assert caught.value.errno == errno.EINVAL
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with pytest.raises(OSError):
            vgpu.device.set_eventfd(IRQ_MSI, 9999)
        with pytest.raises(OSError):
            vgpu.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_MASK, IRQ_MSI, 2)
        vgpu.device.set_eventfd(IRQ_MSI, event)
        assert not select.select([event], [], [], 0.1)[0]
        vgpu.device.set_irqs(IRQ_DATA_NONE | IRQ_ACTION_TRIGGER, IRQ_MSI, 0)
    finally:
        os.close(event)


# --- reset, close, unmap


def test_a_device_reset_leads_the_hardware_nowhere_and_keeps_the_guest_s_bases(driver: Driver, vgpu: Opened) -> None:
    gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x10 * PAGE
    vgpu.device.set_pte(gma, vgpu.page(0) | 1)
    fences = driver.hardware_fences(vgpu)
    vgpu.device.set_fence(0, gma | 1, gma + 0x1000)
    assert driver.hardware_fences(vgpu) != fences
    set_cfg(vgpu, 4, 7, 2)
    bases = vgpu.device.read(BAR0, PVINFO + 0x40, 8) + vgpu.device.read(BAR0, PVINFO + 0x48, 8)
    vgpu.device.reset()
    assert driver.reached(vgpu, gma) is None
    assert driver.hardware_fences(vgpu) == fences
    assert cfg(vgpu, 4, 2) & 7 == 0
    assert vgpu.device.read(BAR0, PVINFO + 0x40, 8) + vgpu.device.read(BAR0, PVINFO + 0x48, 8) == bases
    assert vgpu.device.pte(gma) == vgpu.page(0) | 1  # the guest's own table stays


def test_a_gt_reset_keeps_the_ggtt_and_fences(driver: Driver, vgpu: Opened) -> None:
    gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x10 * PAGE
    vgpu.device.set_pte(gma, vgpu.page(0) | 1)
    vgpu.device.set_fence(0, gma | 1, gma + 0x1000)
    fences = driver.hardware_fences(vgpu)
    vgpu.device.set_reg(GDRST, 1)
    assert vgpu.device.reg(GDRST) == 0
    assert driver.hardware_fences(vgpu) == fences
    assert driver.reached(vgpu, gma) == vgpu.page(0)
    assert vgpu.device.pte(gma) == vgpu.page(0) | 1


def test_the_next_open_finds_the_old_table_and_pins_nothing(driver: Driver, names: Callable[..., str]) -> None:
    name = names()
    with driver.opened(name) as vgpu:
        gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x10 * PAGE
        vgpu.device.set_pte(gma, vgpu.page(0) | 1)
    with driver.opened(name) as vgpu:
        assert vgpu.device.pte(gma) == vgpu.page(0) | 1
        assert driver.reached(vgpu, gma) is None
        vgpu.container.dirty_tracking(1)
        assert vgpu.container.dirty_pages(vgpu.memory) == set()


def test_memory_that_is_unmapped_is_not_pinned_any_more(vgpu: Opened) -> None:
    gma = vgpu.device.reg(PV_MAPPABLE_BASE) + 0x10 * PAGE
    vgpu.device.set_pte(gma, vgpu.page(0) | 1)
    assert vgpu.container.unmap(vgpu.memory) == vgpu.memory.size
    assert vgpu.device.pte(gma) == vgpu.page(0) | 1


def test_the_device_may_outlive_its_group_and_container_fds(driver: Driver, names: Callable[..., str]) -> None:
    with driver.opened(names()) as vgpu:
        duplicate = os.dup(vgpu.device.fd)
    try:
        assert len(os.pread(duplicate, 4, 0)) == 4
    finally:
        os.close(duplicate)
