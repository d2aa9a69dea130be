# SPDX-License-Identifier: MIT
"""Who has a device open, seen from where not everything can be seen, and by those who lie about it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import vfio_mig
from tools.lab import cli
from tools.lab.sample import host

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # what /proc shows is read alike on both kernels

NAMESPACE: Final = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
SERVER: Final = Path(__file__).parents[2] / "tools/lab/fuse_server.py"
FILESYSTEMS: Final = Path("/proc/filesystems")


def program(*args: str | Path) -> list[str]:
    return [cli._program(), *map(str, args)]


def inside(prefix: tuple[str, ...], *args: str, code: int) -> str:
    """Run the command in another place; it must end by itself. Returns all that it says."""
    done = subprocess.run([*prefix, *program(*args)], capture_output=True, text=True, timeout=cli.SECONDS, check=False)
    assert done.returncode == code, f"{args}: {done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "run as root" not in done.stdout + done.stderr  # this is root
    return done.stdout + done.stderr


def holder_column(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.split()[5]


def test_another_pid_namespace_knows_what_it_does_not_see() -> None:
    with host.instance() as vgpu:
        with cli.held(vgpu.uuid):
            assert holder_column(inside(NAMESPACE, "list", code=0), vgpu.uuid) == "?"
            status = inside(NAMESPACE, "status", vgpu.uuid, code=0)
            assert status.startswith(f"{vgpu.uuid}: unknown; ")
            assert "processes outside this PID namespace cannot be seen" in status
            assert "nobody" not in status
            assert "processes outside this PID namespace" in inside(NAMESPACE, "info", vgpu.uuid, code=0)
            for words in (("save", vgpu.uuid, "/dev/shm/a.vfm"), ("stop", vgpu.uuid), ("hold", vgpu.uuid)):
                text = inside(NAMESPACE, *words, code=3)
                assert "processes outside this PID namespace cannot be seen; run it in the host's PID namespace" in text
                assert "nobody has it open" not in text
            text = inside(NAMESPACE, "mdev", "remove", vgpu.uuid, code=3)
            assert "is open in a process that cannot be seen" in text
            assert vgpu.run_state() == "running"
        other = host.create()
        assert holder_column(inside(NAMESPACE, "list", code=0), other.uuid) == "?"
        # its group proves that it is free
        inside(NAMESPACE, "mdev", "remove", other.uuid, code=0)
        assert not Path(f"/sys/bus/mdev/devices/{other.uuid}").exists()


def test_without_proc_nothing_is_said_to_be_closed() -> None:
    place = ("unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh")
    with host.instance() as vgpu, cli.held(vgpu.uuid):
        assert holder_column(inside(place, "list", code=0), vgpu.uuid) == "?"
        status = inside(place, "status", vgpu.uuid, code=0)
        assert status.startswith(f"{vgpu.uuid}: unknown; ")
        assert "/proc is not there" in status
        assert "/proc is not there" in inside(place, "mdev", "remove", vgpu.uuid, code=3)


def test_a_proc_of_another_namespace_is_not_believed() -> None:
    """Its numbers are those of other processes here."""
    place = ("unshare", "--pid", "--fork", "--kill-child")
    with host.instance() as vgpu, cli.held(vgpu.uuid):
        assert holder_column(inside(place, "list", code=0), vgpu.uuid) == "?"
        assert "belongs to another PID namespace" in inside(place, "stop", vgpu.uuid, code=3)


@pytest.mark.parametrize("hidepid", ["1", "2"])
def test_a_hidden_holder_is_not_nobody(hidepid: str) -> None:
    place = ("unshare", "--mount", "sh", "-c", f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"', "sh")
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")
    poor = (*place, "setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-all")
    with host.instance() as vgpu, cli.held(vgpu.uuid) as pid, cli._interpreter_for_everybody():
        listed = subprocess.run([*place, *user, *program("list")], capture_output=True, text=True, check=True)
        assert holder_column(listed.stdout, vgpu.uuid) == "?"
        # root without the capability
        assert holder_column(inside(poor, "list", code=0), vgpu.uuid) == "?"
        assert re.search("cannot be looked into|hides processes", inside(poor, "status", vgpu.uuid, code=0))
        assert holder_column(inside(place, "list", code=0), vgpu.uuid) == f"{pid}:vfio-mig"


def test_an_fd_on_its_way_is_found_by_opening_the_group() -> None:
    """No process has it: it lies in a socket."""
    ours, theirs = socket.socketpair()
    with host.instance() as vgpu, ours, theirs:
        fd = os.open(f"/dev/vfio/{vgpu.group}", os.O_RDWR)
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        os.close(fd)
        cli.refused(
            "mdev", "remove", vgpu.uuid, code=3, words=("open in a process that cannot be seen", "EBUSY"), warm=True
        )
        text = cli.refused(
            "save", vgpu.uuid, "/dev/shm/b.vfm", "--open", code=3, words=("EBUSY", "on its way in a socket"), warm=True
        )
        assert "run as root" not in text


def test_a_process_saves_what_it_holds_itself(tmp_path: Path) -> None:
    with host.instance() as vgpu:
        with vfio_mig.open_device(vgpu.uuid):
            (report,) = vfio_mig.save_all([(vgpu.uuid, str(tmp_path / "gpu.vfm"))])
            assert (report.device, report.state) == (vgpu.uuid, "stop")
            assert vgpu.run_state() == "stopped"
            vfio_mig.start_device(vgpu.uuid)
            assert vgpu.run_state() == "running"
        assert (tmp_path / "gpu.vfm").stat().st_size > 0


def test_asking_keeps_no_job_from_starting(tmp_path: Path) -> None:
    with host.instance() as vgpu, cli.held(vgpu.uuid):
        loop = f"while :; do {cli._program()} -q status {vgpu.uuid}; done"
        with subprocess.Popen(["sh", "-c", loop], stdout=subprocess.DEVNULL, start_new_session=True) as asking:
            try:
                for number in range(12):
                    cli.run("-q", "save", vgpu.uuid, tmp_path / f"{number}.vfm", "--leave-running", warm=True)
            finally:
                os.killpg(asking.pid, signal.SIGKILL)


# --- those who lie


@pytest.fixture(scope="module", autouse=True)
def fuse() -> None:
    """Have FUSE in the kernel: on 6.1 it is a module."""
    if "\tfuse\n" not in FILESYSTEMS.read_text():
        cache = Path(os.environ["VFIO_MIG_KMOD_DIR"]).parents[1]
        (module,) = cache.glob(f"kernels/*/lib/modules/{os.uname().release}/kernel/fs/fuse/fuse.ko")
        subprocess.run(["insmod", module], check=True)


@contextlib.contextmanager
def liar(directory: str, name: str, *more: str) -> Iterator[str]:
    """Have a user's process with a file of its own file system open, called as a hold is; nothing there answers."""
    with tempfile.TemporaryDirectory() as place:
        called = Path(place) / "vfio-mig"
        called.symlink_to(SERVER)
        with started([sys.executable, str(called), "hold", directory, name, *more]) as path:
            yield path


@contextlib.contextmanager
def started(words: list[str]) -> Iterator[str]:
    """Start it; gives where its child's fd is in /proc."""
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pid, fd = process.stdout.readline().split()
            yield f"/proc/{pid}/fd/{fd}"
        finally:
            process.kill()


@pytest.mark.parametrize("more", [(), ("overlay",)])
def test_a_file_that_is_called_as_a_node_is_neither_asked_nor_believed(more: tuple[str, ...], tmp_path: Path) -> None:
    with host.instance() as vgpu, liar("/dev/vfio", str(vgpu.group), *more):
        began = time.monotonic()
        listed = inside(("timeout", "-s", "KILL", "50"), "list", code=0)
        assert holder_column(listed, vgpu.uuid) == "-"
        with cli.hold_started(vgpu.uuid) as hold:
            assert holder_column(inside((), "list", code=0), vgpu.uuid) == f"{hold.pid}:vfio-mig"
            status = json.loads(inside((), "--json", "status", vgpu.uuid, code=0))
            assert (status["holder_pid"], status["protocol"]) == (hold.pid, "gvt-rfc")
            inside((), "-q", "save", vgpu.uuid, str(tmp_path / "gpu.vfm"), code=0)
            assert vgpu.run_state() == "stopped"
        assert time.monotonic() - began < 10 * cli.SECONDS


def test_guest_memory_that_never_answers_is_refused(tmp_path: Path) -> None:
    with host.instance() as vgpu, liar("/mnt", "memory") as path:
        text = inside((), "save", vgpu.uuid, str(tmp_path / "x"), "--memory", f"{path}@0", code=7)
        assert "which may never answer" in text
