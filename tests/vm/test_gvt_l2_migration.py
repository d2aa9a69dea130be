# SPDX-License-Identifier: MIT
"""A Linux guest at work: its vGPU is saved, reset and restored under it, and it does not notice.

The guest's CPUs are paused meanwhile, as ``qemu-save`` pauses them. What is lost shows in a result that is wrong, that
never comes, or that is gone from where it was stored (tools/l2/load.c).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.l2.image import Image
from tools.l2.machine import L2, START_SECONDS
from tools.lab import cli
from tools.lab.borrowing import borrowed_fd
from tools.lab.gvt import kvmgt
from tools.lab.gvt.rfc import MODULES, load_ours, load_stock, view
from tools.lab.vfio import raw

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.gvt, pytest.mark.l2, pytest.mark.slow]

KIND: Final = "i915-GVTg_V5_4"
TIMES: Final = 10
RESULTS: Final = 60

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours()
    yield
    load_stock()


def vfio_mig(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def test_a_guest_goes_on_after_its_vgpu_was_saved_reset_and_restored_ten_times() -> None:
    image = Image.of(Path(os.environ["VFIO_MIG_L2"]))
    with (
        kvmgt.instance(KIND) as name,
        tempfile.TemporaryDirectory(prefix="l2-", dir="/run") as directory,
        L2.started(image, str(kvmgt.DEVICES / name), Path(directory)) as guest,
    ):
        guest.await_ready(5 * START_SECONDS)
        device = raw.Device(borrowed_fd(name), name)
        try:
            for turn in range(TIMES):
                guest.await_right(RESULTS)
                guest.pause()
                saved = vfio_mig("save", name, f"{directory}/{turn}.vfm")
                assert saved["state_bytes"] > 5_000_000
                before = view(device)
                vfio_mig("reset", name, "--force")
                assert view(device) != before
                vfio_mig("restore", name, f"{directory}/{turn}.vfm", "--force")
                assert view(device) == before
                vfio_mig("start", name)
                guest.cont()
            counts = guest.await_right(RESULTS)
            assert counts.wrong == 0
        finally:
            device.close()
