# SPDX-License-Identifier: MIT
"""What the host's part of two VMs with a cable does, and how the VMs talk besides."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tools.pair import post, sshd
from tools.pair.__main__ import KINDS, await_both, main
from tools.vm.apt import Apt
from tools.vm.errors import RunnerError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VFIO_MIG_VM_OUT", str(tmp_path))
    return tmp_path


def test_one_asks_and_the_other_answers(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    heard: list[Any] = []

    def double(value: int) -> int:
        heard.append(value)
        return 2 * value

    server = threading.Thread(target=post.serve, args=({"double": double, "note": heard.append}, 20.0))
    server.start()
    assert post.ask("double", 21, seconds=20) == 42
    script = post.asking_script("note", tmp_path_factory.mktemp("hooks"))
    subprocess.run([script], check=True, timeout=20)
    assert post.ask("end", seconds=20) is None
    server.join(20)
    assert heard == [21, None]
    assert list(shared.iterdir()) == []


def test_what_does_not_come_is_an_error(shared: Path) -> None:  # noqa: ARG001
    with pytest.raises(TimeoutError, match="no 'x'"):
        post.take("x", 0.1)
    with pytest.raises(TimeoutError, match="asked nothing"):
        post.serve({}, 0.1)


def process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_side_that_fails_is_not_waited_for() -> None:
    began = time.monotonic()
    assert await_both(process("raise SystemExit(3)"), process("import time; time.sleep(60)")) == (3, -15)
    assert await_both(process("import time; time.sleep(60)"), process("raise SystemExit(4)")) == (-15, 4)
    assert await_both(process("pass"), process("import time; time.sleep(0.5)")) == (0, 0)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", KINDS)
def test_a_cable_cannot_be_cut_at_a_byte(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([f"--{name.replace('_', '-')}", "--cut", "1"])
    assert caught.value.code == 2
    assert "--cut is for the pipe" in capsys.readouterr().err


class NoApt(Apt):
    """Knows a version, and has no package."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def candidate(self, package: str) -> str:
        assert package == "openssh-server"
        return "1:9.2p1-2"

    def update(self) -> None:
        self.asked.append(("update",))

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        assert cwd is None
        self.asked.append((program, *arguments))
        return subprocess.CompletedProcess([program], 100, "", "E: Unable to fetch\n")


def test_what_cannot_be_fetched_is_told_and_nothing_is_kept(tmp_path: Path) -> None:
    apt = NoApt()
    assert list(sshd.fetch(tmp_path, print, apt, [sys.executable]).iterdir()) == []
    assert apt.asked == []
    with pytest.raises(RunnerError, match="install them:\nE: Unable to fetch"):
        sshd.fetch(tmp_path, print, apt, [sys.executable, "/nonexistent/sshd"])
    first, update, second = apt.asked
    assert update == ("update",)
    assert first == second
    assert "--download-only" in first
    assert [path.name for path in (tmp_path / "tools").iterdir() if path.is_dir()] == ["ssh-of-host"]


def test_a_host_is_never_taken_for_a_vm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What they do to /etc and to root's home is for a VM, whose writes are lost."""
    monkeypatch.delenv("VFIO_MIG_VM", raising=False)
    monkeypatch.setenv(sshd.TREE, str(tmp_path))
    for change in (sshd.install, sshd.own_home, lambda: sshd.Server("127.0.0.1", "")):
        with pytest.raises(RuntimeError, match="this is a host"):
            change()
