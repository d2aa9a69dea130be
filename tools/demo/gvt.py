# SPDX-License-Identifier: MIT
"""Move a vGPU of the real driver, kvmgt with the RFC's patches, with nothing but ``vfio-mig``, and check it.

The GPU is emulated, the distribution's i915 drives it, and our kvmgt divides it (``scripts/vm --gvt --kvmgt ours``).
kvmgt reads a guest's memory in the process that mapped it. So this process holds the source and plays its guest, as a
VMM would; the target is held by ``vfio-mig hold``, and ``restore`` and ``start`` borrow it there. What the hardware's
side looks like is asked from the GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.demo.__main__ import WITHOUT, milliseconds, show_times
from tools.demo.report import Report, asked
from tools.lab import cli
from tools.lab.borrowing import borrowed_fd
from tools.lab.gvt import kvmgt
from tools.lab.gvt import rfc as gvt_rfc
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES, Vgpu
from tools.lab.gvt.rfc import QUEUED, result_of
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE, Memory
from tools.lab.waiting import wait_until

if TYPE_CHECKING:
    from tools.gpu.control import Control


class Migration:
    """The main job, check by check.

    :param target: the UUID of the other vGPU, which another process holds with the memory *into*.
    """

    def __init__(self, gpu: Control, source: Vgpu, target: str, *, into: Memory, report: Report) -> None:
        self.gpu: Final = gpu
        self.source: Final = source
        self.target: Final = target
        self.into: Final = into
        self.report: Final = report
        self.device: Final = raw.Device(borrowed_fd(target), target)
        """A second fd of the target; the caller closes it, as a vGPU that is open cannot be removed."""
        self.times: dict[str, float] = {}

    def run(self) -> None:
        """Do it all."""
        self.look()
        self.work()
        self.save()
        view = gvt_rfc.view(self.source.device)
        self.restore(view)
        self.start()
        show_times(self.report, self.times)

    def look(self) -> None:
        """Have the command say what it is."""
        self.report.step("Both are vGPUs of kvmgt on the distribution's i915, with their apertures at 0")
        self.report.vfio_mig("list", "-o", "name,type,driver,holder")
        spoken = asked("info", self.source.name)["protocol"]
        self.report.check(f"the first speaks the protocol {spoken}, as 'vfio-mig info' says", spoken == "gvt-rfc")
        self.report.check(f"the guest's aperture is at {self.source.low:#x}", self.source.low == 0)

    def work(self) -> None:
        """Leave work done, and work queued."""
        self.report.step("Its work is executed; then $A is stopped, and its guest submits more work")
        gvt_rfc.queue_work(self.source)
        self.source.device.set_fence(0, 0x0010_0001, 0x001F_F003)
        self.source.device.set_pte(self.source.high, MEMORY + kvmgt.TARGET | 1)
        self.report.check("what ran has written guest memory", self.source.u32(kvmgt.RESULT) != 0)
        waiting = [self.source.u32(result_of(engine, turn)) for engine in QUEUED for turn in range(2)]
        self.report.check("two pairs of contexts wait, on the blitter and on the render engine", not any(waiting))

    def save(self) -> None:
        """Save its state, and all of its guest's memory."""
        self.report.step("Save its state with all of its memory: page tables are read, and never dirty")
        words = ("--memory", f"source@{MEMORY:#x}", "--all-memory")
        saved = self.report.vfio_mig("save", self.source.name, "gpu.vfm", *words)
        known = self.source.device.dirty(self.source.memory)
        text = f"{len(known)} pages are dirty, those that the driver has pinned or written"
        self.report.check(text, f" {len(known)} dirty pages" in saved)
        self.times["stop"] = milliseconds(saved, "stop")
        self.times["read state"] = milliseconds(saved, "state")

    def restore(self, view: bytes) -> None:
        """Load it into the target."""
        self.report.step("Look whether it fits the second one, and restore it there")
        self.report.vfio_mig("check", "gpu.vfm", self.target)
        found = asked("check", "gpu.vfm", self.target)
        [memory] = [one for one in found["checks"] if one["name"] == "guest-memory"]
        self.report.check("it does, with its guest's memory", found["fits"] and memory["result"] == "ok")
        before = self.device.guest_high()
        words = ("--memory", f"target@{MEMORY:#x}")
        restored = self.report.vfio_mig("restore", self.target, "gpu.vfm", *words)
        self.times["write state"] = milliseconds(restored, "in")
        self.report.check("the guest's memory is equal", self.into.bytes[:] == self.source.memory.bytes[:])
        self.report.check("the guest's view is identical", gvt_rfc.view(self.device) == view)
        high = self.source.high
        text = f"the guest has its hidden part at {high:#x} still, here at {before:#x}"
        self.report.check(text, self.device.guest_high() == high != before)
        address = gvt_rfc.dma(self.gpu, before)
        self.report.check("the GPU's page table there has the target's pages", address == self._page_of(high))

    def _page_of(self, address: int) -> int | None:
        """Where the guest's entry for a graphics address leads in the machine's memory, None for one that is absent."""
        entry = self.device.pte(address)
        return kvmgt.host_address(self.into, (entry & -PAGE) - MEMORY) if entry & 1 else None

    def start(self) -> None:
        """Start the target, and see who executes the queue."""
        self.report.step("Start it: the queue is executed, with this host's addresses")
        since, untouched = self.gpu.last(), self.source.memory.bytes[:]
        self.times["start"] = milliseconds(self.report.vfio_mig("start", self.target), "in")
        wanted = {value: result_of(engine, turn) for engine in QUEUED for turn, value in enumerate(QUEUED[engine])}
        wait_until("the queued work", lambda: all(self.into.u32(MEMORY + at) == value for value, at in wanted.items()))
        stored = gvt_rfc.stored(self.gpu, since)
        here = all(stored[value] == kvmgt.host_address(self.into, at) for value, at in wanted.items())
        self.report.check(f"the GPU stored all {len(wanted)} values in the target's memory", here)
        self.report.check("and none in the source's", self.source.memory.bytes[:] == untouched)


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    report.begin(
        f"vfio-mig on Linux {os.uname().release}: a GVT-g vGPU moves to another one",
        "Bench: Debian's own i915, and its kvmgt with the RFC's patches, in a VM on a GPU in software. Not silicon.",
        WITHOUT,
    )
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        stack.enter_context(chdir(directory))
        gpu = stack.enter_context(kvmgt.gpu())
        source = stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance()), directory / "source"))
        target = stack.enter_context(kvmgt.instance())
        into = Memory(MEMORY, MEMORY_PAGES, directory / "target")
        option = f"{directory / 'target'}@{MEMORY:#x}"
        stack.enter_context(cli.held(target, option))
        report.name(source.name)
        report.name(target)
        report.step("$A is open here, as a VMM has its vGPU open; $B is held by the command")
        report.command("vfio-mig", "hold", target, "--memory", f"target@{MEMORY:#x}", "&")
        migration = Migration(gpu, source, target, into=into, report=report)
        stack.callback(migration.device.close)
        migration.run()
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
