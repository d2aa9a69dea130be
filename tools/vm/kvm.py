# SPDX-License-Identifier: MIT
"""Is KVM usable? Only a kernel that really ran in it is proof.

``/dev/kvm`` may exist, open, and make a VM, and still stop a Linux guest with an internal error after which QEMU is
paused for ever (seen where KVM itself runs in a VM). So a kernel is booted without a root file system: it panics,
reboots at once, and QEMU ends with 0, or something is wrong.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tools.vm.cache import locked, write_whole

_PROBE_SECONDS: Final = 10
_DEVICE: Final = Path("/dev/kvm")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boots(image: Path) -> bool:
    """Boot *image* in KVM and say whether it came to its end in time."""
    command = [
        "qemu-system-x86_64", "-M", "q35,accel=kvm", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none",
        "-no-reboot", "-serial", "stdio", "-kernel", str(image), "-append", "console=ttyS0 panic=-1",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # run() has killed it
        return False
    return done.returncode == 0


def usable(image: Path, cache: Path, probe: Callable[[Path], bool] = boots, device: Path = _DEVICE) -> bool:
    """Say whether KVM runs *image*; probes once per boot of this machine and remembers the answer."""
    if not os.access(device, os.R_OK | os.W_OK):
        return False
    answer = cache / "kvm" / _BOOT_ID.read_text().strip()
    with locked(cache / "kvm" / ".lock"):
        if not answer.exists():
            for old in answer.parent.glob("[0-9a-f]*"):
                old.unlink()
            write_whole(answer, "yes\n" if probe(image) else "no\n")
        return answer.read_text() == "yes\n"
