# SPDX-License-Identifier: MIT
"""``--kernel custom``: its configuration, and its build with stand-ins for apt, dpkg, tar and make."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.vm import custom, guest, mtty
from tools.vm.apt import Apt
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel
from tools.vm.machine import Options as MachineOptions
from tools.vm.machine import Outcome, explain, outcome_of
from tools.vm_cli import parse

RELEASE = "6.12.9-custom"
FRAGMENT = '# What it is for.\nCONFIG_LOCALVERSION="-custom"\nCONFIG_A=y\n# CONFIG_B is not set\n'

# The tests rely on these, and a build without one would only show as tests that find nothing.
PROMISED = """
IOMMUFD=m IOMMUFD_TEST=y VFIO=m VFIO_GROUP=y VFIO_CONTAINER=y VFIO_DEVICE_CDEV=y VFIO_DEBUGFS=y VFIO_PCI=m
SAMPLE_VFIO_MDEV_MTTY=m KASAN=y KASAN_GENERIC=y KASAN_VMALLOC=y PROVE_LOCKING=y DEBUG_ATOMIC_SLEEP=y DEBUG_KMEMLEAK=y
FAULT_INJECTION=y FAULT_INJECTION_DEBUG_FS=y FAULT_INJECTION_STACKTRACE_FILTER=y FAILSLAB=y FAIL_PAGE_ALLOC=y
KALLSYMS=y DEBUG_FS=y 9P_FS=y OVERLAY_FS=y VIRTIO_CONSOLE=y
"""


class FakeApt(Apt):
    """Has one version of the source package, or none."""

    version: str | None = "6.12.9-1"

    def update(self) -> None:
        pass

    def query(self, *arguments: str) -> str:
        assert arguments[-1] == "linux-source-6.12"
        return "" if self.version is None else f"Package: linux-source-6.12\nVersion: {self.version}\n"

    def download(self, packages: list[str], directory: Path) -> None:
        assert packages == [f"linux-source-6.12={self.version}"]
        (directory / "linux-source-6.12.deb").touch()


MAKE = """
case $* in
*allnoconfig*)
	grep CONFIG_A= "$KCONFIG_ALLCONFIG" >.config
	echo 'CONFIG_LOCALVERSION="-custom"' >>.config
	;;
*bzImage*)
	[ ! -e "$0.broken" ] || { echo "mm/x.c:1: error: x"; exit 2; }
	mkdir -p include/config arch/x86/boot
	echo RELEASE >include/config/kernel.release
	echo image >arch/x86/boot/bzImage
	: >System.map
	;;
*modules_install*)
	for word in "$@"; do case $word in INSTALL_MOD_PATH=*) to=${word#*=}/lib/modules/RELEASE ;; esac; done
	mkdir -p "$to/kernel/samples/vfio-mdev"
	echo mtty >"$to/kernel/samples/vfio-mdev/mtty.ko"
	ln -s "$PWD" "$to/build"
	;;
*run-command*)
	for word in "$@"; do to=${word##* }; done
	mkdir -p "$to"
	;;
esac
""".replace("RELEASE", RELEASE)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins in front of PATH; what make was asked for is in `calls`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, body in {
        "dpkg": 'mkdir -p "$3/usr/src"; : >"$3/usr/src/linux-source-6.12.tar.xz"',
        "tar": "exit 0",
        "depmod": "exit 0",
        "make": f'echo "$*" >>{directory}/calls\nenv >>{directory}/environment\n{MAKE}',
    }.items():
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setenv("MAKEFLAGS", "-n")
    monkeypatch.setattr(custom, "Apt", FakeApt)
    return directory


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Give a checkout whose setup says that nothing is missing."""
    scripts = tmp_path / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "setup").write_text(f'#!/bin/sh\n[ "$*" = --custom ] && [ ! -e {scripts}/refuse ]\n')
    (scripts / "setup").chmod(0o755)
    return scripts.parent


@pytest.fixture
def fragment(tmp_path: Path) -> Path:
    path = tmp_path / "own.config"
    path.write_text(FRAGMENT)
    return path


def directories(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "kernels").iterdir() if path.is_dir())


# The configuration


def test_the_configuration_has_one_line_per_option_and_comments() -> None:
    names = []
    for line in custom.FRAGMENT.read_text().splitlines():
        if found := re.fullmatch(r'(?:# )?(CONFIG_\w+)(?:=(?:y|m|\d+|"[^"]*")| is not set)', line):
            names.append(found[1])
        else:
            assert line == "" or line.startswith("# "), line
            assert "CONFIG_" not in line or "KCONFIG_ALLCONFIG" in line, line
    assert len(names) == len(set(names))


@pytest.mark.parametrize("option", PROMISED.split())
def test_the_configuration_asks_for_what_the_tests_rely_on(option: str) -> None:
    assert f"CONFIG_{option}" in custom.FRAGMENT.read_text().splitlines()


def test_the_legacy_container_is_the_real_one() -> None:
    assert "CONFIG_IOMMUFD_VFIO_CONTAINER=y" not in custom.FRAGMENT.read_text()


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ("CONFIG_A=y\n", []),
        ("CONFIG_A=y\n# CONFIG_B is not set\n", []),
        ("CONFIG_A=m\n", ["CONFIG_A=y"]),
        ("# CONFIG_A is not set\nCONFIG_B=m\n", ["CONFIG_A=y", "# CONFIG_B is not set"]),
        ("CONFIG_A=yes\nCONFIG_BB=y\n", ["CONFIG_A=y"]),
    ],
)
def test_what_the_kernels_rules_do_not_grant_is_named(config: str, refused: list[str]) -> None:
    assert custom.refused("# text\n\nCONFIG_A=y\n# CONFIG_B is not set\n", config) == refused


# The build


def test_it_is_built_once_per_configuration_and_its_source_is_not_kept(
    tmp_path: Path, programs: Path, checkout: Path, fragment: Path
) -> None:
    said: list[str] = []
    first = custom.fetch(checkout, tmp_path / "cache", said.append, fragment)
    assert first.release == RELEASE
    assert first.image.read_text() == "image\n"
    assert (first.headers / ".config").read_text() == (first.tree / "boot" / f"config-{RELEASE}").read_text()
    assert sorted(path.name for path in first.tree.iterdir()) == ["boot", "lib", "release", "usr"]
    modules = first.tree / "lib/modules" / RELEASE
    assert not (modules / "build").is_symlink()
    assert len(said) == 2
    asked = (programs / "calls").read_text()
    assert custom.fetch(checkout, tmp_path / "cache", said.append, fragment) == first
    assert (programs / "calls").read_text() == asked
    assert len(said) == 2
    fragment.write_text(FRAGMENT + "# More.\n")
    second = custom.fetch(checkout, tmp_path / "cache", said.append, fragment)
    assert second.tree != first.tree
    assert directories(tmp_path / "cache") == sorted([first.tree.name, second.tree.name])


def test_the_image_names_neither_user_nor_host_and_a_make_around_us_changes_nothing(
    tmp_path: Path, programs: Path, checkout: Path, fragment: Path
) -> None:
    custom.fetch(checkout, tmp_path / "cache", print, fragment)
    seen = (programs / "environment").read_text().splitlines()
    assert "KBUILD_BUILD_USER=vfio-mig" in seen
    assert "KBUILD_BUILD_HOST=cache" in seen
    assert not [line for line in seen if line.startswith("MAKEFLAGS")]


def test_a_failed_build_shows_its_end_and_leaves_its_log_alone(
    tmp_path: Path, programs: Path, checkout: Path, fragment: Path
) -> None:
    (programs / "make.broken").touch()
    with pytest.raises(RunnerError, match=r"(?s)^--kernel custom: the build failed \(status 2; .*mm/x.c:1: error: x$"):
        custom.fetch(checkout, tmp_path / "cache", print, fragment)
    assert directories(tmp_path / "cache") == []
    assert "error: x" in (tmp_path / "cache/kernels/custom.log").read_text()


@pytest.mark.usefixtures("programs")
def test_an_option_that_this_source_does_not_know_is_one_clear_line(
    tmp_path: Path, checkout: Path, fragment: Path
) -> None:
    fragment.write_text(FRAGMENT + "CONFIG_GONE=y\n")
    with pytest.raises(
        RunnerError, match=r"^--kernel custom: this source does not grant of own.config: CONFIG_GONE=y$"
    ):
        custom.fetch(checkout, tmp_path / "cache", print, fragment)
    assert directories(tmp_path / "cache") == []


@pytest.mark.usefixtures("programs")
def test_missing_programs_room_or_sources_are_told_before_anything_is_built(
    tmp_path: Path, checkout: Path, fragment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(RunnerError, match=rf"^--kernel custom: [^\n]*{reason}[^\n]*$"):
            custom.fetch(checkout, tmp_path / "cache", print, fragment)
        assert directories(tmp_path / "cache") == []

    (checkout / "scripts/refuse").touch()
    refused("the programs that build a kernel are missing")
    (checkout / "scripts/refuse").unlink()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 30))
        refused("4096 MiB while it is built, 1024 MiB are free")
    monkeypatch.setattr(FakeApt, "version", None)
    refused("package sources have no linux-source-6.12")


def test_a_kernel_with_an_mtty_of_its_own_is_asked_no_package(
    tmp_path: Path, programs: Path, checkout: Path, fragment: Path
) -> None:
    kernel = custom.fetch(checkout, tmp_path / "cache", print, fragment)
    asked = (programs / "calls").read_text()
    assert mtty.build(kernel, tmp_path / "cache", print).read_text() == "mtty\n"
    assert (programs / "calls").read_text() == asked


def test_it_is_a_kernel_that_can_be_named() -> None:
    assert parse(["--kernel", "custom", "true"]).kernel == custom.NAME


# Leaks at a run's end


def find_leaks(root: Path) -> subprocess.CompletedProcess[str]:
    """Run that part of the guest's script, with a busybox whose sleep takes no time."""
    function = re.search(r"^find_leaks\(\) \{\n.*?^\}$", guest._ENTRY, re.MULTILINE | re.DOTALL)
    assert function is not None
    busybox = 'busybox() { if [[ $1 == sleep ]]; then SECONDS=99; else "$@"; fi; }'
    script = f"root={root} run={root}\n{busybox}\n{function[0]}\nfind_leaks\necho went on"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)


def test_the_guest_asks_for_leaks_where_the_kernel_looks_for_them(tmp_path: Path) -> None:
    assert find_leaks(tmp_path).stdout == "went on\n"
    assert not (tmp_path / guest.LEAKS).exists()
    file = tmp_path / "sys/kernel/debug/kmemleak"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_leaks(tmp_path).stdout == "went on\n"
    assert (tmp_path / guest.LEAKS).read_text() == "scan\n"


def test_the_report_on_leaks_is_shown_when_the_kernel_found_some(tmp_path: Path) -> None:
    found = "kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)"
    (tmp_path / guest.STATUS).write_text("0\n")
    (tmp_path / guest.DMESG).write_text(f"[   12.0] {found}\n")
    (tmp_path / guest.LEAKS).write_text("unreferenced object 0x1 (size 8):\n    gvt_open+0x1\n" + "    x\n" * 500)
    outcome = outcome_of(tmp_path, timed_out=False)
    assert outcome.exit_code() == 99
    options = MachineOptions(kernel=Kernel(tmp_path, RELEASE), kvm=False, memory="1G", cpus=2, timeout=900)
    shown = explain(outcome, options, tmp_path).splitlines()
    assert shown[1:4] == [f"[   12.0] {found}", "unreferenced object 0x1 (size 8):", "    gvt_open+0x1"]
    assert len(shown) == 202
    (tmp_path / guest.DMESG).write_text("[   12.0] fine\n")
    assert outcome_of(tmp_path, timed_out=False) == Outcome(0, None, [], timed_out=False)
