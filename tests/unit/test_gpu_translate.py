# SPDX-License-Identifier: MIT
"""Page walks: the global GTT, and page tables of all shapes, right ones and broken ones."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.gpu_rig import memfd
from tools.gpu import dma
from tools.gpu.dma import DmaSpace
from tools.gpu.translate import LEGACY_32, LEGACY_64, FaultError, Ggtt, Ppgtt

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE: Final = 0x1_0000_0000
PML4, PDP, PD, PT = (BASE + page * 0x1000 for page in range(4))
TARGET: Final = 0x12_3456_7000


@pytest.fixture
def memory() -> Iterator[DmaSpace]:
    space = DmaSpace()
    fd = memfd(0x10000)
    space.add(BASE, 0x10000, flags=dma.READ | dma.WRITE, fd=fd, offset=0)
    os.close(fd)
    yield space
    space.clear()


def four_levels(memory: DmaSpace) -> Ppgtt:
    memory.write64(PML4 + 8 * 3, PDP | 3)
    memory.write64(PDP + 8 * 5, PD | 3)
    memory.write64(PD + 8 * 7, PT | 3)
    memory.write64(PT + 8 * 9, TARGET | 3)
    return Ppgtt(memory, LEGACY_64, [PML4, 0, 0, 0])


VA: Final = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12


def test_the_ggtt_leads_to_a_page() -> None:
    entries = memoryview(bytearray(8 * 16)).cast("Q")
    entries[3] = TARGET | 1
    entries[4] = TARGET  # not present
    ggtt = Ggtt(entries)
    assert ggtt.translate(0x3ABC) == TARGET + 0xABC
    for address in (0x4000, 0x0, 0x10000, -4, 1 << 40):
        with pytest.raises(FaultError) as caught:
            ggtt.translate(address)
        assert (caught.value.address, caught.value.ggtt) == (address, True)


def test_bits_above_the_address_of_a_ggtt_entry_do_not_count() -> None:
    entries = memoryview(bytearray(struct.pack("<Q", 0xFFFF_FF80_0000_0000 | TARGET | 0xE01))).cast("Q")
    assert Ggtt(entries).translate(0x10) == TARGET + 0x10


def test_four_levels_lead_to_a_page(memory: DmaSpace) -> None:
    assert four_levels(memory).translate(VA + 0x123) == TARGET + 0x123


def test_an_address_is_48_bits_however_it_is_extended(memory: DmaSpace) -> None:
    assert four_levels(memory).translate(0xFFFF << 48 | VA) == TARGET


@pytest.mark.parametrize("entry", [PML4 + 8 * 3, PDP + 8 * 5, PD + 8 * 7, PT + 8 * 9])
@pytest.mark.parametrize("value", [0, TARGET, 0xFFFF_FFFF_FFFF_FFFE])
def test_an_entry_that_is_not_present_is_a_fault(memory: DmaSpace, entry: int, value: int) -> None:
    ppgtt = four_levels(memory)
    memory.write64(entry, value & ~1)
    with pytest.raises(FaultError) as caught:
        ppgtt.translate(VA)
    assert (caught.value.address, caught.value.ggtt) == (VA, False)


@pytest.mark.parametrize("entry", [PML4 + 8 * 3, PDP + 8 * 5, PD + 8 * 7])
def test_a_table_outside_of_the_memory_is_a_fault(memory: DmaSpace, entry: int) -> None:
    ppgtt = four_levels(memory)
    memory.write64(entry, 0x7F_0000_0000 | 3)
    with pytest.raises(FaultError, match="outside of the memory"):
        ppgtt.translate(VA)


def test_tables_that_lead_back_to_themselves_are_walked_as_far_as_any(memory: DmaSpace) -> None:
    for index in range(512):
        memory.write64(PML4 + 8 * index, PML4 | 3)
    assert Ppgtt(memory, LEGACY_64, [PML4]).translate(0x1234_5678_9ABC) == PML4 + 0xABC


def test_large_pages_of_2_mib_and_1_gib(memory: DmaSpace) -> None:
    ppgtt = four_levels(memory)
    memory.write64(PD + 8 * 7, 0x4020_0000 | 0x83)
    assert ppgtt.translate(VA + 0x5432) == 0x4020_0000 + (9 << 12) + 0x5432
    memory.write64(PDP + 8 * 5, 0x8000_0000 | 0x83)
    assert ppgtt.translate(VA) == 0x8000_0000 + (VA & 0x3FFF_FFFF)


def test_pages_of_64_kib(memory: DmaSpace) -> None:
    ppgtt = four_levels(memory)
    memory.write64(PD + 8 * 7, PT | 0x803)
    memory.write64(PT, 0x55_0000 | 3)
    memory.write64(PT + 8 * 16, 0x66_0000 | 3)
    assert ppgtt.translate(VA + 0x123) == 0x55_0000 + (9 << 12) + 0x123
    assert ppgtt.translate((VA & ~0x1FFFFF) + 0x1_0456) == 0x66_0456


def test_a_32_bit_context_has_four_directories(memory: DmaSpace) -> None:
    memory.write64(PD + 8 * 1, PT | 3)
    memory.write64(PT + 8 * 2, TARGET | 3)
    ppgtt = Ppgtt(memory, LEGACY_32, [0x7F_0000_0000, 0x7F_0000_0000, PD, 0x7F_0000_0000])
    assert ppgtt.translate(2 << 30 | 1 << 21 | 2 << 12 | 8) == TARGET + 8
    for address in (1 << 21, 4 << 30):
        with pytest.raises(FaultError):
            ppgtt.translate(address)


@pytest.mark.parametrize("mode", [0, 2])
def test_other_addressing_modes_are_faults(memory: DmaSpace, mode: int) -> None:
    with pytest.raises(FaultError, match="mode"):
        Ppgtt(memory, mode, [PML4, PML4, PML4, PML4]).translate(0)
