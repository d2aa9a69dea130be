# SPDX-License-Identifier: MIT
"""Play every fault on every job and print what came of it; exit status 1 if a promise was broken. Runs in the VM.

With ``--gvt`` on the real driver, our kvmgt: there the jobs fail at their steps, and the driver does not.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from tools.lab.faults.cells import all_cells
from tools.lab.faults.stage import GvtStage, SampleStage
from tools.lab.gvt import held as gvt_held
from tools.lab.sample.held import side


def _stage(stack: contextlib.ExitStack, directory: Path, *, gvt: bool) -> SampleStage | GvtStage:
    source, target = directory / "source.mem", directory / "target.mem"
    if gvt:
        enter = stack.enter_context
        return GvtStage(enter(gvt_held.side(source)), enter(gvt_held.side(target)), directory)
    return SampleStage(stack.enter_context(side(source)), stack.enter_context(side(target)), directory)


def main(arguments: list[str]) -> int:
    """Print one row per cell: job, fault, exit code, device, file, memory, promise."""
    gvt = arguments == ["--gvt"]
    cells = [cell for cell in all_cells() if not gvt or not cell.driver]
    broken = 0
    print(f"{len(cells)} cells on Linux {os.uname().release}")
    print(f"{'JOB':<8}{'FAULT':<46}{'EXIT':>5}  {'DEVICE':<8} {'FILE':<6} {'MEMORY':<10} PROMISE", flush=True)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        stage = _stage(stack, directory, gvt=gvt)
        for cell in cells:
            outcome = stage.play(cell)
            fault = str(cell).partition(": ")[2]
            kept = "; ".join(outcome.broken) or ("kept" if cell.left is None else f"kept (noted: {cell.left})")
            broken += bool(outcome.broken)
            memory = outcome.memory if cell.job == "restore" else "-"
            print(
                f"{cell.job:<8}{fault:<46}{outcome.code:>5}  {outcome.state:<8} {outcome.file:<6} {memory:<10} {kept}",
                flush=True,
            )
    print(f"{len(cells)} cells, {broken} broken promises")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
