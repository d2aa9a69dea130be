# SPDX-License-Identifier: MIT
"""Move a vGPU with pending work from one device to another with nothing but the ``vfio-mig`` command, and check it.

The guest's part (page tables, fences, GPU commands) is played through the holder's group fd by the tests' raw
helpers; what the host's side looks like comes from the sample driver's debugfs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.demo.report import Report, vfio_mig
from tools.lab.sample import gpu
from tools.lab.sample.held import Side, Work, guest_view, queue_one, run_some_work, side
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def held(files: Sequence[Path]) -> Iterator[list[Side]]:
    """Make and hold one vGPU for each file of guest memory."""
    with contextlib.ExitStack() as stack:
        sides = []
        for file in files:
            sides.append(stack.enter_context(side(file)))
            print(f"  $ vfio-mig hold {sides[-1].name} --memory {sides[-1].memory_option} &", flush=True)
        yield sides


class Migration:
    """The main job between two held devices, check by check.

    :param image: where the image is saved to.
    """

    def __init__(self, source: Side, target: Side, image: Path, report: Report) -> None:
        self.source = source
        self.target = target
        self.image = image
        self.report = report
        self.engine: Final = gpu.Engine(source.guest)
        self.times: dict[str, float] = {}

    def run(self) -> None:
        """Do it all."""
        self.work()
        queued = self.stop()
        self.sync()
        view = self.save()
        self.restore(view)
        self.start(queued)
        self.show_times()

    def work(self) -> None:
        """Give the guest's device a fence, a page table of its own and finished work."""
        self.report.step("The first runs GPU workloads that write guest memory")
        device = self.source.guest.device
        device.set_fence(0, 0x00100001, 0x001FF003)
        device.make_ppgtt(4, [0x5000])
        work = run_some_work(self.source.guest, self.engine)
        done = work.done_in(self.source.memory)
        self.report.check(f"{done} of {len(work)} workloads wrote what they should", done == len(work))

    def stop(self) -> Work:
        """Stop the source with work in its queue."""
        self.report.step("Stop it, with one more workload in its queue")
        vfio_mig("stop", self.source.name)
        queued = queue_one(self.source.guest, self.engine)
        waits = len(self.source.instance.queue()) == 1 and queued.done_in(self.source.memory) == 0
        self.report.check("the queued workload waits", waits)
        return queued

    def sync(self) -> None:
        """Copy the dirty pages into the target's memory and compare."""
        self.report.step("Sync its dirty pages, then save its state")
        source, target = self.source, self.target
        dirty = vfio_mig("dirty", source.name, "--memory", source.memory_option, "--list")
        synced = vfio_mig("sync", source.name, str(target.file), "--memory", source.memory_option, "--rounds", "0")
        pages = {at for start, size in dirty["ranges"] for at in range(start, start + size, PAGE)}
        equal = sum(source.memory.read(at, PAGE) == target.memory.read(at, PAGE) for at in pages)
        self.report.check(f"{len(pages)} dirty pages synced, {equal} equal on the target", 0 < len(pages) == equal)
        self.report.check("they are the pages that the driver has pinned", pages == set(source.instance.pinned()))
        self.times["stop"] = synced["stop_time"]
        self.times["last sync round"] = synced["stopped_time"] - synced["stop_time"]

    def save(self) -> bytes:
        """Save the state; returns what the guest saw of its device then."""
        saved = vfio_mig("save", self.source.name, str(self.image))
        self.times["read state"] = saved["state_read_time"]
        print(f"  state: {saved['state_bytes']} bytes, image file: {self.image.stat().st_size} bytes")
        return guest_view(self.source.guest.device)

    def restore(self, view: bytes) -> None:
        """Load it into the target and compare both sides of the translation."""
        self.report.step("Restore it into the second and start that")
        restored = vfio_mig("restore", self.target.name, str(self.image))
        self.times["write state"] = restored["state_write_time"]
        self.report.check("the guest's view is identical", guest_view(self.target.guest.device) == view)
        one, other = self.source.instance, self.target.instance
        here, there = one.layout(), other.layout()
        self.report.check(
            f"host addresses moved: low {here.host_low:#x} -> {there.host_low:#x}, "
            f"high {here.host_high:#x} -> {there.host_high:#x}",
            here.host_low != there.host_low and here.host_high != there.host_high,
        )
        moved = one.hw_fence() != other.hw_fence() and any(other.hw_fence())
        self.report.check("host fences moved with them", moved)

    def start(self, queued: Work) -> None:
        """Start the target and wait for the work that was queued on the source."""
        before = self.target.instance.counters()
        started = vfio_mig("start", self.target.name)
        self.times["start"] = started["seconds"]
        gpu.wait_ended(self.target.guest, before, 1)
        self.report.check("the queued workload has run on the target", queued.done_in(self.target.memory) == 1)
        self.report.check("and not on the source", queued.done_in(self.source.memory) == 0)

    def show_times(self) -> None:
        """Print where the downtime went."""
        self.report.step("Downtime by phase (emulated CPU; without starting the commands)")
        for name, seconds in (*self.times.items(), ("sum", sum(self.times.values()))):
            print(f"  {name:<16} {seconds * 1e3:8.1f} ms")


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    print(f"vfio-mig on Linux {os.uname().release}: a GVT-g vGPU moves from one device to another")
    report.step("Two vGPUs are held open, each with its guest's memory")
    # guest memory must be shared with the holder
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        with held([directory / "source.mem", directory / "target.mem"]) as (source, target):
            Migration(source, target, directory / "gpu.vfm", report).run()
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
