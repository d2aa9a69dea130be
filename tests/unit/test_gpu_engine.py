# SPDX-License-Identifier: MIT
"""Execution lists: what runs when, what the driver is told, and what is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.gpu_rig import (
    BASES,
    BATCH,
    DATA,
    END,
    FIRST,
    GMA,
    PPGTT_BATCH,
    SECOND,
    THIRD,
    Rig,
    rigged,
)
from tools.gpu import registers
from tools.gpu.clock import TICKS_PER_SECOND
from tools.gpu.engine import (
    ACTIVE_IDLE,
    COMPLETE,
    ELEMENT_SWITCH,
    IDLE_ACTIVE,
    LITE_RESTORE,
    PREEMPTED,
    SLICE,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

E: Final = BASES["bcs0"]
STORE: Final = 0x20 << 23 | 2
SECOND_LEVEL: Final = PPGTT_BATCH | 1 << 22
WAIT_GE: Final = 0x1C << 23 | 1 << 15 | 1 << 12 | 2
FLAG: Final = DATA + 0x100
A, B, C = FIRST.ident, SECOND.ident, THIRD.ident


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as made:
        yield made


def store(offset: int, value: int) -> tuple[int, ...]:
    return STORE, offset, 0, value


def wait(value: int = 1) -> tuple[int, ...]:
    return WAIT_GE, value, FLAG, 0


def test_nothing_runs_before_the_fourth_write_to_the_elsp(rig: Rig) -> None:
    rig.lay_out(FIRST, *store(DATA, 1))
    for value in (0, 0, A):
        rig.write(E + 0x230, value)
    assert (rig.get(DATA), rig.state()) == (0, "idle")
    rig.write(E + 0x230, GMA + FIRST.lrca | 0x19)
    assert (rig.get(DATA), rig.state()) == (1, "idle")


def test_one_context_becomes_active_and_completes(rig: Rig) -> None:
    rig.run(*store(DATA, 1))
    assert rig.events() == [(A, IDLE_ACTIVE), (A, COMPLETE | ACTIVE_IDLE)]
    assert rig.interrupts() == 2
    assert rig.head() == rig.tail()


def test_the_first_entry_after_power_on_is_number_0(rig: Rig) -> None:
    """gt/intel_execlists_submission.c, reset_csb_pointers: after a reset the hardware begins with entry 0."""
    rig.run(*store(DATA, 1))
    page = rig.status_page("bcs0")
    assert rig.get64(page + 0x40) == A << 32 | IDLE_ACTIVE
    assert rig.get(page + 0x7C) == 1
    assert rig.read(E + registers.RING_CSB_PTR) & 7 == 1
    assert (rig.read(E + 0x370), rig.read(E + 0x374)) == (IDLE_ACTIVE, A)


def test_two_contexts_run_one_after_the_other(rig: Rig) -> None:
    rig.lay_out(FIRST, *store(DATA, 1))
    rig.lay_out(SECOND, *store(DATA + 4, 2))
    rig.submit(FIRST, SECOND)
    assert (rig.get(DATA), rig.get(DATA + 4)) == (1, 2)
    assert rig.events() == [(A, IDLE_ACTIVE), (A, COMPLETE | ELEMENT_SWITCH), (B, COMPLETE | ACTIVE_IDLE)]


def test_the_status_buffer_goes_round(rig: Rig) -> None:
    for _ in range(5):
        rig.run(*store(DATA, 1))
    assert rig.events() == [(A, IDLE_ACTIVE), (A, COMPLETE | ACTIVE_IDLE)] * 3


@pytest.mark.parametrize("value", [0x0505_0505, 0xFFFF_0505])
def test_the_driver_sets_the_status_pointers(rig: Rig, value: int) -> None:
    rig.run(*store(DATA, 1))
    rig.write(E + registers.RING_CSB_PTR, value if value >> 16 == 0xFFFF else 0x0F0F_0505)
    assert rig.read(E + registers.RING_CSB_PTR) == 0x505


def test_an_engine_without_a_status_page_hangs_and_says_so(rig: Rig) -> None:
    rig.write(E + registers.RING_HWS_PGA, 0x8000_0000)
    rig.run(*store(DATA, 1))
    assert "GGTT fault" in rig.gpu.engines["bcs0"].hung


def test_a_context_whose_image_is_nowhere_hangs_the_engine(rig: Rig) -> None:
    for value in (0, 0, A, 0x8000_0019):
        rig.write(E + 0x230, value)
    assert rig.state() == "hung"


def test_an_empty_list_does_nothing_to_an_idle_engine(rig: Rig) -> None:
    rig.submit()
    assert (rig.state(), rig.events()) == ("idle", [])


def test_engines_do_not_know_each_other(rig: Rig) -> None:
    rig.lay_out(FIRST, *wait(), engine="rcs0")
    rig.submit(FIRST, engine="rcs0")
    rig.lay_out(SECOND, *store(DATA, 1), engine="vecs0")
    rig.submit(SECOND, engine="vecs0")
    assert (rig.state("rcs0"), rig.state("vecs0"), rig.get(DATA)) == ("blocked", "idle", 1)
    assert rig.events("bcs0") == []


@pytest.mark.parametrize(
    ("operation", "memory", "passes"),
    [(0, 4, False), (0, 6, True), (1, 5, True), (1, 4, False), (2, 4, True), (2, 5, False), (3, 5, True), (3, 6, False),
     (4, 5, True), (4, 6, False), (5, 6, True), (5, 5, False)],
)  # fmt: skip
def test_a_semaphore_compares_memory_with_its_dword(rig: Rig, operation: int, memory: int, passes: bool) -> None:
    rig.put(FLAG, memory)
    rig.run(0x1C << 23 | operation << 12 | 2, 5, FLAG, 0)
    assert rig.state() == ("idle" if passes else "blocked")


def test_a_semaphore_is_passed_when_memory_changes(rig: Rig) -> None:
    rig.batch(*store(DATA, 1), *wait(7), *store(DATA + 4, 2))
    assert (rig.state(), rig.get(DATA), rig.get(DATA + 4)) == ("blocked", 1, 0)
    wait_first = rig.gpu.wait()
    assert wait_first == pytest.approx(0.001)
    rig.time.seconds = 100.0
    rig.gpu.advance()
    assert rig.gpu.wait() == pytest.approx(0.005)  # whoever waits for long is looked after less often
    rig.put(FLAG, 7)
    rig.gpu.advance()
    assert (rig.state(), rig.get(DATA + 4)) == ("idle", 2)
    assert rig.gpu.wait() is None
    assert len(rig.entries("MI_SEMAPHORE_WAIT")) == 1  # one entry, however often it was looked at
    assert rig.entries("MI_SEMAPHORE_WAIT")[0].reads[0][1] == 7


def test_a_semaphore_through_the_ggtt(rig: Rig) -> None:
    rig.run(WAIT_GE | 1 << 22, 1, GMA + FLAG, 0)
    assert rig.state() == "blocked"
    rig.put(FLAG, 1)
    rig.gpu.advance()
    assert rig.state() == "idle"


def test_one_engine_passes_another_one_s_semaphore(rig: Rig) -> None:
    rig.lay_out(FIRST, *wait(), *store(DATA, 1), engine="rcs0")
    rig.submit(FIRST, engine="rcs0")
    rig.lay_out(SECOND, *store(FLAG, 1))
    rig.submit(SECOND)
    rig.gpu.advance()
    assert (rig.state("rcs0"), rig.get(DATA)) == ("idle", 1)


def test_a_blocked_context_is_preempted_and_comes_back_where_it_was(rig: Rig) -> None:
    rig.put(BATCH, *store(DATA, 1), *wait(), *store(DATA + 4, 2), END)
    rig.lay_out(FIRST, PPGTT_BATCH, BATCH, 0, 0, *store(DATA + 8, 3))
    rig.submit(FIRST)
    rig.lay_out(SECOND, *store(DATA + 12, 4))
    rig.submit(SECOND)
    assert rig.events() == [(A, IDLE_ACTIVE), (A, PREEMPTED), (B, COMPLETE | ACTIVE_IDLE)]
    assert (rig.get(DATA), rig.get(DATA + 4), rig.get(DATA + 12)) == (1, 0, 4)
    rig.put(DATA, 0)
    rig.put(FLAG, 1)
    rig.submit(FIRST)
    assert [rig.get(DATA + 4 * each) for each in range(3)] == [0, 2, 3]  # the first store is not done again
    assert rig.head() == rig.tail()


def test_the_position_in_two_levels_of_batches_is_kept_in_the_image(rig: Rig) -> None:
    inner = BATCH + 0x1000
    rig.put(BATCH, SECOND_LEVEL, inner, 0, *store(DATA + 4, 2), END)
    rig.put(inner, *wait(), *store(DATA, 1), END)
    rig.run(PPGTT_BATCH, BATCH, 0, 0)
    rig.lay_out(SECOND)
    rig.submit(SECOND)
    state = FIRST.state
    assert [rig.get(state + 4 * each) for each in (0x0D, 0x0F, 0x11)] == [0, BATCH + 12 | 1, 1 << 5]
    assert [rig.get(state + 4 * each) for each in (0x13, 0x15, 0x17)] == [0, inner | 1, 1 << 5]
    rig.put(FLAG, 1)
    rig.submit(FIRST)
    assert (rig.get(DATA), rig.get(DATA + 4), rig.state()) == (1, 2, "idle")
    assert [rig.get(state + 4 * each) for each in (0x0F, 0x15)] == [0, 0]


def test_a_context_that_inhibits_its_restore_begins_without_the_batch(rig: Rig) -> None:
    """The driver makes a new state for a context that it takes back after a reset: lrc_reset."""
    rig.lay_out(FIRST, *store(DATA, 1), control=0x0009_0009 | 1)
    rig.put(FIRST.state + 4 * 0x0F, BATCH | 1)
    rig.put(BATCH, *store(DATA + 4, 2), END)
    rig.submit(FIRST)
    assert (rig.get(DATA), rig.get(DATA + 4)) == (1, 0)
    assert rig.get(FIRST.state + 4 * 3) & 1 == 0  # what is saved can be restored


def test_the_same_context_again_is_a_lite_restore_with_a_new_tail(rig: Rig) -> None:
    rig.run(*wait(), *store(DATA, 1))
    rig.append(FIRST, *store(DATA + 4, 2))
    rig.lay_out(SECOND, *store(DATA + 8, 3))
    rig.submit(FIRST, SECOND)
    assert rig.events() == [(A, IDLE_ACTIVE), (A, PREEMPTED | LITE_RESTORE)]
    assert rig.gpu.engines["bcs0"].ports == [GMA + FIRST.lrca, GMA + SECOND.lrca]
    rig.put(FLAG, 1)
    rig.gpu.advance()
    assert [rig.get(DATA + 4 * each) for each in range(3)] == [1, 2, 3]
    assert rig.events()[2:] == [(A, COMPLETE | ELEMENT_SWITCH), (B, COMPLETE | ACTIVE_IDLE)]


def test_what_waits_in_the_second_port_is_replaced(rig: Rig) -> None:
    rig.lay_out(FIRST, *wait())
    rig.lay_out(SECOND, *store(DATA, 1))
    rig.lay_out(THIRD, *store(DATA + 4, 2))
    rig.submit(FIRST, SECOND)
    rig.submit(FIRST, THIRD)
    rig.put(FLAG, 1)
    rig.gpu.advance()
    assert (rig.get(DATA), rig.get(DATA + 4)) == (0, 2)


def test_many_preemptions_take_no_memory(rig: Rig) -> None:
    rig.lay_out(FIRST, *wait())
    rig.lay_out(SECOND, *wait())
    for _ in range(100):
        rig.submit(FIRST)
        rig.submit(SECOND)
    assert rig.gpu.engines["bcs0"].ports == [GMA + SECOND.lrca]
    rig.put(FLAG, 1)
    rig.gpu.advance()
    assert rig.state() == "idle"


def test_a_context_s_time_is_added_up_in_its_image(rig: Rig) -> None:
    rig.put(FIRST.state + 4 * 0x23, 5)
    rig.run(*wait())
    rig.put(FIRST.state + 4 * 0x23, 5)
    rig.time.seconds += 0.5
    rig.put(FLAG, 1)
    rig.gpu.advance()
    assert rig.get(FIRST.state + 4 * 0x23) == 5 + TICKS_PER_SECOND // 2


def test_an_endless_batch_is_executed_in_slices_and_then_hangs(rig: Rig) -> None:
    rig.put(BATCH, PPGTT_BATCH, BATCH, 0)
    rig.run(PPGTT_BATCH, BATCH, 0, 0)
    engine = rig.gpu.engines["bcs0"]
    assert (rig.state(), engine.executed, rig.gpu.wait()) == ("running", SLICE, 0.0)
    for _ in range(10):
        rig.gpu.advance()
    assert "more than 10000 commands" in engine.hung
    assert engine.executed == 10_000
    assert rig.gpu.wait() is None


def test_large_blits_are_interrupted_sooner(rig: Rig) -> None:
    fill = (2 << 29 | 0x50 << 22 | 5, 0xF0 << 16 | 8, 0, 300 << 16 | 8, DATA, 0, 1)
    rig.batch(*fill * 8)
    assert rig.state() == "running"
    assert len(rig.entries("XY_COLOR_BLT")) == 4
    for _ in range(2):
        rig.gpu.advance()
    assert rig.state() == "idle"


def test_an_endless_batch_is_preempted_between_two_slices(rig: Rig) -> None:
    rig.put(BATCH, PPGTT_BATCH, BATCH, 0)
    rig.run(PPGTT_BATCH, BATCH, 0, 0)
    rig.lay_out(SECOND, *store(DATA, 1))
    rig.submit(SECOND)
    assert (rig.get(DATA), rig.state()) == (1, "idle")


def test_the_ring_registers_show_where_the_engine_is(rig: Rig) -> None:
    rig.batch(*wait())
    names = (registers.RING_START, registers.RING_TAIL, registers.RING_HEAD, registers.RING_ACTHD)
    assert [rig.read(E + offset) for offset in names] == [GMA + FIRST.ring, rig.tail(), 12, BATCH]
    assert rig.read(E + registers.RING_IPEHR) == WAIT_GE


def test_an_idle_engine_says_so_and_so_does_a_stopped_one(rig: Rig) -> None:
    mode = E + registers.RING_MI_MODE
    assert rig.read(mode) == 1 << 9
    rig.run(*wait())
    assert rig.read(mode) == 0
    rig.write(mode, 1 << 24 | 1 << 8)
    assert rig.read(mode) == 1 << 9 | 1 << 8
    rig.put(FLAG, 1)
    assert rig.gpu.wait() is None
    rig.gpu.advance()
    assert rig.head() == 0
    rig.write(mode, 1 << 24)
    assert rig.state() == "idle"


@pytest.mark.parametrize("bit", [1 << 0, 1 << 3])
def test_a_reset_frees_an_engine(rig: Rig, bit: int) -> None:
    rig.run(5 << 29)
    assert rig.state() == "hung"
    rig.submit(FIRST)  # does nothing, as the engine hangs
    rig.write(E + registers.RING_RESET_CTL, 1 << 16 | 1)
    assert rig.read(E + registers.RING_RESET_CTL) == 3  # ready
    rig.write(registers.GDRST, bit)
    assert rig.read(registers.GDRST) == 0
    assert rig.state() == "idle"
    assert rig.read(E + registers.RING_RESET_CTL) == 0
    assert rig.read(E + registers.RING_CSB_PTR) == 0x505
    rig.run(*store(DATA, 1))
    assert rig.get(DATA) == 1


def test_a_reset_of_one_engine_leaves_the_others(rig: Rig) -> None:
    rig.lay_out(FIRST, *wait(), engine="rcs0")
    rig.submit(FIRST, engine="rcs0")
    rig.lay_out(SECOND, *wait())
    rig.submit(SECOND)
    rig.write(registers.GDRST, 1 << 3)
    assert (rig.state("rcs0"), rig.state("bcs0")) == ("blocked", "idle")


def test_a_reset_within_the_four_writes_forgets_them(rig: Rig) -> None:
    rig.lay_out(FIRST, *store(DATA, 1))
    rig.write(E + 0x230, 0)
    rig.write(registers.GDRST, 1 << 3)
    rig.submit(FIRST)
    assert rig.get(DATA) == 1


def test_an_engine_that_is_told_to_hang_does_until_it_is_reset(rig: Rig) -> None:
    rig.gpu.misbehaviour.hang.add("bcs0")
    rig.run(*store(DATA, 1))
    assert (rig.state(), rig.get(DATA)) == ("hung", 0)
    rig.write(registers.GDRST, 1 << 3)
    rig.submit(FIRST)
    assert (rig.state(), rig.get(DATA)) == ("idle", 1)


def test_a_completion_is_delayed_and_work_can_be_added_meanwhile(rig: Rig) -> None:
    rig.gpu.misbehaviour.delay["bcs0"] = 0.5
    rig.run(*store(DATA, 1))
    assert (rig.get(DATA), rig.state(), rig.gpu.wait()) == (1, "completing", 0.5)
    rig.time.seconds = 0.25
    rig.append(FIRST, *store(DATA + 4, 2))
    rig.submit(FIRST)
    assert (rig.get(DATA + 4), rig.gpu.wait()) == (2, 0.5)
    rig.time.seconds = 0.76
    rig.gpu.advance()
    assert rig.events() == [(A, IDLE_ACTIVE), (A, PREEMPTED | LITE_RESTORE), (A, COMPLETE | ACTIVE_IDLE)]


@pytest.mark.parametrize(("space", "start"), [("ppgtt", DATA), ("dma", 0x1000_0000 + DATA)])
def test_an_address_is_told_to_fault(rig: Rig, space: str, start: int) -> None:
    rig.gpu.misbehaviour.add_faults([(space, start, start + 4)])
    rig.run(*store(DATA + 4, 1), *store(DATA, 2))
    assert (rig.state(), rig.get(DATA + 4), rig.get(DATA)) == ("hung", 1, 0)
    rig.gpu.misbehaviour.clear()
    rig.write(registers.GDRST, 1)
    rig.submit(FIRST)
    assert rig.get(DATA) == 2


def test_a_fault_in_the_ggtt_hits_what_the_engine_itself_does(rig: Rig) -> None:
    rig.gpu.misbehaviour.add_faults([("ggtt", GMA + FIRST.state, GMA + FIRST.state + 4096)])
    rig.run(*store(DATA, 1))
    assert "told to fault" in rig.gpu.engines["bcs0"].hung


def test_a_device_reset_ends_all_work(rig: Rig) -> None:
    rig.run(*wait())
    rig.gpu.reset()
    assert (rig.state(), rig.gpu.wait(), rig.read(E + registers.RING_HWS_PGA)) == ("idle", None, 0)
    assert rig.gpu.mmio.ggtt[GMA // 4096] == 0


def test_the_record_keeps_the_last_entries_and_their_numbers(rig: Rig) -> None:
    small = type(rig.gpu.record)(kept=3)
    for number in range(5):
        small.add("rcs0", 0, f"{number}", 0)
    assert [(entry.number, entry.name) for entry in small.since(0)] == [(3, "2"), (4, "3"), (5, "4")]
    assert [entry.number for entry in small.since(4)] == [5]
    assert (small.first, small.last, list(small.since(5)), list(small.since(99))) == (3, 5, [], [])


def test_the_record_keeps_the_first_accesses_of_a_command_and_counts_all(rig: Rig) -> None:
    rig.batch(2 << 29 | 0x50 << 22 | 5, 0xF0 << 16 | 8, 0, 100 << 16 | 8, DATA, 0, 1)
    (entry,) = rig.entries("XY_COLOR_BLT")
    assert (len(entry.writes), entry.accesses) == (8, 100)
