# SPDX-License-Identifier: MIT
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.vm import kvm
from tools.vm.cache import cache_root, populated, write_whole

ROOT = Path(__file__).parents[2]


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_root({"VFIO_MIG_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}) == Path("/a")
    assert cache_root({"XDG_CACHE_HOME": "/b", "HOME": "/c"}) == Path("/b/vfio_mig")
    assert cache_root({"HOME": "/c"}) == Path("/c/.cache/vfio_mig")


def test_an_entry_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "entry"
    with populated(final) as work:
        assert work is not None
        (work / "file").write_text("x")
        assert not final.exists()
    assert (final / "file").read_text() == "x"
    with populated(final) as work:
        assert work is None


def fail_while_filling(final: Path) -> None:
    with populated(final) as work:
        assert work is not None
        (work / "file").write_text("x")
        raise KeyboardInterrupt


def test_an_interrupted_entry_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_while_filling(tmp_path / "entry")
    assert [path.name for path in tmp_path.iterdir()] == [".entry.lock"]


def test_what_a_killed_process_left_is_no_entry_and_is_removed_by_the_next(tmp_path: Path) -> None:
    final = tmp_path / "entry"
    script = (
        "import sys, time; from pathlib import Path; from tools.vm.cache import populated\n"
        "with populated(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').touch(); print('now', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(final)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".partial-*"))
    assert not final.exists()
    with populated(final) as work:
        assert work is not None
        assert list(work.iterdir()) == []
    assert not list(tmp_path.glob(".partial-*"))


def test_a_second_process_waits_and_finds_the_entry(tmp_path: Path) -> None:
    final = tmp_path / "entry"
    script = (
        "import sys; from pathlib import Path; from tools.vm.cache import populated\n"
        "print('started', flush=True)\n"
        "with populated(Path(sys.argv[1])) as work: print(work)\n"
    )
    with populated(final) as work:
        assert work is not None
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(final)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(0.05)
        assert process.poll() is None
    assert process.communicate()[0] == "None\n"


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, "1")
    write_whole(path, "2")
    assert path.read_text() == "2"
    assert list(path.parent.iterdir()) == [path]


def test_kvm_is_probed_once_per_boot_and_the_answer_kept(tmp_path: Path) -> None:
    asked: list[Path] = []

    def probe(image: Path) -> bool:
        asked.append(image)
        return False

    device = tmp_path / "kvm-device"
    device.touch()
    (tmp_path / "kvm").mkdir()
    (tmp_path / "kvm" / "00000000-an-older-boot").write_text("yes\n")
    image = Path("/boot/vmlinuz")
    answers = [kvm.usable(image, tmp_path, probe, device) for _ in range(3)]
    assert answers == [False, False, False]
    assert asked == [image]
    assert len(list((tmp_path / "kvm").glob("[0-9a-f]*"))) == 1


def test_a_kernel_that_boots_means_kvm(tmp_path: Path) -> None:
    device = tmp_path / "kvm-device"
    device.touch()
    assert kvm.usable(Path("/boot/vmlinuz"), tmp_path, lambda _image: True, device)


def test_without_the_device_nothing_is_probed(tmp_path: Path) -> None:
    def probe(_image: Path) -> bool:
        raise AssertionError

    assert not kvm.usable(Path("/boot/vmlinuz"), tmp_path, probe, tmp_path / "none")


@pytest.mark.parametrize(("script", "usable"), [("exit 0", True), ("exit 1", False), ("exec sleep 60", False)])
def test_only_a_qemu_that_ends_well_and_in_time_is_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, usable: bool
) -> None:
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text(f"#!/bin/sh\n{script}\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kvm, "_PROBE_SECONDS", 0.3)
    assert kvm.boots(Path("/boot/vmlinuz")) is usable
