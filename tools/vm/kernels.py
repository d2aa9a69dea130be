# SPDX-License-Identifier: MIT
"""Debian's kernels, fetched and unpacked into the cache; nothing is installed and root is not needed."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.apt import Apt, unpack
from tools.vm.cache import populated, write_whole
from tools.vm.errors import RunnerError

SERIES: Final = ("6.12", "6.1")
FLAVOUR: Final = "amd64"
TOOLS: Final = "tools"  # a directory in the tree of a kernel that brings its own compiler

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: ``boot/``, ``lib/modules/`` and ``usr/src/`` below *tree*."""

    tree: Path
    release: str  # as uname -r says it

    @property
    def is_installed(self) -> bool:
        """Whether it is one of this host's, not one that is unpacked in a directory."""
        return self.tree == Path("/")

    @property
    def image(self) -> Path:
        """The bootable image."""
        return self.tree / "boot" / f"vmlinuz-{self.release}"

    @property
    def headers(self) -> Path:
        """The directory that external modules are built against."""
        return self.tree / "usr" / "src" / f"linux-headers-{self.release}"

    @property
    def common_headers(self) -> Path | None:
        """The part of Debian's header packages that all flavours share; other kernels have none."""
        shared = sorted(self.headers.parent.glob("linux-headers-*-common"))
        own = self.headers.with_name(f"linux-headers-{self.release.rpartition('-')[0]}-common")
        return own if own in shared else next(iter(shared), None)

    @property
    def uapi(self) -> Path:
        """The directory of the headers for programs; in Debian's packages the part that all flavours share has it."""
        return (self.common_headers or self.headers) / "include" / "uapi"

    @property
    def tools(self) -> Path | None:
        """The directory with the compiler that came with it; None for the host's own."""
        return path if (path := self.tree / TOOLS).is_dir() else None


def release_from_depends(output: str, series: str) -> str | None:
    r"""Find the release in what ``apt-cache depends --important linux-image-…`` prints.

    >>> release_from_depends("linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n", "6.1")
    '6.1.0-56-amd64'
    """
    pattern = rf"^\s*\|?Depends: linux-image-({re.escape(series)}\.\S*-{FLAVOUR})$"
    found = re.search(pattern, output, re.MULTILINE)
    return found[1] if found else None


def packages_of(release: str, series: str, kbuild_names: str) -> list[str]:
    """Name the packages that an image and a module build need.

    :param kbuild_names: what ``apt-cache pkgnames linux-kbuild-`` prints. Newer kernels' kbuild package
        carries the whole version, older ones' only the series.
    """
    version = release.removesuffix(f"-{FLAVOUR}")
    known = set(kbuild_names.split())
    kbuild = next((name for name in (f"linux-kbuild-{version}", f"linux-kbuild-{series}") if name in known), None)
    if kbuild is None:
        raise RunnerError(f"no linux-kbuild package fits kernel {release}")
    return [f"linux-image-{release}", f"linux-headers-{release}", f"linux-headers-{version}-common", kbuild]


def find_release(apt: Apt, series: str) -> str | None:
    """Ask the package lists for the newest release of *series*."""
    for package in (f"linux-image-{series}-{FLAVOUR}", f"linux-image-{FLAVOUR}"):
        if release := release_from_depends(apt.query("depends", "--important", package), series):
            return release
    return None


def _unpack(packages: Path, tree: Path) -> None:
    unpack(packages, tree)
    link_lib(tree)


def link_lib(tree: Path) -> None:
    """Have ``lib`` in *tree*: where /usr is merged, newer packages carry usr/lib/modules only."""
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")


def _fetch_once(apt: Apt, series: str, kernels: Path, log: Log) -> Kernel:
    release = find_release(apt, series)
    if release is None:
        raise RunnerError(f"this system's package sources have no kernel {series}; unpack one and use --kernel PATH")
    kernel = Kernel(kernels / release, release)
    with populated(kernel.tree) as tree:
        if tree is not None:
            log(f"fetching kernel {release}, 120 MB")
            packages = tree / "packages"
            packages.mkdir()
            apt.download(packages_of(release, series, apt.query("pkgnames", "linux-kbuild-")), packages)
            _unpack(packages, tree)
            shutil.rmtree(packages)
            make_dependencies(Kernel(tree, release))
    return kernel


def make_dependencies(kernel: Kernel) -> None:
    """Make modules.dep and its like, which packages make only when they are installed."""
    done = subprocess.run(
        ["depmod", "-b", kernel.tree, kernel.release],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RunnerError(f"depmod failed: {done.stderr.strip()}")


def fetch(series: str, cache: Path, log: Log) -> Kernel:
    """Return the kernel of *series*, from the cache if it is there, else from the system's package sources."""
    kernels = cache / "kernels"
    remembered = kernels / f"{series}.release"
    if remembered.exists():
        kernel = Kernel(kernels / (release := remembered.read_text().strip()), release)
        if kernel.tree.is_dir():
            return kernel
    kernels.mkdir(parents=True, exist_ok=True)
    apt = Apt(cache / "apt")
    apt.update()
    try:
        kernel = _fetch_once(apt, series, kernels, log)
    except RunnerError:
        # Between the lists and the download a mirror may have moved on; once more with what it says now.
        apt.update()
        kernel = _fetch_once(apt, series, kernels, log)
    write_whole(remembered, kernel.release + "\n")
    return kernel


def from_directory(tree: Path) -> Kernel:
    """Take the one kernel that is unpacked below *tree*."""
    images = sorted(tree.glob("boot/vmlinuz-*"))
    if len(images) != 1:
        raise RunnerError(f"{tree}: expected one boot/vmlinuz-RELEASE, found {len(images)}")
    kernel = Kernel(tree.absolute(), images[0].name.removeprefix("vmlinuz-"))
    if not (tree / "lib" / "modules" / kernel.release).is_dir():
        raise RunnerError(f"{tree}: lib/modules/{kernel.release} is missing")
    if not (tree / "lib" / "modules" / kernel.release / "modules.dep").exists():
        make_dependencies(kernel)
    return kernel


def installed(release: str) -> Kernel | None:
    """Return the kernel of that release that is installed on this host, None if none is."""
    kernel = Kernel(Path("/"), release)
    there = re.fullmatch(r"\d[\w.+~-]*", release) and (kernel.tree / "lib" / "modules" / release).is_dir()
    return kernel if there else None


def find(wanted: str, cache: Path, log: Log) -> Kernel:
    """Return the kernel that ``--kernel`` names: a series or a directory."""
    return fetch(wanted, cache, log) if wanted in SERIES else from_directory(Path(wanted))
