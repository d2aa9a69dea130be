# SPDX-License-Identifier: MIT
"""Work beside a job, in threads that are there before they are needed."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from vfio_mig import threads
from vfio_mig.threads import WORKERS_MAX, Workers

if TYPE_CHECKING:
    from collections.abc import Iterator


def with_cpus(monkeypatch: pytest.MonkeyPatch, spare: int) -> Workers:
    monkeypatch.setattr(threads, "spare_cpus", lambda: spare)
    return Workers()


@pytest.mark.parametrize("spare", [-1, 0, 1, 3, 100])
def test_results_come_in_order_and_no_more_is_taken_than_there_are_threads(
    monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield taken

    with with_cpus(monkeypatch, spare) as workers:
        assert workers.count == min(max(spare, 0), WORKERS_MAX)
        found = []
        for item, result in workers.results(items(), lambda item: item * item, lambda item: item % 3 == 0):
            assert taken <= item + workers.count
            found.append((item, result))
    assert found == [(item, item * item) for item in range(1, 21)]


def test_small_items_are_worked_on_here_and_others_in_threads_that_no_signal_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(_: int) -> tuple[int, set[int]]:
        return threading.get_ident(), set(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    with with_cpus(monkeypatch, 1) as workers:
        alive = threading.active_count()
        found = dict(workers.results([0, 1], work, lambda item: item == 0))
        assert threading.active_count() == alive
    assert found[0][0] == threading.get_ident() != found[1][0]
    assert {signal.SIGINT, signal.SIGTERM} <= found[1][1]
    assert threading.active_count() == alive - 1


def test_an_error_of_the_work_ends_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: int) -> int:
        raise OSError(5, os.strerror(5))

    with with_cpus(monkeypatch, 2) as workers, pytest.raises(OSError, match="Input/output"):
        list(workers.results(range(9), work, lambda _: False))
