# SPDX-License-Identifier: MIT
"""A kernel of our own, ``--kernel custom``: the distribution's source, small, with all that its packages leave out.

That is iommufd, VFIO's device files and debugfs, and the kernel's means to find bugs: KASAN, lockdep, kmemleak, fault
injection; ``custom.config`` has the list. It is built in the cache, once per configuration, nothing is installed, and
what is kept has the layout of an unpacked package.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.apt import Apt
from tools.vm.cache import populated, write_whole
from tools.vm.errors import RunnerError
from tools.vm.kernels import SERIES, Kernel, Log, make_dependencies

NAME: Final = "custom"
FRAGMENT: Final = Path(__file__).with_name("custom.config")
_PACKAGE: Final = f"linux-source-{SERIES[0]}"
_RECIPE: Final = b"1"  # to be raised when a build does something else with the same configuration
_FREE_BYTES: Final = 4 << 30  # measured: 1.7 GB of source, 0.8 GB of objects
_KEPT_ERROR_LINES: Final = 25
# Nothing of this machine is to be in the image.
_IDENTITY: Final = {
    "KBUILD_BUILD_USER": "vfio-mig",
    "KBUILD_BUILD_HOST": "cache",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
}


def key(fragment: bytes) -> str:
    """Return a name that changes with the configuration and with how it is built."""
    return hashlib.sha256(_RECIPE + b"\0" + fragment).hexdigest()[:12]


def refused(fragment: str, config: str) -> list[str]:
    r"""Return the lines of *fragment* that the kernel's own rules did not grant, in its order.

    >>> refused("# Text\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n", "CONFIG_A=y\nCONFIG_B=y\n")
    ['# CONFIG_B is not set', 'CONFIG_C=m']
    """
    granted = set(config.splitlines())
    names = {line.partition("=")[0] for line in granted if line.startswith("CONFIG_")}
    missing = []
    for line in fragment.splitlines():
        if off := re.fullmatch(r"# (CONFIG_\w+) is not set", line):
            # An option that nothing asked about is not mentioned at all.
            if off[1] in names:
                missing.append(line)
        elif line.startswith("CONFIG_") and line not in granted:
            missing.append(line)
    return missing


@dataclass(frozen=True, slots=True)
class Build:
    """One build: where the source is, and where what is said about it goes."""

    source: Path
    log: Path

    def run(self, what: str, command: Sequence[str | Path], **variables: str) -> None:
        """Run one step; RunnerError with the end of its output when it fails."""
        # MAKEFLAGS of a make that called us would change what this one does.
        outer = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
        with self.log.open("ab") as log:
            done = subprocess.run(
                command, cwd=self.source, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**outer, **_IDENTITY, **variables, "LC_ALL": "C"}, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            last = self.log.read_text(errors="replace").splitlines()[-_KEPT_ERROR_LINES:]
            message = f"--kernel {NAME}: {what} failed (status {done.returncode}; {self.log} has all of it):"
            raise RunnerError("\n".join([message, *last]))

    def make(self, what: str, *arguments: str, **variables: str) -> None:
        """Run the kernel's make."""
        self.run(what, ["make", f"-j{len(os.sched_getaffinity(0))}", *arguments], **variables)

    def configure(self, fragment: Path) -> None:
        """Write .config: what *fragment* says, what that asks for, and nothing else."""
        self.make("configuring", "allnoconfig", KCONFIG_ALLCONFIG=str(fragment))
        if lines := refused(fragment.read_text(), (self.source / ".config").read_text()):
            raise RunnerError(f"--kernel {NAME}: this source does not grant of {fragment.name}: {', '.join(lines)}")

    def install(self, tree: Path) -> Kernel:
        """Put image, modules and headers into *tree*, as the distribution's packages have them."""
        release = (self.source / "include/config/kernel.release").read_text().strip()
        kernel = Kernel(tree, release)
        kernel.image.parent.mkdir()
        shutil.copyfile(self.source / "arch/x86/boot/bzImage", kernel.image)
        shutil.copyfile(self.source / ".config", tree / "boot" / f"config-{release}")
        shutil.copyfile(self.source / "System.map", tree / "boot" / f"System.map-{release}")
        self.make("installing the modules", "modules_install", f"INSTALL_MOD_PATH={tree}")
        (tree / "lib/modules" / release / "build").unlink(missing_ok=True)  # leads to the source, which goes away
        kernel.headers.parent.mkdir(parents=True)
        # What the kernel's own packaging does; make calls the script, as it needs make's variables.
        install = f"+$(srctree)/scripts/package/install-extmod-build {kernel.headers}"
        self.make("installing the headers", "run-command", f"KBUILD_RUN_COMMAND={install}")
        shutil.copyfile(self.source / ".config", kernel.headers / ".config")
        make_dependencies(kernel)
        return kernel


def _unpack(build: Build, package: Path, downloads: Path) -> None:
    """Unpack the tarball that the source package is made of."""
    build.run("unpacking the package", ["dpkg", "-x", package, downloads])
    found = sorted(downloads.glob("usr/src/linux-source-*.tar.*"))
    if len(found) != 1:
        raise RunnerError(f"--kernel {NAME}: {package.name} has {len(found)} tarballs of source, not one")
    build.run("unpacking the source", ["tar", "-xf", found[0], "-C", build.source, "--strip-components=1"])


def _fetch_source(cache: Path, directory: Path) -> tuple[Path, str]:
    """Download the source package; return it and its version."""
    apt = Apt(cache / "apt")
    apt.update()
    version = apt.candidate(_PACKAGE)
    if version is None:
        raise RunnerError(f"--kernel {NAME}: this system's package sources have no {_PACKAGE}")
    apt.download([f"{_PACKAGE}={version}"], directory)
    found = sorted(directory.glob("*.deb"))
    if len(found) != 1:
        raise RunnerError(f"--kernel {NAME}: the download of {_PACKAGE} left {len(found)} packages")
    return found[0], version


def _require(checkout: Path, kernels: Path) -> None:
    """Have the programs that the build needs, and the room."""
    if subprocess.run([checkout / "scripts/setup", "--custom"], stdin=subprocess.DEVNULL, check=False).returncode != 0:
        raise RunnerError(f"--kernel {NAME}: the programs that build a kernel are missing (see above)")
    free = shutil.disk_usage(kernels).free
    if free < _FREE_BYTES:
        wanted = f"{_FREE_BYTES >> 20} MiB while it is built, {free >> 20} MiB are free"
        raise RunnerError(f"--kernel {NAME}: {kernels} must have {wanted}; VFIO_MIG_CACHE chooses another place")


def _build(cache: Path, tree: Path, fragment: Path, log: Log) -> Kernel:
    downloads, source = tree / "download", tree / "source"
    downloads.mkdir()
    source.mkdir()
    log(f"fetching {_PACKAGE}, 150 MB")
    package, version = _fetch_source(cache, downloads)
    build = Build(source, cache / "kernels" / f"{NAME}.log")
    build.log.write_text("")
    _unpack(build, package, downloads)
    shutil.rmtree(downloads)
    log(f"building kernel {version} with {fragment.name}: 5 to 15 minutes, once ({build.log} grows)")
    build.configure(fragment)
    build.make("the build", "bzImage", "modules")
    kernel = build.install(tree)
    shutil.rmtree(source)
    write_whole(tree / "release", f"{kernel.release}\n{version}\n")
    return kernel


def fetch(checkout: Path, cache: Path, log: Log, fragment: Path = FRAGMENT) -> Kernel:
    """Return the custom kernel, from the cache if it is there, else built.

    :param log: told what takes long.
    :raises RunnerError: a program or the source is missing, a line of the configuration was refused, the build failed.
    """
    kernels = cache / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    final = kernels / f"{NAME}-{key(fragment.read_bytes())}"
    with populated(final) as tree:
        if tree is not None:
            _require(checkout, kernels)
            _build(cache, tree, fragment, log)
    return Kernel(final, (final / "release").read_text().splitlines()[0])
