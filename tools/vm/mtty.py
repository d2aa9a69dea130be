# SPDX-License-Identifier: MIT
"""The kernel's own sample of the migration protocol v2, ``samples/vfio-mdev/mtty.c``: fetched, and built unchanged.

Its one file comes from the source package of the very version that the kernel was built from. The rest of that package
(150 MB) is not kept.
"""

import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Final

from tools.vm import module, newest
from tools.vm.apt import Apt
from tools.vm.cache import populated
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel, Log

NAME: Final = "mtty"
_MEMBER: Final = "/samples/vfio-mdev/mtty.c"
_FIRST: Final = (6, 7)  # with migration
_SHIPPED: Final = "kernel/samples/vfio-mdev/mtty.ko"  # where a kernel that was built with its samples has it

# The x86 boot protocol's field kernel_version: where its text is, less 0x200.
_BANNER_FIELD: Final = 0x20E
_BANNER_BASE: Final = 0x200
_BANNER_MAX: Final = 512


def series_of(release: str) -> tuple[int, int]:
    """Return the first two numbers of a release.

    >>> series_of("6.12.117+deb12-amd64"), series_of("6.1.0-56-amd64")
    ((6, 12), (6, 1))
    """
    found = re.match(r"(\d+)\.(\d+)(?!\d)", release)
    if found is None:
        raise RunnerError(f"--mtty: {release} does not begin with a kernel's version")
    return int(found[1]), int(found[2])


def debian_version(image: bytes) -> str | None:
    """Return the version of the source package that a bootable image says it was built from."""
    if len(image) < _BANNER_FIELD + 2:
        return None
    start = int(struct.unpack_from("<H", image, _BANNER_FIELD)[0]) + _BANNER_BASE
    banner = image[start : start + _BANNER_MAX].partition(b"\0")[0].decode(errors="replace")
    found = re.search(r" Debian ([0-9][0-9A-Za-z.+~-]*) \(", banner)
    return found[1] if found else None


def package_of(kernel: Kernel) -> tuple[str, str]:
    """Return name and version of the source package of *kernel*; of one without migration in its mtty there is none."""
    series = series_of(kernel.release)
    if series < _FIRST:
        raise RunnerError(f"--mtty: the one of kernel {kernel.release} cannot be migrated; Linux 6.7 is the first")
    with kernel.image.open("rb") as file:
        version = debian_version(file.read(1 << 16))
    if version is None:
        raise RunnerError(f"--mtty: {kernel.image} does not say from which of Debian's source packages it was built")
    return f"linux-source-{series[0]}.{series[1]}", version


def extract(package: Path) -> bytes:
    """Return mtty.c from a source package, a tarball in a tarball; neither is written to the disk."""
    command: list[str | Path] = ["dpkg-deb", "--fsys-tarfile", package]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as dpkg:
        try:
            with tarfile.open(fileobj=dpkg.stdout, mode="r|") as outer:
                for member in outer:
                    if not re.search(r"/linux-source-[^/]*\.tar\.[a-z0-9]+$", member.name):
                        continue
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r|*") as inner:
                        for file in inner:
                            if file.name.endswith(_MEMBER) and (content := inner.extractfile(file)) is not None:
                                return content.read()
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise RunnerError(f"--mtty: {package.name} cannot be read: {error}") from None
        finally:
            dpkg.kill()  # what follows in the package is nobody's business
    raise RunnerError(f"--mtty: {package.name} has no {_MEMBER.lstrip('/')}")


def _download(apt: Apt, package: str, directory: Path) -> None:
    try:
        apt.download([package], directory)
    except RunnerError:
        # Lists may be missing, or older than the mirror; once more with what it says now.
        apt.update()
        apt.download([package], directory)


def fetch(kernel: Kernel, cache: Path, log: Log) -> Path:
    """Return mtty.c as *kernel* has it, from the cache if it is there, else from the system's package sources."""
    name, version = package_of(kernel)
    directory = cache / "sources" / f"linux-{version}"
    with populated(directory) as work:
        if work is not None:
            package = f"{name}={version}"
            log(f"fetching {package}, 150 MB, for its {_MEMBER.lstrip('/')}")
            packages = work / "packages"
            packages.mkdir()
            try:
                _download(newest.suite_of(kernel, cache) or Apt(cache / "apt"), package, packages)
            except RunnerError as error:
                first, *more = str(error).splitlines()
                reasons = " ".join(line for line in more if line.startswith("E: "))
                message = f"--mtty: {first} {reasons}".rstrip()
                raise RunnerError(f"{message} (a kernel newer than the one in {cache} may still have it)") from None
            found = sorted(packages.glob("*.deb"))
            if len(found) != 1:
                raise RunnerError(f"--mtty: the download of {package} left {len(found)} packages")
            (work / f"{NAME}.c").write_bytes(extract(found[0]))
            shutil.rmtree(packages)
    return directory / f"{NAME}.c"


def build(kernel: Kernel, cache: Path, log: Log) -> Path:
    """Make sure that mtty is built for *kernel*; return the module: the one that came with the kernel, if it did."""
    shipped = kernel.tree / "lib" / "modules" / kernel.release / _SHIPPED
    if shipped.is_file():
        return shipped
    source = fetch(kernel, cache, log).read_bytes()
    digest = hashlib.sha256(os.fsencode(f"{kernel.release}\0{kernel.tree}\0") + source)
    directory = cache / "modules" / f"{NAME}-{digest.hexdigest()[:16]}"
    with populated(directory) as work:
        if work is not None:
            make = work / "make"
            make.mkdir()
            (make / f"{NAME}.c").write_bytes(source)
            (make / "Makefile").write_text(f"obj-m := {NAME}.o\n")
            module.make(kernel, make, f"{NAME}.ko for {kernel.release}")  # its warnings are not ours to mend
            (make / f"{NAME}.ko").replace(work / f"{NAME}.ko")
            shutil.rmtree(make)
    return directory / f"{NAME}.ko"
