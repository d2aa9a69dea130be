# SPDX-License-Identifier: MIT
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tools.vm import kernels
from tools.vm.apt import Apt
from tools.vm.errors import RunnerError
from tools.vm.kernels import find_release, from_directory, packages_of, release_from_depends

# apt-cache depends --important, Debian 12
DEPENDS_612 = "linux-image-6.12-amd64\n  Depends: linux-image-6.12.117+deb12-amd64\n"
DEPENDS_61 = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n"
UNSIGNED = "linux-image-amd64\n |Depends: linux-image-6.12.9-amd64\n  Depends: linux-image-6.12.9-amd64-unsigned\n"


@pytest.mark.parametrize(
    ("output", "series", "release"),
    [
        (DEPENDS_612, "6.12", "6.12.117+deb12-amd64"),
        (DEPENDS_61, "6.1", "6.1.0-56-amd64"),
        (UNSIGNED, "6.12", "6.12.9-amd64"),
        (DEPENDS_612, "6.1", None),  # 6.1 is not the beginning of 6.12
        (DEPENDS_61, "6.12", None),
        ("", "6.12", None),
    ],
)
def test_the_release_is_read_from_apt(output: str, series: str, release: str | None) -> None:
    assert release_from_depends(output, series) == release


def test_the_kbuild_package_s_two_naming_schemes_are_known() -> None:
    assert packages_of("6.12.117+deb12-amd64", "6.12", "linux-kbuild-6.1\nlinux-kbuild-6.12.117+deb12\n") == [
        "linux-image-6.12.117+deb12-amd64",
        "linux-headers-6.12.117+deb12-amd64",
        "linux-headers-6.12.117+deb12-common",
        "linux-kbuild-6.12.117+deb12",
    ]
    assert (
        packages_of("6.1.0-56-amd64", "6.1", "linux-kbuild-6.1\nlinux-kbuild-6.12.117+deb12\n")[-1]
        == "linux-kbuild-6.1"
    )
    with pytest.raises(RunnerError, match="no linux-kbuild package fits"):
        packages_of("6.1.0-56-amd64", "6.1", "linux-kbuild-6.12.117+deb12\n")


class FakeApt(Apt):
    """Lists that name an old release until they are updated twice; only the new one can be downloaded."""

    def __init__(self, directory: Path, *, updates_needed: int) -> None:
        super().__init__(directory)
        self.updates = 0
        self.needed = updates_needed

    def update(self) -> None:
        self.updates += 1

    def query(self, *arguments: str) -> str:
        version = "6.12.2" if self.updates >= self.needed else "6.12.1"
        if arguments[0] == "pkgnames":
            return f"linux-kbuild-{version}\n"
        return f"x\n  Depends: linux-image-{version}-amd64\n" if "6.12" in arguments[-1] else ""

    def download(self, packages: list[str], directory: Path) -> None:
        (directory / "half.deb").touch()
        if "linux-image-6.12.2-amd64" not in packages:
            raise RunnerError("404")


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(packages: Path, tree: Path) -> None:
        assert list(packages.glob("*.deb"))
        (tree / "boot").mkdir()

    monkeypatch.setattr(kernels, "_unpack", unpack)
    monkeypatch.setattr(kernels, "make_dependencies", lambda _kernel: None)


@pytest.mark.usefixtures("no_tools")
def test_lists_older_than_the_mirror_are_refreshed_once_and_then_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = FakeApt(tmp_path / "apt", updates_needed=2)
    monkeypatch.setattr(kernels, "Apt", lambda _directory: apt)
    kernel = kernels.fetch("6.12", tmp_path, lambda _message: None)
    assert kernel.release == "6.12.2-amd64"
    assert (kernel.tree / "boot").is_dir()
    assert not (kernel.tree / "packages").exists()
    assert kernels.fetch("6.12", tmp_path, lambda _message: None) == kernel
    assert apt.updates == 2  # the second fetch asked nobody


@pytest.mark.usefixtures("no_tools")
def test_a_failed_download_leaves_no_kernel_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "Apt", lambda _directory: FakeApt(tmp_path / "apt", updates_needed=99))
    with pytest.raises(RunnerError, match="404"):
        kernels.fetch("6.12", tmp_path, lambda _message: None)
    assert [path.name for path in (tmp_path / "kernels").iterdir() if path.is_dir()] == []


def test_a_series_that_no_source_has_is_not_found(tmp_path: Path) -> None:
    assert find_release(FakeApt(tmp_path, updates_needed=0), "6.1") is None


def test_without_apt_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_kwargs: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(RunnerError, match=r"apt-get is missing: .* use --kernel PATH"):
        Apt(tmp_path).update()


def test_a_kernel_directory_must_hold_exactly_one_kernel_with_modules(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="found 0"):
        from_directory(tmp_path)
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-6.9-own").touch()
    with pytest.raises(RunnerError, match=r"lib/modules/6\.9-own is missing"):
        from_directory(tmp_path)
    modules = tmp_path / "lib" / "modules" / "6.9-own"
    modules.mkdir(parents=True)
    (modules / "modules.dep").touch()
    kernel = from_directory(tmp_path)
    assert (kernel.release, kernel.image) == ("6.9-own", tmp_path / "boot" / "vmlinuz-6.9-own")


def test_two_runners_on_a_new_machine_do_not_use_the_package_lists_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seen: two first starts side by side, and apt-cache knew no kernel while the other's apt-get update went on
    at_work: list[int] = []
    together: list[int] = []

    def run(*_args: object, **_kwargs: object) -> subprocess.CompletedProcess[str]:
        at_work.append(1)
        time.sleep(0.05)
        together.append(len(at_work))
        at_work.pop()
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    runners = [threading.Thread(target=Apt(tmp_path).update) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert together == [1, 1, 1]
