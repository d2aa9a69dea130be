# SPDX-License-Identifier: MIT
"""``--gvt``: the emulated GPU's life, its place on the bus, and the modules of the host driver."""

import dataclasses
import json
import lzma
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.vm import gvt, machine
from tools.vm.errors import RunnerError
from tools.vm.guest import Guest, entry_script, environment
from tools.vm.kernels import Kernel
from tools.vm.machine import Options, virtme_command
from tools.vm_cli import parse

ROOT = Path(__file__).parents[2]


def make_options(tree: Path, gpu: str | None = "skl") -> Options:
    return Options(kernel=Kernel(tree, "6.12-test"), kvm=False, memory="1G", cpus=2, timeout=900, gpu=gpu)


def make_guest(tmp_path: Path, modules: Path | None) -> Guest:
    return Guest(
        tree=tmp_path, module=None, module_args=[], out=tmp_path, cwd=tmp_path, environment={}, command=["true"],
        gvt=modules,
    )  # fmt: skip


# The command line


def test_the_gpu_is_one_of_two_and_goes_with_gvt(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--gvt", "true"]).gpu == "skl"
    assert parse(["--gvt", "--gpu", "kbl", "true"]).gpu == "kbl"
    assert parse(["true"]).gpu is None
    for arguments in (["--gpu", "kbl", "true"], ["--gvt", "--gpu", "xe", "true"]):
        with pytest.raises(SystemExit) as caught:
            parse(arguments)
        assert caught.value.code == 2
    assert "--gpu needs --gvt" in capsys.readouterr().err


def test_our_kvmgt_goes_with_gvt_and_has_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--gvt", "true"]).kvmgt == "stock"
    assert parse(["--gvt", "--kvmgt", "ours", "--kvmgt-args", "migration=off", "true"]).kvmgt == "ours"
    for arguments in (["--kvmgt", "ours", "true"], ["--gvt", "--kvmgt-args", "migration=off", "true"]):
        with pytest.raises(SystemExit) as caught:
            parse(arguments)
        assert caught.value.code == 2
    assert "--kvmgt needs --gvt" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--kvmgt", "ours"], ["--kvmgt=ours", "true"], ["--kvmgt", "stock"], ["--", "true"]])
def test_what_building_our_kvmgt_takes_is_asked_for_first(tmp_path: Path, words: list[str]) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(Path(__file__).parents[2] / "scripts/vm", scripts)
    (scripts / "setup").write_text('#!/bin/sh\necho "asked for: $*"\nexit 7\n')
    (scripts / "setup").chmod(0o755)
    done = subprocess.run([scripts / "vm", "--gvt", *words], capture_output=True, text=True, check=False)
    wanted = "--kvmgt" if "ours" in " ".join(words) else ""
    assert (done.returncode, done.stdout) == (7, f"asked for: {wanted}\n")


# The process


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_the_gpu_listens_when_the_block_begins_and_has_gone_when_it_ends(run: Path) -> None:
    with gvt.gpu("kbl", run) as gpu:
        gpu.check()
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(run / "gpu.control"))
            control.sendall(b'{"do": "state"}\n')
            assert json.loads(control.makefile().readline())["ok"]
    assert sorted(path.name for path in run.iterdir()) == ["gpu.log"]


def test_a_gpu_ends_well_when_qemu_does(run: Path) -> None:
    with gvt.gpu("skl", run) as gpu:
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(str(run / "gpu.socket"))
        gpu.end()
        gpu.check()


def test_a_gpu_that_is_killed_is_the_result_of_the_run(run: Path) -> None:
    with gvt.gpu("skl", run) as gpu:
        (run / "gpu.log").write_text("Traceback: something\n")
        gpu._process.kill()
        gpu._process.wait()
        with pytest.raises(RunnerError, match=r"the emulated GPU ended with status -9:\nTraceback: something"):
            gpu.check()
        with pytest.raises(RunnerError, match="ended with status -9"):
            gpu.end()


def test_a_gpu_that_does_not_start_says_why(run: Path) -> None:
    with (
        pytest.raises(RunnerError, match=r"(?s)the emulated GPU did not start:\n.*invalid choice: 'xe'"),
        gvt.gpu("xe", run),
    ):
        raise AssertionError
    too_long = run / ("x" * 100)
    with pytest.raises(RunnerError, match="VFIO_MIG_CACHE chooses a shorter one"), gvt.gpu("skl", too_long):
        raise AssertionError


def test_a_gpu_ends_with_a_runner_that_is_killed(run: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tools.vm import gvt\n"
        "with gvt.gpu('skl', Path(sys.argv[1])) as gpu: print(gpu._process.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, run], cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        pid = int(runner.stdout.readline())
        os.kill(pid, 0)
        runner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (run / "gpu.socket").exists()


# QEMU


def test_qemu_shares_the_guest_s_memory_and_has_the_gpu_and_its_control_port(run: Path, tmp_path: Path) -> None:
    with gvt.gpu("skl", run) as gpu:
        command = virtme_command(
            make_options(tmp_path), run, tmp_path, interactive=False, devices=gpu.qemu_arguments("3G")
        )
    assert "memory-backend-memfd,id=vm_memory,size=3G,share=on" in command
    assert "memory-backend=vm_memory" in command
    device = next(json.loads(word) for word in command if word.startswith("{"))
    assert device == {
        "driver": "vfio-user-pci", "addr": "2.0", "socket": {"type": "unix", "path": f"{run}/gpu.socket"},
    }  # fmt: skip
    assert any(word.startswith("virtserialport,") and ",name=gpu.control," in word for word in command)


def qemu_arguments(run: Path, options: Options, *arguments: str) -> list[str]:
    """Return what QEMU gets of *arguments* from the script that starts it."""
    fake = run / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    machine.write_scripts(options, run, make_guest(run, None))
    path = f"{fake.parent}:{os.environ['PATH']}"
    done = subprocess.run([run / "qemu", *arguments], env={"PATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


ARGUMENTS = [
    "-device", "virtio-9p-pci,fsdev=a b,mount_tag=x", "-device", "i6300esb,id=watchdog0",
    "-device", "virtserialport,name=x", "-device", "virtio-rng-pci,addr=3", "-device", '{"driver": "vfio-user-pci"}',
    "-append", "virtio-9p-pci", "-device", "virtio-serial-pci",
]  # fmt: skip


def test_other_pci_devices_leave_slot_2_to_the_gpu(run: Path) -> None:
    assert qemu_arguments(run, make_options(run), *ARGUMENTS) == [
        "-device", "virtio-9p-pci,fsdev=a b,mount_tag=x,addr=0x10", "-device", "i6300esb,id=watchdog0,addr=0x11",
        "-device", "virtserialport,name=x", "-device", "virtio-rng-pci,addr=3",
        "-device", '{"driver": "vfio-user-pci"}',
        "-append", "virtio-9p-pci", "-device", "virtio-serial-pci,addr=0x12",
    ]  # fmt: skip


def test_without_a_gpu_nothing_is_moved(run: Path) -> None:
    assert qemu_arguments(run, make_options(run, None), *ARGUMENTS) == ARGUMENTS


# The guest


def test_the_guest_loads_kvm_and_the_host_driver_and_names_the_control_port(tmp_path: Path) -> None:
    script = entry_script(make_guest(tmp_path, Path("/cache/gvt modules")))
    subprocess.run(["bash", "-n"], input=script, check=True)
    assert b"gvt='/cache/gvt modules'\n" in script
    assert b"i915 enable_gvt=1" in script
    assert b"/dev/virtio-ports/gpu.control" in script
    assert b"gvt=''\n" in entry_script(make_guest(tmp_path, None))


LOAD = 'set -e\ninside() { echo "$@"; }\n'


def loads(what: Guest) -> list[str]:
    """Return what the guest's script does to load kvmgt."""
    script = entry_script(what).decode()
    head = script.partition("export PATH")[0]
    body = script[script.index("load_kvmgt() {") : script.index("# The host driver of GVT-g")]
    done = subprocess.run(["bash", "-c", f"{head}{LOAD}{body}\nload_kvmgt"], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().splitlines()


def test_kvmgt_is_the_kernel_s_own_or_another_with_its_parameters(tmp_path: Path) -> None:
    stock = make_guest(tmp_path, Path("/cache/gvt"))
    assert loads(stock) == ["modprobe -d /cache/gvt kvmgt"]
    ours = dataclasses.replace(stock, kvmgt=Path("/cache/kvmgt.ko"), kvmgt_args=["migration=off", "x=a b"])
    assert loads(ours) == ["insmod /cache/kvmgt.ko migration=off x=a b"]


def test_command_is_told_which_gpu_it_has(tmp_path: Path) -> None:
    def seen(gpu: str | None) -> dict[str, str]:
        return environment({}, venv=tmp_path, modules=None, out=tmp_path, release="6.12", gpu=gpu)

    assert seen("kbl")["VFIO_MIG_GPU"] == "kbl"
    assert "VFIO_MIG_GPU" not in seen(None)


# The modules


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Return a kernel with three modules that are needed, compressed and not, and one that is not."""
    result = Kernel(tmp_path / "kernel", "6.12-test")
    modules = result.tree / "lib/modules" / result.release
    (modules / "kernel/drm").mkdir(parents=True)
    (modules / "kernel/drm/i915.ko.xz").write_bytes(lzma.compress(b"i915"))
    (modules / "kernel/drm/kvmgt.ko").write_bytes(b"kvmgt")
    (modules / "kernel/drm/video-x.ko.xz").write_bytes(lzma.compress(b"video"))
    (modules / "kernel/drm/other.ko.xz").write_bytes(lzma.compress(b"other"))
    (modules / "modules.order").touch()
    (modules / "modules.builtin").touch()
    (modules / "modules.dep").write_text(
        "kernel/drm/other.ko.xz:\nkernel/drm/video-x.ko.xz:\n"
        "kernel/drm/i915.ko.xz: kernel/drm/video-x.ko.xz\nkernel/drm/kvmgt.ko: kernel/drm/i915.ko.xz\n"
    )
    return result


@pytest.mark.skipif(shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin") is None, reason="kmod is not there")
def test_the_modules_that_are_needed_are_uncompressed_once(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    told: list[str] = []
    tree = gvt.modules(kernel, tmp_path, told.append)
    found = {path.name: path.read_bytes() for path in tree.glob("lib/modules/6.12-test/kernel/drm/*")}
    assert found == {"i915.ko": b"i915", "kvmgt.ko": b"kvmgt", "video-x.ko": b"video"}
    assert (tree / "lib/modules/6.12-test/modules.dep").is_file()
    assert gvt.modules(kernel, tmp_path, told.append) == tree
    assert told == ["unpacking 3 modules of kernel 6.12-test"]
    (kernel.tree / "lib/modules/6.12-test/kernel/drm/kvmgt.ko").write_bytes(b"another")
    assert gvt.modules(kernel, tmp_path, told.append) != tree


def test_a_kernel_without_gvt_is_refused(tmp_path: Path, kernel: Kernel) -> None:
    (kernel.tree / "lib/modules/6.12-test/modules.dep").write_text("kernel/drm/i915.ko:\n")
    with pytest.raises(RunnerError, match=r"--gvt: kernel 6\.12-test has no module kvmgt"):
        gvt.modules(kernel, tmp_path, lambda _message: None)
