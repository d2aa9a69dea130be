# SPDX-License-Identifier: MIT
"""Every command that is executed, in a ring and in a batch; and that every other one is skipped or hangs the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.gpu_rig import BASE, BASES, BATCH, DATA, END, FIRST, GMA, PPGTT_BATCH, Rig, rigged
from tools.gpu.clock import TICKS_PER_SECOND
from tools.gpu.registers import MASTER_IRQ

if TYPE_CHECKING:
    from collections.abc import Iterator

GGTT: Final = 1 << 22
NOOP: Final = 0
USER_INTERRUPT: Final = 2 << 23
STORE_DATA_IMM: Final = 0x20 << 23 | 2
STORE_QWORD_IMM: Final = 0x20 << 23 | 1 << 21 | 3
STORE_DATA_INDEX: Final = 0x21 << 23 | 1
LOAD_REGISTER_IMM: Final = 0x22 << 23 | 1
UPDATE_GTT: Final = 0x23 << 23
STORE_REGISTER_MEM: Final = 0x24 << 23 | 2
FLUSH_DW: Final = 0x26 << 23 | 2
LOAD_REGISTER_MEM: Final = 0x29 << 23 | 2
LOAD_REGISTER_REG: Final = 0x2A << 23 | 1
COPY_MEM_MEM: Final = 0x2E << 23 | 3
CONDITIONAL_END: Final = 0x36 << 23 | 2
SECOND_LEVEL: Final = PPGTT_BATCH | 1 << 22
PIPE_CONTROL: Final = 0x7A00_0004
SCRATCH: Final = 0x22600  # a general purpose register of bcs0

ENGINES: Final = tuple(BASES)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as made:
        yield made


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_stores_through_the_page_tables(rig: Rig, engine: str) -> None:
    rig.batch(STORE_DATA_IMM, DATA, 0, 0xCAFE, engine=engine)
    assert rig.get(DATA) == 0xCAFE
    assert rig.state(engine) == "idle"
    (entry,) = rig.entries("MI_STORE_DATA_IMM")
    assert (entry.engine, entry.lrca, entry.at, entry.batch) == (engine, GMA + FIRST.lrca, BATCH, True)
    assert (entry.writes, entry.reads, entry.accesses) == ([(BASE + DATA, 0xCAFE)], [], 1)
    (start,) = rig.entries("MI_BATCH_BUFFER_START")
    assert (start.at, start.batch, start.reads) == (GMA + FIRST.ring, False, [(BASE + BATCH, STORE_DATA_IMM)])


def test_store_data_imm_through_the_ggtt_and_of_a_qword(rig: Rig) -> None:
    rig.run(
        STORE_DATA_IMM | GGTT, GMA + DATA, 0, 0x11,
        STORE_QWORD_IMM | GGTT, GMA + DATA + 8, 0, 0x22, 0x33,
        STORE_QWORD_IMM | GGTT, GMA + DATA + 20, 0, 0x44, 0x55,  # not aligned
        STORE_QWORD_IMM, DATA + 32, 0, 0x66, 0x77,
    )  # fmt: skip
    assert [rig.get(DATA + 4 * each) for each in range(10)] == [0x11, 0, 0x22, 0x33, 0, 0x44, 0x55, 0, 0x66, 0x77]
    assert rig.head() == rig.tail()


def test_store_data_index_stores_into_the_status_page(rig: Rig) -> None:
    rig.run(STORE_DATA_INDEX, 0x100, 0xABCD)
    assert rig.get(rig.status_page("bcs0") + 0x100) == 0xABCD


def test_load_register_imm_loads_all_its_registers(rig: Rig) -> None:
    rig.run(LOAD_REGISTER_IMM + 2, SCRATCH, 0x1, SCRATCH + 4, 0x2)
    assert (rig.read(SCRATCH), rig.read(SCRATCH + 4)) == (1, 2)


def test_a_command_s_write_to_a_masked_register_is_masked(rig: Rig) -> None:
    mode = BASES["bcs0"] + 0x29C
    rig.write(mode, 0xFFFF_0011)
    rig.run(LOAD_REGISTER_IMM, mode, 0x0003_0002)
    assert rig.read(mode) == 0x12


@pytest.mark.parametrize("offset", [0x941C, MASTER_IRQ, 0x22230, 0x223A0, 0x2209C, 0x44308, 0xA278, 2 << 20])
def test_a_command_does_not_touch_what_is_the_driver_s(rig: Rig, offset: int) -> None:
    before = rig.gpu.mmio.get(offset) & ~7
    rig.run(LOAD_REGISTER_IMM, offset, 0x8001_8001, STORE_DATA_IMM | GGTT, GMA + DATA, 0, 1)
    assert rig.get(DATA) == 1
    if offset != 0x44308:  # which has the interrupts that came
        assert rig.gpu.mmio.get(offset) & ~7 == before  # the status pointer's lowest bits move by themselves
    assert rig.events()[-1] == (FIRST.ident, 0x18)


def test_registers_go_to_memory_and_back(rig: Rig) -> None:
    rig.write(SCRATCH, 0x1234)
    rig.put(DATA + 16, 0x5678)
    rig.run(
        STORE_REGISTER_MEM | GGTT, SCRATCH, GMA + DATA, 0,
        STORE_REGISTER_MEM, SCRATCH, DATA + 4, 0,
        LOAD_REGISTER_MEM | GGTT, SCRATCH + 4, GMA + DATA + 16, 0,
        LOAD_REGISTER_MEM, SCRATCH + 8, DATA + 16, 0,
        LOAD_REGISTER_REG, SCRATCH + 8, SCRATCH + 12,
    )  # fmt: skip
    assert (rig.get(DATA), rig.get(DATA + 4)) == (0x1234, 0x1234)
    assert [rig.read(SCRATCH + 4 * each) for each in range(1, 4)] == [0x5678] * 3
    assert [entry.reads for entry in rig.entries("MI_LOAD_REGISTER_MEM")] == [[(BASE + DATA + 16, 0x5678)]] * 2


def test_a_timestamp_is_stored_as_it_is_read(rig: Rig) -> None:
    rig.time.seconds = 2.0
    rig.run(STORE_REGISTER_MEM | GGTT, 0x22358, GMA + DATA, 0)
    assert rig.get(DATA) == 2 * TICKS_PER_SECOND


@pytest.mark.parametrize("flags", [0, GGTT, 1 << 21, GGTT | 1 << 21])
def test_copy_mem_mem_has_an_address_space_for_each_side(rig: Rig, flags: int) -> None:
    rig.put(DATA, 0x99)
    target = DATA + 4 + (GMA if flags & GGTT else 0)
    source = DATA + (GMA if flags & 1 << 21 else 0)
    rig.run(COPY_MEM_MEM | flags, target, 0, source, 0)
    assert rig.get(DATA + 4) == 0x99


def test_update_gtt_writes_entries_and_later_commands_see_them(rig: Rig) -> None:
    page = GMA + DATA
    rig.run(
        STORE_DATA_IMM | GGTT, page, 0, 1,  # the old translation is known by now
        UPDATE_GTT | 4, page, BASE + DATA + 0x1000 | 1, 0, BASE + DATA + 0x2000 | 1, 0, NOOP,
        STORE_DATA_IMM | GGTT, page, 0, 2,
        STORE_DATA_IMM | GGTT, page + 0x1000, 0, 3,
    )  # fmt: skip
    assert [rig.get(DATA + each) for each in (0, 0x1000, 0x2000)] == [1, 2, 3]


def test_flush_dw_stores_and_interrupts(rig: Rig) -> None:
    rig.interrupts()
    rig.run(
        FLUSH_DW | 1 << 14, GMA + DATA | 4, 0, 0x11,
        FLUSH_DW | 1 << 14, DATA + 8, 0, 0x22,
        FLUSH_DW | 1 << 14 | 1, DATA + 16, 0, 0x33, 0x44,
        FLUSH_DW | 1 << 14 | 1 << 21, 0x200, 0, 0x55,
        FLUSH_DW | 1 << 8, 0, 0, 0,
    )  # fmt: skip
    assert [rig.get(DATA + 4 * each) for each in range(6)] == [0x11, 0, 0x22, 0, 0x33, 0x44]
    assert rig.get(rig.status_page("bcs0") + 0x200) == 0x55
    assert rig.read(0x44308) == 0x0101_0000  # user and context switch of bcs0
    assert rig.head() == rig.tail()


def test_flush_dw_s_flags_are_not_its_length(rig: Rig) -> None:
    """Bit 7 invalidates a cache of the video engine: counted as length, what follows would be skipped."""
    rig.run(FLUSH_DW | 1 << 7, 0, 0, 0, STORE_DATA_IMM, DATA, 0, 1, engine="vcs0")
    assert rig.get(DATA) == 1


def test_flush_dw_stores_the_time(rig: Rig) -> None:
    rig.time.seconds = 1000.0  # more than 32 bits of ticks
    rig.run(FLUSH_DW | 3 << 14 | 1, DATA, 0, 0, 0)
    assert rig.get64(DATA) == 1000 * TICKS_PER_SECOND


def test_pipe_control_stores_and_interrupts(rig: Rig) -> None:
    rig.time.seconds = 1.0
    rig.run(
        PIPE_CONTROL, 1 << 14 | 1 << 24, GMA + DATA, 0, 0x11, 0x22,
        PIPE_CONTROL, 1 << 14, DATA + 8, 0, 0x33, 0x44,
        PIPE_CONTROL, 3 << 14, DATA + 16, 0, 0, 0,
        PIPE_CONTROL, 1 << 14 | 1 << 21 | 1 << 8, 0x200, 0, 0x55, 0,
        PIPE_CONTROL, 1 << 20, DATA + 24, 0, 0x66, 0x77,  # a flush alone
        engine="rcs0",
    )  # fmt: skip
    assert [rig.get(DATA + 4 * each) for each in range(8)] == [0x11, 0x22, 0x33, 0x44, TICKS_PER_SECOND, 0, 0, 0]
    assert rig.get(rig.status_page("rcs0") + 0x200) == 0x55
    assert rig.read(0x44308) == 0x101


def test_pipe_control_writes_a_register_or_the_count_of_nothing_that_was_drawn(rig: Rig) -> None:
    rig.put(DATA, 0x11, 0x22)
    rig.run(
        PIPE_CONTROL, 1 << 23 | 1 << 14, SCRATCH, 0, 0x33, 0x44,
        PIPE_CONTROL, 2 << 14, DATA, 0, 0x55, 0x66,
        engine="rcs0",
    )  # fmt: skip
    assert (rig.read(SCRATCH), rig.get(DATA), rig.get(DATA + 4)) == (0x33, 0, 0)


def test_user_interrupts_arrive(rig: Rig) -> None:
    before = rig.gpu.interrupts.sent
    rig.run(USER_INTERRUPT, USER_INTERRUPT, engine="vecs0")
    assert rig.read(0x44338) == 0x101
    assert rig.gpu.interrupts.sent - before == 4  # active, twice user, complete


def test_a_batch_in_the_ggtt(rig: Rig) -> None:
    rig.put(BATCH, STORE_DATA_IMM, DATA, 0, 7, END)
    rig.run(PPGTT_BATCH & ~(1 << 8), GMA + BATCH, 0, 0)
    assert rig.get(DATA) == 7
    assert rig.entries("MI_STORE_DATA_IMM")[0].at == GMA + BATCH


def test_batches_are_chained_and_called(rig: Rig) -> None:
    """A chained batch does not come back; a second-level one comes back to its caller."""
    chained, second = BATCH + 0x1000, BATCH + 0x2000
    rig.put(second, STORE_DATA_IMM, DATA + 4, 0, 2, END)
    rig.put(chained, SECOND_LEVEL, second, 0, STORE_DATA_IMM, DATA + 8, 0, 3, END)
    rig.put(BATCH, STORE_DATA_IMM, DATA, 0, 1, PPGTT_BATCH, chained, 0, STORE_DATA_IMM, DATA, 0, 99, END)
    rig.run(PPGTT_BATCH, BATCH, 0, 0, STORE_DATA_IMM, DATA + 12, 0, 4)
    assert [rig.get(DATA + 4 * each) for each in range(4)] == [1, 2, 3, 4]


def test_a_third_level_of_batches_hangs_the_engine(rig: Rig) -> None:
    rig.batch(SECOND_LEVEL, BATCH, 0)
    assert rig.state() == "hung"
    assert "third level" in rig.gpu.engines["bcs0"].hung


@pytest.mark.parametrize(("value", "goes_on"), [(4, False), (5, False), (6, True)])
def test_a_batch_ends_on_a_condition(rig: Rig, value: int, goes_on: bool) -> None:
    rig.put(DATA + 8, value)
    rig.batch(CONDITIONAL_END, 5, DATA + 8, 0, STORE_DATA_IMM, DATA, 0, 1)
    assert rig.get(DATA) == int(goes_on)
    assert rig.state() == "idle"


def test_a_batch_end_in_the_ring_ends_nothing(rig: Rig) -> None:
    rig.run(END, STORE_DATA_IMM, DATA, 0, 1)
    assert rig.get(DATA) == 1


def test_a_ring_goes_round(rig: Rig) -> None:
    rig.lay_out(FIRST)
    rig.put(FIRST.ring + 0xFF8, STORE_DATA_IMM, DATA)
    rig.put(FIRST.ring, 0, 0x77)
    rig.put(FIRST.state + 4 * 5, 0xFF8)
    rig.put(FIRST.state + 4 * 7, 8)
    rig.submit(FIRST)
    assert rig.get(DATA) == 0x77
    assert rig.head() == 8


SKIPPED: Final = [
    ("bcs0", [0x1A << 23 | 2, 0, 0, 0]),  # MI_MATH
    ("bcs0", [0x2F << 23 | 1, 0, 0]),  # MI_ATOMIC
    ("bcs0", [0x08 << 23]),  # MI_ARB_ON_OFF
    ("bcs0", [2 << 29 | 0x11 << 22 | 4, 0, 0, 0, 0, 0]),  # XY_SETUP_CLIP_BLT and the like
    ("rcs0", [0x6904_0000]),  # PIPELINE_SELECT
    ("rcs0", [0x6104_0000]),
    ("rcs0", [0x780B_0001]),  # 3DSTATE_VF_STATISTICS
    ("rcs0", [0x6101_0011, *[0] * 18]),  # STATE_BASE_ADDRESS
    ("rcs0", [0x7000_0007, *[0] * 8]),  # MEDIA_VFE_STATE
    ("rcs0", [0x7100_0101, *[0] * 0x102]),  # a media object, with 16 bits of length
    ("rcs0", [0x7B00_0005, *[0] * 6]),  # 3DPRIMITIVE
    ("vcs0", [0x7000_0003, *[0] * 4]),  # MFX_PIPE_MODE_SELECT
    ("vcs0", [0x7301_0101, *[0] * 0x102]),  # with 12 bits of length
    ("vecs0", [0x7402_F00A, *[0] * 11]),  # VEBOX_STATE: what is above the 12 bits are flags
]


@pytest.mark.parametrize(("engine", "dwords"), SKIPPED, ids=[f"{each[0]}-{each[1][0]:#x}" for each in SKIPPED])
def test_what_is_not_executed_is_skipped_by_its_length(rig: Rig, engine: str, dwords: list[int]) -> None:
    rig.run(*dwords, STORE_DATA_IMM, DATA, 0, 1, engine=engine)
    assert rig.state(engine) == "idle"
    assert [entry.header for entry in rig.entries() if entry.name[:1].isupper() or entry.name[:1].isdigit()] == [
        dwords[0], STORE_DATA_IMM,
    ]  # fmt: skip
    assert rig.get(DATA) == 1


@pytest.mark.parametrize("kind", [1, 4, 5, 6, 7])
def test_what_is_no_command_hangs_the_engine(rig: Rig, kind: int) -> None:
    rig.run(kind << 29 | 5, STORE_DATA_IMM, DATA, 0, 1)
    assert (rig.state(), rig.get(DATA)) == ("hung", 0)
    assert rig.entries("hang")[0].engine == "bcs0"


def test_a_short_pipe_control_hangs_the_engine(rig: Rig) -> None:
    rig.run(0x7A00_0001, 1 << 14, GMA + DATA, engine="rcs0")
    assert rig.state("rcs0") == "hung"


def test_a_semaphore_with_an_unknown_comparison_hangs_the_engine(rig: Rig) -> None:
    rig.run(0x1C << 23 | 7 << 12 | 2, 0, GMA + DATA, 0)
    assert rig.state() == "hung"


def blit(opcode: int, length: int) -> int:
    return 2 << 29 | opcode << 22 | length


def test_a_colour_fills_a_rectangle(rig: Rig) -> None:
    rig.batch(blit(0x50, 5), 3 << 24 | 0xF0 << 16 | 32, 1 << 16 | 2, 3 << 16 | 4, DATA, 0, 0xAABBCCDD)
    rows = [[rig.get(DATA + 32 * y + 4 * x) for x in range(8)] for y in range(4)]
    row = [0, 0, 0xAABBCCDD, 0xAABBCCDD, 0, 0, 0, 0]
    assert rows == [[0] * 8, row, row, [0] * 8]


def test_a_colour_of_one_and_two_bytes(rig: Rig) -> None:
    rig.batch(
        blit(0x50, 5), 0xF0 << 16 | 32, 0, 1 << 16 | 3, DATA, 0, 0x11,
        blit(0x50, 5), 1 << 24 | 0xF0 << 16 | 32, 0, 1 << 16 | 2, DATA + 8, 0, 0x2222,
    )  # fmt: skip
    assert (rig.get(DATA), rig.get(DATA + 8)) == (0x111111, 0x22222222)


@pytest.mark.parametrize("fast", [False, True])
def test_a_rectangle_is_copied(rig: Rig, fast: bool) -> None:
    source, target = DATA, DATA + 0xFF0  # the target's second row goes over a page's border
    for y in range(3):
        rig.put(source + 32 * y, *(0x100 * y + x for x in range(8)))
    header, depth = (blit(0x42, 8), 3 << 24) if fast else (blit(0x53, 8), 3 << 24 | 0xCC << 16)
    rig.batch(header, depth | 32, 0, 2 << 16 | 4, target, 0, 1 << 16 | 2, 32, source, 0)
    assert [rig.get(target + 4 * x) for x in range(4)] == [0x102, 0x103, 0x104, 0x105]
    assert [rig.get(target + 32 + 4 * x) for x in range(4)] == [0x202, 0x203, 0x204, 0x205]


@pytest.mark.parametrize(
    "dwords",
    [
        [blit(0x50, 5), 3 << 24 | 0x55 << 16 | 32, 0, 1 << 16 | 1, DATA, 0, 1],  # another raster operation
        [blit(0x53, 8), 3 << 24 | 0x66 << 16 | 32, 0, 1 << 16 | 1, DATA, 0, 0, 32, DATA, 0],
        [blit(0x42, 8), 7 << 24 | 32, 0, 1 << 16 | 1, DATA, 0, 0, 32, DATA, 0],  # another depth
        [blit(0x50, 5), 3 << 24 | 0xF0 << 16 | 32, 0, 0xFFFF_FFFF, DATA, 0, 1],  # 16 GiB
        [blit(0x50, 5), 3 << 24 | 0xF0 << 16 | 32, 0, 0xFFFF_0001, DATA, 0, 1],  # 65535 rows
        [blit(0x50, 1), 3 << 24 | 0xF0 << 16 | 32, 0],
        [blit(0x42, 1), 3 << 24 | 32, 0],
    ],
)
def test_a_blit_that_is_not_emulated_hangs_the_engine(rig: Rig, dwords: list[int]) -> None:
    rig.batch(*dwords)
    assert rig.state() == "hung"


@pytest.mark.parametrize(("pitch", "rows"), [(0, [3, 0, 0]), (-32 & 0xFFFF, [3, 2, 1])])
def test_rows_may_lie_on_each_other_or_go_back(rig: Rig, pitch: int, rows: list[int]) -> None:
    rig.put(DATA + 0x800, 1, *[0] * 7, 2, *[0] * 7, 3)
    rig.batch(blit(0x42, 8), 3 << 24 | pitch, 0, 3 << 16 | 1, DATA + 0x40, 0, 0, 32, DATA + 0x800, 0)
    assert [rig.get(DATA + offset) for offset in ((0x40, 0x20, 0) if pitch == 0 else (0, 0x20, 0x40))] == rows


def test_an_empty_rectangle_is_nothing(rig: Rig) -> None:
    rig.batch(blit(0x50, 5), 3 << 24 | 0xF0 << 16, 4 << 16 | 4, 2 << 16 | 2, DATA, 0, 1)
    assert rig.state() == "idle"


@pytest.mark.parametrize(
    ("dwords", "address", "ggtt"),
    [
        ([STORE_DATA_IMM, 0x20_0000, 0, 1], 0x20_0000, False),
        ([STORE_DATA_IMM | GGTT, 0x40_0000, 0, 1], 0x40_0000, True),
        ([PPGTT_BATCH, 0x20_0000, 0, 0], 0x20_0000, False),
        ([0x1C << 23 | 2, 0, 0x20_0000, 0], 0x20_0000, False),
        ([PPGTT_BATCH, 0x20_0000, 0x1234, 0], 0x1234_0020_0000, False),
    ],
)
def test_an_address_that_leads_nowhere_hangs_the_engine_and_is_told(
    rig: Rig, dwords: list[int], address: int, ggtt: bool
) -> None:
    rig.run(*dwords)
    assert rig.state() == "hung"
    assert f"{'GGTT' if ggtt else 'PPGTT'} fault at {address:#x}" in rig.gpu.engines["bcs0"].hung
    fault, low, high = (rig.read(offset) for offset in (0x4094, 0x4B10, 0x4B14))
    assert fault == 1 | 2 << 12  # valid, bcs0
    assert (high & 0xF) << 44 | low << 12 == address
    assert bool(high & 1 << 4) == ggtt


def test_a_store_outside_of_the_memory_is_dropped(rig: Rig) -> None:
    rig.gpu.mmio.ggtt[0x40_0000 // 4096] = 0x7000_0000 | 1
    rig.run(STORE_DATA_IMM | GGTT, 0x40_0000, 0, 1, COPY_MEM_MEM | GGTT | 1 << 21, GMA + DATA, 0, 0x40_0000, 0)
    assert rig.state() == "idle"
    assert rig.get(DATA) == 0xFFFF_FFFF
