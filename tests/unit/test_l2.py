# SPDX-License-Identifier: MIT
"""The guest of a vGPU: its initramfs, what goes into it, and how its console is read."""

from __future__ import annotations

import itertools
import lzma
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.l2 import cpio, image
from tools.l2.machine import L2, Counts, GuestError, LostGuestError, arguments, stuck_at
from tools.vm.errors import RunnerError
from tools.vm.gvt import load_order
from tools.vm.kernels import Kernel
from tools.vm_cli import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
RELEASE: Final = "6.12-test"


def unpacked(archive: bytes, directory: Path) -> None:
    directory.mkdir()
    subprocess.run(["busybox", "cpio", "-i", "-d"], input=archive, cwd=directory, check=True, stderr=subprocess.DEVNULL)


def test_another_program_unpacks_what_was_packed(tmp_path: Path) -> None:
    content = [b"", b"1", b"12", b"123", b"1234"]  # each is padded in its own way
    entries = [
        cpio.directory("d"),
        *(cpio.file(f"d/{'x' * number}n", text, executable=number == 1) for number, text in enumerate(content)),
        cpio.link("d/link", "n"),
    ]
    unpacked(b"".join(cpio.archive(entries)), tmp_path / "out")
    found = tmp_path / "out" / "d"
    assert [(found / f"{'x' * number}n").read_bytes() for number in range(5)] == content
    assert (found / "link").readlink() == Path("n")
    assert [path.name for path in found.iterdir() if path.stat().st_mode & 0o111] == ["xn"]


def test_the_console_is_a_node_that_the_kernel_finds() -> None:
    data = b"".join(cpio.archive([cpio.console()]))
    assert data[:6] == b"070701"
    fields = [int(data[6 + 8 * at : 14 + 8 * at], 16) for at in range(13)]
    assert fields[1] == 0o020600  # c_mode
    assert fields[9:11] == [5, 1]  # c_rmaj, c_rmin
    assert data[110:].startswith(b"dev/console\0")
    assert b"TRAILER!!!" in data


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel of text files: i915 needs drm_kms_helper, and that drm."""
    made = Kernel(tmp_path / "tree", RELEASE)
    modules = made.tree / "lib/modules" / RELEASE
    modules.mkdir(parents=True)
    (modules / "drm.ko").write_bytes(b"plain drm")
    (modules / "drm_kms_helper.ko.xz").write_bytes(lzma.compress(b"helper"))
    (modules / "i915.ko.xz").write_bytes(lzma.compress(b"driver"))
    (modules / "modules.dep").write_text(
        "drm.ko:\ndrm_kms_helper.ko.xz: drm.ko\ni915.ko.xz: drm_kms_helper.ko.xz drm.ko\n"
    )
    made.image.parent.mkdir()
    made.image.write_bytes(b"a kernel")
    return made


def test_modules_are_loaded_after_what_they_need(kernel: Kernel) -> None:
    assert [path.name for path in load_order(kernel, "i915")] == ["drm.ko", "drm_kms_helper.ko.xz", "i915.ko.xz"]
    with pytest.raises(RunnerError, match="has no module xe"):
        load_order(kernel, "xe")


def test_the_initramfs_has_the_modules_uncompressed_and_in_order(kernel: Kernel, tmp_path: Path) -> None:
    unpacked(b"".join(cpio.archive(image.entries(kernel, b"program")[:5])), tmp_path / "directories")
    entries = [entry for entry in image.entries(kernel, b"program") if entry.name != "dev/console"]  # takes root
    root = tmp_path / "out"
    unpacked(b"".join(cpio.archive(entries)), root)
    assert (root / "modules").read_text() == "drm.ko\ndrm_kms_helper.ko fbdev_emulation=0\ni915.ko\n"
    assert [(root / "lib" / name).read_bytes() for name in ("drm.ko", "drm_kms_helper.ko", "i915.ko")] == [
        b"plain drm", b"helper", b"driver",
    ]  # fmt: skip
    assert (root / "load").read_bytes() == b"program"
    assert (root / "init").stat().st_mode & 0o111
    assert (root / "bin/sh").readlink() == Path("busybox")
    subprocess.run(["bash", "-n", root / "init"], check=True)


def test_it_is_made_once_and_again_when_what_it_is_made_of_changes(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Path] = []

    def compile_load(_: Kernel, target: Path) -> None:
        compiled.append(target)
        target.write_bytes(b"program")

    monkeypatch.setattr(image, "compile_load", compile_load)
    first = image.build(kernel, tmp_path / "cache", lambda _: None)
    assert image.build(kernel, tmp_path / "cache", lambda _: None) == first
    assert len(compiled) == 1
    found = image.Image.of(first)
    assert found.kernel.read_bytes() == b"a kernel"
    assert b"070701" in found.initramfs.read_bytes()
    kernel.image.write_bytes(b"another kernel")
    assert image.build(kernel, tmp_path / "cache", lambda _: None) != first


def test_a_load_that_does_not_compile_is_told_with_the_compiler_s_words(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"cannot be compiled:\n(.|\n)*i915_drm\.h"):
        image.compile_load(kernel, tmp_path / "load")


def test_the_guest_goes_with_gvt(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--gvt", "--l2", "true"]).l2
    with pytest.raises(SystemExit):
        parse(["--l2", "true"])
    assert "--l2 needs --gvt" in capsys.readouterr().err


# The machine; QEMU is played by a shell that writes what a guest says


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[L2]:
    monkeypatch.setattr("tools.l2.machine.arguments", lambda *_, **__: [])
    (tmp_path / "qemu.log").write_bytes(b"")
    program = [sys.executable, "-c", "import sys; sys.stdin.read()\nimport time; time.sleep(60)"]
    with L2.started(image.Image(tmp_path, tmp_path), "/sys/vgpu", tmp_path, qemu=program) as made:
        yield made
    assert made.process.poll() is not None


def say(guest: L2, text: str) -> None:
    with guest.console.open("a", newline="") as console:
        console.write(text)


def test_whole_lines_are_read_and_counts_are_the_last_ones(guest: L2) -> None:
    assert (guest.lines(), guest.counts()) == ([], Counts())
    say(guest, "load: ready rcs0 bcs0\r\nload: right 12 wrong 0 late 1\r\nload: right 9")
    assert guest.lines() == ["load: ready rcs0 bcs0", "load: right 12 wrong 0 late 1"]
    assert guest.await_ready(1.0) == ["rcs0", "bcs0"]
    assert guest.up_after is not None
    assert guest.counts() == Counts(12, 0, 1)
    say(guest, "9 wrong 0 late 1\r\n")
    assert guest.counts() == Counts(99, 0, 1)


@pytest.mark.parametrize("line", ["load: failed insmod i915.ko", "load: wrong slot 3 is 0x1 and not 0x2"])
def test_a_guest_that_fails_ends_the_waiting_with_what_it_said(guest: L2, line: str) -> None:
    say(guest, f"something\n{line}\nand more\n")
    with pytest.raises(GuestError, match=f"^{line}\nsomething\n{line}\nand more\n"):
        guest.await_right(1, 5.0)


def test_waiting_ends_with_the_time_or_with_qemu(guest: L2) -> None:
    say(guest, "load: right 1 wrong 0 late 0\n")
    with pytest.raises(GuestError, match=r"no 1 more results within 0\.1 s"):
        guest.await_right(1, 0.1)
    guest.process.kill()
    guest.process.wait()
    with pytest.raises(GuestError, match="QEMU has ended with -9"):
        guest.await_ready(5.0)


@pytest.mark.parametrize(
    ("places", "is_lost"),
    [(["ffff", "ffff"], True), (["ffff", "fffe"], False), ([None, "ffff", None], False), ([None, None], False)],
)
def test_a_guest_whose_cpu_stands_at_two_looks_is_lost_and_not_waited_for(
    guest: L2, monkeypatch: pytest.MonkeyPatch, places: list[str | None], is_lost: bool
) -> None:
    looks = itertools.cycle(places)
    monkeypatch.setattr("tools.l2.machine.LOOK_SECONDS", 0.05)
    monkeypatch.setattr(L2, "_standstill", lambda _: next(looks))
    with pytest.raises(GuestError) as caught:
        guest.await_right(1, 60.0 if is_lost else 0.8)
    assert (type(caught.value) is LostGuestError) == is_lost
    assert ("its CPU stands at ffff with interrupts off" in str(caught.value)) == is_lost


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("RIP=ffffffff811b998b RFL=00000002 [-------] CPL=0 II=0", "ffffffff811b998b"),
        ("RIP=ffffffff811b998b RFL=00000246 [---Z-P-] CPL=0 II=0", None),
        ("", None),
    ],
)
def test_a_cpu_without_interrupts_is_told_from_one_that_has_them(said: str, expected: str | None) -> None:
    assert stuck_at(f"\nCPU#0\nRAX=0 RBX=0\n{said}\n") == expected


def test_qemu_gets_the_vgpu_with_what_belongs_to_it(tmp_path: Path) -> None:
    words = arguments(image.Image.of(tmp_path), "/sys/vgpu", tmp_path, device="enable-migration=on")
    assert "vfio-pci,sysfsdev=/sys/vgpu,addr=2.0,id=vgpu,enable-migration=on" in words
    assert words[words.index("-kernel") + 1] == str(tmp_path / "kernel")
    assert "share=on" in " ".join(words)
