# SPDX-License-Identifier: MIT
"""A vGPU of the largest type, whose state the RFC's region has no room for: our kvmgt's larger one, by the command."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import MEMORY, RESULT, Vgpu
from tools.lab.gvt.rfc import BCS, MODULES, dma, host_low, load_ours, load_stock

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from tools.gpu.control import Control

pytestmark = pytest.mark.gvt

LARGEST: Final = "i915-GVTg_V5_1"
REGION: Final = 9
SIZES: Final = {kvmgt.SMALL: 0x900000, LARGEST: 0x1000000}

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours()
    yield
    load_stock()


def vfio_mig(*words: str | Path) -> Any:
    """Run the command in a fork of this process; its JSON."""
    return json.loads(cli.run("--json", *words, warm=True).stdout)


@pytest.mark.parametrize("kind", SIZES)
def test_the_region_is_as_large_as_the_type_needs_and_known_by_that(kind: str, resources: contextlib.ExitStack) -> None:
    vgpu = resources.enter_context(Vgpu.opened(resources.enter_context(kvmgt.instance(kind))))
    told = vfio_mig("info", vgpu.name)
    assert (told["protocol"], told["migratable"]) == ("gvt-rfc", True)
    (region,) = [one for one in told["regions"] if one["number"] == REGION]
    assert region["size"] == SIZES[kind]


def test_the_largest_vgpu_is_saved_and_restored_without_a_header(resources: contextlib.ExitStack, gpu: Control) -> None:
    room = Path(resources.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    vgpu = resources.enter_context(Vgpu.opened(resources.enter_context(kvmgt.instance(LARGEST)), room / "memory"))
    vgpu.prepare(BCS)
    vgpu.submit(BCS, 1, 2)
    vgpu.await_u32(RESULT, 2)
    last = vgpu.high + vgpu.high_size - 0x1000
    vgpu.device.set_pte(last, MEMORY + RESULT | 1)
    saved = vfio_mig("save", vgpu.name, room / "image")
    assert SIZES[kvmgt.SMALL] < saved["state_bytes"] < SIZES[LARGEST]
    cli.run("verify", room / "image", warm=True)
    vgpu.device.reset()
    low = host_low(gpu, vgpu)
    assert dma(gpu, low) is None or dma(gpu, low) != vgpu.at(0)
    vfio_mig("restore", "--force", "--start", vgpu.name, room / "image")
    assert vgpu.device.pte(last) == MEMORY + RESULT | 1
    vgpu.submit(BCS, 3, 4)
    vgpu.await_u32(RESULT, 4)
