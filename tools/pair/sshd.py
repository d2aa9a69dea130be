# SPDX-License-Identifier: MIT
"""A real OpenSSH server for a VM, and what its client needs.

Nothing is installed on the host: what it lacks of the distribution's openssh-server and openssh-client is unpacked into
the cache. In the VM, whose writes are lost, these files are put where the packages would have put them.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.vm.apt import KEPT_ERROR_LINES, Apt, unpack
from tools.vm.cache import populated
from tools.vm.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TREE: Final = "VFIO_MIG_PAIR_SSH"
"""The variable that tells the VMs where the unpacked files are."""
PACKAGES: Final = ("openssh-server", "openssh-client")
OWN: Final = Path("/run/pair")
"""A directory of the VM's, for keys."""
PORT: Final = 22
PROGRAMS: Final = ("/usr/sbin/sshd", "/usr/bin/ssh", "/usr/bin/ssh-keygen")
_START_SECONDS: Final = 30.0

_CONFIG: Final = f"""\
ListenAddress {{address}}
Port {PORT}
HostKey {OWN}/host_key
AuthorizedKeysFile {OWN}/user_key.pub
Banner {OWN}/banner
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


# --- on the host


def fetch(cache: Path, log: Callable[[str], None], apt: Apt | None = None, programs: Sequence[str] = PROGRAMS) -> Path:
    """Return a directory with the files that this host lacks; an empty one where it has the programs.

    :raises RunnerError: they cannot be had.
    """
    lacks = [program for program in programs if not Path(program).exists()]
    if not lacks:
        nothing = cache / "tools" / "ssh-of-host"
        nothing.mkdir(parents=True, exist_ok=True)
        return nothing
    apt = apt or Apt(cache / "apt")
    version = apt.candidate(PACKAGES[0])
    if version is None:
        apt.update()
        version = apt.candidate(PACKAGES[0])
    # Another set of files where more is missing
    final = cache / "tools" / f"ssh-{len(lacks)}-{(version or 'unknown').replace(':', '_')}"
    with populated(final) as work:
        if work is not None:
            log(f"fetching {' and '.join(PACKAGES)} {version or ''}, 2 MB")
            _fill(apt, work)
    return final


def _fill(apt: Apt, tree: Path) -> None:
    packages = tree / "packages"
    (packages / "partial").mkdir(parents=True)
    # With all that the host does not have of what they need
    words = ["-y", "--no-install-recommends", "--download-only", "-o", "Debug::NoLocking=1"]
    words += ["-o", f"Dir::Cache::archives={packages}", "install", *PACKAGES]
    done = apt.run("apt-get", *words)
    if done.returncode:
        apt.update()  # old lists name packages that the mirror has dropped
        done = apt.run("apt-get", *words)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-KEPT_ERROR_LINES:])
        raise RunnerError(f"apt-get could not download {' and '.join(PACKAGES)}; install them:\n{last}")
    unpack(packages, tree)
    shutil.rmtree(packages)


# --- in a VM


def _in_a_vm() -> None:
    if "VFIO_MIG_VM" not in os.environ:
        raise RuntimeError("this is a host, and no VM whose writes are lost")


def install() -> None:
    """Put the unpacked files where they belong, but for those that are there."""
    _in_a_vm()
    tree = Path(os.environ[TREE])
    for source in tree.rglob("*"):
        target = Path("/") / source.relative_to(tree)
        if not source.is_dir() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


def own_home() -> Path:
    """Have a ~/.ssh of the VM's own, without anything of the host's user; return root's home."""
    _in_a_vm()
    home = Path(pwd.getpwuid(0).pw_dir)
    (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run(["busybox", "mount", "-t", "tmpfs", "-o", "mode=0700,size=1m", "none", home / ".ssh"], check=True)
    OWN.mkdir(mode=0o700, exist_ok=True)
    return home


def make_key(name: str) -> str:
    """Make a pair of keys; return the public one."""
    path = OWN / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
    return path.with_name(f"{name}.pub").read_text().strip()


def _accounts() -> None:
    """Let root log in by key into a bash, whatever the host's root may do, and have the server's own account."""
    passwd = Path("/etc/passwd")
    lines = [line.split(":") for line in passwd.read_text().splitlines()]
    for line in lines:
        if line[0] == "root":
            line[-1] = "/bin/bash"
    if "sshd" not in (line[0] for line in lines):
        lines.append(["sshd", "x", "65533", "65534", "", "/run/sshd", "/usr/sbin/nologin"])
    passwd.write_text("".join(f"{':'.join(line)}\n" for line in lines))
    shadow = Path("/etc/shadow")
    shadow.unlink(missing_ok=True)
    shadow.write_text("root:*:::::::\nsshd:*:::::::\n")
    shadow.chmod(0o600)


class Server:
    """A server that root reaches by the key of :func:`make_key`, in this VM."""

    def __init__(self, address: str, banner: str) -> None:
        _in_a_vm()
        _accounts()
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        (OWN / "banner").write_text(banner)
        (OWN / "sshd_config").write_text(_CONFIG.format(address=address))
        self.log: Final = OWN / "log"
        with self.log.open("wb") as log:
            self._process: Final = subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-e", "-f", OWN / "sshd_config"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},  # as of a host's own: without a virtual environment
            )  # fmt: skip
        end = time.monotonic() + _START_SECONDS
        while "listening on" not in self.log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"sshd does not start: {self.log.read_text(errors='replace')}")
            time.sleep(0.1)

    def _sessions(self) -> list[int]:
        """Return the processes that each serve a connection."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def signal_sessions(self, number: signal.Signals) -> int:
        """Send a signal to whatever serves a connection; how many there were."""
        pids = self._sessions()
        for pid in pids:
            os.kill(pid, number)
        return len(pids)

    def close(self) -> None:
        """End it, with all connections."""
        self.signal_sessions(signal.SIGKILL)
        self._process.kill()
        self._process.wait()
