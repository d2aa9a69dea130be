# SPDX-License-Identifier: MIT
"""Move the kernel's own sample device, mtty, by the mainline migration protocol v2, with nothing but ``vfio-mig``.

The driver is the distribution's, unmodified: a serial port that is not there. What its guest would see is its scratch
register, read and written through the holder's group fd.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.demo.report import Report, vfio_mig
from tools.lab import cli
from tools.lab.mtty import STATE_SIZE, held_mtty, scratch, set_scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_SIZE: Final = 24  # samples/vfio-mdev/mtty.c


@contextlib.contextmanager
def shown() -> Iterator[str]:
    """Make an mtty and hold it."""
    with held_mtty() as name:
        print(f"  $ vfio-mig hold {name} &", flush=True)
        yield name


def state(name: str) -> str:
    """Ask for the migration state, silently."""
    return cli.run("state", name, warm=True).stdout.decode().strip()


def walk(report: Report, one: str) -> None:
    """Go through the states that may be gone to by hand."""
    report.step("Walk the states by hand")
    for new in ("running-p2p", "stop", "running"):
        report.check(f"it is in state {new}", vfio_mig("state", one, new)["state"] == new)


def stopped(report: Report, one: str, other: str, image: str) -> None:
    """Save through STOP_COPY, restore through RESUMING."""
    report.step("Stop it, save it, and restore it into the second")
    set_scratch(one, 0x5A)
    saved = vfio_mig("save", one, image)
    report.check(f"{saved['state_bytes']} bytes of state, left {state(one)}", saved["state_bytes"] == STATE_SIZE)
    report.check("the image fits the second", bool(vfio_mig("check", image, other)["fits"]))
    vfio_mig("restore", other, image, "--start")
    report.check(f"the second is {state(other)}, its register is {scratch(other):#x}", scratch(other) == 0x5A)  # noqa: PLR2004


def live(report: Report, one: str, other: str) -> None:
    """Migrate through PRE_COPY, back to the first."""
    report.step("Migrate it back live: PRE_COPY while it runs")
    set_scratch(other, 0xA5)
    moved = vfio_mig("migrate", other, one, "--live", "--max-downtime", "200")
    report.check(f"{moved['precopy_bytes']} bytes were read while it ran", moved["precopy_bytes"] == HEADER_SIZE)
    report.check(f"down for {moved['downtime'] * 1e3:.0f} ms (emulated CPU)", moved["downtime"] > 0)
    report.check(f"source {state(other)}, target {state(one)}", (state(other), state(one)) == ("stop", "running"))
    report.check(f"the register is {scratch(one):#x}", scratch(one) == 0xA5)  # noqa: PLR2004


def together(report: Report, one: str, other: str, directory: Path) -> None:
    """Save and restore both as one job."""
    report.step("Save and restore both as one job: both are in running-p2p before the first is stopped")
    vfio_mig("start", "--force", other)  # its state went back to the first
    pairs = [f"{name}={directory / name[:8]}.vfm" for name in (one, other)]
    values = {one: 0x11, other: 0x22}
    for name, value in values.items():
        set_scratch(name, value)
    cli.run("-q", "save", *pairs, "--leave-running")
    print(f"  $ vfio-mig save {' '.join(pairs)} --leave-running", flush=True)
    for name in values:
        set_scratch(name, 0)
    cli.run("-q", "restore", *pairs, "--start")
    print(f"  $ vfio-mig restore {' '.join(pairs)} --start", flush=True)
    report.check("both have their registers", all(scratch(name) == value for name, value in values.items()))


def garbage(report: Report, one: str, directory: Path) -> None:
    """Show what becomes of a stream that the driver would load in spite of its own refusal."""
    report.step("A stream that is none: this driver refuses it, and would load it all the same on its way to STOP")
    bad = directory / "bad"
    bad.write_bytes(b"garbage" * 10)
    print(f"  $ vfio-mig restore --raw {one} {bad}", flush=True)
    refusal = cli.refused("restore", "--raw", one, bad, code=5)
    print(f"  {refusal.strip()}")
    report.check(f"it was reset, and is {state(one)}", state(one) == "running")


def main() -> int:
    """Run the demonstration; 1 if a check fails."""
    report = Report()
    print(f"vfio-mig on Linux {os.uname().release}: the kernel's own mtty, by the migration protocol v2")
    report.step("Two of them are held open")
    with tempfile.TemporaryDirectory() as name, shown() as one, shown() as other:
        directory = Path(name)
        report.check(
            f"it speaks {vfio_mig('info', one)['protocol']}", vfio_mig("info", one)["protocol"] == "mainline-v2"
        )
        walk(report, one)
        stopped(report, one, other, str(directory / "mtty.vfm"))
        live(report, one, other)
        together(report, one, other, directory)
        garbage(report, one, directory)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
