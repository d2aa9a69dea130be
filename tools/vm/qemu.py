# SPDX-License-Identifier: MIT
"""Which QEMU runs the VM: the host's own if it is good enough, else one that is unpacked into the cache.

Emulation in QEMU before 8.1 races with a kernel that patches its own code: an instruction may be translated while its
first byte is the kernel's breakpoint, and the kernel dies of an int3 that nobody set (QEMU locks the pages before it
translates since July 2023). That happens at boot, once in some tens of times.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tools.vm.apt import unpack
from tools.vm.cache import populated, write_whole
from tools.vm.errors import RunnerError
from tools.vm.suites import Newer, available

Version = tuple[int, int]

PROGRAM: Final = "qemu-system-x86_64"
_PACKAGE: Final = "qemu-system-x86"
_LIBRARIES: Final = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib")
_LOADERS: Final = ("usr/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2")
_FIRMWARE: Final = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
_MODULES: Final = "usr/lib/x86_64-linux-gnu/qemu"
_USELESS: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale")  # a seventh of it


@dataclass(frozen=True, slots=True)
class Need:
    """What a QEMU must have."""

    name: str  # also of the file that remembers which one was fetched for it
    version: Version
    device: str | None = None

    def __str__(self) -> str:
        """Say it as a condition."""
        return f"{dotted(self.version)} or newer{f' with the device {self.device}' if self.device else ''}"


EMULATION: Final = Need("emulation", (8, 1))
KVM: Final = Need("kvm", (0, 0))


@dataclass(frozen=True, slots=True)
class Qemu:
    """How a QEMU is started."""

    version: Version
    command: tuple[str, ...] = (PROGRAM,)
    environment: dict[str, str] = field(default_factory=dict)

    def suits(self, need: Need) -> bool:
        """Say whether it has what is needed."""
        return self.version >= need.version and (need.device is None or self.has_device(need.device))

    def has_device(self, name: str) -> bool:
        """Say whether it has a device of this name.

        The list of all devices would load all modules, also those of the host's QEMU, and end in an assertion.
        """
        return f"{name} options:" in _ask(self.command, self.environment, "-device", f"{name},help")

    def shell_words(self) -> str:
        """Return the start of a shell command."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(("env", *variables) if variables else ()), *self.command])


ON_PATH: Final = Qemu((0, 0))  # whichever it is


def dotted(version: Version) -> str:
    """Write a version as people do.

    >>> dotted((8, 1))
    '8.1'
    """
    return ".".join(map(str, version))


def program_version(text: str) -> Version | None:
    """Read what ``--version`` prints.

    >>> program_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)")
    (7, 2)
    """
    found = re.search(r"^QEMU emulator version (\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def package_version(text: str) -> Version | None:
    """Read a package's version.

    >>> package_version("1:11.1.3+ds-1~bpo13+1"), package_version("1:10.0.2+ds-2+deb13u1~bpo12+1")
    ((11, 1), (10, 0))
    """
    found = re.match(r"(?:\d+:)?(\d+)\.(\d+)(?!\d)", text)
    return (int(found[1]), int(found[2])) if found else None


def _ask(command: tuple[str, ...], environment: dict[str, str], *arguments: str) -> str:
    try:
        done = subprocess.run(
            [*command, *arguments], env={**os.environ, **environment, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace", check=False,
        )  # fmt: skip
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def of_host() -> Qemu | None:
    """Return the QEMU on PATH; None when there is none, or what is there does not run."""
    version = program_version(_ask((PROGRAM,), {}, "--version"))
    return None if version is None else Qemu(version, (PROGRAM,))


def unpacked(tree: Path) -> Qemu | None:
    """Return the QEMU below *tree*, run by its own loader with its own libraries; None when it does not run."""
    loader = next((path for name in _LOADERS if (path := tree / name).exists()), None)
    program = tree / "usr/bin" / PROGRAM
    if loader is None or not program.exists():
        return None
    libraries = ":".join(str(path) for name in _LIBRARIES if (path := tree / name).is_dir())
    firmware = [word for name in _FIRMWARE if (path := tree / name).is_dir() for word in ("-L", str(path))]
    command = (str(loader), "--library-path", libraries, str(program), *firmware)
    # Else it looks where it would be if it were installed, and fails on the host's modules, which are another build's.
    environment = {"QEMU_MODULE_DIR": str(tree / _MODULES)}
    version = program_version(_ask(command, environment, "--version"))
    return None if version is None else Qemu(version, command, environment)


def _fill(suite: Newer, version: str, tree: Path) -> None:
    packages = tree / "packages"
    packages.mkdir()
    suite.download_with_dependencies([f"{_PACKAGE}={version}"], packages)
    unpack(packages, tree)
    shutil.rmtree(packages)
    for name in _USELESS:
        shutil.rmtree(tree / name, ignore_errors=True)


def _from_suite(suite: Newer, need: Need, cache: Path, log: Callable[[str], None]) -> tuple[Path, Qemu]:
    """Return the QEMU of *suite* and the directory that has it; RunnerError when it is not what is needed."""
    version = suite.candidate(_PACKAGE)
    number = package_version(version) if version else None
    if version is None or number is None or number < need.version:
        raise RunnerError(f"{suite.suite.name} has QEMU {version or 'not at all'}")
    directory = cache / "qemu" / f"{suite.suite.name}_{version.replace(':', '_')}"
    with populated(directory) as tree:
        if tree is not None:
            log(f"fetching QEMU {version} of {suite.suite.name}, 40 MB")
            _fill(suite, version, tree)
    found = unpacked(directory)
    if found is None:
        raise RunnerError(f"QEMU {version} of {suite.suite.name} does not run here ({directory})")
    if not found.suits(need):
        raise RunnerError(f"QEMU {version} of {suite.suite.name} lacks the device {need.device}")
    return directory, found


def fetch(need: Need, cache: Path, log: Callable[[str], None]) -> Qemu:
    """Return a QEMU from the cache if it is there, else from the distribution's newer suites."""
    (cache / "qemu").mkdir(parents=True, exist_ok=True)
    remembered = cache / "qemu" / f"{need.name}.directory"
    if remembered.exists():
        found = unpacked(cache / "qemu" / remembered.read_text().strip())
        if found is not None and found.suits(need):
            return found
    failures: list[str] = []
    for suite in available(cache, failures):
        try:
            directory, found = _from_suite(suite, need, cache, log)
        except RunnerError as error:
            failures.append(str(error))
            continue
        write_whole(remembered, directory.name + "\n")
        return found
    raise RunnerError(f"no QEMU {need} could be fetched: {'; '.join(failures)}")


def of_suite(name: str, cache: Path, log: Callable[[str], None]) -> Qemu:
    """Return the QEMU of one of the distribution's newer suites, whatever its version.

    :raises RunnerError: there is no such suite, or its QEMU does not run here.
    """
    (cache / "qemu").mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    names = []
    for suite in available(cache, failures):
        names.append(suite.suite.name)
        if names[-1] == name:
            return _from_suite(suite, KVM, cache, log)[1]
    raise RunnerError("; ".join([f"no suite {name}; there are: {', '.join(names) or 'none'}", *failures]))


def find(need: Need, cache: Path, log: Callable[[str], None], warn: Callable[[str], None]) -> Qemu:
    """Return the host's QEMU if it has what is needed, else one in the cache.

    Where emulation must make do with an older one, that is said; a device that is needed cannot be done without.

    :param warn: told what the user must know.
    """
    host = of_host()
    if host is not None and host.suits(need):
        return host
    try:
        return fetch(need, cache, log)
    except RunnerError as error:
        if host is None or need.device is not None:
            have = "this host has none" if host is None else f"this host has {dotted(host.version)}"
            raise RunnerError(f"QEMU {need} is needed and {have}; install one. {error}") from None
        warn(
            f"this host's QEMU is {dotted(host.version)}: before {dotted(need.version)} an emulated kernel may die at "
            f"boot of an int3 that nobody set. {error}"
        )
        return host
