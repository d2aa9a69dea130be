# SPDX-License-Identifier: MIT
"""The Ansible collection's playbook on vGPUs of our kvmgt: ``python -m tools.pair.fleet_gvt source|target``.

Only the move itself: ``fleet`` has the rest, and ``gvt`` shows what comes of a vGPU's work. Each VM has a GPU of its
own.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.demo.report import Report
from tools.lab.borrowing import borrowed_fd
from tools.lab.gvt.held import side
from tools.lab.gvt.kvmgt import MEMORY_PAGES
from tools.lab.gvt.rfc import view
from tools.lab.vfio import raw
from tools.pair import post, sshd
from tools.pair.fleet import PLAYBOOK, VGPUS, Control, FleetTarget, once_more, recap
from tools.pair.hosts import Way, vfio_mig
from tools.pair.sides import digest


def be_source() -> int:
    """Play the host that is emptied; 1 if a check fails."""
    sshd.install()
    report = Report()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        played = [stack.enter_context(side(directory / f"guest{number}.mem")) for number in range(VGPUS)]
        told = post.ask("memory", [str(one.file) for one in played])
        way = Way("")
        way.know(told["host_key"])
        way.have(told["user_key"])
        for number, one in enumerate(played):
            one.device.set_fence(number, 0x0010_0001, 0x001F_F003)
        views = [digest(view(one.device)) for one in played]
        report.check("the guests see different devices", len(set(views)) == len(views))
        report.step("The playbook empty_host")
        control = Control(directory, {one.name: one.memory_option for one in played})
        done = control.play(PLAYBOOK)
        report.check(f"it ends well: {recap(done)}", done.returncode == 0)
        if done.returncode:
            print(done.stdout, done.stderr)
        for one, seen in zip(played, views, strict=True):
            report.failures += post.ask("judge", {"name": one.name, "view": seen})
            report.check("here it is not started by mistake", "was moved" in vfio_mig("start", one.name).stderr)
        once_more(control, report)
        post.ask("end")
    return int(report.failures > 0)


class GvtFleetTarget(FleetTarget):
    """A host with a GPU and without a vGPU."""

    pages = MEMORY_PAGES

    def judge(self, facts: dict[str, Any]) -> int:
        """See whether one has come."""
        report = Report()
        there = facts["name"] in self.devices()
        report.check(f"{facts['name']} is here", there)
        if there:
            with contextlib.closing(raw.Device(borrowed_fd(facts["name"]), facts["name"])) as device:
                report.check("and the guest's view is identical", digest(view(device)) == facts["view"])
        return report.failures


def be_target() -> int:
    """Play the host that the vGPUs come to."""
    with contextlib.closing(GvtFleetTarget()) as target:
        target.serve()
    return 0


if __name__ == "__main__":
    sys.exit(be_source() if sys.argv[1] == "source" else be_target())
