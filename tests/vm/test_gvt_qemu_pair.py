# SPDX-License-Identifier: MIT
"""From one QEMU to another with all of the guest's RAM: work that was queued in the first one runs in the second.

A VM's CPU is QEMU's to move. Here it halts, and what it would do the test does: with the RAM, and with the vGPU by
QEMU's emulation of it.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.gvt.kvmgt import CONTEXT, MEMORY, PML4, RESULT, SEMAPHORE, TARGET
from tools.lab.gvt.qemu import GvtQemu
from tools.lab.gvt.rfc import (
    BATCH_VALUE,
    BCS,
    MODULES,
    QUEUED,
    load_ours,
    load_stock,
    queue_work,
    result_of,
    stored,
    view,
    work_done,
)
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.gpu.control import Control
    from tools.lab.cli import Done

pytestmark = [pytest.mark.gvt, pytest.mark.l2]

ROOT: Final = Path(__file__).parents[2]
FENCE: Final = (0x0010_0001, 0x001F_F003)

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours()
    yield
    load_stock()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Have a directory for what processes share, with room for RAM."""
    with tempfile.TemporaryDirectory(prefix="pair-", dir="/run") as name:
        yield Path(name)


def qemu(name: str, vm: GvtQemu, file: Path, *options: str) -> Done:
    """Run `qemu-save` or `qemu-restore` in a fork of this process."""
    words = [str(ROOT / "tools/qemu_host/__main__.py"), name, *options, str(vm.socket), vm.name, str(file)]
    done = cli._forked(words, None, None, None)
    assert done.returncode == 0, done.stderr.decode()
    return done


def mig(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def memory_check(image: Path, vm: GvtQemu) -> dict[str, str]:
    """Return what `check` says of guest memory; all else fits."""
    report = mig("check", image, vm.name)
    assert report["fits"], report
    [found] = [one for one in report["checks"] if one["name"] == "guest-memory"]
    return {key: found[key] for key in ("result", "text")}


def save_while_it_works(vm: GvtQemu, image: Path, *options: str) -> Any:
    """Save a vGPU whose running work waits for its guest, and let that work end while the save waits for it."""
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(qemu, "save", vm, image, *options)
        time.sleep(3)
        assert not saving.done()
        assert vm.status() == "paused"
        vm.ram.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
        return json.loads(saving.result().stdout)


def test_queued_work_moves_to_another_qemu_with_the_whole_ram_and_runs_there(gpu: Control, directory: Path) -> None:
    with GvtQemu.started(directory / "a") as a, GvtQemu.started(directory / "b") as b:
        assert a.driver.high != b.driver.high  # the guests' are at first the host's
        assert (a.status(), b.status()) == ("running", "running")
        # far from what the GPU uses: of the guest's CPU alone
        a.ram.whole[0x20_0000:0x20_0008] = b"its CPU's"[:8]
        queue_work(a.driver, wait=True)
        a.driver.device.set_fence(0, *FENCE)
        mig("start", a.name)
        saved = save_while_it_works(a, directory / "all.vfm", "--all-memory")
        assert saved["vm"] == "paused"

        # what ran has ended in the first VM, and what was queued behind it has not begun
        for engine, values in QUEUED.items():
            assert (a.driver.u32(result_of(engine, 0)), a.driver.u32(result_of(engine, 1))) == (values[0], 0)
        assert a.driver.u32(TARGET) == BATCH_VALUE
        seen, ram, since = view(a.outside), a.ram.whole[:], gpu.last()

        # the second one's guest has done nothing, and is at another place of the same memory
        b.pause()
        assert b.ram.whole[:] != ram
        assert memory_check(directory / "all.vfm", b)["result"] == "ok"
        restored = qemu("restore", b, directory / "all.vfm")
        assert restored.stderr == b""
        assert b.ram.whole[:] == ram
        assert view(b.outside) == seen
        assert b.outside.guest_high() == a.driver.high
        assert not work_done(gpu, since)

        mig("start", b.name)
        b.cont()
        for engine, values in QUEUED.items():
            b.driver.await_u32(result_of(engine, 1), values[1])
            where = stored(gpu, since)
            assert where[values[1]] == b.driver.at(result_of(engine, 1))
            assert values[0] not in where
        assert (a.ram.whole[:] == ram, a.status()) == (True, "paused")

        # its guest goes on: with the page tables and the contexts that it has
        b.driver.low, b.driver.high = a.driver.low, a.driver.high  # of the guest that is in there
        b.driver.submit(BCS, 0x600D, 0x900D)
        b.driver.await_u32(TARGET, 0x600D)
        b.driver.await_u32(RESULT, 0x900D)
        assert stored(gpu, since)[0x600D] == b.driver.at(TARGET)


@pytest.mark.slow
def test_without_the_whole_ram_the_page_tables_are_missing_and_that_is_said(directory: Path) -> None:
    with GvtQemu.started(directory / "a") as a, GvtQemu.started(directory / "b") as b:
        queue_work(a.driver, wait=True)
        mig("start", a.name)
        save_while_it_works(a, directory / "dirty.vfm")
        b.pause()
        found = memory_check(directory / "dirty.vfm", b)
        assert found["result"] == "note"
        assert "only the pages that the device may have written come along" in found["text"]
        told = qemu("restore", b, directory / "dirty.vfm").stderr.decode()
        # Its contexts are there, as the GPU writes them; the page tables, which it reads, are not.
        context, tables = (slice(start, start + PAGE) for start in (CONTEXT + PAGE, PML4))
        assert b.ram.bytes[context] == a.ram.bytes[context] != bytes(PAGE)
        assert a.ram.bytes[tables] != bytes(PAGE) == b.ram.bytes[tables]
        assert f"guest memory: {found['text']}" in told
