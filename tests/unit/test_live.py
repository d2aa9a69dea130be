# SPDX-License-Identifier: MIT
"""When a live save ends its rounds, and what it reads in each; and a log that is not always there."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, ClassVar

import pytest

from vfio_mig.device import Device, Holder
from vfio_mig.dirty.memory import Memory, MemoryMap
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.errors import DeviceBusyError, DeviceError, UnsupportedError, UsageError
from vfio_mig.host import tracking
from vfio_mig.host.devices import HostDevice
from vfio_mig.jobs.engine.dirtylog import DirtyLog
from vfio_mig.jobs.engine.live import Live, StateCopy, copy_live, falls_short
from vfio_mig.jobs.engine.session import Session, Settings
from vfio_mig.protocols.abilities import Pending
from vfio_mig.protocols.base import MigrationProtocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from vfio_mig.protocols.abilities import LogsWrites

FOUND = HostDevice("fake", "/nowhere", "pci", "8086:4941", "", "qat_vfio_pci", 1)


class Played(MigrationProtocol):
    """Tells what is pending from a list, its last entry for ever."""

    name: ClassVar[str] = "mainline-v2"

    def __init__(self, *pending: Pending, holder: Holder | None = None) -> None:
        super().__init__(Device("fake", -1, how="borrowed" if holder else "group", holder=holder))
        self._pending = list(pending)
        self.limits: list[int] = []
        self.log: list[object] = []
        self.broken = False

    @property
    def state_size_max(self) -> int:
        return 0

    def stop(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def read_state(self) -> memoryview:
        raise NotImplementedError

    def write_state(self, state: memoryview) -> None:
        raise NotImplementedError

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        if self.broken:
            raise DeviceError("REPORT failed: EIO", device="fake")
        self.log.append((start_page, nr_pages))
        return memoryview(bytes((nr_pages + 7) // 8))

    @property
    def dirty_log(self) -> LogsWrites:
        return self

    def start_log(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.log.append(list(ranges))

    def stop_log(self) -> None:
        self.log.append("stop")

    def begin_live(self) -> bool:
        raise NotImplementedError

    def read_live(self, limit: int) -> Iterator[bytes]:
        self.limits.append(limit)
        yield bytes(limit)

    def pending(self) -> Pending:
        return self._pending.pop(0) if len(self._pending) > 1 else self._pending[0]


def discard(chunks: Iterable[bytes | memoryview]) -> int:
    return sum(map(len, chunks))


def run(live: Live, *pending: Pending) -> StateCopy:
    state = StateCopy(Played(*pending), discard)
    assert copy_live(live, None, [state]) == []
    return state


def test_a_round_reads_what_was_pending_when_it_began_as_more_may_come_as_fast() -> None:
    state = run(Live(9), Pending(100, 0, 150), Pending(0, 40, 50), Pending(0, 20, 30), Pending(0, 20, 30))
    assert [(one.bytes_read, one.dirty_bytes) for one in state.rounds] == [(100, 40), (40, 20), (20, 20)]
    assert state.bytes_read == 160


def test_the_rate_is_of_the_time_that_reading_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1000.0, 2.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    state = run(Live(9), Pending(100, 0, 150), Pending(0, 40, 50), Pending(0, 0, 30))
    assert [(one.bytes_read, one.read_time, one.rate) for one in state.rounds] == [(100, 2.0, 50.0), (40, 2.0, 35.0)]


def test_rounds_end_when_nothing_is_dirty() -> None:
    assert len(run(Live(9), Pending(10, 0, 10), Pending(0, 0, 5)).rounds) == 1


def test_initial_data_is_read_whatever_the_downtime_and_new_initial_data_too() -> None:
    live = Live(9, max_downtime=1e9)
    assert len(run(live, Pending(10, 0, 10), Pending(5, 0, 10), Pending(0, 7, 7)).rounds) == 2
    anew = run(live, Pending(10, 0, 10), Pending(0, 0, 9, is_anew=True), Pending(8, 0, 9), Pending(0, 7, 7))
    assert len(anew.rounds) == 3
    assert len(run(Live(3), Pending(10, 0, 10)).rounds) == 3  # but not for ever


def test_a_downtime_that_fits_ends_the_rounds_and_one_that_cannot_be_kept_is_told() -> None:
    pending = (Pending(10, 0, 10), Pending(0, 100, 100), Pending(0, 50, 50), Pending(0, 50, 50))
    live = Live(9, max_downtime=1e9)
    state = run(live, *pending)
    assert len(state.rounds) == 1
    assert falls_short(live, [], [state]) is None
    live = Live(9, max_downtime=0)
    state = run(live, *pending)
    assert len(state.rounds) == 3
    text = falls_short(live, [], [state])
    assert text is not None
    assert "further rounds bring nothing" in text


@pytest.fixture
def warned() -> list[str]:
    return []


def session(protocol: Played, warned: list[str]) -> Session:
    return Session(FOUND, protocol.device, protocol, None, Settings(warn=warned.append))


def test_a_log_tells_what_was_written_since_it_began_and_every_page_after_it_was_lost(warned: list[str]) -> None:
    protocol = Played()
    log = DirtyLog(session(protocol, warned), [PageRange(16, 100), PageRange(1 << 20, 3)])
    log.begin()
    assert protocol.log == [[(16 * 4096, 100 * 4096), (1 << 32, 3 * 4096)]]
    assert sum(chunk.total() for chunk in log.every_page()) == 103
    assert sum(chunk.total() for chunk in log.fetch()) == 0
    lost = [log.was_lost]
    protocol.broken = True
    assert sum(chunk.total() for chunk in log.fetch()) == 103
    assert [*lost, log.was_lost] == [False, True]
    assert warned == ["fake: REPORT failed: EIO; every page is taken as dirty"]
    log.end()
    log.end()
    assert protocol.log[-1] == "stop"
    assert protocol.log.count("stop") == 1


def test_of_a_device_that_does_not_log_nothing_is_lost_that_could_be_told(warned: list[str]) -> None:
    protocol = Played()
    protocol.broken = True
    log = DirtyLog(session(protocol, warned), [PageRange(16, 100)])
    with pytest.raises(DeviceError, match="REPORT failed"):
        log.fetch()
    assert (log.was_lost, warned) == (False, [])


def test_a_log_is_not_read_under_an_owner_who_is_migrating(monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    from vfio_mig.host import migrating

    asked: list[int] = []

    def is_migrating(pid: int) -> bool:
        asked.append(pid)
        return True

    monkeypatch.setattr(migrating, "is_migrating", is_migrating)
    for is_hold in (True, False):
        protocol = Played(holder=Holder(4711, "qemu-system-x86", is_hold, 5))
        log = DirtyLog(session(protocol, warned), [PageRange(0, 1)])
        if is_hold:
            log.begin()
            continue
        with pytest.raises(DeviceBusyError, match=r"PID 4711 \(qemu-system-x86\) is migrating it"):
            log.begin()
        assert protocol.log == []
    assert asked == [4711]


class Tracker:
    """What the IOMMU or the container would be."""

    caution = "it tells too much"

    def __init__(self) -> None:
        self.did: list[object] = []

    def start(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.did.append(("start", list(ranges)))

    def collect(self) -> None:
        self.did.append("collect")

    def take(self, start_page: int, nr_pages: int) -> memoryview:
        self.did.append(("take", start_page, nr_pages))
        return memoryview(bytes((nr_pages + 7) // 8))

    def stop(self) -> None:
        self.did.append("stop")


@pytest.mark.parametrize("has_log", [False, True], ids=["no log", "a log that the kernel cannot report"])
def test_where_the_device_has_no_log_what_else_knows_is_asked(
    monkeypatch: pytest.MonkeyPatch, warned: list[str], *, has_log: bool
) -> None:
    tracker = Tracker()
    monkeypatch.setattr(tracking, "find_tracker", lambda *_, **__: tracker)
    monkeypatch.setattr(Played, "has_dirty", has_log)

    def start_log(_: object, _ranges: object) -> None:
        raise UnsupportedError("this kernel cannot report")

    monkeypatch.setattr(Played, "start_log", start_log)
    log = DirtyLog(session(Played(), warned), [PageRange(16, 8)])
    log.require()
    log.begin()
    assert sum(chunk.total() for chunk in log.fetch()) == 0
    log.end()
    assert tracker.did == [("start", [(16 * 4096, 8 * 4096)]), "collect", ("take", 16, 8), "stop"]
    assert warned == ["fake: it tells too much"]


def test_a_device_without_a_log_is_refused(monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    monkeypatch.setattr(Played, "has_dirty", False)
    with pytest.raises(UnsupportedError, match="keeps no log of its writes"):
        DirtyLog(session(Played(), warned), []).require()


@pytest.mark.parametrize("has_log", [False, True])
def test_pinned_pages_are_asked_for_at_any_time_and_no_log_is_begun(
    monkeypatch: pytest.MonkeyPatch, warned: list[str], *, has_log: bool
) -> None:
    tracker = Tracker()
    monkeypatch.setattr(tracking, "find_owners_tracker", lambda _: tracker)
    monkeypatch.setattr(Played, "has_dirty", has_log)
    protocol = Played()
    log = DirtyLog(session(protocol, warned), [PageRange(16, 8)], pinned=True)
    log.require()
    assert (log.is_log, log.is_snapshot) == (False, True)
    log.begin()
    for _ in range(2):
        assert sum(chunk.total() for chunk in log.fetch()) == 0
    log.end()
    assert tracker.did == [("start", [(16 * 4096, 8 * 4096)]), *["collect", ("take", 16, 8)] * 2]
    assert protocol.log == []
    assert warned == ["fake: it tells too much"]


def test_pinned_pages_of_a_device_that_tells_them_by_itself_are_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr(Played, "dirty_log", None)
    with pytest.raises(UsageError, match="tells its dirty pages by itself; leave out --pinned"):
        DirtyLog(session(Played(), warned), [PageRange(16, 8)], pinned=True).require()


def test_pages_outside_of_the_known_memory_are_looked_for_among_the_pinned(
    monkeypatch: pytest.MonkeyPatch, warned: list[str], tmp_path: Path
) -> None:
    class Pinned(Tracker):
        def take(self, start_page: int, nr_pages: int) -> memoryview:
            super().take(start_page, nr_pages)
            bits = sum(1 << page - start_page for page in (3, 20) if start_page <= page < start_page + nr_pages)
            return memoryview(bits.to_bytes((nr_pages + 7) // 8, "little"))

    tracker = Pinned()
    monkeypatch.setattr(tracking, "find_owners_tracker", lambda _: tracker)
    log = DirtyLog(session(Played(), warned), [PageRange(0, 16)], pinned=True)
    log.require()
    (tmp_path / "memory").write_bytes(bytes(16 * 4096))
    with Memory([MemoryMap(str(tmp_path / "memory"), 0)]) as guest:
        assert log.outside(guest) == (1, 20)


class Broken(Played):
    """Cannot go back to where it was."""

    def __init__(self, state: str, *, holder: Holder | None = None) -> None:
        super().__init__(holder=holder)
        self.now = state

    def state(self) -> str:
        return self.now

    def restore_run_state(self) -> None:
        raise DeviceError("SET running failed: EINVAL", device="fake")

    def reset(self) -> None:
        self.now = "running"


QEMU = Holder(4711, "qemu-system-x86", False, 5)


@pytest.mark.parametrize(
    ("state", "holder", "now", "words"),
    [
        ("error", None, "running", "has been reset: what it was doing is lost"),
        ("error", QEMU, "error", "only 'vfio-mig reset --force fake'"),
        ("stop", None, "stop", "SET running failed"),
    ],
)
def test_a_device_that_does_not_go_on_is_reset_only_out_of_the_error_state_and_only_if_it_is_ours(
    state: str, holder: Holder | None, now: str, words: str, warned: list[str]
) -> None:
    protocol = Broken(state, holder=holder)
    with pytest.raises(DeviceError) as caught:
        session(protocol, warned).resume()
    assert words in str(caught.value)
    assert protocol.now == now
