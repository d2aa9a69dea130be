# SPDX-License-Identifier: MIT
"""List what a real ``vfio-mig save`` imports. Runs in the VM, as only there is a device to save."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools.lab.sample import host

UNWANTED: Final = ("numpy", "rich", "matplotlib", "hypothesis", "pycparser")
_RUN: Final = """
import atexit, sys
from vfio_mig.cli import main
atexit.register(lambda: print(*sys.modules))
main()
"""


def modules_of_save() -> list[str]:
    """Save a vGPU and return the modules that were imported, in order of name."""
    with host.instance("GVTg_V4_8") as vgpu, tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", _RUN, "save", "--open", vgpu.uuid, str(Path(directory) / "image")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return sorted(done.stdout.split())


def report() -> bool:
    """Print the list, the standard library's as a count; tell whether nothing unwanted is in it."""
    modules = modules_of_save()
    foreign = [name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names]
    packages = sorted({name.partition(".")[0] for name in foreign})
    print(f"vfio-mig save imports {len(modules)} modules, {len(foreign)} of them not the standard library's:")
    for name in foreign:
        print(f"  {name}")
    found = [name for name in packages if name in UNWANTED]
    print(f"packages: {' '.join(packages)}; unwanted ({', '.join(UNWANTED)}): {' '.join(found) or 'none'}")
    return not found and "vfio_mig" in packages
