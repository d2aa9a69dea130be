# SPDX-License-Identifier: MIT
import io
import struct
import tarfile
from pathlib import Path

import pytest

from tools.vm import mtty
from tools.vm.apt import Apt
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel
from tools.vm_cli import parse

# As in Debian 12's images
BANNER_612 = (
    b"6.12.117+deb12-amd64 (debian-kernel@lists.debian.org) #1 SMP PREEMPT_DYNAMIC "
    b"Debian 6.12.117-1~deb12u1 (2026-11-14)\0"
)
BANNER_61 = b"6.1.0-56-amd64 (debian-kernel@lists.debian.org) #1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)\0"
BANNER_OWN = b"6.12.1 (me@home) #1 SMP PREEMPT_DYNAMIC Mon Nov 16 10:00:00 UTC 2026\0"
SOURCE = b"/* mtty */\n"
PACKAGE = "linux-source-6.12=6.12.117-1~deb12u1"


def image(banner: bytes, at: int = 0x3000) -> bytes:
    head = bytearray(at + 0x200)
    struct.pack_into("<H", head, 0x20E, at)
    return bytes(head) + banner + bytes(64)


def make_kernel(tree: Path, release: str = "6.12.117+deb12-amd64", banner: bytes = BANNER_612) -> Kernel:
    kernel = Kernel(tree, release)
    kernel.image.parent.mkdir(parents=True, exist_ok=True)
    kernel.image.write_bytes(image(banner))
    return kernel


def tarball(mode: str, files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def package(files: dict[str, bytes], *, compression: str = "xz") -> bytes:
    """Return what the stand-in for dpkg-deb takes for a package: the tarball that the real one would print."""
    name = f"./usr/src/linux-source-6.12.tar.{compression}"
    return tarball("w", {"./usr/share/doc/x": b"", name: tarball(f"w:{compression}", files)})


GOOD = {
    "linux-source-6.12/samples/vfio-mdev/mdpy.c": b"other\n",
    "linux-source-6.12/samples/vfio-mdev/mtty.c": SOURCE,
    "linux-source-6.12/zlast": bytes(1 << 20),
}


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a dpkg-deb that prints the package and a make that copies the source in front of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, body in {
        "dpkg-deb": 'exec cat "$2"',
        "make": f'echo "$*" >>{directory}/calls\n'
        'for a in "$@"; do case $a in M=*) M=${a#M=};; esac; done\n'
        'cat "$M/Makefile" "$M/mtty.c" >"$M/mtty.ko"; echo "warning: theirs"',
    }.items():
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory / "calls"


class FakeApt(Apt):
    """Has the one package, after so many updates."""

    def __init__(self, directory: Path, *, updates_needed: int, content: bytes = b"") -> None:
        super().__init__(directory)
        self.updates = 0
        self.needed = updates_needed
        self.content = content
        self.asked: list[str] = []

    def update(self) -> None:
        self.updates += 1

    def download(self, packages: list[str], directory: Path) -> None:
        self.asked += packages
        if self.updates < self.needed:
            (directory / "half.deb.partial").touch()
            raise RunnerError("apt-get could not download X:\nW: odd\nE: Version '1' for 'X' was not found")
        (directory / "linux-source.deb").write_bytes(self.content)


@pytest.mark.parametrize(
    ("content", "version"),
    [
        (image(BANNER_612), "6.12.117-1~deb12u1"),
        (image(BANNER_61, 0xFDFF), "6.1.192-2"),
        (image(BANNER_OWN), None),
        (image(b""), None),
        (b"MZ", None),
    ],
)
def test_an_image_says_from_which_source_package_it_was_built(content: bytes, version: str | None) -> None:
    assert mtty.debian_version(content) == version


def test_a_kernel_without_migration_or_of_unknown_origin_has_no_package(tmp_path: Path) -> None:
    assert mtty.package_of(make_kernel(tmp_path)) == ("linux-source-6.12", "6.12.117-1~deb12u1")
    for release, banner, problem in (
        ("6.1.0-56-amd64", BANNER_61, "cannot be migrated; Linux 6.7 is the first"),
        ("6.12.1", BANNER_OWN, "does not say"),
        ("own", BANNER_612, "does not begin with a kernel's version"),
    ):
        with pytest.raises(RunnerError, match=problem):
            mtty.package_of(make_kernel(tmp_path, release, banner))


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_the_one_file_is_read_from_the_tarball_in_the_package(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(package(GOOD, compression=compression))
    assert mtty.extract(path) == SOURCE


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (package({"linux-source-6.12/samples/vfio-mdev/mdpy.c": b""}), "has no samples/vfio-mdev/mtty.c"),
        (tarball("w", {"./usr/share/doc/x": b""}), "has no samples/vfio-mdev/mtty.c"),
        (package(GOOD)[:1200], "cannot be read"),
        (b"", "cannot be read"),
        (b"x" * 4096, "cannot be read"),
    ],
)
def test_a_package_without_the_file_is_one_clear_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(content)
    with pytest.raises(RunnerError, match=rf"^--mtty: x\.deb {problem}[^\n]*$"):
        mtty.extract(path)


@pytest.mark.parametrize("updates_needed", [0, 1])
def test_the_source_is_fetched_once_and_only_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates_needed: int
) -> None:
    apt = FakeApt(tmp_path / "apt", updates_needed=updates_needed, content=package(GOOD))
    monkeypatch.setattr(mtty, "Apt", lambda _directory: apt)
    kernel = make_kernel(tmp_path / "k")
    found = mtty.fetch(kernel, tmp_path / "cache", lambda _message: None)
    assert found.read_bytes() == SOURCE
    assert [path.name for path in found.parent.iterdir()] == ["mtty.c"]
    assert mtty.fetch(kernel, tmp_path / "cache", lambda _message: None) == found
    assert apt.asked == [PACKAGE] * (1 + updates_needed)
    assert apt.updates == updates_needed


def test_a_package_that_cannot_be_had_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = FakeApt(tmp_path / "apt", updates_needed=9)
    monkeypatch.setattr(mtty, "Apt", lambda _directory: apt)
    with pytest.raises(RunnerError, match=r"^--mtty: apt-get could not .*: E: Version '1' for 'X' was[^\n]*$"):
        mtty.fetch(make_kernel(tmp_path / "k"), tmp_path / "cache", lambda _message: None)
    assert apt.asked == [PACKAGE] * 2
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()] == [tmp_path / "cache/sources"]


def test_it_is_built_once_for_its_kernel_and_its_warnings_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Path
) -> None:
    monkeypatch.setattr(
        mtty, "Apt", lambda _directory: FakeApt(tmp_path / "apt", updates_needed=0, content=package(GOOD))
    )
    first, second = make_kernel(tmp_path / "k"), make_kernel(tmp_path / "k2")
    built = [mtty.build(kernel, tmp_path / "cache", lambda _message: None) for kernel in (first, first, second)]
    assert built[0] == built[1] != built[2]
    assert built[0].read_bytes() == b"obj-m := mtty.o\n" + SOURCE
    assert [path.name for path in built[0].parent.iterdir()] == ["mtty.ko"]
    assert len(programs.read_text().splitlines()) == 2


def test_it_is_asked_for_beside_the_driver_or_alone() -> None:
    assert not parse(["true"]).mtty
    assert parse(["--mtty", "true"]).mtty
    assert parse(["--mtty", "--no-module", "true"]).no_module
