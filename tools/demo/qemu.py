# SPDX-License-Identifier: MIT
"""Move a vGPU with pending work from the VM of one QEMU to another's with ``scripts/qemu-save`` and ``qemu-restore``.

Both are real QEMUs. The guests' CPUs are played by the tests' helpers through QEMU's qtest protocol, so that whatever
the guest does goes through QEMU's vfio-pci. What the host's side looks like comes from the sample driver's debugfs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.demo.__main__ import WITHOUT
from tools.demo.report import Report
from tools.lab.qemu import MEGABYTES, Qemu
from tools.lab.sample import gpu, host
from tools.lab.sample.held import Work, guest_view, queue_one, run_some_work
from tools.lab.vfio.raw import PAGE
from vfio_mig.vm.monitor import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS: Final = Path("scripts").absolute()
SHOWN: Final = ("vm", "state", "state_bytes", "pages_dirty", "pages_written", "stopped_time")
"""Of the JSON that the scripts print."""


@contextlib.contextmanager
def two_vms(directory: Path, report: Report) -> Iterator[tuple[Qemu, Qemu]]:
    """Start two QEMUs, each with a vGPU; the second waits."""
    with contextlib.ExitStack() as stack:
        vms = []
        for name, paused in (("source", False), ("target", True)):
            vgpu = stack.enter_context(host.instance())
            vms.append(stack.enter_context(Qemu.started(vgpu, directory / name, paused=paused)))
            report.name(vgpu.uuid)
            report.command(
                "qemu-system-x86_64", "-m", str(MEGABYTES), "-object", "memory-backend-memfd,id=ram,share=on,…",
                "-device", f"vfio-pci,sysfsdev=…/{vgpu.uuid}", "-qmp", f"unix:{name}.qmp,…",
                *(["-S"] if paused else []), "&",
            )  # fmt: skip
        yield vms[0], vms[1]


def script(report: Report, name: str, vm: Qemu, image: Path, *options: str) -> dict[str, Any]:
    """Run scripts/qemu-NAME as a user would, show it and what it says of the RAM, and return its summary."""
    words = [str(SCRIPTS / f"qemu-{name}"), *options, str(vm.socket), vm.name, str(image)]
    report.command(f"qemu-{name}", *options, vm.socket.name, vm.name, image.name)
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    report.reply(done.stderr)
    summary: dict[str, Any] = json.loads(done.stdout)
    report.reply("\n".join(f'"{key}": {json.dumps(summary[key])}' for key in SHOWN if key in summary))
    return summary


class Migration:
    """The main job between two VMs, check by check.

    :param image: where the vGPU is saved to.
    """

    def __init__(self, source: Qemu, target: Qemu, image: Path, report: Report) -> None:
        self.source = source
        self.target = target
        self.image = image
        self.report = report
        self.engine: Final = gpu.Engine(source.guest)

    def run(self) -> None:
        """Do it all."""
        self.work()
        self.refusal()
        queued = self.queue()
        pages = self.save()
        self.restore(pages)
        self.resume(queued)

    def work(self) -> None:
        """Give the guest's device a fence and finished work, through QEMU."""
        self.report.step("The guest of the first runs GPU workloads that write its memory")
        guest = self.source.guest
        guest.device.set_fence(0, 0x00100001, 0x001FF003)
        work = run_some_work(guest, self.engine)
        done = work.done_in(guest.memory)
        self.report.check(f"{done} of {len(work)} workloads wrote what they should", done == len(work))
        listed = self.report.vfio_mig("list", "-o", "name,type,holder")
        holders = {line.split()[0]: line.split()[2] for line in listed.splitlines()}
        named = all(holders[vm.name] == vm.holder for vm in (self.source, self.target))
        self.report.check(f"each vGPU is QEMU's: {self.source.holder}, {self.target.holder}", named)

    def refusal(self) -> None:
        """Have QEMU say that it does not migrate such a VM."""
        self.report.step("QEMU's own migration: it does not migrate a VM that has such a vGPU")
        self.report.note('(qemu) migrate "exec:cat >/dev/null"')
        said = ""
        try:
            self.source.qmp.execute("migrate", uri="exec:cat >/dev/null")
        except RefusedError as error:
            said = str(error).partition("'migrate': ")[2]
            self.report.reply(said)
        self.report.check("it refuses", "vfio" in said.lower())

    def queue(self) -> Work:
        """Have a workload in the queue when the VM is paused."""
        self.report.step("One more workload comes into its queue; then the VM is paused and the vGPU saved")
        self.report.vfio_mig("stop", self.source.name)  # else it is done before anybody can save it
        queued = queue_one(self.source.guest, self.engine)
        waits = len(self.source.instance.queue()) == 1 and queued.done_in(self.source.guest.memory) == 0
        self.report.check("the queued workload waits", waits)
        return queued

    def save(self) -> list[int]:
        """Save vGPU and dirty pages; returns the pages."""
        saved = script(self.report, "save", self.source, self.image)
        self.report.check("the VM is paused", self.source.status() == "paused")
        pages = self.source.instance.pinned()
        self.report.check(f"{saved['pages_dirty']} dirty pages, those pinned", saved["pages_dirty"] == len(pages) > 0)
        return pages

    def restore(self, pages: list[int]) -> None:
        """Load it into the target and compare what the guests and what the host sees."""
        self.report.step("Restore it into the second VM, which is paused")
        script(self.report, "restore", self.target, self.image)
        source, target = self.source.guest, self.target.guest
        same = guest_view(target.device) == guest_view(source.device)
        self.report.check("the guest's view is identical", same)
        equal = sum(source.memory.read(at, PAGE) == target.memory.read(at, PAGE) for at in pages)
        self.report.check(f"{len(pages)} dirty pages, {equal} equal on the target", equal == len(pages))
        here, there = self.source.instance.layout(), self.target.instance.layout()
        self.report.check(
            f"host addresses moved: low {here.host_low:#x} -> {there.host_low:#x}, "
            f"high {here.host_high:#x} -> {there.host_high:#x}",
            here.host_low != there.host_low and here.host_high != there.host_high,
        )

    def resume(self, queued: Work) -> None:
        """Let the target go on, and wait for the work that was queued on the source."""
        self.report.step("Start its vGPU and continue the VM")
        target = self.target
        before = target.instance.counters()
        self.report.vfio_mig("start", target.name)
        target.cont()
        gpu.wait_ended(target.guest, before, 1)
        self.report.check("the VM runs", target.status() == "running")
        self.report.check("the queued workload has run on the target", queued.done_in(target.guest.memory) == 1)
        self.report.check("and not on the source", queued.done_in(self.source.guest.memory) == 0)
        target.guest.go_on_as(self.source.guest)
        work = run_some_work(target.guest, gpu.Engine(target.guest))
        done = work.done_in(target.guest.memory)
        self.report.check(f"the moved guest goes on: {done} of {len(work)} new workloads", done == len(work))


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    report.begin(
        f"vfio-mig on Linux {os.uname().release}: a vGPU moves from the VM of one QEMU to another's",
        "Bench: a sample driver with GVT-g's address model and the ioctls of its RFC of 2017, in a VM; two real QEMUs.",
        WITHOUT,
    )
    report.step("Two QEMUs are started, each with a vGPU and with RAM that others can see; the second waits")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with two_vms(directory, report) as (source, target):
            Migration(source, target, directory / "gpu.vfm", report).run()
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
