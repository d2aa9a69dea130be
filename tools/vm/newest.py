# SPDX-License-Identifier: MIT
"""``--kernel newest``: the newest kernel of the distribution's newer suites, with the tools that build modules for it.

Those tools, and the compiler, are programs of that release and need its C library. They are unpacked beside the kernel,
and each is replaced by a script that runs it by the unpacked loader: nothing is installed, nobody needs to be root.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tools.vm import kernels
from tools.vm.apt import unpack
from tools.vm.cache import populated, write_whole
from tools.vm.errors import RunnerError
from tools.vm.kernels import FLAVOUR, TOOLS, Kernel, link_lib, make_dependencies
from tools.vm.suites import Newer, available

NAME: Final = "newest"
_META: Final = f"linux-image-{FLAVOUR}"
_REMEMBERED: Final = f"{NAME}.release"
_SUITE: Final = "suite"  # a file in the kernel's tree: where it came from
_LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_PROGRAMS: Final = ("usr/bin", "usr/libexec", "usr/lib/gcc", "usr/lib/linux-kbuild-*")
_REAL: Final = ".real"
_USELESS: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl5", "etc", "var")
# What a build calls; other names with the architecture in front of them exist, too.
_CALLED: Final = ("gcc", "as", "ld", "ar", "nm", "objcopy", "objdump", "readelf", "strip", "pahole")
_PT_INTERP: Final = 3
_ELF_HEADER: Final = 64

Log = Callable[[str], None]


def release_of(depends: str) -> str | None:
    r"""Find the release in what ``apt-cache depends --important linux-image-amd64`` prints.

    >>> release_of("linux-image-amd64\n  Depends: linux-base-amd64\n  Depends: linux-image-7.3.4+deb13-amd64\n")
    '7.3.4+deb13-amd64'
    """
    found = re.search(rf"^\s*\|?Depends: linux-image-(\d+\.\d\S*-{FLAVOUR})$", depends, re.MULTILINE)
    return found[1] if found else None


def packages_of(release: str, names: str) -> list[str]:
    """Name the packages that an image and a module build need.

    :param names: what ``apt-cache pkgnames`` prints. From 7.x on image and modules are packages of their own.
    """
    known = set(names.split())
    parts = [name for name in (f"linux-binary-{release}", f"linux-modules-{release}") if name in known]
    return [f"linux-headers-{release}", *(parts or [f"linux-image-{release}"])]


def needs_loader(path: Path) -> bool:
    """Say whether a file is a program that the C library's loader has to start."""
    with path.open("rb") as file:
        header = file.read(_ELF_HEADER)
        if len(header) < _ELF_HEADER or header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
            return False
        offset = int.from_bytes(header[32:40], "little")
        size = int.from_bytes(header[54:56], "little")
        count = int.from_bytes(header[56:58], "little")
        file.seek(offset)
        table = file.read(size * count)
    types = (int.from_bytes(table[start : start + 4], "little") for start in range(0, len(table), size or 1))
    return _PT_INTERP in types


def _programs(tree: Path) -> Iterator[Path]:
    for pattern in _PROGRAMS:
        for directory in tree.glob(pattern):
            for path in directory.rglob("*"):
                if not path.is_symlink() and path.is_file() and os.access(path, os.X_OK) and needs_loader(path):
                    yield path


def _wrapper(program: Path, up: str) -> str:
    """Return the script that takes the place of *program*; it finds everything from where it is itself.

    :param up: the way from the program's directory to the tree.
    """
    name = program.name
    return (
        "#!/bin/sh\n"
        'me=$0; [ ! -L "$me" ] || me=$(readlink -f -- "$me") || exit; here=${me%/*}\n'
        f'root=$here/{up}\nexec "$root/{_LOADER}" --library-path "$root/{_LIBRARIES}" '
        # gcc finds its other programs by its own name
        f'--argv0 "$here/{name}" "$here/{name}{_REAL}" "$@"\n'
    )


def wrap_programs(tree: Path) -> None:
    """Replace every program below *tree* by a script that runs it with the libraries that are there, too."""
    for program in list(_programs(tree)):
        mode = program.stat().st_mode
        up = os.path.relpath(tree, program.parent)
        program.rename(program.with_name(program.name + _REAL))
        program.write_text(_wrapper(program, up))
        program.chmod(mode & 0o777)


def _link_tools(tree: Path) -> None:
    """Give the tools the names that a build calls, in a directory for PATH."""
    (tree / TOOLS).mkdir()
    up = os.path.relpath(tree, tree / TOOLS)
    for name in _CALLED:
        # x86_64-linux-gnu-gcc-14, x86_64-linux-gnu-as, pahole
        candidates = [*sorted((tree / "usr/bin").glob(f"x86_64-linux-gnu-{name}*")), tree / "usr/bin" / name]
        found = [path for path in candidates if re.fullmatch(rf"(x86_64-linux-gnu-)?{name}(-\d+)?", path.name)]
        target = next((path for path in found if path.exists()), None)
        if target is None:
            raise RunnerError(f"the packages of {tree.name} bring no {name}")
        (tree / TOOLS / name).symlink_to(f"{up}/usr/bin/{target.name}")


def _fill(suite: Newer, release: str, tree: Path) -> None:
    packages = tree / "packages"
    packages.mkdir()
    suite.download_with_dependencies(packages_of(release, suite.query("pkgnames", "linux-")), packages)
    unpack(packages, tree)
    shutil.rmtree(packages)
    for name in _USELESS:
        shutil.rmtree(tree / name, ignore_errors=True)
    link_lib(tree)
    kernel = Kernel(tree, release)
    if not kernel.image.exists():  # from 7.x on it is among the modules
        kernel.image.parent.mkdir(exist_ok=True)
        kernel.image.hardlink_to(tree / "usr/lib/modules" / release / "vmlinuz")
    wrap_programs(tree)
    _link_tools(tree)
    write_whole(tree / _SUITE, suite.suite.name + "\n")
    make_dependencies(kernel)


def _from_suite(suite: Newer, directory: Path, log: Log) -> Kernel:
    release = release_of(suite.query("depends", "--important", _META))
    if release is None:
        raise RunnerError(f"{suite.suite.name} has no {_META}")
    kernel = Kernel(directory / release, release)
    with populated(kernel.tree) as tree:
        if tree is not None:
            log(f"fetching kernel {release} of {suite.suite.name} and its compiler, 200 MB")
            _fill(suite, release, tree)
    return kernel


def fetch(cache: Path, log: Log) -> Kernel:
    """Return the newest kernel: the one in the cache if there is one, else that of the distribution's newer suites."""
    directory = cache / "kernels"
    remembered = directory / _REMEMBERED
    if remembered.exists():
        kernel = Kernel(directory / (release := remembered.read_text().strip()), release)
        if kernel.tree.is_dir():
            return kernel
    directory.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    for suite in available(cache, failures):
        try:
            kernel = _from_suite(suite, directory, log)
        except RunnerError as error:
            failures.append(str(error))
            continue
        write_whole(remembered, kernel.release + "\n")
        return kernel
    raise RunnerError(f"no kernel newer than this host's could be fetched: {'; '.join(failures)}")


def find(wanted: str, cache: Path, log: Log) -> Kernel:
    """Return the kernel that ``--kernel`` names: a series, ``newest`` or a directory."""
    return fetch(cache, log) if wanted == NAME else kernels.find(wanted, cache, log)


def suite_of(kernel: Kernel, cache: Path) -> Newer | None:
    """Return the suite that *kernel* came from, which has its source, too; None for one of the host's own sources."""
    origin = kernel.tree / _SUITE
    if not origin.exists():
        return None
    name = origin.read_text().strip()
    failures: list[str] = []
    for suite in available(cache, failures):
        if suite.suite.name == name:
            return suite
    raise RunnerError(f"{name}, where kernel {kernel.release} came from, cannot be had: {'; '.join(failures)}")
