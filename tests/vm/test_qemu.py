# SPDX-License-Identifier: MIT
"""vGPUs that a real QEMU has open: the commands from outside, and scripts/qemu-save and scripts/qemu-restore."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vfio_mig.vm.jobs  # noqa: F401  # once, for every fork
from tools.lab import cli, waiting
from tools.lab.faults.injection import VARIABLE
from tools.lab.qemu import COMMAND, MEGABYTES, PRIVATE, Qemu
from tools.lab.sample import gpu, host
from tools.lab.sample.held import guest_view, queue_one, run_some_work
from tools.lab.vfio.raw import PAGE
from vfio_mig.vm.memory import find_memory
from vfio_mig.vm.monitor import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.cli import Done
    from tools.lab.kernel.log import KernelLog

ROOT = Path(__file__).parents[2]


def js(*args: str | Path) -> Any:
    return json.loads(cli.run("--json", *args, warm=True).stdout)


def script(name: str, vm: Qemu, file: Path | str, *options: str, device: str | None = None, rc: int = 0) -> Done:
    """Run what scripts/qemu-NAME runs, in a fork of this process that has everything imported."""
    words = [str(ROOT / "tools/qemu_host/__main__.py"), name, *options, str(vm.socket), device or vm.name, str(file)]
    done = cli._forked(words, None, None, None)
    assert done.returncode == rc, done.stderr.decode()
    return done


def refused(name: str, vm: Qemu, file: Path | str, *options: str, rc: int, device: str | None = None) -> str:
    done = script(name, vm, file, *options, device=device, rc=rc)
    text = done.stderr.decode()
    assert not done.stdout
    assert text.startswith(f"qemu-{name}: ")
    assert len(text.splitlines()) == 1, text
    return text


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def source(directory: Path) -> Iterator[Qemu]:
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "source") as vm:
        yield vm


@pytest.fixture(scope="module")
def target(directory: Path, source: Qemu) -> Iterator[Qemu]:  # noqa: ARG001  # made after it
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "target", paused=True) as vm:
        yield vm


@pytest.fixture(scope="module")
def engine(source: Qemu) -> gpu.Engine:
    return gpu.Engine(source.guest)


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """As everywhere, but the VMs stay for the next test."""
    kernel_log.new()
    yield
    assert kernel_log.complaints() == []


@pytest.fixture
def image(directory: Path) -> Iterator[Path]:
    yield directory / "gpu.vfm"
    (directory / "gpu.vfm").unlink(missing_ok=True)


def assert_running(vm: Qemu) -> None:
    assert (vm.status(), vm.instance.run_state()) == ("running", "running")


def assert_works(vm: Qemu, engine: gpu.Engine) -> None:
    assert_running(vm)
    assert run_some_work(vm.guest, engine, 1).done_in(vm.guest.memory) == 1


def test_the_holder_of_a_working_vgpu_is_qemu(source: Qemu, engine: gpu.Engine) -> None:
    work = run_some_work(source.guest, engine, 4)
    assert work.done_in(source.guest.memory) == 4
    lines = {line.split()[0]: line.split() for line in cli.run("list", warm=True).stdout.decode().splitlines()}
    assert lines[source.name][5] == f"{source.pid}:{COMMAND}"
    info = js("info", source.name)
    assert (info["how"], info["protocol"]) == ("borrowed", "gvt-rfc")
    status = js("status", source.name)
    assert (status["holder_pid"], status["holder"], status["state"]) == (source.pid, COMMAND, "unknown")
    assert_running(source)


def test_qemu_itself_does_not_migrate_a_vm_that_has_such_a_vgpu(source: Qemu) -> None:
    with pytest.raises(RefusedError, match=r"QEMU refuses 'migrate': .*(?i:vfio)"):
        source.qmp.execute("migrate", uri="exec:cat >/dev/null")
    assert_running(source)


def test_the_vgpu_of_a_paused_vm_is_stopped_saved_and_goes_on(source: Qemu, engine: gpu.Engine, image: Path) -> None:
    pieces = find_memory(source.qmp, source.pid)
    memory = [word for piece in pieces for word in ("--memory", piece)]
    source.pause()
    cli.run("stop", source.name, warm=True)
    assert source.instance.run_state() == "stopped"
    pinned = source.instance.pinned()
    dirty = js("dirty", source.name, "--list", *memory)
    assert [at for start, size in dirty["ranges"] for at in range(start, start + size, PAGE)] == pinned
    # all of it but the hole for video and for the firmware
    assert 0.99 * MEGABYTES < dirty["pages"] / 256 < MEGABYTES
    saved = js("save", source.name, image, *memory)
    assert (saved["state"], saved["pages_dirty"]) == ("stop", len(pinned))
    cli.run("start", source.name, warm=True)
    source.cont()
    assert_works(source, engine)


@pytest.mark.core
def test_a_vgpu_with_queued_work_moves_into_another_vm(
    source: Qemu, target: Qemu, engine: gpu.Engine, image: Path
) -> None:
    cli.run("stop", source.name, warm=True)
    work = queue_one(source.guest, engine)
    # as a user runs it; in the other tests a fork of this process does
    done = subprocess.run(
        [ROOT / "scripts/qemu-save", source.socket, source.name, image], capture_output=True, check=True, text=True
    )
    saved = json.loads(done.stdout)
    assert (saved["vm"], saved["state"], saved["pid"]) == ("paused", "stop", source.pid)
    assert source.status() == "paused"
    pinned = source.instance.pinned()
    assert saved["pages_dirty"] == len(pinned)

    loaded = json.loads(script("restore", target, image).stdout)
    assert (loaded["vm"], loaded["state"], loaded["pid"]) == ("prelaunch", "stop", target.pid)
    assert loaded["pages_written"] == len(pinned)
    assert guest_view(target.guest.device) == guest_view(source.guest.device)
    assert all(target.guest.memory.read(at, PAGE) == source.guest.memory.read(at, PAGE) for at in pinned)
    assert target.instance.layout().host_low != source.instance.layout().host_low

    assert work.done_in(target.guest.memory) == 0
    before = target.instance.counters()
    cli.run("start", target.name, warm=True)
    target.cont()
    gpu.wait_ended(target.guest, before, 1)
    assert work.done_in(target.guest.memory) == 1
    assert work.done_in(source.guest.memory) == 0
    target.guest.go_on_as(source.guest)
    moved = gpu.Engine(target.guest)
    assert_works(target, moved)
    assert work.done_in(source.guest.memory) == 0

    cli.run("start", source.name, warm=True)
    source.cont()
    assert_works(source, engine)


def test_save_and_restore_continue_the_vm_if_asked(source: Qemu, target: Qemu, engine: gpu.Engine, image: Path) -> None:
    target.pause()
    saved = json.loads(script("save", source, image, "--cont").stdout)
    assert (saved["vm"], saved["state"]) == ("running", "running")
    assert_works(source, engine)
    loaded = json.loads(script("restore", target, image, "--cont").stdout)
    assert (loaded["vm"], loaded["state"]) == ("running", "running")
    assert_running(target)


@pytest.mark.core
def test_vm_save_and_restore_name_the_socket_and_find_the_device(
    source: Qemu, target: Qemu, engine: gpu.Engine, image: Path
) -> None:
    target.pause()
    # as a user runs it
    said = cli.run("vm", "save", source.socket, image, "--leave-running").stderr.decode()
    assert said.startswith(f"{source.name}: saved ")
    assert said.endswith(f"; the VM {source.socket} is running\n")
    pinned = source.instance.pinned()
    assert_works(source, engine)
    report = js("vm", "restore", target.socket, image, "--start")
    assert (report["device"], report["pid"], report["run_state"]) == (target.name, target.pid, "running")
    assert report["restored"]["state"] == "running"
    assert report["restored"]["pages_written"] == len(pinned)
    assert report["ram"]
    assert_running(target)


@pytest.mark.core
def test_vm_list_tells_of_vms_and_their_devices(source: Qemu, target: Qemu) -> None:
    target.pause()
    rows = {row["pid"]: row for row in js("vm", "list")}
    assert rows.keys() == {source.pid, target.pid}
    row = rows[source.pid]
    assert (row["vm"], row["command"], row["state"], row["memory"]) == (None, COMMAND, "unknown", "shared")
    assert row["devices"] == [{"device": source.name, "protocol": "gvt-rfc"}]
    assert str(source.socket) in row["sockets"]
    asked = cli.run("vm", "list", source.socket, target.socket, warm=True)
    assert [line.split() for line in asked.stdout.decode().splitlines()] == [
        [str(source.socket), str(source.pid), "running", "shared", source.name],
        [str(target.socket), str(target.pid), target.status(), "shared", target.name],
    ]
    assert (
        f"{source.socket}: {source.name}: it speaks gvt-rfc, so QEMU and libvirt can neither" in asked.stderr.decode()
    )
    target.cont()


@pytest.mark.slow
def test_of_several_devices_none_is_chosen_and_private_ram_is_told(directory: Path, image: Path) -> None:
    with host.instance() as vgpu, host.instance() as second:
        behind = ["-device", f"vfio-pci,sysfsdev={second.sysfs}"]
        with Qemu.started(vgpu, directory / "two", ram=PRIVATE, more=behind) as vm:
            text = cli.refused("vm", "save", vm.socket, image, code=2, warm=True)
            assert f"the VM {vm.socket} has several devices; --device names one: " in text
            assert vm.name in text
            assert second.uuid in text
            text = cli.refused("vm", "save", vm.socket, image, "--device", vm.name, code=4, warm=True)
            assert "private to it (share=off); start QEMU with" in text
            (row,) = js("vm", "list", vm.socket)
            assert row["memory"] == "private"
            assert any("its RAM is private" in note for note in row["notes"])
            report = js("vm", "save", vm.socket, image, "--device", second.uuid, "--memory", "none", "--leave-running")
            assert (report["device"], report["run_state"]) == (second.uuid, "running")
            assert report["saved"]["memory"] == "none"
            assert_running(vm)


@pytest.mark.slow
def test_vm_save_that_fails_lets_the_vm_go_on(source: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "save:after-state=EIO")
    cli.refused("vm", "save", source.socket, image, code=5, words=("EIO",), warm=True)
    assert not image.exists()
    assert_running(source)
    monkeypatch.delenv(VARIABLE)
    text = cli.refused("vm", "save", "win10", image, code=3, warm=True)
    assert text.endswith("a libvirt domain is named with --connect qemu:///system\n")


# Python's alone, as the others that are slow
@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("EIO", 5), ("ENOSPC", 7), ("sigint", 130), ("sigterm", 130)])
def test_a_failed_save_lets_the_vm_go_on(
    source: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch, fault: str, code: int
) -> None:
    monkeypatch.setenv(VARIABLE, f"save:after-state={fault}")
    text = refused("save", source, image, rc=code)
    assert (fault if code != 130 else "interrupted; what was begun has been undone") in text
    assert not image.exists()
    assert_running(source)


@pytest.mark.slow
def test_a_failed_save_leaves_a_paused_vm_paused(source: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.pause()
    monkeypatch.setenv(VARIABLE, "save:after-state=EIO")
    refused("save", source, image, "--cont", rc=5)
    assert (source.status(), source.instance.run_state()) == ("paused", "running")
    source.cont()


@pytest.mark.slow
def test_a_failed_restore_leaves_the_vm_paused(
    source: Qemu, target: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("save", source, image, "--cont")
    target.pause()
    monkeypatch.setenv(VARIABLE, "restore:after-state=EIO")
    refused("restore", target, image, "--cont", rc=5)
    # prelaunch: one that was started paused, and has not run yet
    assert target.status() in {"paused", "prelaunch"}
    assert target.instance.run_state() == "running"


def test_a_device_in_a_vm_is_changed_by_force_only(source: Qemu, target: Qemu, image: Path) -> None:
    script("save", source, image, "--cont")
    view = guest_view(target.guest.device)
    for words in (("restore", target.name, image, "--no-memory"), ("reset", target.name)):
        cli.refused(*words, code=2, words=(f"PID {target.pid}", COMMAND, "--force"), warm=True)
    assert guest_view(target.guest.device) == view


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_the_vm_is_paused(
    source: Qemu, target: Qemu, engine: gpu.Engine, image: Path, directory: Path
) -> None:
    text = refused("save", source, image, device=target.name, rc=3)
    assert f"{target.name}: the VM does not have it; it has {source.name}" in text
    image.write_bytes(b"precious")
    assert "exists" in refused("save", source, image, rc=2)
    assert image.read_bytes() == b"precious"
    assert "the VM is in state 'running'; pause it first" in refused("restore", source, image, rc=2)
    target.pause()
    refused("restore", target, image, rc=6)
    nobody = directory / "nobody.qmp"
    done = cli._forked([str(ROOT / "tools/qemu_host/__main__.py"), "save", str(nobody), "a", "b"], None, None, None)
    assert done.returncode == 3
    assert done.stderr.decode() == (
        f"qemu-save: {nobody}: cannot connect to QMP: ENOENT (No such file or directory); "
        "give QEMU a socket with -qmp unix:PATH,server=on,wait=off\n"
    )
    assert_works(source, engine)


@pytest.mark.slow
def test_ram_of_its_own_is_refused_and_the_state_alone_is_saved(directory: Path, image: Path) -> None:
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "private", ram=PRIVATE) as vm:
        run_some_work(vm.guest, gpu.Engine(vm.guest), 1)
        assert "private to it (share=off); start QEMU with" in refused("save", vm, image, rc=4)
        assert_running(vm)
        saved = json.loads(script("save", vm, image, "--memory", "none", "--cont").stdout)
        assert (saved["memory"], saved["pages_written"]) == ([], 0)
        assert saved["pages_dirty"] > 0
        assert_running(vm)


@contextlib.contextmanager
def dies_when_stopped(vm: Qemu) -> Iterator[None]:
    """Have the VM killed as soon as a command has stopped its vGPU."""
    state = vm.instance.debugfs / "run_state"
    code = f"until grep -q stopped {state}; do :; done; kill -9 {vm.pid}"
    with subprocess.Popen(["sh", "-c", code]) as killer:
        yield
        killer.kill()


@pytest.mark.slow
def test_a_save_of_a_vm_that_dies_says_so_in_one_line(directory: Path, image: Path) -> None:
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "dies") as vm:
        (vgpu.debugfs / "fault").write_text("state_read 1 delay 2000")
        with dies_when_stopped(vm):
            text = refused("save", vm, image, rc=7)
        assert text.endswith(f"QEMU has gone while it was asked for 'query-status'; {image} is whole\n")
        cli.run("verify", image, warm=True)
        assert js("status", vm.name)["state"] == "closed"


# VT-d's global command register, in QEMU's q35; bit 31 switches translation on
VTD_GCMD = 0xFED9_0018
TRANSLATE = 1 << 31


@pytest.mark.slow
def test_behind_a_virtual_iommu_pages_are_saved_only_while_it_is_off(directory: Path, image: Path) -> None:
    iommu = ["-device", "intel-iommu,caching-mode=on"]
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "iommu", more=iommu) as vm:
        run_some_work(vm.guest, gpu.Engine(vm.guest), 1)
        done = script("save", vm, image, "--cont")
        assert json.loads(done.stdout)["pages_written"] > 0
        assert (
            "warning: the VM has a virtual IOMMU (intel-iommu); it is off for this device now" in done.stderr.decode()
        )
        vm.pause()
        done = script("restore", vm, image, "--cont")
        assert "warning: the VM has a virtual IOMMU (intel-iommu)" in done.stderr.decode()
        image.unlink()
        vm.qtest.ask(f"writel {VTD_GCMD:#x} {TRANSLATE:#x}")
        text = refused("save", vm, image, rc=4)
        assert "a virtual IOMMU (intel-iommu), so the pages that the device has written are not those" in text
        assert not image.exists()
        assert_running(vm)
        saved = json.loads(script("save", vm, image, "--memory", "none", "--cont").stdout)
        assert saved["pages_written"] == 0
        vm.pause()
        refused("restore", vm, image, rc=4)


@pytest.mark.slow
def test_a_vm_that_somebody_lets_go_on_meanwhile_is_not_saved(source: Qemu, image: Path) -> None:
    (source.instance.debugfs / "fault").write_text("state_read 1 delay 3000")
    state = source.instance.debugfs / "run_state"
    words = [str(ROOT / "tools/qemu_host/__main__.py"), "save", str(source.socket), source.name, str(image)]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(cli._forked, words, None, None, None)
        waiting.wait_until("the vGPU is stopped", lambda: "stopped" in state.read_text())
        source.cont()
        result = done.result()
    assert result.returncode == 7, result.stderr
    assert b"the VM did not stand still while its vGPU was being saved (RESUME); see who else has a" in result.stderr
    assert not image.exists()
    assert_running(source)


@pytest.mark.slow
def test_a_vm_that_waits_for_a_migration_is_left_alone(directory: Path, image: Path) -> None:
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "incoming", more=["-incoming", "defer"]) as vm:
        for word in ("save", "restore"):
            text = refused(word, vm, image, rc=2)
            assert "the VM is in state 'inmigrate'; it waits for a migration to come in" in text
        assert vm.status() == "inmigrate"


@pytest.mark.slow
def test_from_a_sibling_container_qemu_is_not_seen_and_that_is_said(source: Qemu, image: Path) -> None:
    program: list[str | Path] = ["unshare", "-pf", "--mount-proc", ROOT / "scripts/qemu-save"]
    words: list[str | Path] = ["--memory", "none", "--cont", source.socket, source.name, image]
    done = subprocess.run([*program, *words], capture_output=True, check=False, text=True)
    assert done.returncode == 3, done.stderr
    assert "in a PID namespace that is not seen from here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    for wrong in ("PID None", "PID 0", "run as root"):
        assert wrong not in done.stderr
    assert not image.exists()
    assert_running(source)


def test_a_restore_into_a_vm_that_dies_fails_in_one_line(source: Qemu, directory: Path, image: Path) -> None:
    script("save", source, image, "--cont")
    with host.instance() as vgpu, Qemu.started(vgpu, directory / "dies-too") as vm:
        (vgpu.debugfs / "fault").write_text("state_write 1 delay 2000")
        with dies_when_stopped(vm):
            done = cli.run("restore", "--force", "--no-memory", vm.name, image, warm=True, rc=None)
        assert len(done.stderr.decode().splitlines()) == 1
        assert done.returncode == 5
