# SPDX-License-Identifier: MIT
"""A kvmgt of ours among a kernel's modules, and what Secure Boot asks for; modprobe's programs are stood in for."""

from __future__ import annotations

import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tools.kvmgt import build, installed, pack, secure_boot, source
from tools.vm import kernels
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel

if TYPE_CHECKING:
    from pathlib import Path

RELEASE = "6.12.117+deb12-amd64"
VERSION = "6.12.117-1~deb12u1"
# Looks first in updates/, as depmod.d says; a module's fields are its lines.
MODINFO = """\
root=$2 release=$4 field=$6
for one in "$root/lib/modules/$release"/updates/*/kvmgt.ko "$root/lib/modules/$release"/kernel/*/kvmgt.ko; do
	[ -e "$one" ] || continue
	if [ "$field" = filename ]; then echo "$one"; else sed -n "s/^$field=//p" "$one"; fi
	exit 0
done
echo "modinfo: ERROR: Module kvmgt not found." >&2
exit 1
"""
OURS = f"version={build.our_version()}\nvfio_mig_source={VERSION}\n"
EFI = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def program(directory: Path, name: str, body: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{body}\n")
    (directory / name).chmod(0o755)


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, "modinfo", MODINFO)
    program(programs, "depmod", f'echo "$@" >>{tmp_path}/depmod')
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    made = Kernel(tmp_path / "root", RELEASE)
    put(made.tree / "lib/modules" / RELEASE / "kernel/i915/kvmgt.ko", b"stock\n")
    head = bytearray(0x3200)
    struct.pack_into("<H", head, 0x20E, 0x3000)
    put(made.image, bytes(head) + f"{RELEASE} (x) #1 SMP Debian {VERSION} (2026-11-14)".encode() + bytes(64))
    return made


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return put(tmp_path / "built/kvmgt.ko", OURS.encode())


def nobody(_message: str) -> None:
    pass


def under(kernel: Kernel, name: str = "updates") -> list[Path]:
    return sorted((kernel.tree / "lib/modules" / RELEASE / name).rglob("*"))


def test_ours_is_what_is_loaded_until_it_is_removed(kernel: Kernel, built: Path) -> None:
    place = installed.install(kernel, built, nobody)
    found = installed.find(kernel)
    assert (found.path, found.version, found.source) == (place, build.our_version(), VERSION)
    assert installed.problems(kernel) == []
    assert place.stat().st_mode & 0o777 == 0o644
    said = list[str]()
    installed.remove(kernel, said.append)
    assert under(kernel) == []
    assert not installed.find(kernel).is_ours
    assert said == [f"modprobe loads {installed.find(kernel).path}"]
    assert installed.find(kernel).path.read_bytes() == b"stock\n"


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (("depmod", 'test -e "${2}/failed" || { touch "${2}/failed"; echo full >&2; exit 1; }'), "depmod failed: full"),
        (("modinfo", 'echo "$2"/lib/modules/*/kernel/*/kvmgt.ko'), "modprobe would load .*, not .*: see /etc/depmod.d"),
    ],
)
def test_a_module_that_would_not_be_found_is_taken_away_again(
    kernel: Kernel, built: Path, tmp_path: Path, failing: tuple[str, str], words: str
) -> None:
    program(tmp_path / "bin", *failing)
    with pytest.raises(RunnerError, match=words):
        installed.install(kernel, built, nobody)
    assert under(kernel) == []


def test_where_dkms_has_one_nothing_is_changed(kernel: Kernel, built: Path) -> None:
    dkms = put(kernel.tree / "lib/modules" / RELEASE / "updates/dkms/kvmgt.ko", OURS.encode())
    for change in (lambda: installed.install(kernel, built, nobody), lambda: installed.remove(kernel, nobody)):
        with pytest.raises(RunnerError, match="apt-get remove vfio-mig-kvmgt-dkms"):
            change()
    assert under(kernel) == [dkms.parent, dkms]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"stock\n", "is not one of ours: it has no migration"),
        (f"version=0.0.1\nvfio_mig_source={VERSION}\n".encode(), "is of version 0.0.1, this is "),
        (OURS.replace(VERSION, "6.12.9-1").encode(), f"the source of 6.12.9-1, the kernel is {VERSION}"),
    ],
)
def test_it_is_said_why_another_one_would_be_built(kernel: Kernel, built: Path, content: bytes, words: str) -> None:
    installed.install(kernel, built, nobody).write_bytes(content)
    assert words in " ".join(installed.problems(kernel))


def secure(kernel: Kernel, keys: bool = True) -> None:
    put(kernel.tree / EFI, b"\6\0\0\0\1")
    if keys:
        put(kernel.tree / "var/lib/dkms/mok.key")
        put(kernel.tree / "var/lib/dkms/mok.pub")


def test_with_secure_boot_an_unsigned_module_is_not_installed(kernel: Kernel, built: Path) -> None:
    secure(kernel, keys=False)
    with pytest.raises(RunnerError, match="Secure Boot is on, and there is no key to sign with: apt-get install dkms"):
        installed.install(kernel, built, nobody)
    assert [path for path in under(kernel) if path.is_file()] == []


def test_it_is_signed_with_the_key_of_dkms_which_is_to_be_enrolled(kernel: Kernel, built: Path, tmp_path: Path) -> None:
    secure(kernel)
    sign = put(kernel.tree / "usr/lib/linux-kbuild-6.12.117+deb12/scripts/sign-file")
    program(sign.parent, sign.name, 'echo "signer=$2" >>"$4"')
    program(tmp_path / "bin", "mokutil", 'echo "$2 is not enrolled"')
    said = list[str]()
    place = installed.install(kernel, built, said.append)
    assert place.read_text() == f"{OURS}signer={kernel.tree}/var/lib/dkms/mok.key\n"
    assert built.read_text() == OURS
    assert f"once: mokutil --import {kernel.tree}/var/lib/dkms/mok.pub" in said[1]


@pytest.mark.parametrize(
    ("answer", "lines", "words"),
    [
        ("echo it is already enrolled", 1, "is enrolled"),
        ("echo it is not enrolled", 2, "will refuse the module"),
        ("echo EFI variables are not supported; exit 1", 2, "mokutil tells"),
    ],
)
def test_what_mokutil_says_decides_what_is_to_be_done(
    kernel: Kernel, tmp_path: Path, answer: str, lines: int, words: str
) -> None:
    secure(kernel)
    program(tmp_path / "bin", "mokutil", answer)
    told = list(secure_boot.advice(kernel.tree))
    assert len(told) == lines
    assert words in told[0]


def test_without_secure_boot_there_is_nothing_to_do(kernel: Kernel) -> None:
    assert list(secure_boot.advice(kernel.tree)) == []
    put(kernel.tree / EFI, b"\6\0\0\0\0")
    assert not secure_boot.is_enforced(kernel.tree)
    put(kernel.tree / "sys/kernel/security/lockdown", b"none [integrity] confidentiality\n")
    assert secure_boot.is_enforced(kernel.tree)


def test_a_tarball_that_is_installed_is_taken_only_if_it_is_of_the_kernel_s_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = put(tmp_path / "usr/src/linux-source-6.12.tar.xz")
    program(tmp_path, "dpkg-query", f"echo -n 'installed {VERSION}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert source.installed_tarball("linux-source-6.12", VERSION, tmp_path) == tarball
    assert source.installed_tarball("linux-source-6.12", "6.12.118-1", tmp_path) is None


def test_a_kernel_that_is_not_installed_is_refused() -> None:
    command = [sys.executable, "-m", "tools.kvmgt", "install", "--kernel", "9.9.9-none"]
    done = subprocess.run(command, cwd=pack.CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == "kvmgt: kernel 9.9.9-none is not installed: there is no /lib/modules/9.9.9-none\n"
    assert kernels.installed("../../etc") is None


def test_what_the_package_builds_with_is_whole_and_needs_nothing_else_of_ours(tmp_path: Path) -> None:
    pack.pack(tmp_path)
    command = [sys.executable, "-m", "tools.kvmgt", "build", "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--plain" in done.stdout
    packed = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.suffix != ".pyc"}
    assert {one[0] for one in packed} == {"LICENSE", "cdefs", "tools", "vfio_mig"}
