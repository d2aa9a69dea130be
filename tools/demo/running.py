# SPDX-License-Identifier: MIT
"""A running Linux guest with a GVT-g vGPU moves, by stock QEMU and our kvmgt, and its work goes on.

The guest's own i915 gives its vGPU work without end, looks at every result, and says so on its console. Those lines
are shown as they come. kvmgt is loaded with ``migration=v2`` (``scripts/vm --gvt --l2 --kvmgt ours``).
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Final

from tools.demo.report import Report, asked
from tools.l2.machine import START_SECONDS
from tools.l2.pair import Pair

if TYPE_CHECKING:
    from tools.l2.machine import L2, Counts
    from tools.l2.moves import Move

RESULTS: Final = 40
TURNS: Final = 2
"""There, and back."""


class Show:
    """The running guest, before your eyes."""

    def __init__(self, pair: Pair, report: Report) -> None:
        self.pair: Final = pair
        self.report: Final = report
        self.last = 0
        """Results that the guest had counted when they were last looked at."""

    def run(self) -> None:
        """Do it all."""
        guest = self.boot()
        for turn in range(TURNS):
            guest = self.move(guest, (turn + 1) % 2)
        self.file(guest)

    def boot(self) -> L2:
        """Start the guest, and look at its vGPU from outside."""
        self.report.step("A Linux guest boots in a stock QEMU; its own i915 drives a vGPU, and it checks every result")
        guest = self.pair.start(0)
        engines = guest.await_ready(5 * START_SECONDS)
        self.report.check(f"its i915 uses {', '.join(engines)}", bool(engines))
        self.report.vfio_mig("list", "-o", "name,type,driver,holder")
        spoken = asked("info", self.pair.vgpus[0])["protocol"]
        self.report.check(f"the vGPU's protocol is {spoken}, and QEMU holds it", spoken == "mainline-v2")
        self.goes_on(guest)
        return guest

    def goes_on(self, guest: L2) -> Counts:
        """Show the guest's own lines until there are more results; none may be wrong, and the count is the old one."""
        began, shown = time.monotonic(), len(guest.lines())
        counts = guest.await_right(RESULTS)
        for line in guest.lines()[shown:]:
            self.report.note(f"guest: {line}")
        text = f"{counts.right - self.last} more results, {counts.wrong} wrong, in {time.monotonic() - began:.1f} s"
        self.report.check(text, counts.right > self.last and counts.wrong == 0)
        self.last = counts.right
        return counts

    def move(self, guest: L2, vgpu: int) -> L2:
        """Have QEMU move it to the other vGPU."""
        self.report.step(f"QEMU moves the running guest to {self.report.name(self.pair.vgpus[vgpu])}, in another QEMU")
        self.report.note("(qemu) migrate unix:SOCKET")
        moved = self.pair.move(guest, vgpu)
        self.tell(moved.move)
        self.report.note(f"its console was silent for {moved.silence * 1e3:.0f} ms")
        self.goes_on(moved.guest)
        return moved.guest

    def tell(self, done: Move) -> None:
        """Say what QEMU says of it."""
        self.report.note(
            f"QEMU: {done.ram_bytes >> 20} MiB of RAM and {done.vfio_bytes} bytes of vGPU in {done.total_ms} ms; "
            f"the guest stood still for {done.downtime_ms} ms (emulated CPU)"
        )

    def file(self, guest: L2) -> None:
        """Have QEMU write it to a file, look into that, and go on from it with the other vGPU."""
        self.report.step("QEMU writes the running guest into a file, and is ended: nothing runs")
        self.report.note(f"(qemu) migrate file:{self.pair.stream}")
        self.tell(self.pair.save(guest))
        image = self.pair.stream.with_suffix(".vfm")
        self.report.vfio_mig("extract", "--device", "vfio0", str(self.pair.stream), str(image))
        size = asked("inspect", str(image))["state_bytes"]
        self.report.check(f"vfio-mig takes {size} bytes of vGPU out of it", size > 0)
        found = self.report.vfio_mig("check", str(image), self.pair.vgpus[1])
        self.report.check("they fit $B", "mismatch" not in found)
        self.report.step("A new QEMU with $B takes the guest from the file; it goes on where it was")
        self.report.note(f"(qemu) migrate-incoming file:{self.pair.stream}")
        self.goes_on(self.pair.load(1))


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    report.begin(
        f"Linux {os.uname().release}: QEMU moves a running VM with a GVT-g vGPU",
        "Bench: Debian's own i915, and its kvmgt with our protocol v2, in a VM on a GPU in software. Not silicon.",
        "Without vfio-mig's kvmgt: QEMU refuses to migrate a VM that has such a vGPU.",
    )
    with Pair.made() as pair:
        for vgpu in pair.vgpus:
            report.name(vgpu)
        report.leave_out(f"{pair.stream.parent}/")
        Show(pair, report).run()
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
