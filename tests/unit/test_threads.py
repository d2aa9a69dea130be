# SPDX-License-Identifier: MIT
"""Work beside a job, in threads that are there before they are needed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from vfio_mig import threads
from vfio_mig.image import digests
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


@pytest.fixture(params=[0, 1])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A host that gives so many threads more, as one does at RLIMIT_NPROC or a cgroup's pids.max."""
    left = int(request.param)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            raise RuntimeError("can't start new thread")  # CPython's Modules/_threadmodule.c
        left -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return left


def test_without_threads_the_work_is_done_here(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(threads, "spare_cpus", lambda: 3)
    before = threading.active_count()
    with Workers() as workers:
        assert workers.count == 0
        assert list(workers.results([1, 2], str, lambda _: False)) == [(1, "1"), (2, "2")]
    if not few:
        assert list(threads.ahead(iter([1, 2]))) == [1, 2]
    assert threading.active_count() == before


def test_a_digest_is_taken_without_threads(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(digests, "spare_cpus", lambda: few + 1)
    content = bytes(digests.SMALL)
    with digests.Digests(None) as taken:
        assert taken.of_memory(memoryview(content))() == hashlib.sha256(content).hexdigest()


def test_a_thread_that_is_needed_and_not_to_be_had_is_the_host_s_error(few: int) -> None:
    for _ in range(few):
        threads.start(threading.Thread(target=int))
    with pytest.raises(OSError, match=r"temporarily unavailable: 'a new thread'") as caught:
        threads.start(threading.Thread(target=int))
    assert caught.value.errno == errno.EAGAIN

    with pytest.raises(OSError, match="temporarily unavailable"):
        threads.need_pool(2)


def test_no_other_error_is_taken_for_that() -> None:
    thread = threading.Thread(target=int)
    threads.start(thread)
    with pytest.raises(RuntimeError, match="can only be started once"):
        threads.start(thread)
    thread.join()
