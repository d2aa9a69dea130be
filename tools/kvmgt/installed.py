# SPDX-License-Identifier: MIT
"""A kvmgt of ours among the modules of a kernel that is installed: put there, looked up, taken away.

The distribution's module is never touched. Ours goes into ``updates/``, where modprobe looks first, so taking it away
brings the distribution's back. There is a whole module or none: it is written beside its place, renamed, and taken away
again if modprobe would not find it then.
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.kvmgt import secure_boot
from tools.kvmgt.build import NAME, SOURCE_FIELD, our_version
from tools.kvmgt.source import package_of
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel, Log

_OURS: Final = "updates/vfio-mig"
_DKMS: Final = "updates/dkms"
DKMS_PACKAGE: Final = "vfio-mig-kvmgt-dkms"


def directory(kernel: Kernel) -> Path:
    """Return the directory of a kernel's modules."""
    return kernel.tree / "lib/modules" / kernel.release


def _place(kernel: Kernel) -> Path:
    return directory(kernel) / _OURS / f"{NAME}.ko"


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise RunnerError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _modinfo(kernel: Kernel, field: str) -> str:
    return _run("modinfo", "-b", kernel.tree, "-k", kernel.release, "-F", field, NAME)


def _depmod(kernel: Kernel) -> None:
    _run("depmod", "-b", kernel.tree, kernel.release)


@dataclass(frozen=True, slots=True)
class Found:
    """The kvmgt that modprobe would load.

    :param version: this project's, of a module of ours; empty of another one.
    :param source: the version of the source package that it was made from.
    :param signer: whose signature it carries; empty without one.
    """

    path: Path
    version: str
    source: str
    signer: str

    @property
    def is_ours(self) -> bool:
        """Whether it is one with migration."""
        return bool(self.source)


def find(kernel: Kernel) -> Found:
    """Look up the module that modprobe would load; RunnerError where there is none."""
    path = Path(re.sub("^/+", "/", _modinfo(kernel, "filename")))
    source = _modinfo(kernel, SOURCE_FIELD)
    return Found(path, _modinfo(kernel, "version") if source else "", source, _modinfo(kernel, "signer"))


def problems(kernel: Kernel) -> list[str]:
    """Say why the module that modprobe would load is not the one that would be built now; nothing where it is."""
    found = find(kernel)
    if not found.is_ours:
        return [f"{found.path} is not one of ours: it has no migration"]
    wrong = []
    if found.version != our_version():
        wrong.append(f"{found.path} is of version {found.version}, this is {our_version()}")
    if found.source != (wanted := package_of(kernel)[1]):
        wrong.append(f"{found.path} was made from the source of {found.source}, the kernel is {wanted}")
    return wrong


def _is_loaded() -> bool:
    return Path("/sys/module", NAME).exists()


def _demand(kernel: Kernel, place: Path) -> None:
    found = find(kernel)
    if not found.path.samefile(place):
        raise RunnerError(f"modprobe would load {found.path}, not {place}: see /etc/depmod.d")


def _say_loaded(kernel: Kernel, log: Log) -> None:
    if kernel.is_installed and kernel.release == os.uname().release and _is_loaded():
        log(f"the {NAME} that is loaded stays until, without vGPUs, another is: modprobe -r {NAME}; modprobe {NAME}")


def install(kernel: Kernel, built: Path, log: Log) -> Path:
    """Put *built* among the kernel's modules, signed if DKMS has a key; return where it is.

    :raises RunnerError: nothing was changed, or what was is undone.
    """
    if dkms := sorted((directory(kernel) / _DKMS).glob(f"{NAME}.ko*")):
        raise RunnerError(f"{dkms[0]} is dkms's; apt-get remove {DKMS_PACKAGE} first")
    place = _place(kernel)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as work:
        copy = Path(shutil.copyfile(built, Path(work) / place.name))
        if not secure_boot.sign(copy, kernel) and secure_boot.is_enforced(kernel.tree):
            raise RunnerError(" ".join(secure_boot.advice(kernel.tree)))
        copy.chmod(0o644)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        copy.replace(place)
    try:
        _depmod(kernel)
        _demand(kernel, place)
    except BaseException:
        remove(kernel, lambda _message: None)
        raise
    for line in secure_boot.advice(kernel.tree):
        log(line)
    _say_loaded(kernel, log)
    return place


def remove(kernel: Kernel, log: Log) -> None:
    """Take ours away; the distribution's module is then the one that is loaded."""
    place = _place(kernel)
    if dkms := sorted((directory(kernel) / _DKMS).glob(f"{NAME}.ko*")):
        raise RunnerError(f"{dkms[0]} is dkms's; apt-get remove {DKMS_PACKAGE}")
    place.unlink(missing_ok=True)
    for empty in (place.parent, place.parent.parent):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
    _depmod(kernel)
    log(f"modprobe loads {find(kernel).path}")
    _say_loaded(kernel, log)
