# SPDX-License-Identifier: MIT
"""Domains of a real libvirt with a vGPU of our kvmgt, whose Linux guest is at work: ours and libvirt's own ways.

By the RFC ``vfio-mig vm`` saves and restores the vGPU, which libvirt refuses. By protocol v2 libvirt saves, restores
and migrates the whole domain. Two daemons are two hosts: each has its UUID. ``scripts/test --gvt --libvirt`` runs this.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.l2.image import INITRAMFS, KERNEL, Image
from tools.l2.machine import MEGABYTES, START_SECONDS, Counts, GuestError, counted, kernel_options, stuck_at
from tools.lab import cli, libvirtd
from tools.lab.faults.injection import VARIABLE
from tools.lab.gvt import kvmgt
from tools.lab.gvt.rfc import MODULES, load_ours, load_stock
from tools.lab.libvirtd import Libvirtd

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.gvt, pytest.mark.l2, pytest.mark.slow]

KIND: Final = "i915-GVTg_V5_4"
RESULTS: Final = 60
_TELL_SECONDS: Final = 20.0
NAME: Final = "guest"
UUID: Final = "6b1a3a4e-6b0c-4d55-9a5a-9f2c9f3b5d10"
URI: Final = "qemu:///system"

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)
if not libvirtd.available():
    pytest.skip("the VM was started without --libvirt", allow_module_level=True)

_BEGAN: Final = time.monotonic()


def report(text: object) -> None:
    """Tell about the run; pytest shows it when the test fails, and with -s."""
    print(f"[{time.monotonic() - _BEGAN:6.1f}] {text}", flush=True)  # noqa: T201


SHARED: Final = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
MIGRATES: Final = """
<qemu:override><qemu:device alias='hostdev0'><qemu:frontend>
  <qemu:property name='enable-migration' type='string' value='on'/>
</qemu:frontend></qemu:device></qemu:override>"""


def hostdev(vgpu: str) -> str:
    return f"""
<hostdev mode='subsystem' type='mdev' model='vfio-pci'>
  <source><address uuid='{vgpu}'/></source>
  <address type='pci' domain='0' bus='0' slot='2' function='0'/>
</hostdev>"""


def domain(vgpu: str, memory: str = SHARED, more: str = "") -> str:
    """Describe the guest of tools/l2; its vGPU is where its i915 looks for it."""
    return f"""
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{NAME}</name><uuid>{UUID}</uuid>
  <memory unit='MiB'>{MEGABYTES}</memory><vcpu>1</vcpu>{memory}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/shared/{KERNEL}</kernel><initrd>/shared/{INITRAMFS}</initrd><cmdline>{kernel_options()}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough'><feature policy='disable' name='x2apic'/></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/><memballoon model='none'/>
    <serial type='file'><source path='/shared/console' append='on'/></serial>{hostdev(vgpu)}
  </devices>{more}
</domain>"""


class Host:
    """Two libvirts, and what the guest has said on its console, wherever it runs."""

    def __init__(self, here: Libvirtd, there: Libvirtd, shared: Path) -> None:
        self.here: Final = here
        self.there: Final = there
        self.shared: Final = shared

    def counts(self) -> Counts:
        path = self.shared / "console"
        return counted(path.read_text(errors="replace").splitlines() if path.exists() else [])

    def await_right(self, more: int = RESULTS, seconds: float = 120.0) -> Counts:
        """Wait until so many more results were right, and none wrong."""
        before, end = self.counts(), time.monotonic() + seconds
        told = time.monotonic()
        while (counts := self.counts()).right < before.right + more:
            if time.monotonic() > told + _TELL_SECONDS:
                told = time.monotonic()
                report(f"{counts}, {self.state()}")
                report((self.shared / "console").read_text(errors="replace")[-500:])
            if time.monotonic() > end:
                said = (self.shared / "console").read_text(errors="replace")[-3000:]
                why = f"no {more} more results within {seconds:g} s; {self.cpus()}"
                raise GuestError(f"{why}\n{said}\n{self.here.log()}")
            time.sleep(0.1)
        assert counts.wrong == 0
        report(counts)
        return counts

    def begin(self, vgpu: str, memory: str = SHARED, more: str = "") -> None:
        (self.shared / "console").unlink(missing_ok=True)
        self.here.define(NAME, domain(vgpu, memory=memory, more=more))
        report("defined")
        self.here.virsh("start", NAME)
        report("started")

    def end(self) -> None:
        for one in (self.here, self.there):
            if NAME in one.virsh("list", "--name").split():
                one.virsh("destroy", NAME)
            if NAME in one.virsh("list", "--all", "--name").split():
                one.virsh("undefine", NAME, "--managed-save")

    @contextlib.contextmanager
    def vgpu(self) -> Iterator[str]:
        """Have a vGPU; domains end first, as the removal of an open one waits for its last close."""
        with kvmgt.instance(KIND) as name:
            try:
                yield name
            finally:
                self.end()

    def cpus(self) -> str:
        """Say where the guest's CPU stands on each host, if nested KVM has lost it (tools/kvmgt/README.md)."""
        seen = []
        for host in (self.here, self.there):
            try:
                said = host.virsh("qemu-monitor-command", NAME, "--hmp", "info registers")
            except libvirtd.VirshError:  # the guest is not there
                continue
            where = stuck_at(said)
            seen.append("its CPU has interrupts on" if where is None else f"interrupts are off at {where}")
        return ", ".join(seen) or "it runs nowhere"

    def state(self) -> str:
        return self.here.virsh("domstate", NAME, "--reason").strip()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    try:
        libvirtd.have_binding()
    except ImportError as error:
        pytest.skip(f"libvirt's binding is for another Python: {error}")
    image = Image.of(Path(os.environ["VFIO_MIG_L2"]))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lv-", dir="/dev/shm")))
        shared = directory / "shared"
        shared.mkdir()
        for name, path in ((KERNEL, image.kernel), (INITRAMFS, image.initramfs)):
            (shared / name).write_bytes(path.read_bytes())
        here = stack.enter_context(Libvirtd.started(directory / "here", shared, is_default=True))
        there = stack.enter_context(Libvirtd.started(directory / "there", shared))
        yield Host(here, there, shared)


@pytest.fixture
def rfc(host: Host) -> Iterator[Host]:
    load_ours()
    yield host
    load_stock()


@pytest.fixture
def v2(host: Host) -> Iterator[Host]:
    load_ours(None, "migration=v2")
    yield host
    load_stock()


def vfio_mig(*words: str | Path) -> Any:
    report(f"vfio-mig {' '.join(map(str, words))}")
    return json.loads(cli.run("--json", *words, "--connect", URI, warm=True).stdout)


def test_the_vgpu_of_a_running_domain_is_saved_and_restored_and_its_guest_goes_on(
    rfc: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "gpu.vfm"
    with rfc.vgpu() as vgpu:
        rfc.begin(vgpu)
        rfc.await_right(seconds=5 * START_SECONDS)

        done = cli.run("vm", "list", "--connect", URI, env=libvirtd.client())  # as a user runs it
        words = done.stdout.decode().split()
        assert (words[0], *words[2:]) == (NAME, "running", "shared", vgpu)
        assert f"{NAME}: {vgpu}: it speaks gvt-rfc, so QEMU and libvirt can neither migrate" in done.stderr.decode()
        (row,) = vfio_mig("vm", "list")
        assert row["pid"] == int(words[1])

        saved = vfio_mig("vm", "save", NAME, image, "--leave-running")
        assert (saved["device"], saved["pid"], saved["run_state"]) == (vgpu, row["pid"], "running")
        assert saved["saved"]["state_bytes"] > 3_000_000
        assert saved["saved"]["pages_written"] > 0
        assert rfc.state() == "running (unpaused)"
        rfc.await_right()

        monkeypatch.setenv(VARIABLE, "save:after-state=EIO")
        cli.refused("vm", "save", NAME, image, "--force", "--connect", URI, code=5, warm=True)
        monkeypatch.delenv(VARIABLE)
        assert rfc.state() == "running (unpaused)"
        cli.refused("vm", "restore", NAME, image, "--connect", URI, code=2, words=("virsh suspend",), warm=True)
        rfc.await_right()

        # docs/libvirt.md, word for word
        saved = vfio_mig("vm", "save", NAME, image, "--force")
        assert saved["run_state"] == "paused"
        assert rfc.state() == "paused (user)"
        cli.run("reset", vgpu, "--force", warm=True)
        loaded = vfio_mig("vm", "restore", UUID, image)
        assert loaded["restored"]["pages_written"] == saved["saved"]["pages_dirty"]
        cli.run("start", vgpu, warm=True)
        rfc.here.virsh("resume", NAME)
        assert rfc.await_right().wrong == 0

        refusal = rfc.here.virsh("save", NAME, "/shared/refused", rc=1)
        assert "cannot migrate domain" in refusal, refusal
        rfc.await_right()


def test_what_cannot_be_is_refused_in_the_user_s_words(rfc: Host, tmp_path: Path) -> None:
    image = tmp_path / "gpu.vfm"
    with rfc.vgpu() as vgpu:  # kvmgt lets a VM have one only; tests/vm/test_qemu.py has several
        rfc.begin(vgpu, memory="")
        connect = ("--connect", URI)
        text = cli.refused("vm", "save", NAME, image, *connect, code=4, warm=True)
        assert "private to it (share=off); put <memoryBacking>" in text
        (row,) = vfio_mig("vm", "list")
        assert (row["memory"], row["state"]) == ("private", "running")
        saved = vfio_mig("vm", "save", NAME, image, "--device", vgpu, "--memory", "none", "--leave-running")
        assert (saved["device"], saved["run_state"]) == (vgpu, "running")
        rfc.here.virsh("destroy", NAME)
        cli.refused("vm", "save", NAME, image, *connect, code=3, words=("virsh start --paused",), warm=True)
        cli.refused("vm", "save", "nobody", image, *connect, code=3, words=(f"it has {NAME}",), warm=True)
        far = ("--connect", "qemu+ssh://root@far/system")
        cli.refused("vm", "save", NAME, image, *far, code=4, words=("use --connect qemu:///system",), warm=True)


def test_libvirt_saves_and_migrates_a_domain_whose_vgpu_speaks_v2(v2: Host) -> None:
    peer = v2.here.reach(v2.there)
    with v2.vgpu() as vgpu, v2.vgpu() as second:
        v2.begin(vgpu, more=MIGRATES)
        right = v2.await_right(seconds=5 * START_SECONDS).right
        (row,) = vfio_mig("vm", "list")
        assert row["devices"] == [{"device": vgpu, "protocol": "mainline-v2"}]

        report("save")
        v2.here.virsh("save", NAME, "/shared/saved")
        report("restore")
        assert NAME not in v2.here.virsh("list", "--name")
        v2.here.virsh("restore", "/shared/saved")
        (v2.shared / "saved").unlink()
        right = _further(v2, right)

        report("managedsave")
        v2.here.virsh("managedsave", NAME)
        v2.here.virsh("start", NAME)
        right = _further(v2, right)

        report("migrate")
        xml = re.sub(vgpu, second, v2.here.virsh("dumpxml", NAME, "--migratable"))
        (v2.shared / "there.xml").write_text(xml)
        v2.here.virsh(
            *("migrate", NAME, peer, "--migrateuri", "unix:///shared/migration", "--xml", "/shared/there.xml"),
            *("--live", "--unsafe"),
        )
        assert v2.there.virsh("list", "--name").split() == [NAME]
        assert NAME not in v2.here.virsh("list", "--name").split()
        _further(v2, right)


def _further(host: Host, right: int) -> int:
    """Demand more results, all right; the guest's count came along."""
    counts = host.await_right()
    assert counts.right > right
    return counts.right
