# SPDX-License-Identifier: MIT
"""A GPU without extended configuration space: ``scripts/vm --gvt --gpu-args=--conventional``, which no other test has.

``VFIO_MIG_KVMGT`` is the directory of a kvmgt with the fixes of our series.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import Vgpu
from tools.lab.gvt.rfc import MODULES, load_ours, load_stock
from tools.lab.vfio.raw import CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gvt

CONFIGURATION: Final = Path("/sys/bus/pci/devices/0000:00:02.0/config")
CONVENTIONAL: Final = 256

if not CONFIGURATION.exists() or CONFIGURATION.stat().st_size != CONVENTIONAL:
    pytest.skip("the GPU has extended configuration space", allow_module_level=True)


@pytest.fixture(params=[False, True], ids=["stock", "fixed"])
def fixed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Load one of the two; says whether it has the fixes."""
    if request.param:
        assert MODULES.is_dir(), "VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built"
        load_ours(None, "migration=off")
    yield request.param
    if request.param:
        load_stock()


def test_a_vgpu_has_nothing_beyond_256_bytes_of_configuration(fixed: bool) -> None:
    """The distribution's copies ones from behind them, a list of extended capabilities without an end."""
    with kvmgt.instance() as name, Vgpu.opened(name) as vgpu:
        beyond = vgpu.device.read(CONFIG, CONVENTIONAL, CONVENTIONAL)
        assert beyond == (bytes(CONVENTIONAL) if fixed else b"\xff" * CONVENTIONAL)
        assert vgpu.device.read(CONFIG, 0, 2) == b"\x86\x80"
