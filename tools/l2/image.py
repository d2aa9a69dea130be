# SPDX-License-Identifier: MIT
"""Make the guest's files: a kernel, and an initramfs with busybox, i915 and the load.

All but the load and the first script is the distribution's.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from tools.l2 import cpio
from tools.vm.cache import populated
from tools.vm.errors import RunnerError
from tools.vm.gvt import expanded, load_order
from tools.vm.kernels import Kernel

KERNEL: Final = "kernel"
INITRAMFS: Final = "initramfs"
MODULE: Final = "i915"
PARAMETERS: Final = {
    # Each store to a console's frame buffer would trap: minutes
    "drm_kms_helper": "fbdev_emulation=0",
    "drm_client_lib": "active=",
}
"""Of the guest's modules, where a kernel has such a one."""

_HERE: Final = Path(__file__).parent
_SOURCES: Final = ("load.c", "init.sh", "cpio.py", "image.py")
_BUSYBOX: Final = ("/bin/busybox", "/usr/bin/busybox")
_DIRECTORIES: Final = ("bin", "dev", "lib", "proc", "sys")
_COMPILE: Final = ("gcc", "-static", "-O2", "-s", "-Wall", "-Wextra", "-Werror", "-D__user=")


class Image(NamedTuple):
    """The files of a guest."""

    kernel: Path
    initramfs: Path

    @classmethod
    def of(cls, directory: Path) -> "Image":
        """Name the files in a directory that :func:`build` has returned."""
        return cls(directory / KERNEL, directory / INITRAMFS)


def busybox() -> Path:
    """Return the host's static busybox.

    :raises RunnerError: there is none.
    """
    for name in _BUSYBOX:
        if (path := Path(name)).exists():
            return path
    raise RunnerError("the guest of a vGPU needs a static busybox: install busybox-static")


def compile_load(kernel: Kernel, target: Path) -> None:
    """Compile the load for the requests of *kernel*'s i915: the C library's package does not carry them.

    :raises RunnerError: the compiler complains.
    """
    # Its headers of DRM, and of the rest those that the C library's package is too old for
    where = ["-isystem", str(kernel.uapi / "drm"), "-idirafter", str(kernel.uapi)]
    command = [*_COMPILE, *where, "-o", str(target), str(_HERE / "load.c")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunnerError(f"the load of a vGPU's guest cannot be compiled:\n{done.stderr.strip()}")


def entries(kernel: Kernel, load: bytes) -> list[cpio.Entry]:
    """Return what is in the initramfs."""
    modules = load_order(kernel, MODULE)
    names = [path.name.partition(".")[0] + ".ko" for path in modules]
    lines = [f"{name} {PARAMETERS.get(name.partition('.')[0].replace('-', '_'), '')}".rstrip() for name in names]
    return [
        *(cpio.directory(name) for name in _DIRECTORIES),
        cpio.console(),
        cpio.file("bin/busybox", busybox().read_bytes(), executable=True),
        cpio.link("bin/sh", "busybox"),
        cpio.file("init", (_HERE / "init.sh").read_bytes(), executable=True),
        cpio.file("load", load, executable=True),
        cpio.file("modules", "".join(f"{line}\n" for line in lines).encode()),
        *(cpio.file(f"lib/{name}", expanded(path)) for name, path in zip(names, modules, strict=True)),
    ]


def _digest(kernel: Kernel) -> str:
    """Name what an image is made of."""
    files = [kernel.image, busybox(), *load_order(kernel, MODULE)]
    stamps = [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    own = [(_HERE / name).read_text() for name in _SOURCES]
    return hashlib.sha256("\0".join([*stamps, *own]).encode()).hexdigest()[:16]


def build(kernel: Kernel, cache: Path, log: Callable[[str], None]) -> Path:
    """Return the directory with a guest's files for *kernel*, from the cache if they are there.

    :raises RunnerError: the kernel has no i915, or the host lacks a compiler or busybox.
    """
    directory = cache / "l2" / f"{kernel.release}-{_digest(kernel)}"
    (cache / "l2").mkdir(parents=True, exist_ok=True)
    with populated(directory) as work:
        if work is not None:
            log(f"making the guest of a vGPU, of kernel {kernel.release}")
            program = work / "load"
            compile_load(kernel, program)
            with (work / INITRAMFS).open("wb") as initramfs:
                initramfs.writelines(cpio.archive(entries(kernel, program.read_bytes())))
            shutil.copyfile(kernel.image, work / KERNEL)
    return directory
