# SPDX-License-Identifier: MIT
"""The installed `vfio-mig` on a driver that nobody of ours has written: the kernel's own mtty, protocol v2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.demo import mainline as demo
from tools.lab import cli
from tools.lab.imports import stopped_window
from tools.lab.mtty import STATE_SIZE, TWO_PORTS, held_mtty, scratch, set_scratch
from tools.lab.sample import host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.kernel.log import KernelLog

pytestmark = pytest.mark.mtty


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def state(name: str) -> str:
    return str(js("state", name)["state"])


@pytest.fixture(scope="module")
def devices() -> Iterator[tuple[str, str]]:
    with held_mtty() as one, held_mtty() as other:
        yield one, other


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """As everywhere, but the devices stay for the next test."""
    kernel_log.new()
    yield
    assert kernel_log.complaints() == []


@pytest.fixture
def source(devices: tuple[str, str]) -> str:
    js("reset", devices[0])
    return devices[0]


@pytest.fixture
def target(devices: tuple[str, str]) -> str:
    js("reset", devices[1])
    set_scratch(devices[1], 0)
    return devices[1]


def test_list_info_and_status_know_it(source: str) -> None:
    info = js("info", source)
    assert info["protocol"] == "mainline-v2"
    assert [check["text"] for check in info["checks"]] == ["mainline-v2 (stop-copy, p2p, pre-copy, dma-logging)"]
    status = js("status", source)
    assert (status["type"], status["protocol"], status["state"]) == (TWO_PORTS, "mainline-v2", "running")


def test_what_can_be_imported_before_the_stop_is_imported_before_it(source: str, target: str, tmp_path: Path) -> None:
    assert stopped_window(tmp_path, source, target) == ([], [])


@pytest.mark.parametrize("raw", [False, True], ids=["archive", "raw"])
def test_a_state_moves_from_one_to_the_other(source: str, target: str, tmp_path: Path, *, raw: bool) -> None:
    image = tmp_path / "image"
    options = ["--raw"] if raw else []
    set_scratch(source, 0x5A)
    saved = js("save", source, image, *options)
    assert (saved["state_bytes"], saved["state"]) == (STATE_SIZE, "stop")
    assert state(source) == "stop"
    if not raw:
        assert js("check", image, target)["fits"]
        assert cli.run("verify", image, warm=True).returncode == 0
    restored = js("restore", target, image, "--start", *options)
    assert (restored["state_bytes"], restored["state"]) == (STATE_SIZE, "running")
    assert state(target) == "running"
    assert scratch(target) == 0x5A


def test_a_device_is_put_back_where_it_was_found(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIO_MIG_FAULT", "save:after-state=EIO")
    for found in ("running", "running-p2p", "stop"):
        cli.run("state", source, found, warm=True)
        cli.refused("save", source, tmp_path / "image", code=5, warm=True)
        assert state(source) == found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"), [(b"garbage" * 5, "EFAULT"), (b"", "EINVAL"), (b"cut", "EINVAL"), (bytes(4096), "ENOMEM")]
)
def test_a_stream_that_the_driver_refuses_ends_in_a_reset_and_never_in_stop(
    source: str, target: str, tmp_path: Path, content: bytes, reason: str
) -> None:
    """mtty answers EFAULT to garbage, and would load it all the same if it were asked to go to STOP."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    set_scratch(source, 0x77)
    js("save", "--raw", source, good)
    bad.write_bytes(good.read_bytes()[:50] if content == b"cut" else content)
    # Nothing at all is not a state, whatever the driver would say of it
    code, words = (5, (reason,)) if content else (6, ("empty",))
    cli.refused("restore", "--raw", target, bad, code=code, words=words, warm=True)
    assert state(target) in {"running", "stop"}
    assert scratch(target) != 0x77
    js("restore", "--raw", target, good, "--start")
    assert scratch(target) == 0x77
    assert state(target) == "running"


def test_a_live_save_of_it_reads_the_header_while_it_runs(source: str, target: str, tmp_path: Path) -> None:
    set_scratch(source, 0x66)
    report = js("save", source, tmp_path / "image", "--live", "--max-downtime", "1000")
    assert (report["precopy_bytes"], report["state_bytes"], report["state"]) == (24, STATE_SIZE, "stop")
    js("restore", target, tmp_path / "image", "--start")
    assert scratch(target) == 0x66
    report = js("migrate", target, source, "--live")
    assert (state(target), state(source)) == ("stop", "running")
    assert (report["precopy_bytes"], scratch(source)) == (24, 0x66)


def test_several_of_them_are_one_job(source: str, target: str, tmp_path: Path) -> None:
    pairs = [f"{name}={tmp_path / name}" for name in (source, target)]
    assert [one["state"] for one in js("save", *pairs, "--live")] == ["stop", "stop"]
    assert [one["state"] for one in js("restore", *pairs, "--start")] == ["running", "running"]


def test_migrate_moves_it_and_leaves_one_running(source: str, target: str) -> None:
    set_scratch(source, 0x33)
    report = js("migrate", source, target)
    assert report["state_bytes"] == STATE_SIZE
    assert (state(source), state(target)) == ("stop", "running")
    assert scratch(target) == 0x33


def test_what_it_cannot_do_is_refused_and_changes_nothing(source: str, target: str, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(8192))
    image = tmp_path / "image"
    # It says that it logs, but Debian's kernel has no CONFIG_IOMMUFD_DRIVER, and every report is EOPNOTSUPP
    if not Path("/dev/iommu").exists():
        words = ("CONFIG_IOMMUFD_DRIVER",)
        cli.refused("dirty", source, code=4, words=words, warm=True)
        cli.refused("save", source, image, "--memory", f"{memory}@0", code=4, words=words, warm=True)
    cli.refused("--abi", "gvt-rfc", "stop", source, code=4, words=("speaks mainline-v2",), warm=True)
    for name in ("resuming", "stop-copy", "pre-copy", "pre-copy-p2p", "error"):
        cli.refused("state", source, name, code=2, words=(name, "running-p2p"), warm=True)
    assert state(source) == "running"
    with host.instance() as vgpu, cli.held(vgpu.uuid):
        cli.refused("state", vgpu.uuid, code=4, words=("gvt-rfc",), warm=True)
        cli.run("-q", "save", source, image, warm=True)
        cli.refused("restore", vgpu.uuid, image, code=6, words=("protocol",), warm=True)
        assert vgpu.run_state() == "running"
    with held_mtty("mtty-1") as other:
        cli.refused("restore", other, image, code=6, words=("device-type",), warm=True)
        assert state(other) == "running"
    assert state(target) == "running"


@pytest.mark.slow
@pytest.mark.usefixtures("warm_demonstrations")
def test_the_demonstration_holds(capfd: pytest.CaptureFixture[str]) -> None:
    status = demo.main()
    said = capfd.readouterr().out
    assert status == 0, said
    assert said.endswith("All checks hold.\n")
    assert said.count("  ok    ") >= 12
    assert max(map(len, said.splitlines())) <= 80
    assert "  $ vfio-mig state $A running-p2p\n" in said
