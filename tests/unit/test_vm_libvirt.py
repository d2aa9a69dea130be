# SPDX-License-Identifier: MIT
"""``--libvirt``: what is fetched, once, and from where; and the reaper that the daemon runs under."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from tools.lab import reaper
from tools.vm import libvirt
from tools.vm.errors import RunnerError
from tools.vm_cli import parse


class FakeSuite:
    """A newer suite of the distribution."""

    def __init__(self, name: str, version: str | None, *, fails: bool = False) -> None:
        self.suite = SimpleNamespace(name=name)
        self.version = version
        self.fails = fails
        self.fetched: list[str] = []

    def candidate(self, package: str) -> str | None:
        assert package == "libvirt-daemon"
        return self.version

    def download_with_dependencies(self, packages: list[str], directory: Path) -> None:
        if self.fails:
            raise RunnerError(f"{self.suite.name} is away")
        self.fetched += packages
        (directory / "partial").mkdir()


class FakeApt:
    """The host's package sources."""

    code = 0
    asked: ClassVar[list[str]] = []

    def __init__(self, _directory: Path) -> None: ...

    def update(self) -> None: ...

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        FakeApt.asked = [program, *words]
        return subprocess.CompletedProcess([], self.code, "", "E: no\nE: such package\n")


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> list[FakeSuite]:
    found: list[FakeSuite] = []

    def available(_cache: Path, _failures: list[str]) -> Iterator[FakeSuite]:
        yield from found

    def unpack(_packages: Path, tree: Path) -> None:
        (tree / "usr/share/doc/x").mkdir(parents=True)
        (tree / "usr/sbin").mkdir()

    monkeypatch.setattr(libvirt, "available", available)
    monkeypatch.setattr(libvirt, "unpack", unpack)
    monkeypatch.setattr(libvirt, "Apt", FakeApt)
    monkeypatch.setattr(FakeApt, "code", 0)
    return found


def test_it_is_fetched_once_from_the_first_suite_that_has_it(suites: list[FakeSuite], tmp_path: Path) -> None:
    suites += [
        FakeSuite("old", None),
        FakeSuite("away", "1", fails=True),
        FakeSuite("new", "1:12.9.0-1~bpo13+1"),
        FakeSuite("newer", "13"),
    ]
    said: list[str] = []
    found = libvirt.fetch(tmp_path, said.append)
    assert found == tmp_path / "libvirt/new_1_12.9.0-1~bpo13+1"
    assert "libvirt-clients" in suites[2].fetched
    assert "qemu-system-x86" in suites[2].fetched
    assert FakeApt.asked[-1] == "python3-libvirt"
    assert "--download-only" in FakeApt.asked
    assert sorted(path.name for path in found.iterdir()) == ["binding", "root"]
    assert (found / "root/usr/sbin").is_dir()
    assert not (found / "root/usr/share/doc").exists()
    assert said[-1] == "fetching libvirt 1:12.9.0-1~bpo13+1 of new with its QEMU, 55 MB"
    suites.clear()
    assert libvirt.fetch(tmp_path, said.append) == found
    assert len(said) == 2  # that of the suite that was away, and this one


def test_what_cannot_be_fetched_leaves_nothing(
    suites: list[FakeSuite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeApt, "code", 100)
    suites.append(FakeSuite("new", "12"))
    with pytest.raises(RunnerError, match=r"(?s)no libvirt could be fetched: .*python3-libvirt:\nE: no"):
        libvirt.fetch(tmp_path, lambda _: None)
    assert [path.name for path in (tmp_path / "libvirt").iterdir() if path.is_dir()] == []


def test_the_vm_has_it_only_if_that_is_asked_for() -> None:
    assert not parse(["true"]).libvirt
    assert parse(["--libvirt", "true"]).libvirt


def test_the_reaper_ends_with_the_last_child_of_its_program() -> None:
    began = time.monotonic()
    # the shell ends at once, and leaves a child to nobody
    code = "sleep 0.5 & exit 3"
    done = subprocess.run([sys.executable, reaper.__file__, "sh", "-c", code], check=False, timeout=30)
    assert done.returncode == 0
    assert time.monotonic() - began >= 0.5


def test_the_reaper_passes_the_end_on() -> None:
    with subprocess.Popen(
        [sys.executable, reaper.__file__, "sh", "-c", "echo up; exec sleep 60"], stdout=-1
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(30) == 0
