# SPDX-License-Identifier: MIT
"""Move the kernel's own sample device, mtty, by the mainline migration protocol v2, with nothing but ``vfio-mig``.

The driver is the distribution's, unmodified: a serial port that is not there. What its guest would see is its scratch
register, read and written through the holder's group fd.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tools.demo.report import Report, asked
from tools.lab import cli
from tools.lab.mtty import STATE_SIZE, held_mtty, scratch, set_scratch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def shown(report: Report) -> Iterator[str]:
    """Make an mtty and hold it."""
    with held_mtty() as name:
        report.name(name)
        report.command("vfio-mig", "hold", name, "&")
        yield name


def state(name: str) -> str:
    """Ask for the migration state, silently."""
    return cli.run("state", name, warm=True).stdout.decode().strip()


def walk(report: Report, one: str) -> None:
    """Go through the states that may be gone to by hand."""
    report.step("Walk the states by hand")
    for new in ("running-p2p", "stop", "running"):
        report.vfio_mig("state", one, new)
        report.check(f"it is in state {new}", state(one) == new)


def stopped(report: Report, one: str, other: str, image: str) -> None:
    """Save through STOP_COPY, restore through RESUMING."""
    report.step("Stop it, save it, and restore it into the second")
    set_scratch(one, 0x5A)
    saved = report.vfio_mig("save", one, image)
    report.check(f"{STATE_SIZE} bytes of state, left {state(one)}", f" {STATE_SIZE} bytes of state" in saved)
    report.vfio_mig("check", image, other)
    report.vfio_mig("restore", other, image, "--start")
    report.check(f"the second is {state(other)}, its register is {scratch(other):#x}", scratch(other) == 0x5A)  # noqa: PLR2004


def live(report: Report, one: str, other: str) -> None:
    """Migrate through PRE_COPY, back to the first."""
    report.step("Migrate it back live: PRE_COPY while it runs")
    set_scratch(other, 0xA5)
    moved = report.vfio_mig("migrate", other, one, "--live", "--max-downtime", "200")
    report.check("it was down for a moment (emulated CPU)", re.search(r"down for \d+\.\d+ ms", moved) is not None)
    report.check(f"source {state(other)}, target {state(one)}", (state(other), state(one)) == ("stop", "running"))
    report.check(f"the register is {scratch(one):#x}", scratch(one) == 0xA5)  # noqa: PLR2004


def together(report: Report, one: str, other: str) -> None:
    """Save and restore both as one job."""
    report.step("Save and restore both as one job: both are in running-p2p before the first is stopped")
    report.vfio_mig("start", "--force", other)  # its state went back to the first
    pairs = [f"{one}=one.vfm", f"{other}=other.vfm"]
    values = {one: 0x11, other: 0x22}
    for name, value in values.items():
        set_scratch(name, value)
    report.vfio_mig("save", *pairs, "--leave-running")
    for name in values:
        set_scratch(name, 0)
    report.vfio_mig("restore", *pairs, "--start")
    report.check("both have their registers", all(scratch(name) == value for name, value in values.items()))


def garbage(report: Report, one: str) -> None:
    """Show what becomes of a stream that the driver would load in spite of its own refusal."""
    report.step("A stream that is none: this driver refuses it, and would load it all the same on its way to STOP")
    bad = Path("bad")
    bad.write_bytes(b"garbage" * 10)
    report.command("vfio-mig", "restore", "--raw", one, bad.name)
    report.reply(cli.refused("restore", "--raw", one, bad.name, code=5))
    report.check(f"it was reset, and is {state(one)}", state(one) == "running")


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    report.begin(
        f"vfio-mig on Linux {os.uname().release}: the kernel's own mtty, by the migration protocol v2",
        "Bench: the kernel's sample of a serial port, as it is, in a VM.",
        "Without vfio-mig: only QEMU migrates such a device, and only together with the whole VM that has it.",
    )
    report.step("Two of them are held open")
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.chdir(directory),
        shown(report) as one,
        shown(report) as other,
    ):
        report.vfio_mig("list", "-o", "name,type,driver,holder")
        spoken = asked("info", one)["protocol"]
        report.check(f"the first speaks the protocol {spoken}, as 'vfio-mig info' says", spoken == "mainline-v2")
        walk(report, one)
        stopped(report, one, other, "mtty.vfm")
        live(report, one, other)
        together(report, one, other)
        garbage(report, one)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
