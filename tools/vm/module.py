# SPDX-License-Identifier: MIT
"""Building the sample driver for a kernel, once per source state, and its mutations."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tools.vm.cache import locked
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel

# Each disables one mechanism; the tests must notice every one of them.
MUTATIONS: Final = ("g2h_gtt", "g2h_fence", "g2h_cmd", "pvinfo_base", "aperture_zero")
NAME: Final = "gvt_sample"
_SOURCES: Final = ("tools/kmod", "cdefs")
_SUFFIXES: Final = frozenset({".c", ".h"})
_FILES: Final = frozenset({"Makefile", "Kbuild"})


def file_name(mutation: str | None) -> str:
    """Return the name of a built module in the module directory.

    >>> file_name(None), file_name("g2h_gtt")
    ('gvt_sample.ko', 'gvt_sample-g2h_gtt.ko')
    """
    return f"{NAME}.ko" if mutation is None else f"{NAME}-{mutation}.ko"


def warnings_in(log: str) -> list[str]:
    """Return the lines of a build log that are warnings about our code.

    Kbuild's remark that another compiler built the kernel is none: CC=gcc is what we ask for.
    """
    found = re.compile(r"(^|: |\s)warning: |^WARNING: ", re.IGNORECASE)
    return [line for line in log.splitlines() if found.search(line) and "the compiler differs from" not in line]


def source_files(checkout: Path) -> list[Path]:
    """List what a build reads, relative to *checkout*, in a fixed order."""
    return sorted(
        path.relative_to(checkout)
        for directory in _SOURCES
        for path in (checkout / directory).rglob("*")
        if path.is_file() and not path.name.endswith(".mod.c") and (path.suffix in _SUFFIXES or path.name in _FILES)
    )


def source_key(checkout: Path, kernel: Kernel) -> str:
    """Return a name that changes with the sources, the kernel, and where it is."""
    digest = hashlib.sha256(os.fsencode(f"{kernel.release}\0{kernel.tree}\0"))
    for path in source_files(checkout):
        content = (checkout / path).read_bytes()
        digest.update(os.fsencode(path) + b"\0" + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def make_command(kernel: Kernel, directory: Path, *variables: str) -> list[str]:
    """Return the kernel's own build command for the external module in *directory*.

    Debian's header directory has a Makefile of one or two lines, with absolute paths that hold only where the package
    is installed; ``-f`` goes around it.
    """
    common = kernel.common_headers
    # From 6.13 on a build does not take the directory where make runs for the one with the configuration.
    makefile = kernel.headers / "Makefile"
    output = common and makefile.is_file() and "KBUILD_OUTPUT" in makefile.read_text()
    return [
        "make", f"-j{os.cpu_count() or 1}",
        "-C", str(kernel.headers),
        *(["-f", str(common / "Makefile")] if common else []),
        *([f"KBUILD_OUTPUT={kernel.headers}"] if output else []),
        f"M={directory}",
        "CC=gcc",  # the default is the versioned compiler that built the kernel
        "CONFIG_DEBUG_INFO_BTF_MODULES=",  # or a missing pahole is an error
        *variables,
        "modules",
    ]  # fmt: skip


def make(kernel: Kernel, directory: Path, what: str, *variables: str) -> str:
    """Build the external module in *directory*; return make's log."""
    # MAKEFLAGS of a make that called us would change what this one does.
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    if kernel.tools is not None:
        environment["PATH"] = f"{kernel.tools}:{environment['PATH']}"
    done = subprocess.run(
        make_command(kernel, directory, *variables),
        env={**environment, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RunnerError(f"building {what} failed:\n{done.stdout}")
    return done.stdout


def _copy_sources(checkout: Path, work: Path) -> None:
    for path in source_files(checkout):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout / path, work / path)


def _compile(kernel: Kernel, work: Path, mutation: str | None) -> Path:
    """Build in *work*; what an earlier mutation has left there and this one does not change is not built again."""
    what = f"{file_name(mutation)} for {kernel.release}"
    variables = [f"CDEFS={work / 'cdefs'}", "W=1", *([f"BREAK={mutation}"] if mutation else [])]
    log = make(kernel, work / "tools/kmod", what, *variables)
    if warned := warnings_in(log):
        raise RunnerError(f"building {what} gave {len(warned)} warning(s):\n{log}")
    built = work / "tools/kmod" / f"{NAME}.ko"
    if not built.exists():
        raise RunnerError(f"the build of {what} left no {NAME}.ko:\n{log}")
    return built


def build(checkout: Path, kernel: Kernel, cache: Path, mutations: tuple[str | None, ...]) -> Path:
    """Make sure that the named builds exist (None is the driver itself); return the directory that holds them."""
    if not (checkout / "tools/kmod").is_dir():
        raise RunnerError(f"{checkout}/tools/kmod is missing; --no-module runs without the sample driver")
    directory = cache / "modules" / source_key(checkout, kernel)
    with locked(cache / "modules" / f".{directory.name}.lock"):
        directory.mkdir(exist_ok=True)
        missing = [mutation for mutation in mutations if not (directory / file_name(mutation)).exists()]
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache / "modules") as work:
            if missing:
                _copy_sources(checkout, Path(work))
            for mutation in missing:
                _compile(kernel, Path(work), mutation).replace(directory / file_name(mutation))
    return directory
