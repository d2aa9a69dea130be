# SPDX-License-Identifier: MIT
"""apt, used without root and without touching what is installed: lists and downloads are kept in the cache."""

import re
import subprocess
from pathlib import Path
from typing import Final

from tools.vm.cache import locked
from tools.vm.errors import RunnerError

KEPT_ERROR_LINES: Final = 15


def version_of(show: str) -> str | None:
    r"""Return the version in what ``apt-cache show`` prints.

    >>> version_of("Package: linux-source-6.12\nVersion: 6.12.117-1\n")
    '6.12.117-1'
    """
    found = re.search(r"^Version: (\S+)$", show, re.MULTILINE)
    return found[1] if found else None


class Apt:
    """The system's package sources, used with lists and a cache of our own, so that no root is needed.

    One program at a time: apt fails, and apt-cache finds nothing, where another one is at work on the lists.
    """

    def __init__(self, directory: Path) -> None:
        self._lock = directory / ".lock"
        self._lists = directory / "lists"
        self._options = [
            "-o", f"Dir::State::Lists={self._lists}",
            "-o", f"Dir::Cache={directory / 'cache'}",
            "-o", "APT::Sandbox::User=",  # as root apt would drop to a user who cannot write here, and warn
            "-o", "Acquire::Retries=3",
        ]  # fmt: skip
        (self._lists / "partial").mkdir(parents=True, exist_ok=True)
        (directory / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of apt's programs; RunnerError where there is no apt."""
        try:
            with locked(self._lock):
                return subprocess.run(
                    [program, *self._options, *arguments],
                    cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
                )  # fmt: skip
        except FileNotFoundError:
            message = f"{program} is missing: kernels are fetched with apt; elsewhere unpack one and use --kernel PATH"
            raise RunnerError(message) from None

    def update(self) -> None:
        """Fetch the package lists. A source that is away is not fatal: the kernel may come from another one."""
        self.run("apt-get", "update")

    def query(self, *arguments: str) -> str:
        """Return what apt-cache prints, or nothing when it fails."""
        done = self.run("apt-cache", *arguments)
        return done.stdout if done.returncode == 0 else ""

    def candidate(self, package: str) -> str | None:
        """Return the version of *package* that would be installed, None when no list has it."""
        return version_of(self.query("show", "--no-all-versions", package))

    def download(self, packages: list[str], directory: Path) -> None:
        """Download *packages* into *directory*."""
        done = self.run("apt-get", "download", *packages, cwd=directory)
        if done.returncode != 0:
            last = "\n".join(done.stderr.splitlines()[-KEPT_ERROR_LINES:])
            raise RunnerError(f"apt-get could not download {' '.join(packages)}:\n{last}")


class HostApt(Apt):
    """The system's package sources with the system's own lists, which are only read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._options = ["-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3"]

    def update(self) -> None:
        """Leave the lists as they are: they are the administrator's."""


def unpack(packages: Path, tree: Path) -> None:
    """Unpack the packages in the directory *packages* into *tree*; none is installed, no script of theirs runs."""
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, tree], check=True)
