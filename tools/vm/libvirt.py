# SPDX-License-Identifier: MIT
"""``--libvirt``: a libvirt daemon for the VM, with a QEMU of its own time, and libvirt's Python binding.

The daemon is that of the distribution's newer suites, as an older one does not know how to migrate with a newer QEMU
(9.0 with 11.1: ``Parameter 'detach' is unexpected``). It is unpacked with all that it depends on: a root directory to
change into. The binding is the host's own release's, as it is for that release's Python; what of its libraries the host
has is not fetched. Nothing is installed, on the host or in the cache, and no script of a package runs.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tools.vm.apt import KEPT_ERROR_LINES, Apt, unpack
from tools.vm.cache import populated, write_whole
from tools.vm.errors import RunnerError
from tools.vm.suites import Newer, available

ROOT: Final = "root"
BINDING: Final = "binding"
_DAEMON: Final = "libvirt-daemon"
_PACKAGES: Final = (_DAEMON, "libvirt-daemon-driver-qemu", "libvirt-clients", "qemu-system-x86")
_BINDING: Final = "python3-libvirt"
_USELESS: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale")
_REMEMBERED: Final = "current.directory"


def _fill(suite: Newer, host: Apt, directory: Path) -> None:
    packages = directory / "packages"
    packages.mkdir()
    suite.download_with_dependencies(list(_PACKAGES), packages)
    unpack(packages, directory / ROOT)
    shutil.rmtree(packages)
    for name in _USELESS:
        shutil.rmtree(directory / ROOT / name, ignore_errors=True)
    (packages / "partial").mkdir(parents=True)
    host.update()
    done = host.run(
        "apt-get", "-y", "-o", f"Dir::Cache::archives={packages}", "-o", "Debug::NoLocking=true",
        "--no-install-recommends", "--download-only", "install", _BINDING,
    )  # fmt: skip
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-KEPT_ERROR_LINES:])
        raise RunnerError(f"apt-get could not download {_BINDING}:\n{last}")
    (directory / BINDING).mkdir()
    unpack(packages, directory / BINDING)
    shutil.rmtree(packages)


def fetch(cache: Path, log: Callable[[str], None]) -> Path:
    """Return the directory with both, from the cache if it is there.

    :raises RunnerError: no suite has it.
    """
    kept = cache / "libvirt"
    kept.mkdir(parents=True, exist_ok=True)
    remembered = kept / _REMEMBERED
    if remembered.exists() and (found := kept / remembered.read_text().strip()).is_dir():
        return found
    failures: list[str] = []
    for suite in available(cache, failures):
        version = suite.candidate(_DAEMON)
        if version is None:
            failures.append(f"{suite.suite.name} has no {_DAEMON}")
            continue
        directory = kept / f"{suite.suite.name}_{version.replace(':', '_')}"
        try:
            with populated(directory) as empty:
                if empty is not None:
                    log(f"fetching libvirt {version} of {suite.suite.name} with its QEMU, 55 MB")
                    _fill(suite, Apt(cache / "apt"), empty)
        except RunnerError as error:
            failures.append(str(error))
            continue
        write_whole(remembered, directory.name + "\n")
        return directory
    raise RunnerError(f"no libvirt could be fetched: {'; '.join(failures)}")
