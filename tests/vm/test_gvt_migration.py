# SPDX-License-Identifier: MIT
"""The whole job on the real driver: the installed ``vfio-mig`` moves vGPUs of our kvmgt that other processes hold.

A guest's work can be played only in the process that mapped its memory, as kvmgt reads that memory from there. So this
process plays it on a vGPU of its own, and what was queued there is brought to the vGPUs of real holders.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.gvt import kvmgt
from tools.lab.gvt.held import Side, side
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES, RESULT, SEMAPHORE, TARGET, Vgpu
from tools.lab.gvt.rfc import (
    BATCH_VALUE,
    BCS,
    HALF_PTE,
    MODULES,
    QUEUED,
    RCS,
    dma,
    load_ours,
    load_stock,
    patched,
    queue_work,
    result_of,
    sealed,
    stored,
    view,
    work_done,
)
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from tools.gpu.control import Control

    MakeSide = Callable[[str], "Side"]

pytestmark = pytest.mark.gvt

STATE_BYTES: Final = 0x4E1248  # of a _8 with nothing queued: HEAD, five records of fixed size, two empty ones

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours()
    yield
    load_stock()


@pytest.fixture
def shm(resources: contextlib.ExitStack) -> Path:
    """Have a directory for what processes share."""
    return Path(resources.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))


@pytest.fixture
def make_side(resources: contextlib.ExitStack, shm: Path) -> MakeSide:
    """Make vGPUs that a process each holds, with memory of their own."""

    return lambda label: resources.enter_context(side(shm / label))


@pytest.fixture
def player(resources: contextlib.ExitStack, shm: Path) -> Vgpu:
    """Have a vGPU of this process, which is its guest's driver."""
    name = resources.enter_context(kvmgt.instance())
    return resources.enter_context(Vgpu.opened(name, shm / "player"))


def vfio_mig(*words: str | Path, rc: int = 0) -> Any:
    """Run the command in a fork of this process; its JSON."""
    return json.loads(cli.run("--json", *words, rc=rc, warm=True).stdout)


def hand_over(player: Vgpu, to: Side, image: Path) -> bytes:
    """Bring the player's state and memory into a held vGPU, by the command; what the guest sees of it."""
    queue_work(player, wait=True)
    player.device.set_fence(0, 0x0010_0001, 0x001F_F003)
    seen = view(player.device)
    vfio_mig("save", player.name, image)
    to.memory.bytes[:] = player.memory.bytes[:]
    vfio_mig("restore", to.name, image)
    assert view(to.device) == seen
    return seen


def test_the_command_knows_the_protocol_and_the_holder_s_vm(make_side: MakeSide) -> None:
    one = make_side("A")
    told = vfio_mig("info", one.name)
    assert (told["protocol"], told["migratable"]) == ("gvt-rfc", True)
    text = cli.run("info", one.name, warm=True).stdout.decode()
    assert "NO " not in text
    assert one.name in cli.run("list", warm=True).stdout.decode()


def test_a_user_s_own_hold_with_a_kvm_is_stopped_started_saved_and_reset(shm: Path) -> None:
    """With processes of their own, as a user starts them."""
    (shm / "A").write_bytes(bytes(MEMORY_PAGES * PAGE))
    with (
        kvmgt.instance() as name,
        cli.hold_started(name, "--kvm", "--memory", f"{shm / 'A'}@{MEMORY:#x}") as holder,
    ):
        status = cli.run("status", name).stdout.decode()
        assert f"PID {holder.pid} " in status
        assert "protocol: gvt-rfc" in status
        cli.run("stop", name, warm=True)
        saved = json.loads(cli.run("--json", "save", name, shm / "image").stdout)
        assert saved["state_bytes"] == STATE_BYTES
        cli.run("verify", shm / "image", warm=True)
        cli.run("check", shm / "image", name, warm=True)
        cli.run("start", name, warm=True)
        cli.run("reset", name, warm=True)


def test_a_vgpu_at_work_moves_to_one_with_other_host_addresses(
    player: Vgpu, make_side: MakeSide, gpu: Control, shm: Path
) -> None:
    a, b = make_side("A"), make_side("B")
    assert a.device.guest_high() != b.device.guest_high()  # at first the guest's is the host's
    b_high = b.device.guest_high()
    seen = hand_over(player, a, shm / "player.vfm")

    # it runs until its guest's work waits for its guest
    vfio_mig("start", a.name)
    time.sleep(1)
    assert [a.u32(result_of(engine, 0)) for engine in QUEUED] == [0, 0]
    stop = cli.Forked("stop", a.name)
    time.sleep(2)
    assert stop.runs()
    a.memory.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
    assert stop.wait().returncode == 0
    # the first of each pair has ended, the second one waits
    for engine, values in QUEUED.items():
        a.await_u32(result_of(engine, 0), values[0])
        assert a.u32(result_of(engine, 1)) == 0
    assert a.u32(TARGET) == BATCH_VALUE
    changed = view(a.device)
    assert changed != seen

    dirty = {at for start, size in vfio_mig("dirty", a.name, "--memory", a.memory_option, "--list")["ranges"]
             for at in range(start, start + size, PAGE)}  # fmt: skip
    assert dirty == a.device.dirty(a.memory)
    assert {MEMORY + RESULT, MEMORY + TARGET} <= dirty
    saved = vfio_mig("save", a.name, shm / "a.vfm", "--memory", a.memory_option)
    assert saved["pages_dirty"] == len(dirty)

    b.memory.bytes[:] = a.memory.bytes[:]  # with the pages that the guest wrote: page tables are never dirty
    since, untouched = gpu.last(), a.memory.bytes[:]
    vfio_mig("restore", b.name, shm / "a.vfm", "--memory", b.memory_option)
    assert view(b.device) == changed
    assert b.device.guest_high() == a.device.guest_high()
    assert not work_done(gpu, since)

    vfio_mig("start", b.name)
    for engine, values in QUEUED.items():
        b.await_u32(result_of(engine, 1), values[1])
        assert stored(gpu, since)[values[1]] == b.at(result_of(engine, 1))
        assert values[0] not in stored(gpu, since)
    assert a.memory.bytes[:] == untouched
    # the guest goes on: the other half of its entry, and one of its hidden part, which this host has elsewhere
    b.device.set_reg(raw.GTT + (HALF_PTE >> 12) * 8 + 4, 0)
    b.device.set_pte(b.device.guest_high(), MEMORY + TARGET | 1)
    assert dma(gpu, b_high) == b.at(TARGET)
    # and the source, which is not to run again, still can
    vfio_mig("start", a.name)
    a.await_u32(result_of(BCS, 1), QUEUED[BCS][1])


def test_pages_are_synced_while_it_runs_and_the_rest_when_it_is_stopped(
    player: Vgpu, make_side: MakeSide, shm: Path
) -> None:
    a = make_side("A")
    hand_over(player, a, shm / "player.vfm")
    a.memory.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
    vfio_mig("start", a.name)
    for engine, values in QUEUED.items():
        a.await_u32(result_of(engine, 1), values[1])
    copy = shm / "copy"
    synced = vfio_mig("sync", a.name, copy, "--memory", a.memory_option, "--rounds", "2")
    assert synced["state"] == "stop"
    assert synced["pages_dirty"] >= len(a.device.dirty(a.memory))
    for page in a.device.dirty(a.memory):
        with copy.open("rb") as file:
            file.seek(page)
            assert file.read(PAGE) == a.memory.read(page, PAGE)


def test_one_command_migrates_it(player: Vgpu, make_side: MakeSide, shm: Path) -> None:
    a, b = make_side("A"), make_side("B")
    hand_over(player, a, shm / "player.vfm")
    a.memory.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
    b.memory.bytes[:] = a.memory.bytes[:]
    told = cli.run("migrate", a.name, b.name, warm=True).stderr.decode()
    assert "guest memory: it has the state's 1 page table and 4 queued workloads, and no page comes along" in told
    for engine, values in QUEUED.items():
        for number, value in enumerate(values):
            b.await_u32(result_of(engine, number), value)
            assert a.u32(result_of(engine, number)) == 0


def test_the_queue_is_lost_without_the_guest_s_memory_and_the_driver_says_so(
    player: Vgpu, make_side: MakeSide, shm: Path
) -> None:
    a = make_side("A")
    queue_work(player)
    vfio_mig("save", player.name, shm / "image")
    own = a.device.save()
    # the contexts are not there: what would be made of them is nobody's work
    told = cli.run("restore", a.name, shm / "image", rc=None, warm=True)
    a.device.stop()
    if told.returncode:
        assert a.device.save()[24:] == own[24:]
    else:
        pytest.fail("a state whose contexts are not there was taken")


# the rules


def findings(report: Any) -> set[str]:
    return {check["id"] for check in report["checks"] if check["outcome"] in {"fail", "warn"}}


def test_conform_finds_nothing_wrong_with_the_real_driver() -> None:
    with kvmgt.instance() as one, kvmgt.instance() as other:
        report = vfio_mig("conform", one, "--second", other)
        assert findings(report) == set(), [check for check in report["checks"] if check["id"] in findings(report)]
        skipped = [check["id"] for check in report["checks"] if check["outcome"] == "skip"]
        assert skipped == ["rfc.state.too-long"]
        assert sum(check["id"].startswith("rfc.work.") for check in report["checks"]) == 6


@pytest.mark.slow
def test_conform_finds_a_driver_that_loses_the_queue() -> None:
    load_ours("lose_queue")
    try:
        with kvmgt.instance() as one:
            report = vfio_mig("conform", one, rc=5)
            assert findings(report) == {"rfc.work.restored", "rfc.work.goes-on"}
    finally:
        load_ours()


# hostile images


def damage(kind: str, content: bytes) -> bytes:
    middle = len(content) // 2
    return {
        "cut": content[:middle],
        "one byte short": content[:-1],
        "flipped": patched(content, middle, bytes([content[middle] ^ 1])),
        "one byte more": content + b"\1",
        "empty": b"",
    }[kind]


DAMAGE: Final = {
    "image": ("cut", "one byte short", "flipped", "one byte more", "empty"),
    # behind a bare state there may be leftovers of the region that it was read from, which are not written
    "bare state": ("cut", "one byte short", "flipped", "empty"),
}


@pytest.mark.parametrize("form", DAMAGE)
def test_a_damaged_file_is_refused_and_the_queue_stays(player: Vgpu, make_side: MakeSide, shm: Path, form: str) -> None:
    a = make_side("A")
    hand_over(player, a, shm / "player.vfm")
    before = a.device.save()
    good = before if form == "bare state" else (shm / "player.vfm").read_bytes()
    for kind in DAMAGE[form]:
        (shm / "bad").write_bytes(damage(kind, good))
        option = ["--raw"] if form == "bare state" else []
        done = cli.run("restore", *option, a.name, shm / "bad", rc=None, warm=True)
        assert done.returncode != 0, kind
        assert done.stderr.count(b"\n") == 1, done.stderr
        if form == "image":
            assert a.device.save() == before, kind
    if form == "image":
        a.memory.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
        vfio_mig("start", a.name)
        a.await_u32(result_of(RCS, 1), QUEUED[RCS][1])


def test_the_driver_refuses_what_the_command_cannot_know_before_anything_changes(
    player: Vgpu, make_side: MakeSide, shm: Path
) -> None:
    a = make_side("A")
    hand_over(player, a, shm / "player.vfm")
    before = a.device.save()
    end = len(before)
    for bad in (
        before[: end // 2],
        before[:-1],
        patched(before, end // 2, bytes([before[end // 2] ^ 1])),
        sealed(patched(before, 0x1228 + 24, b"\1")),  # another set of engines
    ):
        with pytest.raises(OSError):
            a.device.write(raw.STATE, 0, bad)
        assert a.device.save() == before
    a.device.restore(before)
    assert a.device.save() == before


def test_an_interrupted_stop_leaves_it_running(player: Vgpu, make_side: MakeSide, shm: Path) -> None:
    a = make_side("A")
    hand_over(player, a, shm / "player.vfm")
    vfio_mig("start", a.name)
    time.sleep(1)
    stop = cli.Forked("stop", a.name)
    time.sleep(2)
    assert stop.runs()
    os.kill(stop.pid, signal.SIGKILL)
    assert stop.wait().returncode == -signal.SIGKILL
    a.memory.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
    for engine, values in QUEUED.items():
        a.await_u32(result_of(engine, 1), values[1])
