# SPDX-License-Identifier: MIT
"""What the kernel's debugfs (CONFIG_VFIO_DEBUGFS) says of devices that nobody opens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tools.lab import cli
from tools.lab.sample import host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.custom


@pytest.fixture(scope="module", autouse=True)
def v2_driver() -> Iterator[None]:
    if not host.module_loaded():  # not in the VM: every test says so
        yield
        return
    with host.loaded(v2=7, migratable=0):
        yield


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def listed(name: str) -> list[str]:
    lines = [line.split() for line in cli.run("list", warm=True).stdout.decode().splitlines()]
    (found,) = [line for line in lines if line[0] == name]
    return found


def test_the_state_is_known_of_a_closed_and_of_an_open_device() -> None:
    with host.instance() as vgpu:
        assert listed(vgpu.uuid)[5:8] == ["-", "yes", "running"]
        info = js("info", vgpu.uuid)
        assert (info["how"], info["migratable"], info["source"], info["state"]) == (
            "closed",
            True,
            "debugfs",
            "running",
        )
        assert vgpu.counters()["v2_set_state"] == 0
        with cli.held(vgpu.uuid) as holder:
            cli.run("state", vgpu.uuid, "stop", warm=True)
            line = listed(vgpu.uuid)
            assert line[5:8] == [f"{holder}:vfio-mig", "yes", "stop"]
            assert line[8].startswith("/dev/vfio/devices/vfio")
            status = js("status", vgpu.uuid)
            assert (status["state"], status["migratable"], status["driver_state"]) == ("stop", True, "stop")
            assert js("info", vgpu.uuid)["state"] == "stop"
        status = js("status", vgpu.uuid)
        assert (status["state"], status["migratable"]) == ("closed", True)
        assert status["driver_state"] == vgpu.words("v2_state").strip().lower()
