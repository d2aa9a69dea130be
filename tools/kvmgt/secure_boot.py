# SPDX-License-Identifier: MIT
"""Secure Boot: with it the kernel loads only signed modules, and ours needs a key that the machine's owner enrols."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel

# The UEFI specification's EFI_GLOBAL_VARIABLE; four bytes of attributes come before the value.
_VARIABLE: Final = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_VALUE_AT: Final = 4
_LOCKDOWN: Final = "sys/kernel/security/lockdown"
_DKMS: Final = "var/lib/dkms"
_HASH: Final = "sha256"


@dataclass(frozen=True, slots=True)
class Keys:
    """The key that DKMS makes for this machine, and its certificate."""

    key: Path
    certificate: Path

    @classmethod
    def of(cls, root: Path = Path("/")) -> "Keys | None":
        """Return DKMS's keys, None where it has made none yet."""
        keys = cls(root / _DKMS / "mok.key", root / _DKMS / "mok.pub")
        return keys if keys.key.is_file() and keys.certificate.is_file() else None


def is_enforced(root: Path = Path("/")) -> bool:
    """Say whether this machine's kernel refuses unsigned modules: by Secure Boot, or by lockdown."""
    try:
        value = (root / _VARIABLE).read_bytes()[_VALUE_AT:]
    except OSError:
        value = b""
    try:
        lockdown = (root / _LOCKDOWN).read_text("ascii", "replace")
    except OSError:
        lockdown = ""
    return value == b"\1" or "[integrity]" in lockdown or "[confidentiality]" in lockdown


def is_enrolled(keys: Keys) -> bool | None:
    """Ask mokutil whether the firmware's owner has enrolled the certificate; None where it cannot say."""
    if shutil.which("mokutil") is None:
        return None
    done = subprocess.run(
        ["mokutil", "--test-key", keys.certificate],
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if "is not enrolled" in done.stdout:
        return False
    return True if "is already enrolled" in done.stdout else None


def advice(root: Path = Path("/")) -> Iterator[str]:
    """Say what is to be done for a module of ours to be loaded; nothing where the kernel does not care."""
    if not is_enforced(root):
        return
    keys = Keys.of(root)
    if keys is None:
        yield "Secure Boot is on, and there is no key to sign with: apt-get install dkms, then build once more"
        return
    known = is_enrolled(keys)
    if known:
        yield f"Secure Boot is on; {keys.certificate} is enrolled"
    elif known is None:
        yield f"Secure Boot is on; the kernel loads the module only if {keys.certificate} is enrolled: mokutil tells"
    else:
        yield f"Secure Boot is on, and the kernel will refuse the module: {keys.certificate} is not enrolled"
    if not known:
        yield f"once: mokutil --import {keys.certificate}; choose a password, reboot, 'Enroll MOK' in the blue screen"


def _sign_file(kernel: Kernel) -> Path | None:
    series = ".".join(kernel.release.split(".")[:2])
    version = kernel.release.rpartition("-")[0]
    names = (kernel.headers, *(kernel.tree / "usr/lib" / f"linux-kbuild-{name}" for name in (version, series)))
    return next((path for name in names if (path := name / "scripts/sign-file").is_file()), None)


def sign(module: Path, kernel: Kernel) -> bool:
    """Sign *module* in place with DKMS's key; False where there is no key or nothing that signs.

    :raises RunnerError: it was to be signed and was not.
    """
    keys, program = Keys.of(kernel.tree), _sign_file(kernel)
    if keys is None or program is None:
        return False
    done = subprocess.run(
        [program, _HASH, keys.key, keys.certificate, module],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RunnerError(f"{program} could not sign {module}: {done.stdout.strip()}")
    return True
