# SPDX-License-Identifier: MIT
"""Time of the command line's start, against the import of click that it cannot do without."""

from __future__ import annotations

import compileall
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import vfio_mig

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNS: Final = 41
LIMIT: Final = 1.0


def seconds(command: Sequence[str]) -> float:
    """Return the wall time of one run."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def program() -> str:
    """Return the installed ``vfio-mig`` of this interpreter's environment."""
    beside = Path(sys.executable).with_name("vfio-mig")
    return str(beside) if beside.exists() else shutil.which("vfio-mig") or "vfio-mig"


def measure(runs: int = RUNS) -> bool:
    """Run both alternately, print medians and ratio; tell whether the limit is kept."""
    reference = [sys.executable, "-c", "import click"]
    ours = [program(), "--version"]
    # As pip leaves a package that it installs; where PYTHONDONTWRITEBYTECODE is set, no run would do it
    compileall.compile_dir(Path(vfio_mig.__file__).parent, quiet=1)
    for command in (reference, ours):  # once unmeasured: the page cache
        seconds(command)
    times = [(seconds(reference), seconds(ours)) for _ in range(runs)]
    base = statistics.median(reference_time for reference_time, _ in times)
    mine = statistics.median(our_time for _, our_time in times)
    ratio = mine / base
    print(f"python -c 'import click'  {base * 1e3:7.1f} ms")
    print(f"vfio-mig --version        {mine * 1e3:7.1f} ms")
    print(f"ratio                     {ratio:7.2f}     (limit {LIMIT}; medians of {runs} alternating runs)")
    return ratio <= LIMIT
