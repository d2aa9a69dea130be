# SPDX-License-Identifier: MIT
import io
import struct
import tarfile
from pathlib import Path

import pytest

from tools.kvmgt import source
from tools.vm import newest
from tools.vm.apt import Apt
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel

BANNER = (
    b"6.12.117+deb12-amd64 (debian-kernel@lists.debian.org) #1 SMP PREEMPT_DYNAMIC "
    b"Debian 6.12.117-1~deb12u1 (2026-11-14)\0"
)
PACKAGE = "linux-source-6.12=6.12.117-1~deb12u1"
I915 = "linux-source-6.12/drivers/gpu/drm/i915"
WANTED = {
    f"{I915}/gvt/Makefile": b"kvmgt-y\n",
    f"{I915}/gvt/kvmgt.c": b"/* kvmgt */\n",
    f"{I915}/gvt/gvt.h": b"/* gvt.h */\n",
    f"{I915}/i915_drv.h": b"/* i915 */\n",
    f"{I915}/gt/uc/abi/guc_abi.h": b"/* deep */\n",
    "linux-source-6.12/scripts/checkpatch.pl": b"#!perl\n",
}
OTHER = {
    f"{I915}/i915_driver.c": b"i915's own code\n",
    f"{I915}/Makefile": b"i915's own Makefile\n",
    f"{I915}/../../../etc/x.h": b"climbs\n",
    "linux-source-6.12/drivers/gpu/drm/xe/xe.h": b"another driver\n",
    "linux-source-6.12/zlast": bytes(1 << 16),
}


def tarball(mode: str, files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def package(files: dict[str, bytes]) -> bytes:
    """Return what the stand-in for dpkg-deb takes for a package: the tarball that the real one would print."""
    return tarball("w", {"./usr/src/linux-source-6.12.tar.xz": tarball("w:xz", files)})


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, body in {"dpkg-deb": 'exec cat "$2"', "dpkg": 'exec tar -xf "$2" -C "$3"'}.items():
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


class FakeApt(Apt):
    """Has one package, after so many updates."""

    def __init__(self, content: bytes, updates: int = 0) -> None:
        self.content, self.updates = content, updates
        self.asked: list[str] = []

    def update(self) -> None:
        self.updates -= 1

    def download(self, packages: list[str], directory: Path) -> None:
        self.asked += packages
        if self.updates > 0:
            raise RunnerError("not there\nE: Version was not found")
        (directory / "package.deb").write_bytes(self.content)


def make_kernel(tree: Path, banner: bytes = BANNER) -> Kernel:
    head = bytearray(0x3200)
    struct.pack_into("<H", head, 0x20E, 0x3000)
    kernel = Kernel(tree, "6.12.117+deb12-amd64")
    kernel.image.parent.mkdir(parents=True)
    kernel.image.write_bytes(bytes(head) + banner + bytes(64))
    return kernel


def silent(_message: str) -> None:
    pass


def test_exactly_the_version_that_the_kernel_was_built_from_is_fetched(tmp_path: Path) -> None:
    apt = FakeApt(package(WANTED | OTHER))
    found = source.fetch(make_kernel(tmp_path / "kernel"), tmp_path / "cache", silent, apt)
    assert apt.asked == [PACKAGE]
    assert "6.12.117-1~deb12u1" in found.name


def test_only_what_a_build_needs_is_kept(tmp_path: Path) -> None:
    found = source.fetch(make_kernel(tmp_path / "kernel"), tmp_path / "cache", silent, FakeApt(package(WANTED | OTHER)))
    kept = {f"linux-source-6.12/{path.relative_to(found)}": path for path in found.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in kept.items()} == WANTED


def test_it_is_fetched_once(tmp_path: Path) -> None:
    kernel = make_kernel(tmp_path / "kernel")
    source.fetch(kernel, tmp_path / "cache", silent, FakeApt(package(WANTED)))
    nothing = FakeApt(b"")
    assert source.fetch(kernel, tmp_path / "cache", silent, nothing).is_dir()
    assert nothing.asked == []


def test_a_kernel_of_a_newer_suite_has_its_source_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = make_kernel(tmp_path / "kernel")
    apt = FakeApt(package(WANTED))
    monkeypatch.setattr(newest, "suite_of", lambda one, _cache: apt if one == kernel else None)
    assert source.fetch(kernel, tmp_path / "cache", silent).is_dir()
    assert apt.asked == [PACKAGE]


def test_old_lists_are_brought_up_to_date(tmp_path: Path) -> None:
    apt = FakeApt(package(WANTED), updates=1)
    assert source.fetch(make_kernel(tmp_path / "kernel"), tmp_path / "cache", silent, apt).is_dir()
    assert apt.asked == [PACKAGE, PACKAGE]


def test_a_version_that_is_gone_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="a kernel newer than the one in"):
        source.fetch(make_kernel(tmp_path / "kernel"), tmp_path / "cache", silent, FakeApt(b"", updates=5))
    assert [path.name for path in (tmp_path / "cache" / "sources").iterdir() if path.is_dir()] == []


def test_a_kernel_of_one_s_own_is_refused(tmp_path: Path) -> None:
    own = b"6.12.1 (me@home) #1 SMP PREEMPT_DYNAMIC Mon Nov 16 10:00:00 UTC 2026\0"
    with pytest.raises(RunnerError, match="no source that certainly fits its i915"):
        source.package_of(make_kernel(tmp_path / "kernel", own))


@pytest.mark.parametrize("missing", [f"{I915}/gvt/Makefile", "linux-source-6.12/scripts/checkpatch.pl"])
def test_a_package_without_the_driver_is_refused(tmp_path: Path, missing: str) -> None:
    files = {name: content for name, content in WANTED.items() if name != missing}
    with pytest.raises(RunnerError, match=r"package\.deb has no .*\(5 files were taken\)"):
        source.fetch(make_kernel(tmp_path / "kernel"), tmp_path / "cache", silent, FakeApt(package(files)))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_package_cut_off_is_refused(tmp_path: Path, part: float) -> None:
    inner = tarball("w:xz", WANTED | OTHER)
    cut = tarball("w", {"./usr/src/linux-source-6.12.tar.xz": inner[: int(len(inner) * part)]})
    with pytest.raises(RunnerError, match=r"package\.deb (cannot be read|has no)"):
        source.fetch(make_kernel(tmp_path / "kernel"), tmp_path / "cache", silent, FakeApt(cut))


def test_sparse_comes_from_its_package_where_the_host_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    apt = FakeApt(tarball("w", {"./usr/bin/sparse": b"#!/bin/sh\n"}))
    assert source.fetch_sparse(tmp_path / "cache", silent, apt).read_bytes() == b"#!/bin/sh\n"
    assert apt.asked == ["sparse"]


def test_the_host_s_own_sparse_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert source.fetch_sparse(tmp_path / "cache", silent, FakeApt(b"")) == Path("/usr/bin/sparse")
