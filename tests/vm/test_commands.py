# SPDX-License-Identifier: MIT
"""The sample driver's engines: what each GPU command does, what is refused, and how the queue behaves."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

import pytest

from tools.lab import waiting
from tools.lab.sample import gpu
from tools.lab.vfio.raw import DIRTY_START, DIRTY_STOP

if TYPE_CHECKING:
    from tools.lab.sample.guest import Guest

PAGE = 4096
GPR = gpu.RING_BASE[gpu.RCS] + gpu.RING_GPR


@pytest.fixture
def engine(guest: Guest) -> gpu.Engine:
    return gpu.Engine(guest)


# --- what each command does


def test_store_commands_write_guest_memory_and_nothing_around_it(guest: Guest, engine: gpu.Engine) -> None:
    gma, iova = guest.bind()
    expected = bytearray(b"\xa5" * PAGE)
    guest.memory.write(iova, bytes(expected))
    assert engine.run(
        gpu.NOOP,
        gpu.ARB_CHECK,
        gpu.store_dword(gma + 0x10, 0x11223344),
        gpu.store_qword(gma + 0x20, 0x5566778899AABBCC),
        gpu.flush_dword(gma + 0x30, 0x0D0E0F10),
        gpu.flush_qword(gma + 0x40, 0x0123456789ABCDEF),
        gpu.pipe_control(gma + 0x50, 0xFEDCBA9876543210),
        gpu.load_register(GPR, 0xCAFE),
        gpu.store_register_mem(GPR, gma + 0x60),
    )[1], guest.instance.last_error()
    for offset, size, value in (
        (0x10, 4, 0x11223344),
        (0x20, 8, 0x5566778899AABBCC),
        (0x40, 8, 0x0123456789ABCDEF),
        (0x50, 8, 0xFEDCBA9876543210),
        (0x60, 4, 0xCAFE),
    ):
        expected[offset : offset + size] = value.to_bytes(size, "little")
    # the short form of MI_FLUSH_DW writes a dword, or a qword with its upper half zero
    got = guest.memory.read(iova, PAGE)
    assert got[0x30:0x34] == 0x0D0E0F10.to_bytes(4, "little")
    assert got[0x34:0x38] in {bytes(4), b"\xa5" * 4}
    expected[0x30:0x38] = got[0x30:0x38]
    assert got == expected
    assert guest.device.reg(GPR) == 0xCAFE


def test_load_register_mem_reads_guest_memory(guest: Guest, engine: gpu.Engine) -> None:
    gma, iova = guest.bind()
    guest.memory.set_u32(iova + 8, 0x900DDA7A)
    assert engine.run(gpu.load_register_mem(GPR + 8, gma + 8))[1], guest.instance.last_error()
    assert guest.device.reg(GPR + 8) == 0x900DDA7A


def test_a_batch_runs_and_returns_to_the_ring(guest: Guest, engine: gpu.Engine) -> None:
    gma, iova = guest.bind(high=True)
    batch_gma, batch_iova = guest.bind()
    words = [*gpu.store_dword(gma, 1), gpu.BATCH_END, *gpu.store_dword(gma + 8, 0xBAD)]
    guest.memory.write(batch_iova, b"".join(word.to_bytes(4, "little") for word in words))
    assert engine.run(gpu.batch_start(batch_gma), gpu.store_dword(gma + 4, 2))[1], guest.instance.last_error()
    assert guest.memory.read(iova, 12) == bytes.fromhex("01000000 02000000 00000000")


def test_a_store_may_reach_over_a_page_border(guest: Guest, engine: gpu.Engine) -> None:
    gma, iova = guest.bind(2)
    assert engine.run(gpu.store_dwords(gma + PAGE - 4, 0x55667788, 0x11223344))[1], guest.instance.last_error()
    assert guest.memory.u64(iova + PAGE - 4) == 0x1122334455667788


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_every_engine_executes(guest: Guest, ring: int) -> None:
    gma, iova = guest.bind()
    assert gpu.Engine(guest, ring).run(gpu.flush_qword(gma, 0x77))[1], guest.instance.last_error()
    assert guest.memory.u64(iova) == 0x77


def test_completion_shows_in_the_context_the_head_register_and_the_status_page(
    guest: Guest, engine: gpu.Engine
) -> None:
    gma, _ = guest.bind()
    status = guest.memory.read(engine.status_iova, PAGE)
    context, completed = engine.run(gpu.store_dword(gma, 1))
    assert completed
    assert guest.memory.u32(context.image + gpu.CTX_HEAD) == 16
    assert guest.device.reg(engine.base + gpu.RING_HEAD) == 16
    after = guest.memory.read(engine.status_iova, PAGE)
    changed = {at for at in range(0, PAGE, 4) if status[at : at + 4] != after[at : at + 4]}
    assert changed
    assert changed <= set(range(0x40, 0x80, 4))
    entries = guest.device.read(0, engine.base + gpu.RING_CSB, 48)
    assert context.high in memoryview(entries).cast("I").tolist()  # the context's id in an entry's upper half
    assert {engine.status_iova, context.image + PAGE} <= guest.device.dirty(guest.memory)


def test_type1_and_the_driver_agree_on_what_is_dirty(guest: Guest, engine: gpu.Engine) -> None:
    guest.container.dirty_tracking(DIRTY_START)
    gma, iova = guest.bind()
    unbound = guest.page()
    assert engine.run(gpu.store_dword(gma, 5))[1]
    theirs = guest.container.dirty_pages(guest.memory)
    ours = guest.device.dirty(guest.memory)
    assert iova in ours
    assert unbound not in ours
    assert theirs == ours == set(guest.instance.pinned())
    guest.container.dirty_tracking(DIRTY_STOP)


# --- what is refused

REFUSED: dict[str, list[int]] = {
    "an unknown MI command": [0x1E << 23],
    "a semaphore wait": [0x0E400002, 0, 0, 0],
    "a 2D command": [0x50000000],
    "a 3D command other than PIPE_CONTROL": [0x78000000],
    "an address below both windows' end": gpu.store_dword(0x04000000, 1),
    "an address in nobody's memory": gpu.store_dword(0xC0000000, 1),
    "an address above 4 GiB": [0x10400002, 0x10000, 1, 1],
    "a store that leaves its window": gpu.store_dwords(0x03FFFFFC, 1, 2),
    "a load from outside": gpu.load_register_mem(GPR, 0x04000000),
    "a register store to outside": gpu.store_register_mem(GPR, 0x04000000),
    "a flush write to outside": gpu.flush_dword(0x04000000, 1),
    "a post-sync write to outside": gpu.pipe_control(0x04000000, 1),
    "a qword store to half a qword": gpu.store_qword(0x10004, 1),
    "a PPGTT store": [0x10000002, 0x10000, 0, 1],
    "a PPGTT batch": [0x18800101, 0x10000, 0],
    "a batch outside": gpu.batch_start(0x04000000),
    "a register beyond 2 MiB": gpu.load_register(0x00200000, 1),
    "the ELSP register": gpu.load_register(0x2230, 1),
    "a register of PVINFO": gpu.load_register(0x78048, 1),
    "a fence": gpu.load_register(0x100000, 1),
    "a qword store of three dwords": [0x10600004, 0x10000, 0, 1, 2, 3],
    "a command that ends behind the ring": [0x10400002, 0x10000],
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_command_fails_the_workload_before_it_begins(guest: Guest, engine: gpu.Engine, what: str) -> None:
    gma, iova = guest.bind()
    before = guest.instance.counters()
    image_before = guest.device.read(0, 0x100000, 0x100)
    assert not engine.run(gpu.store_dword(gma, 0xBAD), REFUSED[what])[1]
    counters = guest.instance.counters()
    assert counters["workloads_failed"] == before["workloads_failed"] + 1
    assert counters["workloads_completed"] == before["workloads_completed"]
    assert guest.memory.u32(iova) == 0
    assert guest.instance.last_error()
    assert guest.device.read(0, 0x100000, 0x100) == image_before
    assert engine.run(gpu.store_dword(gma, 0x600D))[1]  # the vGPU goes on
    assert guest.memory.u32(iova) == 0x600D


def test_a_batch_that_chains_to_itself_or_never_ends_fails(guest: Guest, engine: gpu.Engine) -> None:
    loop_gma, loop_iova = guest.bind()
    guest.memory.write(loop_iova, b"".join(word.to_bytes(4, "little") for word in gpu.batch_start(loop_gma)))
    endless_gma, _ = guest.bind()  # a page of NOOPs with nothing behind it
    for gma in (loop_gma, endless_gma):
        assert not engine.run(gpu.batch_start(gma))[1]
        assert guest.instance.last_error()


def test_a_store_to_an_entry_that_is_not_present_fails(engine: gpu.Engine) -> None:
    assert not engine.run(gpu.store_dword(0x00200000, 1))[1]


def test_a_context_that_makes_no_sense_fails(guest: Guest, engine: gpu.Engine) -> None:
    before = guest.instance.counters()
    for number, (offset, value) in enumerate(
        ((gpu.CTX_START, 0x00200000), (gpu.CTX_START, 0x04000000), (gpu.CTX_HEAD, 0x1FFFFC), (gpu.CTX_TAIL, 0x1FFFF8)),
        1,
    ):
        context = engine.context(gpu.NOOP)
        guest.memory.set_u32(context.image + offset, value)
        engine.submit(context)
        gpu.wait_ended(guest, before, number)
    engine.elsp(0, 0, 9, 0x00300000 | gpu.DESC_FLAGS)  # no context there
    gpu.wait_ended(guest, before, 5)
    assert guest.instance.counters()["workloads_failed"] == before["workloads_failed"] + 5


@pytest.mark.parametrize(
    "words",
    [(0, 0, 0, 0), (1, 0x10109, 0, 0), (0, 0, 1, 0x10008 | 1), (0, 0, 1, 0x10100 | 1), (0, 0, 1, 0x10108)],
    ids=["none", "element 1 alone", "unprivileged", "addressing mode 0", "not valid"],
)
def test_a_bad_pair_of_descriptors_fails_the_fourth_write(
    guest: Guest, engine: gpu.Engine, words: tuple[int, int, int, int]
) -> None:
    guest.device.stop()
    engine.elsp(*words[:3])
    with pytest.raises(OSError) as caught:
        engine.elsp(words[3])
    assert caught.value.errno in {errno.EFAULT, errno.EINVAL}
    assert guest.instance.queue() == []
    engine.submit(engine.context(gpu.NOOP))  # the count of words has begun anew
    assert len(guest.instance.queue()) == 1


# --- queue


def test_workloads_run_in_the_order_of_their_submission(guest: Guest, engine: gpu.Engine) -> None:
    gma, iova = guest.bind()
    before = guest.instance.counters()
    guest.device.stop()
    contexts = [
        engine.context(gpu.store_register_mem(GPR, gma + 4 * number), gpu.load_register(GPR, number + 1))
        for number in range(4)
    ]
    engine.submit(contexts[0], contexts[1])
    engine.submit(contexts[2])
    engine.submit(contexts[3])
    assert [row[1:] for row in guest.instance.queue()] == [one.descriptor for one in contexts]
    guest.device.start()
    gpu.wait_ended(guest, before, 4)
    assert memoryview(guest.memory.read(iova, 16)).cast("I").tolist() == [0, 1, 2, 3]


def test_the_queue_has_an_end(guest: Guest, engine: gpu.Engine) -> None:
    before = guest.instance.counters()
    guest.device.stop()
    context = engine.context(gpu.NOOP)
    for _ in range(256):
        engine.submit(context)
    assert len(guest.instance.queue()) == 256
    with pytest.raises(OSError):
        engine.submit(context)
    assert len(guest.instance.queue()) == 256
    assert len(guest.device.save()) == 0x4E1248 + 24 * 256
    guest.device.reset()
    assert guest.instance.queue() == []
    guest.device.start()
    assert gpu.ended(guest.instance.counters()) == gpu.ended(before)


def test_stop_waits_for_the_running_workload_and_keeps_the_others(guest: Guest, engine: gpu.Engine) -> None:
    gma, iova = guest.bind()
    contexts = [engine.context(gpu.store_dword(gma + 4 * number, 1)) for number in range(3)]
    before = guest.instance.counters()
    guest.instance.set_exec_delay(300)
    for context in contexts:
        engine.submit(context)
    waiting.wait_until("the first workload at work", lambda: len(guest.instance.queue()) == 2)
    assert guest.memory.read(iova, 12) == bytes(12)
    begin = time.monotonic()
    guest.device.stop()
    assert time.monotonic() - begin > 0.05
    assert guest.memory.read(iova, 12) == bytes.fromhex("01000000 00000000 00000000")
    assert [row[1:] for row in guest.instance.queue()] == [one.descriptor for one in contexts[1:]]
    assert guest.instance.counters()["workloads_completed"] == before["workloads_completed"] + 1
    time.sleep(0.5)
    assert guest.memory.read(iova, 12) == bytes.fromhex("01000000 00000000 00000000")
    guest.instance.set_exec_delay(0)
    guest.device.start()
    gpu.wait_ended(guest, before, 3)
    assert guest.memory.read(iova, 12) == bytes.fromhex("01000000 01000000 01000000")


def test_an_engine_reset_drops_the_work_of_that_engine(guest: Guest, engine: gpu.Engine) -> None:
    blitter = gpu.Engine(guest, gpu.BCS)
    guest.device.stop()
    kept = blitter.context(gpu.NOOP)
    engine.submit(engine.context(gpu.NOOP))
    blitter.submit(kept)
    guest.device.set_reg(gpu.RESET_REGISTER, 1 << 1)
    assert guest.instance.queue() == [(gpu.BCS, *kept.descriptor)]
