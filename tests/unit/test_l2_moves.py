# SPDX-License-Identifier: MIT
"""When QEMU is to stop the guest: what it takes for left must fit into the limit then, and not before."""

import pytest

from tools.l2.moves import REST, switchover_bandwidth

GIB = 1 << 30


@pytest.mark.parametrize(("kernel", "unknown"), [("6.1.0-57-amd64", 100 * GIB), ("6.2", 0), ("7.3.4-amd64", 0)])
@pytest.mark.parametrize("limit", [300, 5000])
def test_the_guest_is_stopped_when_the_rest_is_left(kernel: str, unknown: int, limit: int) -> None:
    fits = switchover_bandwidth(limit, kernel) * limit // 1000
    assert unknown + REST - (1 << 20) < fits <= unknown + REST
