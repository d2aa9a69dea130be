# SPDX-License-Identifier: MIT
"""What the commands print with --json about a real device is what docs/schemas says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.schemas import validate
from tools.lab import cli
from tools.lab.sample import gpu, host
from tools.lab.sample.held import run_some_work, side

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.core, pytest.mark.slow]  # what is printed is the program's, not the kernel's


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def said(name: str, *arguments: str | Path, rc: int = 0) -> None:
    """Run a command and have its document validated."""
    validate(name, cli.run("--json", *arguments, rc=rc, warm=True).stdout)


def test_what_is_said_of_an_rfc_device_is_valid(memory: Path, tmp_path: Path) -> None:
    image, events = tmp_path / "gpu.vfm", tmp_path / "events"
    with side(memory / "one") as one, side(memory / "two") as two:
        run_some_work(one.guest, gpu.Engine(one.guest), 2)
        pages = ("--memory", one.memory_option)
        said("list", "list")
        said("info", "info", one.name)
        said("status", "status", one.name)
        said("dirty", "dirty", one.name, "--list")
        said("stop", "stop", one.name)
        said("start", "start", one.name)
        said("stop", "stop", one.name, two.name)
        said("start", "start", one.name, two.name)
        said("sync", "sync", one.name, tmp_path / "copy", *pages, "--rounds", "1", "--leave-running")
        said("save", "--events", events, "save", one.name, image, *pages, "--leave-running")
        said("save", "save", f"{one.name}={tmp_path / 'a'}", f"{two.name}={tmp_path / 'b'}", "--leave-running")
        said("verify", "verify", image)
        said("inspect", "inspect", image)
        said("inspect", "inspect", image, "--section", "pvinfo")
        said("inspect", "inspect", image, "--section", "pvinfo", "--hex")
        said("diff", "diff", image, tmp_path / "b")
        said("check", "check", image, two.name)
        said("pages", "pages", image, "--memory", two.memory_option)
        said("restore", "restore", two.name, image, "--memory", two.memory_option, "--start")
        said("migrate", "migrate", one.name, two.name, *pages, "--target-memory", two.memory_option)
        said("reset", "reset", two.name)
        cli.run("--events", events, "save", one.name, image, rc=2, warm=True)  # it exists
    for line in events.read_text().splitlines():
        validate("events", line)
    said("mdev-types", "mdev", "types")
    said("mdev-create", "mdev", "create", host.SMALL)


def test_what_is_said_of_a_v2_device_is_valid(memory: Path, tmp_path: Path) -> None:
    with host.loaded(v2=7, migratable=0):
        with side(memory / "one") as one:
            said("list", "list")
            said("info", "info", one.name)
            said("status", "status", one.name)
            said("state", "state", one.name)
            said("save", "save", one.name, tmp_path / "image", "--live", "--leave-running")
            said("restore", "restore", one.name, tmp_path / "image", "--start")
        with host.instance() as closed:
            said("conform", "conform", closed.uuid, "--check", "v2.state")
