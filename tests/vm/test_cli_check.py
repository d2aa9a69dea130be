# SPDX-License-Identifier: MIT
"""`check` and `verify`, one job at a time, and what a killed one leaves, through the installed command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli, waiting
from tools.lab.sample import host
from tools.lab.sample.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.conftest import MakeInstance

pytestmark = pytest.mark.slow  # who may do what when is the program's, not the kernel's

FAULT: Final = "VFIO_MIG_FAULT"
OTHER_KIND: Final = "GVTg_V4_4"


def js(*args: str | Path, rc: int = 0) -> Any:
    return json.loads(cli.run("--json", *args, rc=rc, warm=True).stdout)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved vGPU with some page table entries."""
    path = tmp_path_factory.mktemp("image") / "gpu.vfm"
    with host.instance() as instance, Guest.opened(instance) as guest:
        guest.bind(4)
        cli.run("-q", "save", instance.uuid, path, warm=True)
    return path


@pytest.fixture
def held(make_instance: MakeInstance) -> Iterator[host.Instance]:
    instance = make_instance()
    with cli.held(instance.uuid):
        yield instance


@contextlib.contextmanager
def untouched(instance: host.Instance) -> Iterator[None]:
    """Demand that no request of the RFC reaches the device."""

    def truth() -> tuple[object, ...]:
        counters = instance.counters()
        asked = [counters[name] for name in ("status_set", "get_dirty", "state_read", "state_write")]
        return asked, instance.run_state(), instance.pinned()

    before = truth()
    yield
    assert truth() == before


# --- check and verify


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_check_of_a_fitting_image_touches_nothing(held: host.Instance, image: Path, state: str) -> None:
    if state == "stopped":
        cli.run("-q", "stop", held.uuid, warm=True)
    with untouched(held):
        done = cli.run("check", image, held.uuid, warm=state == "stopped")
    lines = done.stdout.decode().splitlines()
    assert [re.fullmatch(r"(ok|note) +([a-z-]+): .+", line) is not None for line in lines] == [True] * 10
    assert f"ok       device-type: gvt_sample-{host.SMALL}" in lines
    assert "ok       graphics-memory: 64 + 384 MiB" in lines
    assert done.stderr == b""
    assert held.run_state() == state


def test_a_check_of_another_type_s_image_says_what_differs(make_instance: MakeInstance, image: Path) -> None:
    with Guest.opened(make_instance(OTHER_KIND)) as guest:
        with untouched(guest.instance):
            done = cli.run("check", image, guest.instance.uuid, rc=6)
            report = js("check", image, guest.instance.uuid, rc=6)
        differs = [line for line in done.stdout.decode().splitlines() if not line.startswith("ok ")]
        assert differs == [
            f"mismatch device-type: 'gvt_sample-{host.SMALL}' in the image, 'gvt_sample-{OTHER_KIND}' here (forcible)",
            "mismatch graphics-memory: '64 + 384 MiB' in the image, '128 + 512 MiB' here",
        ]
        assert done.stderr == b""
        assert report["fits"] is False
        assert [one["name"] for one in report["checks"] if one["result"] == "mismatch"] == [
            "device-type",
            "graphics-memory",
        ]
        with untouched(guest.instance):  # what may not be forced is not, together with what may
            cli.refused("restore", guest.instance.uuid, image, "--force", code=6, words=("graphics-memory",), warm=True)


@pytest.mark.core
def test_a_check_of_a_broken_image_is_an_error(held: host.Instance, image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.vfm"
    broken.write_bytes(image.read_bytes()[:-1])
    with untouched(held):
        cli.refused("check", broken, held.uuid, code=6, words=("cut off",), warm=True)


@pytest.mark.core
def test_verify_needs_no_device(image: Path, tmp_path: Path) -> None:
    good = cli.run("verify", image)
    assert re.fullmatch(
        rf"{image}: good: gvt-rfc image of a gvt_sample-{host.SMALL}, \d members, \d+ bytes of state, "
        r"0 pages of memory\n",
        good.stdout.decode(),
    )
    assert good.stderr == b""
    damaged = bytearray(image.read_bytes())
    damaged[0x10000] ^= 1
    (tmp_path / "damaged.vfm").write_bytes(damaged)
    cli.refused("verify", tmp_path / "damaged.vfm", code=6, words=("state/0000", "damaged"), warm=True)


# --- one job at a time


def test_a_second_save_is_told_of_the_first_one_which_a_signal_ends(held: host.Instance, tmp_path: Path) -> None:
    first, second = tmp_path / "first.vfm", tmp_path / "second.vfm"
    with subprocess.Popen(
        [sys.executable, "-m", "tools.lab.faults.faulty", "save", held.uuid, first],
        env={**os.environ, FAULT: "save:after-stop=wait"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            waiting.wait_until("the first save's stop", lambda: held.run_state() == "stopped", cli.SECONDS)
            with untouched(held):
                words = (held.uuid, f"PID {process.pid} ('vfio-mig save') is at work on it")
                cli.refused("save", held.uuid, second, code=3, words=words)
                for command in ("stop", "start", "reset"):
                    cli.refused(command, held.uuid, code=3, words=words, warm=True)
            status = js("status", held.uuid)
            assert (status["left"], status["state"]) == (None, "unknown")  # it lives: nothing is left
        finally:
            process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=cli.SECONDS)
    assert process.returncode == 130
    assert (out, said) == (b"", b"vfio-mig: interrupted; what was begun has been undone\n")
    assert held.run_state() == "running"
    assert list(tmp_path.iterdir()) == []
    cli.run("save", held.uuid, second, warm=True)
    assert held.run_state() == "stopped"


# --- what a kill leaves


def killed(point: str, *args: str | Path, cold: bool = False) -> None:
    done = cli.run(*args, rc=-signal.SIGKILL, env={FAULT: f"{point}=kill"}, warm=not cold)
    assert done.stdout == done.stderr == b""


def test_a_killed_save_leaves_a_stopped_device_which_start_repairs(held: host.Instance) -> None:
    # A tmpfs: overlayfs has files without a name since Linux 6.3 only, and until then a kill leaves a hidden one
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        killed("save:after-state", "save", held.uuid, Path(name) / "gpu.vfm", cold=True)
        assert held.run_state() == "stopped"
        assert list(Path(name).iterdir()) == []
    shown = cli.run("status", held.uuid).stdout.decode()
    assert re.search(
        rf"note: an earlier 'vfio-mig save' \(PID \d+\) did not come to its end; the device was left stopped; "
        rf"'vfio-mig start {held.uuid}' lets it go on\n",
        shown,
    )
    said = cli.run("start", held.uuid, warm=True).stderr.decode()
    assert said.startswith(f"vfio-mig: warning: {held.uuid}: an earlier 'vfio-mig save' (PID ")
    assert held.run_state() == "running"
    assert js("status", held.uuid)["left"] is None
    assert cli.run("stop", held.uuid, warm=True).stderr == b""


@pytest.mark.parametrize("repair", ["reset", "restore"])
@pytest.mark.core
def test_a_killed_restore_leaves_a_device_that_only_reset_or_restore_repair(
    held: host.Instance, image: Path, tmp_path: Path, repair: str
) -> None:
    killed("restore:after-state", "restore", held.uuid, image)
    assert held.run_state() == "stopped"
    status = js("status", held.uuid)
    assert status["left"].startswith("an earlier 'vfio-mig restore' (PID ")
    left = "did not come to its end; the device and its guest's memory may hold a part of an image"
    assert status["left"].endswith(f" {left}")
    assert status["repair"] == f"restore it again, or make it defined with 'vfio-mig reset {held.uuid}'"
    words = (held.uuid, status["left"], status["repair"])
    with untouched(held):
        cli.refused("start", held.uuid, code=5, words=words, warm=repair == "reset")
        cli.refused("save", held.uuid, tmp_path / "gpu.vfm", code=5, words=words, warm=True)
    assert js("status", held.uuid)["left"] == status["left"]
    # a repair that fails leaves what there was
    cli.run("restore", held.uuid, image, rc=5, env={FAULT: "restore:after-stop=EIO"}, warm=True)
    assert held.run_state() == "stopped"
    assert js("status", held.uuid)["left"] == status["left"]
    if repair == "reset":
        cli.run("reset", held.uuid, warm=True)
    else:
        cli.run("restore", held.uuid, image, "--start", warm=True)
    assert held.run_state() == "running"
    assert js("status", held.uuid)["left"] is None
    cli.run("save", held.uuid, tmp_path / "gpu.vfm", warm=True)
    assert held.run_state() == "stopped"


def test_what_a_kill_has_left_ends_with_the_holder(make_instance: MakeInstance, image: Path, tmp_path: Path) -> None:
    instance = make_instance()
    with cli.held(instance.uuid):
        killed("restore:after-state", "restore", instance.uuid, image)
    assert js("status", instance.uuid)["left"] is None
    with cli.held(instance.uuid):
        assert js("status", instance.uuid)["left"] is None
        assert cli.run("-q", "save", instance.uuid, tmp_path / "gpu.vfm", warm=True).stderr == b""
