# SPDX-License-Identifier: MIT
"""What runs in two VMs with an emulated GPU each: ``python -m tools.pair.gvt source|target``.

A vGPU of our kvmgt with queued work moves by ``vfio-mig migrate`` and ssh to a host whose GPU has another vGPU already,
so that its guest's addresses are not this host's. Both are played by processes of the VMs: a guest's work needs the
process that mapped its memory (tools/lab/gvt).
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.demo.report import Report
from tools.lab.gvt import kvmgt
from tools.lab.gvt.held import Side, side
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES, SEMAPHORE, TARGET, Driver, Vgpu
from tools.lab.gvt.rfc import (
    BATCH_VALUE,
    HALF_PTE,
    QUEUED,
    dma,
    host_low,
    queue_work,
    result_of,
    stored,
    view,
    work_done,
)
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE
from tools.pair import post, sshd
from tools.pair.hosts import HOST_FAILED, Target, Way, vfio_mig
from tools.pair.sides import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tools.gpu.control import Control

FENCE: Final = (0x0010_0001, 0x001F_F003)


def break_connection(player: Vgpu, way: Way, report: Report) -> None:
    """Lose the connection while the vGPU stands still."""
    report.step("A connection that breaks while the vGPU stands still")
    script = post.asking_script("cut", sshd.OWN)
    done = vfio_mig("migrate", player.name, way.device, "--no-memory", "--hook", f"after-stop={script}")
    print(f"  {done.stderr.strip()}")
    lost = done.returncode == HOST_FAILED and "ssh failed at 'restore'" in done.stderr
    report.check(f"it is told: exit code {done.returncode}", lost)
    before = post.ask("state")
    report.check("the target's vGPU is as it was", before["view"] == before["first_view"])


def goes_on(player: Vgpu) -> bool:
    """Have some work done, and leave more of it in the queues of the vGPU, stopped; say whether it does any."""
    try:
        queue_work(player, wait=True)
    except TimeoutError as error:
        print(f"  {error}")
        return False
    return True


def move(player: Vgpu, file: Path, way: Way, told: Mapping[str, Any], report: Report) -> None:
    """Have work queued, and move it with all of the guest's memory, in which page tables and contexts are."""
    with kvmgt.gpu() as gpu:
        low, high = host_low(gpu, player), player.device.guest_high()
    report.check("the source's vGPU works on after that", goes_on(player))
    report.step("A migration by ssh")
    player.device.set_fence(0, *FENCE)
    player.put(SEMAPHORE, 1)
    memory = ["--memory", f"{file}@{MEMORY:#x}", "--target-memory", told["memory"], "--all-memory"]
    facts = {"view": digest(view(player.device)), "low": low, "high": high}
    done = vfio_mig("--json", "migrate", "--no-start", player.name, way.device, *memory)
    report.check(f"it is moved: exit code {done.returncode} {done.stderr}".rstrip(), done.returncode == 0)
    if done.returncode == 0:
        said: dict[str, Any] = json.loads(done.stdout)
        report.check(f"{said['pages_written']} pages were written there", said["pages_written"] == MEMORY_PAGES)
        print(f"  {said['state_bytes']} bytes of state, down for {said['downtime']:.1f} s")
        report.failures += post.ask("judge", facts)
    ran = [player.u32(result_of(engine, number)) for engine in QUEUED for number in range(2)]
    report.check("nothing of the queued work has run on the source", not any(ran))


def be_source() -> int:
    """Play the host that a vGPU leaves; 1 if a check fails."""
    sshd.install()
    report = Report()
    with contextlib.ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))) / "guest.mem"
        player = stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance()), file))
        told = post.take("target")
        way = Way(told["name"])
        way.know(told["host_key"])
        way.have(told["user_key"])
        break_connection(player, way, report)
        move(player, file, way, told, report)
        post.ask("end")
    return int(report.failures > 0)


class GvtTarget(Target):
    """The host that a vGPU comes to: its GPU has another one already, so the addresses differ."""

    def __init__(self, played: Side, gpu: Control) -> None:
        super().__init__()
        self._played: Final = played
        self._gpu: Final = gpu
        # Before anything is loaded the guest's high addresses are the host's
        self._low = host_low(gpu, Driver(played.name, played.memory, played.device))
        self._high = played.device.guest_high()
        self._first = digest(view(played.device))

    def device_state(self) -> dict[str, Any]:
        """Say how the vGPU is."""
        return {"view": digest(view(self._played.device)), "first_view": self._first}

    def judge(self, facts: dict[str, Any]) -> int:
        """Compare what has come, start it, and see what the GPU does for it; how many checks fail."""
        report, b, gpu = Report(), self._played, self._gpu
        report.check("the guest's view is identical", digest(view(b.device)) == facts["view"])
        report.check(
            f"host addresses moved: aperture {facts['low']:#x} -> {self._low:#x}, "
            f"hidden {facts['high']:#x} -> {self._high:#x}",
            self._low != facts["low"] and self._high != facts["high"],
        )
        since = gpu.last()
        report.check("the queued work waits", not work_done(gpu, since))
        started = vfio_mig("start", b.name)
        report.check(f"it starts {started.stderr}".rstrip(), started.returncode == 0)
        for engine, values in QUEUED.items():
            for number, value in enumerate(values):
                b.await_u32(result_of(engine, number), value)
            at = [stored(gpu, since)[value] for value in values]
            right = at == [b.at(result_of(engine, number)) for number in range(2)]
            report.check(f"{engine.name} has stored both results into this guest's memory", right)
        report.check("and a batch of the guest's page table has run", b.u32(TARGET) == BATCH_VALUE)
        b.device.set_reg(raw.GTT + (HALF_PTE >> 12) * 8 + 4, 0)
        b.device.set_pte(facts["high"], MEMORY + TARGET | 1)
        leads = dma(gpu, self._high) == b.at(TARGET)
        report.check(
            f"the guest maps a page at {facts['high']:#x}, and this host's GPU has it at {self._high:#x}", leads
        )
        return report.failures


def be_target() -> int:
    """Play the host that a vGPU comes to."""
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(kvmgt.gpu())
        stack.enter_context(kvmgt.instance())
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))) / "guest.mem"
        file.write_bytes(bytes(MEMORY_PAGES * PAGE))
        played = stack.enter_context(side(file))
        target = stack.enter_context(contextlib.closing(GvtTarget(played, gpu)))
        target.install()
        post.put("target", {**target.told, "name": played.name, "memory": played.memory_option})
        post.serve(target.answers())
    return 0


if __name__ == "__main__":
    sys.exit(be_source() if sys.argv[1] == "source" else be_target())
