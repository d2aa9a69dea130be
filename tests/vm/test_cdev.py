# SPDX-License-Identifier: MIT
"""Devices opened through their own node and an iommufd, as real kernels with VFIO_DEVICE_CDEV do it."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.lab import cli
from tools.lab.sample import gpu, host
from tools.lab.sample.held import run_some_work, side
from vfio_mig.host.discover import Host
from vfio_mig.host.opening import open_device

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.custom

BIND_IOMMUFD = 0x3B76
DEVICE_GET_INFO = 0x3B6B
PROGRAM = [sys.executable, "-c", "from vfio_mig.cli import main; main()"]


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


@pytest.fixture
def vgpu() -> Iterator[host.Instance]:
    with host.instance() as made:
        yield made


def node_of(vgpu: host.Instance) -> str:
    (entry,) = (vgpu.sysfs / "vfio-dev").iterdir()
    return f"/dev/vfio/devices/{entry.name}"


def reached(*words: str) -> str:
    return cli.run("-v", *words, warm=True).stderr.decode()


def test_a_device_is_opened_through_its_node_and_others_are_kept_out(vgpu: host.Instance) -> None:
    node = node_of(vgpu)
    assert f"opened through {node}, " in reached("dirty", vgpu.uuid)
    assert f"opened through /dev/vfio/{vgpu.group}, " in reached("--via", "group", "dirty", vgpu.uuid)
    found = Host().find(vgpu.uuid)
    assert (found.cdev, found.cdev_number) == (node, Path(node).stat().st_rdev)
    with open_device(found) as device:
        assert (device.how, device.info().num_regions) == ("cdev", 10)
        with pytest.raises(OSError, match="busy"):
            os.open(f"/dev/vfio/{vgpu.group}", os.O_RDWR)
    with open_device(found._replace(group=None)) as device:  # as without CONFIG_VFIO_GROUP
        assert device.how == "cdev"


def test_a_user_with_both_nodes_needs_nothing_else_and_hears_of_a_holder_that_cannot_be_seen(
    vgpu: host.Instance,
) -> None:
    node = node_of(vgpu)
    Path(node).chmod(0o666)
    Path("/dev/iommu").chmod(0o666)
    try:
        done = cli.run("-v", "dirty", vgpu.uuid, user=cli.NOBODY, warm=True)
        assert f"opened through {node}, ".encode() in done.stderr
        with cli.held(vgpu.uuid):
            words = (f"{node} is open in another process: VFIO_DEVICE_BIND_IOMMUFD failed: EINVAL", "run as root")
            cli.refused("dirty", vgpu.uuid, code=3, user=cli.NOBODY, words=words, warm=True)
    finally:
        Path("/dev/iommu").chmod(0o660)


@pytest.mark.parametrize("way", ["cdev", "group"])
def test_every_command_borrows_from_a_hold(way: str, tmp_path: Path) -> None:
    with side(tmp_path / "memory", via=way) as source:
        node = node_of(source.instance) if way == "cdev" else f"/dev/vfio/{source.instance.group}"
        work = run_some_work(source.guest, gpu.Engine(source.guest), 4)
        assert all(source.memory.u32(iova) == value for iova, value in work)  # the GPU's DMA has arrived
        told = reached("stop", source.name)
        assert "borrowed from PID " in told
        assert f" by {node}, protocol gvt-rfc" in told
        assert source.instance.run_state() == "stopped"
        assert js("info", source.name)["how"] == "borrowed"
        pinned = len(source.instance.pinned())
        assert js("dirty", source.name)["pages_dirty"] == pinned
        synced = js("sync", source.name, tmp_path / "copy", "--memory", source.memory_option)
        assert synced["pages_dirty"] == pinned
        saved = js("save", source.name, tmp_path / "gpu.vfm", "--memory", source.memory_option)
        assert (saved["state"], saved["pages_dirty"]) == ("stop", pinned)
        words = ("restore", source.name, tmp_path / "gpu.vfm", "--memory", source.memory_option, "--start")
        assert js(*words)["state"] == "running"
        assert js("status", source.name)["protocol"] == "gvt-rfc"
        assert js("reset", source.name)["action"] == "reset"
        assert js("start", source.name)["action"] == "start"
        assert source.instance.run_state() == "running"


def open_and_bind(node: str) -> tuple[int, int]:
    fd, iommu = os.open(node, os.O_RDWR), os.open("/dev/iommu", os.O_RDWR)
    fcntl.ioctl(fd, BIND_IOMMUFD, struct.pack("<IIiI", 16, 0, iommu, 0))
    return fd, iommu


def test_a_node_that_is_only_open_is_told_from_one_that_is_bound(vgpu: host.Instance) -> None:
    """Any number of processes may have the node open; one of them has bound it."""
    node = node_of(vgpu)
    idle = os.open(node, os.O_RDWR)
    try:
        words = (f"PID {os.getpid()} (", f"has {node} open and has not bound it", "wait until")
        cli.refused("stop", vgpu.uuid, code=3, words=words, warm=True)
        fd, iommu = open_and_bind(node)
        try:
            cli.run("-q", "stop", vgpu.uuid, warm=True)
            assert vgpu.run_state() == "stopped"
        finally:
            os.close(fd)
            os.close(iommu)
    finally:
        os.close(idle)


def test_an_inherited_node_is_enough(vgpu: host.Instance) -> None:
    node = node_of(vgpu)
    fd, iommu = open_and_bind(node)
    idle = os.open(node, os.O_RDWR)
    try:
        for inherited in (fd, idle):
            os.set_inheritable(inherited, True)
        command = [*PROGRAM, "-v", "stop", vgpu.uuid, "--fd"]
        done = subprocess.run([*command, str(fd)], close_fds=False, capture_output=True, text=True, check=True)
        assert f"inherited {node}" in done.stderr
        assert vgpu.run_state() == "stopped"
        bad = subprocess.run([*command, str(idle)], close_fds=False, capture_output=True, text=True, check=False)
        assert (bad.returncode, bad.stderr.count("\n")) == (3, 1)
        assert f"fd {idle}, {node}, is not bound to an iommufd" in bad.stderr
    finally:
        for one in (fd, iommu, idle):
            os.close(one)
