# SPDX-License-Identifier: MIT
"""Borrowing from processes that are not ours, holding, and following live memory to elsewhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.lab import cli
from tools.lab.sample import gpu, host
from tools.lab.sample.held import run_some_work, side

if TYPE_CHECKING:
    from tools.lab.sample.guest import Guest

ME = os.getpid()
# opens a vGPU as a VMM would, says so, and stays; its group fd is dup'ed to 100
OWNER = """
import os, sys
from tools.lab.sample.host import Instance
from tools.lab.vfio.raw import Container, Device
instance = Instance(sys.argv[1], "")
container = Container(instance.group)
device = Device(container, instance.uuid)
os.dup2(container.group_fd, 100)
print("open", flush=True)
sys.stdin.read()
"""


def owner(uuid: str, *prefix: str) -> subprocess.Popen[bytes]:
    command = [*prefix, sys.executable, "-c", OWNER, uuid]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait(cli.SECONDS)


def test_of_several_devices_in_one_process_the_named_one_is_borrowed(guest: Guest, other: Guest) -> None:
    cli.run("-q", "stop", other.instance.uuid, warm=True)
    assert (guest.instance.run_state(), other.instance.run_state()) == ("running", "stopped")
    listed = cli.run("list", warm=True).stdout.decode().splitlines()
    assert [line.split()[5] for line in listed].count(f"{ME}:pytest") == 2
    cli.run("-q", "stop", guest.instance.uuid, warm=True)
    cli.run("-q", "start", other.instance.uuid, warm=True)
    assert (guest.instance.run_state(), other.instance.run_state()) == ("stopped", "running")


def test_a_holder_in_another_pid_namespace_is_borrowed_from() -> None:
    with host.instance() as vgpu:
        process = owner(vgpu.uuid, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
        try:
            status = json.loads(cli.run("--json", "status", vgpu.uuid, warm=True).stdout)
            assert status["protocol"] == "gvt-rfc"
            assert status["holder_pid"] not in {None, process.pid}  # a child of unshare's, by the number it has here
            cli.run("-q", "stop", vgpu.uuid, warm=True)
            assert vgpu.run_state() == "stopped"
        finally:
            end(process)


def test_an_inherited_group_is_enough(guest: Guest) -> None:
    """The launcher gives its group's fd; no look into any process is needed."""
    program = [sys.executable, "-c", "from vfio_mig.cli import main; main()"]
    fd = guest.container.group_fd
    os.set_inheritable(fd, True)
    try:
        command = [*program, "-v", "stop", guest.instance.uuid, "--fd", str(fd)]
        done = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True)
    finally:
        os.set_inheritable(fd, False)
    assert f"inherited /dev/vfio/{guest.instance.group}" in done.stderr
    assert guest.instance.run_state() == "stopped"
    cli.refused("stop", guest.instance.uuid, "--fd", "0", code=2, words=("'--fd'", "x>=3"), warm=True)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        words = (f"fd {null} is /dev/null", "--fd takes")
        cli.refused("stop", guest.instance.uuid, "--fd", str(null), code=3, words=words, warm=True)
    finally:
        os.close(null)


def test_hold_announces_itself_to_an_fd_a_file_and_systemd(tmp_path: Path) -> None:
    pidfile, address = tmp_path / "hold.pid", tmp_path / "notify"
    read, write = os.pipe()
    with host.instance() as vgpu, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(cli.SECONDS)
        command = ["vfio-mig", "-q", "hold", vgpu.uuid, "--ready-fd", str(write), "--pidfile", str(pidfile)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(address)}
        with subprocess.Popen(command, pass_fds=[write], env=environment, stdout=subprocess.PIPE) as process:
            os.close(write)
            with os.fdopen(read) as ready:
                assert ready.read() == f"{vgpu.uuid}: held open by PID {process.pid}\n"
            assert pidfile.read_text() == f"{process.pid}\n"
            assert systemd.recv(100) == b"READY=1"
            cli.refused("hold", vgpu.uuid, code=3, words=(f"PID {process.pid} (vfio-mig)",), warm=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(cli.SECONDS) == 0
            assert process.stdout is not None
            assert process.stdout.read() == b""
        assert systemd.recv(100) == b"STOPPING=1"
    assert not pidfile.exists()


def test_pages_follow_a_running_device_through_a_pipe(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, side(Path(name) / "memory") as source:
        work = run_some_work(source.guest, gpu.Engine(source.guest), 4)
        stream, copy = tmp_path / "stream", tmp_path / "copy"
        arguments = ["sync", source.name, "-", "--memory", source.memory_option, "--leave-running", "--rounds", "2"]
        cli.run("-q", *arguments, stdout=str(stream), warm=True)
        assert source.instance.run_state() == "running"
        with copy.open("wb") as file:
            file.truncate(source.memory.size)
        done = json.loads(cli.run("--json", "pages", stream, "--memory", f"{copy}@0", warm=True).stdout)
        assert done["pages_written"] == len(source.instance.pinned())
        content = copy.read_bytes()
        assert all(content[at : at + 4096] == source.memory.read(at, 4096) for at in source.instance.pinned())
        assert all(content[iova : iova + 4] == value.to_bytes(4, "little") for iova, value in work)
        # no state in it: nothing to restore
        cli.refused("restore", source.name, stream, code=6, words=("state",), warm=True)
        stream.write_bytes(stream.read_bytes()[:-1])
        copy.write_bytes(bytes(source.memory.size))
        cli.refused("pages", stream, "--memory", f"{copy}@0", code=6, words=("cut off",), warm=True)
        assert not any(copy.read_bytes())


@pytest.mark.parametrize("words", [["pages", "-"], ["sync", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "-"]])
def test_pages_need_a_memory(words: list[str]) -> None:
    cli.refused(*words, code=2, words=("--memory",), warm=True)
