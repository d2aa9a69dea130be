# SPDX-License-Identifier: MIT
"""``--kernel newest``: which packages, how their programs are run, and when nothing is fetched again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.vm import module, mtty, newest
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel
from tools.vm.newest import needs_loader, packages_of, release_of
from tools.vm.suites import Suite

RELEASE = "7.3.4+deb13-amd64"
DEPENDS = f"linux-image-amd64\n  Depends: linux-base-amd64\n  Depends: linux-image-{RELEASE}\n"


@pytest.mark.parametrize(
    ("output", "release"),
    [
        (DEPENDS, RELEASE),
        ("linux-image-amd64\n  Depends: linux-image-6.12.117+deb13-amd64\n", "6.12.117+deb13-amd64"),
        (
            "linux-image-amd64\n |Depends: linux-image-7.3-amd64\n  Depends: linux-image-7.3-amd64-unsigned\n",
            "7.3-amd64",
        ),
        ("linux-image-amd64\n  Depends: linux-image-cloud-amd64\n", None),
        ("", None),
    ],
)
def test_the_release_is_read_from_apt(output: str, release: str | None) -> None:
    assert release_of(output) == release


def test_image_and_modules_are_one_package_or_two() -> None:
    names = f"linux-binary-{RELEASE}\nlinux-modules-{RELEASE}\nlinux-image-{RELEASE}\n"
    assert packages_of(RELEASE, names) == [
        f"linux-headers-{RELEASE}",
        f"linux-binary-{RELEASE}",
        f"linux-modules-{RELEASE}",
    ]
    assert packages_of("6.19-amd64", names) == ["linux-headers-6.19-amd64", "linux-image-6.19-amd64"]


def test_programs_are_told_from_scripts_and_libraries(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n" + "x" * 100)
    empty = tmp_path / "empty"
    empty.touch()
    assert needs_loader(Path(os.path.realpath("/bin/sh")))
    assert not needs_loader(script)
    assert not needs_loader(empty)
    elf = bytearray(Path(os.path.realpath("/bin/sh")).read_bytes()[:4096])
    elf[4] = 1  # 32 bits
    (tmp_path / "old").write_bytes(elf)
    assert not needs_loader(tmp_path / "old")


def host_loader() -> Path:
    return next(
        path for path in map(Path, ("/lib64/ld-linux-x86-64.so.2", "/usr/lib64/ld-linux-x86-64.so.2")) if path.exists()
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return an unpacked root with this host's loader and C library, and two of its programs."""
    tree = tmp_path / "a root"
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (tree / "usr/lib64").mkdir()
    shutil.copy(os.path.realpath(host_loader()), tree / "usr/lib64/ld-linux-x86-64.so.2")
    needed = subprocess.run(["ldd", "/bin/cat"], stdout=subprocess.PIPE, text=True, check=True).stdout
    for word in needed.split():
        if word.startswith("/") and ".so" in word and "ld-linux" not in word:
            shutil.copy(os.path.realpath(word), libraries / Path(word).name)
    for name in ("usr/bin/x86_64-linux-gnu-tool-14", "usr/lib/linux-kbuild-7/scripts/fixdep"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath("/bin/cat"), tree / name)
    (tree / "usr/bin/tool").symlink_to("x86_64-linux-gnu-tool-14")
    (tree / "usr/bin/script").write_text("#!/bin/sh\n" + "# a comment\n" * 10)
    (tree / "usr/bin/script").chmod(0o755)
    return tree


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86-64 only")
def test_a_program_is_run_by_the_loader_that_came_with_it_whatever_its_name_is(root: Path, tmp_path: Path) -> None:
    newest.wrap_programs(root)
    (tmp_path / "text").write_text("the text\n")
    link = tmp_path / "elsewhere"
    link.symlink_to(root / "usr/bin/tool")
    for name in (root / "usr/bin/x86_64-linux-gnu-tool-14", root / "usr/lib/linux-kbuild-7/scripts/fixdep", link):
        assert subprocess.run([name, tmp_path / "text"], stdout=subprocess.PIPE, check=True).stdout == b"the text\n"
        assert subprocess.run([name, "none"], stderr=subprocess.DEVNULL, check=False).returncode == 1
    assert not (root / "usr/bin/script.real").exists()
    # it is really that loader, and not the host's
    (root / "usr/lib64/ld-linux-x86-64.so.2").unlink()
    assert subprocess.run([link, tmp_path / "text"], stderr=subprocess.DEVNULL, check=False).returncode != 0


class FakeSuite:
    """A suite that has one kernel, or none."""

    def __init__(self, name: str, depends: str) -> None:
        self.suite = Suite(name, name)
        self.depends = depends
        self.downloads: list[str] = []

    def query(self, *arguments: str) -> str:
        return self.depends if arguments[0] == "depends" else f"linux-binary-{RELEASE}\nlinux-modules-{RELEASE}\n"

    def download_with_dependencies(self, packages: list[str], directory: Path) -> None:
        assert directory.is_dir()
        self.downloads += packages


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> list[FakeSuite]:
    result: list[FakeSuite] = []

    def available(_cache: Path, failures: list[str]) -> Iterator[FakeSuite]:
        failures.append("trixie: no such suite")
        yield from result

    def unpack(_packages: Path, tree: Path) -> None:
        (tree / "usr/lib/modules" / RELEASE).mkdir(parents=True)
        (tree / "usr/lib/modules" / RELEASE / "vmlinuz").write_text("image")
        (tree / "usr/bin").mkdir()
        for name in newest._CALLED:
            target = name if name == "pahole" else f"x86_64-linux-gnu-{name}{'-14' if name == 'gcc' else ''}"
            (tree / "usr/bin" / target).write_text("#!/bin/sh\n")
        (tree / "usr/bin/x86_64-linux-gnu-gcc-ar-14").write_text("#!/bin/sh\n")
        (tree / "usr/share/doc").mkdir(parents=True)

    monkeypatch.setattr(newest, "available", available)
    monkeypatch.setattr(newest, "unpack", unpack)
    monkeypatch.setattr(newest, "make_dependencies", lambda _kernel: None)
    return result


def never(message: object, *_more: object) -> None:
    raise AssertionError(message)


def test_it_is_fetched_once_with_its_compiler_and_remembered(
    tmp_path: Path, offers: list[FakeSuite], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = FakeSuite("trixie-backports", DEPENDS)
    offers += [FakeSuite("empty", ""), suite]
    told: list[str] = []
    kernel = newest.fetch(tmp_path, told.append)
    assert kernel == Kernel(tmp_path / "kernels" / RELEASE, RELEASE)
    assert suite.downloads == [f"linux-headers-{RELEASE}", f"linux-binary-{RELEASE}", f"linux-modules-{RELEASE}"]
    assert told == [f"fetching kernel {RELEASE} of trixie-backports and its compiler, 200 MB"]
    assert kernel.image.read_text() == "image"
    assert (kernel.tree / "lib/modules" / RELEASE).is_dir()
    assert kernel.tools is not None
    assert (kernel.tools / "gcc").resolve().name == "x86_64-linux-gnu-gcc-14"
    assert not (kernel.tree / "packages").exists()
    monkeypatch.setattr(newest, "available", never)
    assert newest.fetch(tmp_path, never) == kernel
    assert newest.find("newest", tmp_path, never) == kernel
    assert newest.find(str(kernel.tree), tmp_path, never) == kernel


def test_where_no_suite_has_one_every_reason_is_said(tmp_path: Path, offers: list[FakeSuite]) -> None:
    offers.append(FakeSuite("empty", ""))
    with pytest.raises(RunnerError, match=r"could be fetched: trixie: no such suite; empty has no linux-image-amd64$"):
        newest.fetch(tmp_path, never)
    assert list((tmp_path / "kernels").iterdir()) == []


def test_its_source_comes_from_its_own_suite_and_others_from_the_host_s(
    tmp_path: Path, offers: list[FakeSuite]
) -> None:
    kernel = Kernel(tmp_path / "tree", RELEASE)
    kernel.tree.mkdir()
    assert newest.suite_of(kernel, tmp_path) is None
    (kernel.tree / "suite").write_text("trixie-backports\n")
    with pytest.raises(RunnerError, match=r"trixie-backports, where kernel 7\.3\.4.* came from, cannot be had"):
        newest.suite_of(kernel, tmp_path)
    suite = FakeSuite("trixie-backports", "")
    offers += [FakeSuite("other", ""), suite]
    assert newest.suite_of(kernel, tmp_path) is suite  # type: ignore[comparison-overlap]


def test_its_modules_are_built_by_its_own_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, RELEASE)
    seen: list[str] = []

    def run(_command: object, *, env: dict[str, str], **_options: object) -> subprocess.CompletedProcess[str]:
        seen.append(env["PATH"])
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PATH", "/host/bin")
    module.make(kernel, tmp_path, "x")
    (tmp_path / "tools").mkdir()
    module.make(kernel, tmp_path, "x")
    assert seen == ["/host/bin", f"{tmp_path}/tools:/host/bin"]


@pytest.mark.parametrize(
    ("makefile", "expected"),
    [
        (f"include /usr/src/linux-headers-{RELEASE}-common/Makefile\n", False),
        (f"KBUILD_OUTPUT=/usr/src/linux-headers-{RELEASE}\ninclude /usr/src/x/Makefile\n", True),
    ],
)
def test_the_directory_with_the_configuration_is_told_where_a_build_asks_for_it(
    tmp_path: Path, makefile: str, expected: bool
) -> None:
    kernel = Kernel(tmp_path, RELEASE)
    kernel.headers.mkdir(parents=True)
    (kernel.headers.parent / "linux-headers-7.3.4+deb13-common").mkdir()
    (kernel.headers / "Makefile").write_text(makefile)
    command = module.make_command(kernel, tmp_path / "x")
    assert (f"KBUILD_OUTPUT={kernel.headers}" in command) is expected


def test_mtty_has_the_source_package_of_backports(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, RELEASE)
    kernel.image.parent.mkdir()
    banner = b"7.3.4 (x@lists.debian.org) #1 SMP PREEMPT_DYNAMIC Debian 7.3.4-1~bpo13+1 (2026-11-15)\0"
    kernel.image.write_bytes(b"\0" * 0x20E + (0x200).to_bytes(2, "little") + b"\0" * (0x400 - 0x210) + banner)
    assert mtty.package_of(kernel) == ("linux-source-7.3", "7.3.4-1~bpo13+1")
