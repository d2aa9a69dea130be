# SPDX-License-Identifier: MIT
"""``python -m tools.l2``, inside of ``scripts/vm --gvt --l2``: run the guest on a new vGPU and show what it says."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.l2.image import Image
from tools.l2.machine import L2, QEMU, START_SECONDS, GuestError
from vfio_mig.errors import VfioMigError
from vfio_mig.host import mdev

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE: Final = "VFIO_MIG_L2"
TYPE: Final = "GVTg_V5_4"
_DEVICES: Final = Path("/sys/bus/mdev/devices")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(prog="python -m tools.l2", description=__doc__, allow_abbrev=False)
    result.add_argument("--type", default=TYPE, help="of the vGPU; default: %(default)s")
    result.add_argument("--seconds", type=float, default=20.0, help="for which the load runs; default: %(default)s")
    result.add_argument("--vm-qemu", action="store_true", help="by the QEMU that runs this VM, not by the one on PATH")
    return result


def run(image: Image, vgpu: str, seconds: float, qemu: Sequence[str]) -> None:
    """Run a guest for so long and print what it says as it says it.

    :raises GuestError: it failed, or a result was wrong.
    """
    with (
        tempfile.TemporaryDirectory(prefix="l2-", dir="/run") as directory,
        L2.started(image, str(_DEVICES / vgpu), Path(directory), qemu=qemu) as guest,
    ):
        guest.await_ready(5 * START_SECONDS)
        print(f"up after {guest.up_after or 0:.1f} s (limit {START_SECONDS:g})", flush=True)
        end, said = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            lines = guest.lines()
            print(*lines[said:], sep="\n", end="\n" if lines[said:] else "", flush=True)
            said = len(lines)
            guest.require_good()
            time.sleep(0.5)


def main() -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args()
    directory = os.environ.get(VARIABLE)
    if directory is None:
        print("l2: run it by scripts/vm --gvt --l2 -- python -m tools.l2", file=sys.stderr)
        return 2
    qemu = shlex.split(os.environ["VFIO_MIG_QEMU"]) if options.vm_qemu else QEMU
    try:
        vgpu = mdev.create(options.type)
        try:
            run(Image.of(Path(directory)), vgpu, options.seconds, qemu)
        finally:
            mdev.remove(vgpu)
    except (GuestError, VfioMigError) as error:
        print(f"l2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
