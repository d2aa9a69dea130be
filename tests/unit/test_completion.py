# SPDX-License-Identifier: MIT
"""Shell completions: the committed scripts are click's of now, and bash completes with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from tests.unit.saved_images import write
from tools.fuzz import builders
from vfio_mig.cli import complete
from vfio_mig.host import discover

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
SCRIPTS = {"bash": "bash/vfio-mig", "zsh": "zsh/_vfio-mig", "fish": "fish/vfio-mig.fish"}


def program() -> str:
    found = shutil.which("vfio-mig")
    assert found is not None
    return found


@pytest.mark.parametrize(("shell", "name"), SCRIPTS.items())
def test_the_committed_script_is_the_one_that_click_makes(shell: str, name: str) -> None:
    done = subprocess.run(
        [program()], env={**os.environ, "_VFIO_MIG_COMPLETE": f"{shell}_source"}, capture_output=True, check=True
    )
    made = f"run _VFIO_MIG_COMPLETE={shell}_source vfio-mig >completions/{name}"
    assert (ROOT / "completions" / name).read_bytes() == done.stdout, made


def in_bash(*words: str) -> list[str]:
    script = (
        f'source "{ROOT}/completions/bash/vfio-mig"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_vfio_mig_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script, "bash", program(), *words], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_and_options() -> None:
    assert in_bash("st") == ["start", "state", "status", "stop"]
    assert "--max-downtime" in in_bash("save", "--m")


def test_bash_completes_what_only_some_options_take(tmp_path: Path) -> None:
    path = write(tmp_path / "image.vfm", builders.mtty())
    assert "v2.size.covers" in in_bash("conform", "--check", "v2.size.")
    assert in_bash("--hook", "before-sto") == ["before-stop="]
    assert in_bash("list", "-o", "name,ho") == ["name,HOLDER"]
    assert in_bash("inspect", str(path), "--section", "port") == ["port0", "port1"]
    assert in_bash("inspect", str(tmp_path / "none"), "--section", "port") == []


def test_a_device_comes_first_and_then_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    (tmp_path / "sys/bus/mdev/devices" / uuid).mkdir(parents=True)
    make: Callable[[], discover.Host] = lambda: host  # noqa: E731
    host = discover.Host(str(tmp_path))
    monkeypatch.setattr(discover, "Host", make)
    argument = click.Argument(["targets"], nargs=-1)
    context = click.Context(click.Command("save", params=[argument]))
    assert complete.target(context, argument, "83") == [uuid]
    assert complete.target(context, argument, "9") == []
    context.params["targets"] = (uuid,)
    (item,) = complete.target(context, argument, "gpu")
    assert isinstance(item, click.shell_completion.CompletionItem)
    assert (item.type, item.value) == ("file", "gpu")
