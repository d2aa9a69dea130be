# SPDX-License-Identifier: MIT
"""A real libvirt daemon, with its own QEMU, in a root directory of its own: ``scripts/vm --libvirt``.

Two of them are two hosts to libvirt: each has its own UUID, state and domains, and they share devices and /dev.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tools.vm import libvirt

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLE: Final = "VFIO_MIG_LIBVIRT"
SOCKET: Final = "run/libvirt/libvirt-sock"
SECONDS: Final = 120.0
DEFAULT: Final = Path("/run/libvirt")
"""Where a client looks that was told ``qemu:///system``."""
SHARED: Final = "shared"
"""A directory that all daemons and this program have, as /shared."""

_REAPER: Final = Path(__file__).parent / "reaper.py"
_QEMU_CONF: Final = """\
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
namespaces = [ ]
cgroup_controllers = [ ]
"""
_DAEMON_CONF: Final = """\
log_level = 3
log_outputs = "3:file:/run/libvirtd.log"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/root"}
_USERS: Final = "root:x:0:0::/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n"
_GROUPS: Final = "root:x:0:\nlibvirt-qemu:x:64055:\nkvm:x:64056:\n"


def available() -> bool:
    """Tell whether this is a VM that was started with ``--libvirt``."""
    return VARIABLE in os.environ


def tree() -> Path:
    """Return the directory that :func:`tools.vm.libvirt.fetch` has made."""
    return Path(os.environ[VARIABLE])


def client() -> dict[str, str]:
    """Return the variables with which a Python finds libvirt's binding."""
    below = tree() / libvirt.BINDING
    return {
        "LD_LIBRARY_PATH": f"{below / 'usr/lib/x86_64-linux-gnu'}",
        "PYTHONPATH": f"{below / 'usr/lib/python3/dist-packages'}",
    }


def have_binding() -> None:
    """Let this process, and its forks, import the binding without these variables.

    :raises ImportError: it is for another Python.
    """
    variables = client()
    missing = sorted(str(path) for path in Path(variables["LD_LIBRARY_PATH"]).glob("lib*.so.?*"))
    while missing:  # each needs others, which may not be loaded yet
        left = [name for name in missing if not _is_loaded(name)]
        if len(left) == len(missing):
            break
        missing = left
    sys.path += [variables["PYTHONPATH"], "/usr/lib/python3/dist-packages"]
    importlib.import_module("libvirt_qemu")


def _is_loaded(name: str) -> bool:
    """Load a library, and tell whether that has worked."""
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


class VirshError(RuntimeError):
    """virsh has failed, with what it said."""


class Libvirtd:
    """A running daemon.

    :ivar root: its root directory.
    """

    def __init__(self, root: Path) -> None:
        self.root: Final = root

    @property
    def uri(self) -> str:
        """How a client of the VM reaches it."""
        return f"qemu+unix:///system?socket={self.root / SOCKET}"

    def log(self) -> str:
        """Return what it has said, and its QEMUs."""
        logs = [self.root / "run/libvirtd.log", *(self.root / "var/log/libvirt/qemu").glob("*.log")]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in logs if path.exists())

    def virsh(self, *words: str, rc: int = 0, seconds: float = SECONDS) -> str:
        """Run virsh in the daemon's root; returns what it prints.

        :raises VirshError: it ended otherwise than with *rc*.
        """
        done = subprocess.run(
            ["chroot", self.root, "virsh", "-q", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds,
            env=_ENVIRONMENT,
        )  # fmt: skip
        if done.returncode != rc:
            raise VirshError(f"virsh {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}")
        return done.stdout if rc == 0 else done.stderr

    def define(self, name: str, xml: str) -> None:
        """Define a domain."""
        (self.root / "run" / f"{name}.xml").write_text(xml)
        self.virsh("define", f"/run/{name}.xml")

    def reach(self, other: Libvirtd) -> str:
        """Let this daemon, and virsh in its root, reach another one; returns the URI."""
        target = self.root / "run/peer"
        target.mkdir()
        subprocess.run(["mount", "--bind", other.root / "run", target], check=True)
        return "qemu+unix:///system?socket=/run/peer/libvirt/libvirt-sock"

    def _prepare(self, shared: Path) -> None:
        for name in ("proc", "sys", "dev", "run", SHARED, "tmp", "root", "var/lib/libvirt", "var/log"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("proc", "sys", "dev"):
            subprocess.run(["mount", "--rbind", f"/{name}", self.root / name], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.root / "run"], check=True)
        subprocess.run(["mount", "--bind", shared, self.root / SHARED], check=True)
        shutil.rmtree(self.root / "var/run", ignore_errors=True)
        (self.root / "var/run").unlink(missing_ok=True)
        (self.root / "var/run").symlink_to("/run")
        files = {
            "etc/passwd": _USERS,
            "etc/group": _GROUPS,
            "etc/hosts": f"127.0.0.1 localhost {os.uname().nodename}\n",
            "etc/libvirt/qemu.conf": _QEMU_CONF,
            "etc/libvirt/libvirtd.conf": _DAEMON_CONF.format(uuid=uuid.uuid4()),
        }
        for name, text in files.items():
            (self.root / name).write_text(text)

    @classmethod
    @contextlib.contextmanager
    def started(cls, directory: Path, shared: Path, *, is_default: bool = False) -> Iterator[Self]:
        """Start one; its files are below *directory*, in memory.

        :param shared: a directory that its QEMUs see as /shared.
        :param is_default: ``qemu:///system`` is this one.
        """
        parts = [directory / name for name in ("root", "upper", "work")]
        for part in parts:
            part.mkdir(parents=True)
        root, upper, work = parts
        lower = tree() / libvirt.ROOT
        with contextlib.ExitStack() as stack:
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "-o", options, "libvirt", root], check=True)
            self = cls(root)
            stack.callback(self._unmount)
            self._prepare(shared)
            if is_default:
                DEFAULT.symlink_to(root / DEFAULT.relative_to("/"))
                stack.callback(DEFAULT.unlink)
            words = ["chroot", str(root), "/usr/sbin/libvirtd", "-f", "/etc/libvirt/libvirtd.conf"]
            process = stack.enter_context(
                subprocess.Popen([sys.executable, _REAPER, *words], stdin=subprocess.DEVNULL, env=_ENVIRONMENT)
            )
            stack.callback(process.terminate)
            self._await_socket(process)
            stack.callback(self._end_domains)  # else the reaper waits for them
            yield self

    def _unmount(self) -> None:
        subprocess.run(["umount", "-l", "-R", self.root], check=False)

    def _await_socket(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + SECONDS
        while not (self.root / SOCKET).exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"libvirtd has not come up\n{self.log()}")
            time.sleep(0.05)

    def _end_domains(self) -> None:
        for name in self.virsh("list", "--name").split():
            self.virsh("destroy", name)
