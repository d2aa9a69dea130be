# SPDX-License-Identifier: MIT
"""`scripts/bench --gvt` measures every pair on our kvmgt; here some of them once, and the figures are no test's matter.

Which kvmgt that is ``VFIO_MIG_KVMGT`` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tools.bench import stopped
from tools.lab.gvt.rfc import MODULES, load_stock

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.gvt, pytest.mark.variant, pytest.mark.slow]

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(autouse=True)
def stock_again() -> Iterator[None]:
    """Leave the distribution's own behind."""
    yield
    load_stock()


@pytest.mark.parametrize("interface", stopped.INTERFACES)
def test_c_and_we_find_the_same_state_and_both_devices_go_on(interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopped, "RUNS", 1)
    monkeypatch.setattr(stopped, "WORKS", (stopped.QUEUED,))
    save, move, mapped = stopped.measure([interface])
    assert save.ours[stopped.STATE] == save.reference[stopped.STATE] == move.reference[stopped.STATE]
    assert all(one.ours[stopped.TOTAL] > 0 < one.reference[stopped.TOTAL] for one in (save, move))
    assert move.reference["load"] > 0 < mapped.reference["load"]
    assert not mapped.ours
