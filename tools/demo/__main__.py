# SPDX-License-Identifier: MIT
"""Move a vGPU with pending work from one device to another with nothing but the ``vfio-mig`` command, and check it.

The guest's part (page tables, fences, GPU commands) is played through the holder's group fd by the tests' raw
helpers; what the host's side looks like comes from the sample driver's debugfs.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.demo.report import Report, asked
from tools.lab.sample import gpu
from tools.lab.sample.held import Side, Work, guest_view, queue_one, run_some_work, side
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


WITHOUT: Final = (
    "Without vfio-mig: QEMU refuses to migrate a VM that has such a vGPU, as its driver does not speak the kernel's "
    "migration protocol v2; and nothing saves one alone."
)


@contextlib.contextmanager
def held(files: Sequence[Path], report: Report) -> Iterator[list[Side]]:
    """Make and hold one vGPU for each file of guest memory, in this directory."""
    with contextlib.ExitStack() as stack:
        sides = []
        for file in files:
            sides.append(stack.enter_context(side(file)))
            report.name(sides[-1].name)
            report.command("vfio-mig", "hold", sides[-1].name, "--memory", f"{file.name}@0", "&")
        yield sides


def milliseconds(reply: str, before: str) -> float:
    """Return the time behind a word of a reply.

    >>> milliseconds("stopped for 9.1 ms (stop 0.5, bitmap 0.3, state 8.3); left stopped", "state")
    8.3
    """
    found = re.search(rf"\b{before} (\d+\.\d+)", reply)
    assert found is not None, reply  # noqa: S101 -- a reply of another form is the demonstration's fault
    return float(found[1])


def show_times(report: Report, times: dict[str, float]) -> None:
    """Print where the downtime went."""
    report.step("Downtime by phase (emulated CPU; without starting the commands)")
    for name, one in (*times.items(), ("sum", sum(times.values()))):
        report.note(f"{name:<16} {one:8.1f} ms")


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
        show_times(self.report, self.times)

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
        self.times["stop"] = milliseconds(self.report.vfio_mig("stop", self.source.name), "in")
        queued = queue_one(self.source.guest, self.engine)
        waits = len(self.source.instance.queue()) == 1 and queued.done_in(self.source.memory) == 0
        self.report.check("the queued workload waits", waits)
        return queued

    def sync(self) -> None:
        """Copy the dirty pages into the target's memory and compare."""
        self.report.step("Sync its dirty pages, then save its state")
        source, target = self.source, self.target
        memory = ("--memory", f"{source.file.name}@0")
        self.report.vfio_mig("dirty", source.name, *memory)
        synced = self.report.vfio_mig("sync", source.name, target.file.name, *memory, "--rounds", "0")
        dirty = asked("dirty", source.name, *memory, "--list")
        pages = {at for start, size in dirty["ranges"] for at in range(start, start + size, PAGE)}
        equal = sum(source.memory.read(at, PAGE) == target.memory.read(at, PAGE) for at in pages)
        self.report.check(f"{len(pages)} dirty pages synced, {equal} equal on the target", 0 < len(pages) == equal)
        self.report.check("they are the pages that the driver has pinned", pages == set(source.instance.pinned()))
        self.times["last sync round"] = milliseconds(synced, "stopped for")

    def save(self) -> bytes:
        """Save the state; returns what the guest saw of its device then."""
        saved = self.report.vfio_mig("save", self.source.name, self.image.name)
        self.times["read state"] = milliseconds(saved, "state")
        return guest_view(self.source.guest.device)

    def restore(self, view: bytes) -> None:
        """Load it into the target and compare both sides of the translation."""
        self.report.step("Restore it into the second and start that")
        restored = self.report.vfio_mig("restore", self.target.name, self.image.name)
        self.times["write state"] = milliseconds(restored, "in")
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
        self.times["start"] = milliseconds(self.report.vfio_mig("start", self.target.name), "in")
        gpu.wait_ended(self.target.guest, before, 1)
        self.report.check("the queued workload has run on the target", queued.done_in(self.target.memory) == 1)
        self.report.check("and not on the source", queued.done_in(self.source.memory) == 0)


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    report.begin(
        f"vfio-mig on Linux {os.uname().release}: a vGPU moves from one device to another",
        "Bench: a sample driver with GVT-g's address model and the ioctls of its RFC of 2017, in a VM.",
        WITHOUT,
    )
    report.step("Two vGPUs are held open, each with its guest's memory")
    # guest memory must be shared with the holder
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        with (
            contextlib.chdir(directory),
            held([directory / "source.mem", directory / "target.mem"], report) as (source, target),
        ):
            Migration(source, target, directory / "gpu.vfm", report).run()
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
