# SPDX-License-Identifier: MIT
"""`scripts/bench --in-vm` measures every pair; here once, on small sizes, and what it finds is not a test's matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tools.bench import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.table import Row


def once(one: Callable[[], float], other: Callable[[], float], _: int = 1) -> list[tuple[float, float]]:
    return [(one(), other())]


@pytest.mark.variant
@pytest.mark.slow  # what it runs is tested on both kernels
def test_every_pair_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel, "alternate", once)
    monkeypatch.setattr(kernel, "STREAMS", ((1, 1),))
    monkeypatch.setattr(kernel, "SIZES", ((1, "1 GiB"),))
    rows: list[Row] = kernel.measure()
    assert [row.name.partition(":")[0] for row in rows] == ["RFC"] * 4 + ["v2"] * 2
    assert all(row.ours > 0 < row.reference for row in rows)
    shown = capsys.readouterr().out
    assert all(row.name in shown for row in rows)
