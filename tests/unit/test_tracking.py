# SPDX-License-Identifier: MIT
"""What an IOMMU or a container knows of a device's writes; the kernel is played by sets of pages."""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig import uapi
from vfio_mig.device import Device, Holder
from vfio_mig.errors import DeviceBusyError, DeviceError, UnsupportedError, UsageError
from vfio_mig.host import frozen, migrating, tracking
from vfio_mig.host.dma import ContainerDma, IommufdDma
from vfio_mig.host.tracking import (
    ContainerTracker,
    DmaTracker,
    IommuTracker,
    OwnersTracker,
    find_owners_tracker,
    find_tracker,
)
from vfio_mig.ranges import PAGE
from vfio_mig.uapi import IoctlError, Request, iommufd

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.host.iommufd import Iommufd

NAME: Final = "0000:3b:00.1"
PIECES: Final = ((3 * PAGE, 13 * PAGE), (100 * PAGE, 70 * PAGE))
MAPPED: Final = {*range(3, 16), *range(100, 170)}
HWPT, FD = 9, 77


class FakeIommu:
    """A :class:`Iommufd` whose IOMMU is a set of pages; to begin twice empties it, as Linux 6.12 does.

    Its page table has one entry for each mapping. As in the kernel (drivers/iommu/amd/io_pgtable.c,
    read_and_clear_dirty), a question for a part of an entry clears all of it.
    """

    def __init__(self) -> None:
        self.dirty: set[int] = set()
        self.calls: list[bool] = []

    def set_tracking(self, hwpt: int, *, enabled: bool) -> None:
        assert hwpt == HWPT
        self.calls.append(enabled)
        self.dirty.clear()

    def take_dirty(self, hwpt: int, iova: int, length: int, page_size: int) -> bytearray:
        assert (hwpt, page_size) == (HWPT, PAGE)
        assert set(range(iova // PAGE, (iova + length) // PAGE)) <= MAPPED  # else the kernel answers 0, and nothing
        bits = sum(1 << page - iova // PAGE for page in self.dirty if iova <= page * PAGE < iova + length)
        for start, size in PIECES:
            if start < iova + length and iova < start + size:
                self.dirty -= set(range(start // PAGE, (start + size) // PAGE))
        return bytearray(bits.to_bytes((length // PAGE + 63) // 64 * 8, "little"))


class FakeContainer:
    """A type1 container: answers for whole mappings only, overwrites the buffer, and forgets what it has told."""

    def __init__(self) -> None:
        self.dirty: set[int] = set()
        self.calls: list[bool] = []
        self.refuse = 0

    def call(self, fd: int, request: Request, arg: bytearray) -> int:
        assert (fd, request) == (FD, uapi.IOMMU_DIRTY_PAGES)
        argsz, flags = struct.unpack_from("=II", arg)
        assert argsz == len(arg)
        if self.refuse:
            raise IoctlError(self.refuse, request)
        if flags in {1, 2}:
            self.calls.append(flags == 1)
            return 0
        assert flags == 4
        iova, size, page_size, length, where = struct.unpack_from("=QQQQQ", arg, 8)
        assert (iova, size) in PIECES
        assert page_size == PAGE
        first, end = iova // PAGE, (iova + size) // PAGE
        bits = sum(1 << page - first for page in self.dirty if first <= page < end)
        ctypes.memmove(where, bits.to_bytes(length, "little"), length)
        self.dirty -= set(range(first, end))
        return 0


def iommu_tracker() -> tuple[FakeIommu, DmaTracker]:
    fake = FakeIommu()
    return fake, IommuTracker(NAME, IommufdDma(cast("Iommufd", fake), HWPT, "", PIECES), HWPT)


def pages(tracker: DmaTracker, start: int, number: int) -> set[int]:
    bitmap = tracker.fetch(start, number)
    assert len(bitmap) == (number + 7) // 8
    return bits_of(bitmap, start)


def bits_of(bitmap: memoryview, start: int) -> set[int]:
    return {start + at for at in range(8 * len(bitmap)) if bitmap[at // 8] >> at % 8 & 1}


rounds = st.lists(
    st.tuples(st.sets(st.sampled_from(sorted(MAPPED))), st.integers(0, 180), st.integers(1, 180)), max_size=12
)


@given(rounds)
@pytest.mark.parametrize("kind", ["iommu", "container"])
def test_every_written_page_is_told_once_whatever_ranges_are_asked_for(
    kind: str, rounds: list[tuple[set[int], int, int]]
) -> None:
    fake: FakeIommu | FakeContainer
    with pytest.MonkeyPatch.context() as patch:
        if kind == "iommu":
            fake, tracker = iommu_tracker()
        else:
            fake, tracker = FakeContainer(), ContainerTracker(NAME, ContainerDma(FD, PIECES))
            patch.setattr(uapi, "call", fake.call)
        tracker.start([(0, 1 << 20)])
        owed: set[int] = set()
        for written, start, number in rounds:
            fake.dirty |= written
            owed |= written
            asked = set(range(start, start + number))
            assert pages(tracker, start, number) == owed & asked
            owed -= asked
        assert pages(tracker, 0, 200) == owed
        tracker.stop()
        assert fake.calls == [True, False]


def test_many_ranges_are_taken_from_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, tracker = iommu_tracker()
    questions: list[tuple[int, int]] = []
    asked = fake.take_dirty

    def ask(hwpt: int, iova: int, length: int, page_size: int) -> bytearray:
        questions.append((iova, length))
        return asked(hwpt, iova, length, page_size)

    monkeypatch.setattr(fake, "take_dirty", ask)
    tracker.start()
    fake.dirty = {3, 15, 120}
    tracker.collect()
    fake.dirty = {4}  # written after the question: for the next one
    found = [page for at in range(0, 200, 7) for page in sorted(bits_of(tracker.take(at, 7), at))]
    assert found == [3, 15, 120]
    assert questions == list(PIECES)
    assert pages(tracker, 0, 200) == {4}


def test_a_second_start_is_none() -> None:
    fake, tracker = iommu_tracker()
    tracker.start()
    fake.dirty = {5}
    tracker.start()
    assert pages(tracker, 0, 20) == {5}
    tracker.stop()
    tracker.stop()
    assert fake.calls == [True, False]


def test_what_was_not_started_is_not_clean() -> None:
    _, tracker = iommu_tracker()
    with pytest.raises(ValueError, match="was not started"):
        tracker.fetch(0, 1)


def test_a_refusal_names_the_device_and_keeps_the_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    container = FakeContainer()
    monkeypatch.setattr(uapi, "call", container.call)
    tracker = ContainerTracker(NAME, ContainerDma(FD, PIECES))
    container.refuse = errno.EACCES
    with pytest.raises(DeviceError, match=f"{NAME}: tracking its writes: VFIO_IOMMU_DIRTY_PAGES failed: EACCES"):
        tracker.start()
    container.refuse = 0
    tracker.start()  # it was not begun
    container.refuse = errno.ENOMEM
    with pytest.raises(DeviceError) as caught:
        tracker.fetch(0, 10)
    assert caught.value.errno == errno.ENOMEM


def test_a_refusing_iommu_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, tracker = iommu_tracker()

    def refuse(*_: Any, **__: Any) -> None:
        raise IoctlError(errno.EOPNOTSUPP, iommufd.HWPT_SET_DIRTY_TRACKING)

    monkeypatch.setattr(fake, "set_tracking", refuse)
    with pytest.raises(DeviceError, match="IOMMU_HWPT_SET_DIRTY_TRACKING failed"):
        tracker.start()
    monkeypatch.undo()
    tracker.start()
    monkeypatch.setattr(fake, "take_dirty", refuse)
    with pytest.raises(DeviceError, match=NAME):
        tracker.fetch(0, 10)


def test_the_iommu_is_asked_first_then_the_container() -> None:
    iommu = cast("Iommufd", FakeIommu())
    device = Device(NAME, -1, how="cdev", dma=IommufdDma(iommu, HWPT, "", PIECES))
    assert isinstance(find_tracker(device), IommuTracker)
    assert not find_tracker(device).caution
    device = Device(NAME, -1, dma=ContainerDma(FD, PIECES))
    assert isinstance(find_tracker(device), ContainerTracker)
    assert "every mapped page counts as dirty" in find_tracker(device).caution


class HeldContainer(FakeContainer):
    """One with mappings that nobody tells; a question may span them and may not end, or begin, inside of one."""

    def __init__(self, *mappings: tuple[int, int]) -> None:
        super().__init__()
        self.mappings = mappings
        self.questions: list[int] = []

    def call(self, fd: int, request: Request, arg: bytearray) -> int:
        if struct.unpack_from("=I", arg, 4)[0] != 4 or self.refuse:
            return super().call(fd, request, arg)
        assert self.calls[-1:] == [True]
        iova, size, _, length, where = struct.unpack_from("=QQQQQ", arg, 8)
        self.questions.append(size)
        if any(start < edge < start + long for start, long in self.mappings for edge in (iova, iova + size)):
            raise IoctlError(errno.EINVAL, request)
        bits = sum(1 << page - iova // PAGE for page in self.dirty if page * PAGE < iova + size)
        ctypes.memmove(where, bits.to_bytes(length, "little"), length)
        self.dirty = {page for page in self.dirty if page * PAGE >= iova + size}
        return 0


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> Callable[[HeldContainer], DmaTracker]:
    holder = Holder(4711, "vfio-mig", is_hold=True, fd=5)

    def find(container: HeldContainer) -> DmaTracker:
        monkeypatch.setattr(uapi, "call", container.call)
        monkeypatch.setattr(tracking, "duplicate_container", lambda *whose: FD if whose == (NAME, holder) else None)
        device = Device(NAME, -1, how="borrowed", holder=holder)
        tracker = find_tracker(device, of_holder=True)
        assert FD in device._owned
        return tracker

    return find


def test_what_a_holder_has_mapped_is_told_whatever_ranges_are_asked_for(
    borrowed: Callable[[HeldContainer], DmaTracker],
) -> None:
    container = HeldContainer((3 * PAGE, 13 * PAGE), (1 << 30, 1 << 20))
    tracker = borrowed(container)
    container.dirty = {3, 15}  # pinned already when the tracking begins
    tracker.start([(4 * PAGE, PAGE)])
    tracker.start()
    assert container.calls == [True]
    assert set(container.questions) == {1 << 32}
    container.dirty |= {4, 1 << 18}
    assert pages(tracker, 4, 1) == {4}
    assert pages(tracker, 0, 1 << 20) == {3, 15, 1 << 18}
    assert pages(tracker, 0, 1 << 20) == set()
    tracker.stop()
    assert container.calls == [True, False]


@pytest.mark.parametrize(
    ("mapping", "asked", "expected"),
    [
        ((0, 6 << 30), 0, [1 << 32, 1 << 33]),
        ((0, 6 << 30), 5 << 30, [1 << 33]),
        ((1 << 34, PAGE), 0, [1 << 32]),
    ],
    ids=["it goes on behind", "so far is asked for", "there is more"],
)
def test_a_holder_s_memory_may_end_anywhere(
    borrowed: Callable[[HeldContainer], DmaTracker], mapping: tuple[int, int], asked: int, expected: list[int]
) -> None:
    container = HeldContainer(mapping)
    borrowed(container).start([(0, asked)])
    assert container.questions == expected


def test_a_holder_s_container_that_refuses_is_left_as_it_was(borrowed: Callable[[HeldContainer], DmaTracker]) -> None:
    container = HeldContainer()
    tracker = borrowed(container)
    with pytest.raises(DeviceError, match="more than a container can be asked for"):
        tracker.start([(0, 1 << 44)])
    assert container.calls == [True, False]

    container = HeldContainer((0, 1 << 50))
    with pytest.raises(DeviceError, match="EINVAL"):
        borrowed(container).start()
    assert container.calls == [True, False]
    assert container.questions[-1] == 1 << 43


def test_a_holder_without_a_container_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "duplicate_container", lambda *_: None)
    device = Device(NAME, -1, how="borrowed", holder=Holder(4711, "vfio-mig", is_hold=True, fd=5))
    with pytest.raises(UnsupportedError, match=r"PID 4711 \(vfio-mig\) has it without a container; hold it with --via"):
        find_tracker(device, of_holder=True)


def test_a_holder_s_container_is_asked_only_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "duplicate_container", lambda *_: pytest.fail("it was asked"))
    device = Device(NAME, -1, how="borrowed", holder=Holder(4711, "vfio-mig", is_hold=True, fd=5))
    with pytest.raises(UnsupportedError, match="what was mapped by another process is left alone"):
        find_tracker(device)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (
            Device(NAME, -1, how="cdev", dma=IommufdDma(cast("Iommufd", None), None, "its IOMMU cannot", PIECES)),
            "keeps no log of its writes, and its IOMMU cannot; leave out --memory",
        ),
        (Device(NAME, -1), "and no memory was mapped for it; name the guest's memory with --memory"),
        (Device(NAME, -1, how="borrowed", holder=None), "what was mapped by another process is left"),
        (
            Device(NAME, -1, how="borrowed", holder=Holder(4711, "qemu-system-x86", is_hold=False, fd=5)),
            "as that may be tracking it; 'dirty' and 'save' ask that process with --pinned; or leave out --memory",
        ),
        (Device(NAME, -1, how="inherited"), "as that may be tracking it; ask that process, or leave out --memory"),
    ],
)
def test_where_nothing_can_tell_it_says_what_was_looked_at(device: Device, words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_tracker(device)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{NAME}: cannot be asked for its dirty pages")
    assert caught.value.exit_code == 4


# Whoever else has the device -----------------------------------------------------------------------------------------

OWNER: Final = Holder(4711, "qemu-system-x86", is_hold=False, fd=5)


class OwnersContainer(HeldContainer):
    """One whose owner may have begun a log: only then a question is answered."""

    def __init__(self, *mappings: tuple[int, int], is_logged: bool = False) -> None:
        super().__init__(*mappings)
        self.is_logged = is_logged
        self.is_still = False
        """Whether the owner stands still."""

    def call(self, fd: int, request: Request, arg: bytearray) -> int:
        assert self.is_still
        flags = struct.unpack_from("=I", arg, 4)[0]
        if flags == 4:
            if not self.is_logged:
                raise IoctlError(errno.EINVAL, request)
            if struct.unpack_from("=Q", arg, 8)[0] >= 1 << 63:
                return 0
        done = super().call(fd, request, arg)
        self.is_logged = {1: True, 2: False}.get(flags, self.is_logged)
        return done


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch) -> Callable[[OwnersContainer], OwnersTracker]:
    monkeypatch.setattr(migrating, "is_migrating", lambda _: False)

    def find(container: OwnersContainer) -> OwnersTracker:
        def still(name: str, holder: Holder, do: Callable[[], None]) -> None:
            assert (name, holder) == (NAME, OWNER)
            container.is_still = True
            try:
                do()
            finally:
                container.is_still = False

        monkeypatch.setattr(uapi, "call", container.call)
        monkeypatch.setattr(frozen, "while_still", still)
        monkeypatch.setattr(tracking, "duplicate_container", lambda *whose: FD if whose == (NAME, OWNER) else None)
        device = Device(NAME, -1, how="borrowed", holder=OWNER)
        tracker = find_owners_tracker(device)
        assert FD in device._owned
        return tracker

    return find


def test_an_owner_s_container_is_asked_as_a_whole_and_left_as_it_was(
    owned: Callable[[OwnersContainer], OwnersTracker],
) -> None:
    container = OwnersContainer((0, 6 << 30))
    tracker = owned(container)
    tracker.start([(0, PAGE)])
    assert container.calls == []
    for dirty in ({3, 15}, {4, 1 << 20}, set[int]()):
        container.dirty = set(dirty)
        tracker.collect()
        assert bits_of(memoryview(tracker.take(0, 1 << 21)), 0) == dirty
        assert container.calls[-2:] == [True, False]
        assert not container.is_logged
    tracker.stop()
    assert len(container.calls) == 6
    assert "pinned now" in tracker.caution


def test_an_owner_that_logs_is_left_alone(
    owned: Callable[[OwnersContainer], OwnersTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = OwnersContainer((0, 1 << 20), is_logged=True)
    with pytest.raises(DeviceBusyError, match=r"PID 4711 \(qemu-system-x86\) has a log of its own"):
        owned(container).collect()
    assert (container.calls, container.questions, container.is_logged) == ([], [], True)
    monkeypatch.setattr(migrating, "is_migrating", lambda pid: pid == OWNER.pid)
    container = OwnersContainer((0, 1 << 20))
    with pytest.raises(DeviceBusyError, match="has a log of its own"):
        owned(container).collect()
    assert container.calls == []


def test_an_owner_s_log_is_ended_whatever_fails(owned: Callable[[OwnersContainer], OwnersTracker]) -> None:
    container = OwnersContainer((0, 1 << 50))  # of which no question can see the end
    with pytest.raises(DeviceError, match="EINVAL"):
        owned(container).collect()
    assert container.calls == [True, False]
    container = OwnersContainer()
    container.refuse = errno.EACCES
    with pytest.raises(DeviceError, match="EACCES"):
        owned(container).collect()
    assert not container.is_logged


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        (Device(NAME, -1), UsageError, "no other process has it open; leave out --pinned"),
        (Device(NAME, -1, how="inherited"), UsageError, "nothing tells whose container an inherited fd has"),
        (Device(NAME, -1, how="borrowed", holder=OWNER), UnsupportedError, "has it without a container"),
    ],
)
def test_where_no_owner_s_container_can_be_asked_it_says_why(
    device: Device, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "duplicate_container", lambda *_: None)
    with pytest.raises(error, match=words):
        find_owners_tracker(device)
