# SPDX-License-Identifier: MIT
"""Newer suites of the distribution than the host's own, read by an apt configuration of our own.

The host's sources, lists, preferences and installed packages stay as they are and count for nothing: what is fetched
brings all its dependencies along, is unpacked into the cache, and runs from there. The mirror is the one that the
host's own sources name. Every list and package is checked against the distribution's keys, as the host's keyring has
them; if that is older than the suite, against those of the newest keyring in the host's own, checked, sources.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.apt import KEPT_ERROR_LINES, Apt, unpack
from tools.vm.cache import write_whole
from tools.vm.errors import RunnerError

# Debian's releases in their order; testing is the last one.
RELEASES: Final = ("bullseye", "bookworm", "trixie", "forky", "duke")
_ALIASES: Final = ("oldstable", "stable", "testing")
_OS_RELEASE: Final = Path("/etc/os-release")
_KEYRING: Final = "debian-archive-keyring"
_KEYRINGS: Final = Path("/usr/share/keyrings")

_CONFIG: Final = """\
// Hooks of the host's are about what is installed there.
#clear APT::Update;
#clear DPkg;
#clear APT::Periodic;
Dir::Etc::sourcelist "{directory}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "{directory}/keys";
Dir::State "{directory}";
Dir::State::Lists "{directory}/lists";
Dir::State::status "{directory}/status";
APT::Default-Release "{suite}";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Architecture "amd64";
#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
Acquire::Languages "none";
// Whatever the host allows: nothing unsigned gets in here.
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
"""


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite, and the release whose packages it needs besides its own."""

    name: str
    release: str


def codename(os_release: str) -> str | None:
    r"""Return the codename of the Debian release that ``/etc/os-release`` tells of; None for another system.

    >>> codename('ID=debian\nVERSION_CODENAME=bookworm\n'), codename("ID=ubuntu\nVERSION_CODENAME=noble\n")
    ('bookworm', None)
    """
    values = dict(re.findall(r"^([A-Z_]+)=[\"']?([^\"'\n]*)", os_release, re.MULTILINE))
    return values.get("VERSION_CODENAME") if values.get("ID") == "debian" else None


def newer(host: str) -> list[Suite]:
    """Return the suites that a host of this release may take packages from, the best choice first.

    >>> [suite.name for suite in newer("bookworm")]
    ['trixie-backports', 'bookworm-backports', 'trixie']
    """
    if host not in RELEASES:
        return []
    own = RELEASES.index(host)
    following = RELEASES[own + 1 : own + 2]
    return [
        *(Suite(f"{release}-backports", release) for release in (*following, host)),
        *(Suite(release, release) for release in following),
    ]


def mirrors(print_uris: str, host: str) -> list[str]:
    r"""Return the mirrors that have the release *host*, from what ``apt-get update --print-uris`` prints.

    A distribution's own mirror has updates besides the release; others that use the same names come after it.

    >>> mirrors("'http://a.example/debian/dists/bookworm/InRelease' a_InRelease 0 \n", "bookworm")
    ['http://a.example/debian']
    """
    found = re.findall(r"^'([^']+)/dists/([^/']+)/(?:In)?Release'", print_uris, re.MULTILINE)
    names = (host, *_ALIASES)
    updates = {mirror for mirror, suite in found if suite.removesuffix("-updates") in names and suite not in names}
    have = dict.fromkeys(mirror for name in names for mirror, suite in found if suite == name)
    return sorted(have, key=lambda mirror: mirror not in updates)


def replace_by_copy(source: Path, target: Path) -> None:
    """Make *target* a copy of *source* in one step."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as work:
        Path(shutil.copyfile(source, Path(work) / target.name)).replace(target)


def host_keyring(directory: Path = _KEYRINGS) -> Path | None:
    """Return the file with the distribution's keys that this host has."""
    return next((path for suffix in ("pgp", "gpg") if (path := directory / f"{_KEYRING}.{suffix}").is_file()), None)


class Newer(Apt):
    """One suite at one mirror, with everything of apt's but the network settings in *directory*."""

    def __init__(self, directory: Path, suite: Suite, mirror: str, keyring: Path) -> None:
        super().__init__(directory)
        self.suite: Final = suite
        self.keyring: Final = keyring
        suites = dict.fromkeys((suite.release, suite.name))
        write_whole(directory / "sources.list", "".join(f"deb {mirror} {name} main\n" for name in suites))
        write_whole(directory / "status", "")
        (directory / "keys").mkdir(exist_ok=True)
        replace_by_copy(keyring, directory / "keys" / f"{_KEYRING}.gpg")
        write_whole(directory / "apt.conf", _CONFIG.format(directory=directory, suite=suite.name))
        self._options = ["-c", str(directory / "apt.conf"), *self._options]

    def update(self) -> None:
        """Fetch the package lists; RunnerError when one is missing or nobody known has signed it."""
        done = self.run("apt-get", "update", "--error-on=any")
        if done.returncode == 0:
            return
        if "NO_PUBKEY" in done.stderr:
            raise UnknownKeyError(f"{self.suite.name} is signed with keys that {self.keyring} does not have")
        reasons = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise RunnerError(f"{self.suite.name}: {' '.join(reasons) or f'apt-get ended with {done.returncode}'}")

    def download_with_dependencies(self, packages: list[str], directory: Path) -> None:
        """Download *packages* and all they depend on, as for a system where nothing is installed."""
        (directory / "partial").mkdir()
        done = self.run(
            "apt-get", "-y", "-o", f"Dir::Cache::archives={directory}", "--download-only", "install", *packages
        )
        if done.returncode != 0:
            last = "\n".join(done.stderr.splitlines()[-KEPT_ERROR_LINES:])
            raise RunnerError(f"apt-get could not download {' '.join(packages)} of {self.suite.name}:\n{last}")


class UnknownKeyError(RunnerError):
    """A suite's signature cannot be checked: its keys are newer than the keyring."""


def _newest_keyring(host: Apt, cache: Path) -> Path:
    """Fetch the newest keyring that the host's own sources have, whose signatures the host's keys can check."""
    kept = cache / "suites" / "keyring"
    with tempfile.TemporaryDirectory(dir=cache / "suites") as work:
        host.update()
        host.download([_KEYRING], Path(work))
        unpack(Path(work), Path(work) / "tree")
        found = host_keyring(Path(work) / "tree" / _KEYRINGS.relative_to("/"))
        if found is None:
            raise RunnerError(f"the package {_KEYRING} of this host's own sources has no keyring")
        kept.mkdir(exist_ok=True)
        return found.replace(kept / found.name)


def _open(suite: Suite, mirror: str, host: Apt, cache: Path) -> Newer:
    keyring = host_keyring()
    if keyring is None:
        raise RunnerError(f"this host has no {_KEYRINGS / _KEYRING}.gpg to check signatures with; install {_KEYRING}")
    directory = cache / "suites" / suite.name
    directory.mkdir(parents=True, exist_ok=True)
    result = Newer(directory, suite, mirror, keyring)
    try:
        result.update()
    except UnknownKeyError as error:
        result = Newer(directory, suite, mirror, _newest_keyring(host, cache))
        try:
            result.update()
        except UnknownKeyError:
            raise UnknownKeyError(f"{error}, nor has the newest {_KEYRING} of this host's own sources") from None
    return result


def available(cache: Path, failures: list[str], os_release: Path = _OS_RELEASE) -> Iterator[Newer]:
    """Open one newer suite after the other, with lists of this minute.

    :param failures: told why a suite could not be had.
    """
    text = os_release.read_text(errors="replace") if os_release.is_file() else ""
    host = codename(text)
    if host is None or host not in RELEASES:
        failures.append(f"newer suites are known for Debian {', '.join(RELEASES)} only")
        return
    apt = Apt(cache / "apt")
    known = mirrors(apt.run("apt-get", "update", "--print-uris").stdout, host)
    if not known:
        failures.append(f"this host's package sources name no mirror of {host}")
    for suite in newer(host):
        for mirror in known:
            try:
                opened = _open(suite, mirror, apt, cache)
            except RunnerError as error:
                failures.append(str(error))
            else:
                yield opened
                break
