# SPDX-License-Identifier: MIT
"""Guest memory in whole jobs, on devices that are played: one copy for all, nothing old, missing or half-told."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_jobs import FakeProtocol, Gpu
from tools.lab.faults.injection import LISTENERS, install
from tools.lab.faults.injection import VARIABLE as FAULT
from vfio_mig import interrupts
from vfio_mig.device import Device, Holder
from vfio_mig.dirty.memory import MemoryMap
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    HostError,
    MismatchError,
    OpenError,
    UnsupportedError,
    UsageError,
)
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.discover import Host, Snapshot
from vfio_mig.host.holders import NAMESPACE, View
from vfio_mig.host.lock import LOADING, MOVED, VARIABLE, DeviceLock, Leftover
from vfio_mig.image import memoryplan
from vfio_mig.image.archive import read_archive
from vfio_mig.image.memoryplan import memory_note
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs import control
from vfio_mig.jobs import restore as restoring
from vfio_mig.jobs.check import MEMORY, NOTE, FitCheck
from vfio_mig.jobs.control import device_status, start_device, start_devices, stop_device, stop_devices
from vfio_mig.jobs.engine import session
from vfio_mig.jobs.engine.export import describe_device
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.live import Live
from vfio_mig.jobs.engine.memory import MAY_BE_OLD, SINCE_NOW
from vfio_mig.jobs.engine.session import Session, Settings
from vfio_mig.jobs.files.pages import load_pages
from vfio_mig.jobs.migrate import _check_memory
from vfio_mig.jobs.restore import OLD_PAGES, restore, restore_all
from vfio_mig.jobs.save import save, save_all
from vfio_mig.jobs.sync import sync_dirty
from vfio_mig.protocols.abilities import Pending
from vfio_mig.ranges import merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_mig.dirty.sync import Round
    from vfio_mig.protocols.abilities import HasP2p, LogsWrites, SavesLive
    from vfio_mig.words import Effect

A, B = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
PAGE: Final = 4096
PAGES: Final = 16


def found(name: str) -> HostDevice:
    return HostDevice(name, "", "mdev", "i915-GVTg_V4_8", "0000:00:02.0", "vfio_mdev", 7)


class Vgpu(Gpu):
    """A device whose dirty pages a test chooses, round by round; the last ones stay."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol = Knowing
        self.rounds: list[set[int]] = [set()]
        self.on_fetch: Callable[[], object] = int
        self.note: Callable[[str], object] = str

    def next_dirty(self) -> set[int]:
        self.on_fetch()
        return self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]


class Knowing(FakeProtocol):
    """Always knows its dirty pages, as the RFC does."""

    name: ClassVar[str] = "fake"
    gpu: Vgpu

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        pages = self.gpu.next_dirty() if start_page == 0 else self.gpu.rounds[0]
        bits = sum(1 << page - start_page for page in pages if start_page <= page < start_page + nr_pages)
        return memoryview(bits.to_bytes((nr_pages + 7) // 8, "little"))


class Logging(Knowing):
    """Logs its writes once it is told to, as v2 devices do."""

    @property
    def dirty_log(self) -> LogsWrites:
        return self

    def start_log(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.gpu.calls.append(f"log {len(ranges)}")

    def stop_log(self) -> None:
        self.gpu.calls.append("log ends")


class Streaming(Knowing):
    """Has a state that can be read in parts, of which the first is there while it runs."""

    streams: ClassVar[bool] = True
    left: int = 4

    @property
    def live(self) -> SavesLive | None:
        return self

    def begin_live(self) -> bool:
        self.gpu.calls.append("begin_live")
        return self.gpu.running

    def read_live(self, limit: int) -> Iterator[bytes]:
        assert self.gpu.running
        self.gpu.calls.append("read_live")
        self.left -= limit
        yield b"live"[:limit]

    def pending(self) -> Pending:
        return Pending(self.left, 0, self.left + 4)

    def read_chunks(self) -> Iterator[bytes]:
        self.gpu.request("read_state")
        yield b"rest"


class Pci(Knowing):
    """Could write to another device, and so has no business without the P2P states in a job of several."""

    reaches_others: ClassVar[bool] = True


class PciWithP2p(Pci):
    """One that can be kept from it."""

    @property
    def p2p(self) -> HasP2p | None:
        return self

    def quiet(self) -> None:
        self.gpu.note(f"quiet {self.device.name[-1]}")

    def wake(self) -> None:
        self.gpu.note(f"wake {self.device.name[-1]}")

    def undo_wake(self) -> None:
        self.gpu.note(f"undo_wake {self.device.name[-1]}")

    def stop(self) -> None:
        self.gpu.note(f"stop {self.device.name[-1]}")
        super().stop()

    def start(self) -> None:
        self.gpu.note(f"start {self.device.name[-1]}")
        super().start()


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Vgpu]]:
    made = {A: Vgpu(), B: Vgpu()}

    def open_found(
        device: HostDevice,
        settings: Settings,
        _profile: object,
        _memory: object,
        lock: DeviceLock | None,
        _view: object,
        **_: object,
    ) -> Session:
        gpu = made[device.name]
        opened = Device(device.name, -1, how="borrowed", holder=gpu.holder)
        return Session(device, opened, gpu.protocol(opened, gpu), lock, settings)

    monkeypatch.setattr(session, "find", found)

    def survey(*names: str) -> Snapshot:
        holders: dict[str, tuple[Holder, ...]] = {
            name: () if gpu.holder is None else (gpu.holder,) for name, gpu in made.items()
        }
        return Snapshot(Host("/nowhere"), [found(name) for name in names or made], View(holders, None))

    for module in (session, control):
        monkeypatch.setattr(module, "survey", survey)
    monkeypatch.setattr(session, "_open_found", open_found)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv(FAULT, raising=False)
    install()
    handlers = {number: signal.getsignal(number) for number in interrupts.ENDING}
    yield made
    LISTENERS.clear()
    interrupts.install()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(b"".join(bytes([0x80 + page]) * PAGE for page in range(PAGES)))
    return path


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def settings(warned: list[str]) -> Settings:
    return Settings(warn=warned.append)


def maps(path: Path) -> list[MemoryMap]:
    return [MemoryMap(str(path), 0)]


def pages_of(path: Path) -> dict[int, int]:
    """What each page of an image is in the end: its first byte."""
    last: dict[int, int] = {}
    with path.open("rb") as file, read_archive(file) as archive:
        for gpa, size, content in archive.memory():
            for at in range(0, size, PAGE):
                last[(gpa + at) // PAGE] = 0 if content is None else content[at]
    return last


def set_page(path: Path, page: int, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(bytes([byte]) * PAGE)


def page(path: Path, number: int) -> int:
    return path.read_bytes()[number * PAGE]


# --- one copy of guest memory for all devices


def test_two_devices_share_one_copy_and_the_other_image_names_it(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings
) -> None:
    """A page that both have dirtied is copied in its last state, whichever device wrote it."""
    gpus[A].rounds = [{1, 2}, {1, 2}, {1, 2}]
    gpus[B].rounds = [{2, 3}, {2, 3}, {2, 3}]
    seen: list[int] = []

    def write(number: int) -> None:
        seen.append(number)
        set_page(memory, 2, number)

    gpus[B].on_fetch = lambda: write(len(seen) + 1)
    first, second = (tmp_path / name for name in ("a.vfm", "b.vfm"))
    reports = save_all([(A, str(first)), (B, str(second))], settings, memory=maps(memory), live=Live(2))
    assert len(seen) > 2
    assert pages_of(first) == {1: 0x81, 2: seen[-1], 3: 0x83}
    assert pages_of(second) == {}
    assert [report.pages_dirty for report in reports] == [2, 2]
    assert reports[0].pages_written >= 3
    assert reports[1].pages_written == 0
    notes = []
    for path in (first, second):
        with path.open("rb") as file, read_archive(file) as archive:
            notes.append(memory_note(archive))
    assert notes[0].is_in is None
    assert (notes[1].is_in, notes[1].job) == ("a.vfm", notes[0].job)


def test_images_of_one_save_are_restored_together_and_each_page_once(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings
) -> None:
    gpus[A].rounds, gpus[B].rounds = [{1, 2}], [{2, 3}]
    pairs = [(A, str(tmp_path / "a.vfm")), (B, str(tmp_path / "b.vfm"))]
    save_all(pairs, settings, memory=maps(memory))
    target = tmp_path / "target"
    target.write_bytes(bytes(PAGES * PAGE))
    written: list[int] = []
    reports = restore_all(pairs, settings, memory=maps(target), progress=written.append)
    assert [page(target, number) for number in range(5)] == [0, 0x81, 0x82, 0x83, 0]
    assert [report.pages_written for report in reports] == [3, 0]
    assert sum(written) == 3 * PAGE
    with pytest.raises(MismatchError, match=r"the guest memory of .*b\.vfm is in a\.vfm"):
        restore(B, pairs[1][1], settings, memory=maps(target))
    assert gpus[B].calls.count("write_state") == 1
    assert restore(B, pairs[1][1], settings, no_memory=True).pages_written == 0


def image_of(path: Path, pages: dict[int, int], time: int | None = 1, **head: Any) -> Path:
    device = Device(A, -1)
    header = {**describe_device(Session(found(A), device, Knowing(device, Vgpu()))), "time": time, **head}
    with path.open("wb") as file:
        writer = ArchiveWriter(file, header)
        for number, byte in pages.items():
            if byte:
                writer.add_pages([(number * PAGE, bytes([byte]) * PAGE)])
            else:
                writer.add_zero([(number * PAGE, PAGE)])
        writer.add_state(b"state")
        writer.finish()
    return path


def test_an_image_says_of_which_device_it_is() -> None:
    device = Device(A, -1)
    head = describe_device(Session(found(A), device, Knowing(device, Vgpu())))
    assert head["device"] == {"name": A, "kind": "mdev", "type": "i915-GVTg_V4_8", "driver": "vfio_mdev"}


def test_of_images_of_several_saves_the_newest_page_counts_in_any_order(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings
) -> None:
    old = image_of(tmp_path / "old", {1: 1, 2: 1, 3: 1}, time=10)
    new = image_of(tmp_path / "new", {2: 2, 3: 0}, time=20)
    for pairs in ([(A, str(old)), (B, str(new))], [(A, str(new)), (B, str(old))]):
        target = tmp_path / "target"
        target.write_bytes(b"\xff" * PAGE * PAGES)
        written: list[int] = []
        restore_all(pairs, settings, memory=maps(target), progress=written.append)
        assert [page(target, number) for number in range(5)] == [0xFF, 1, 2, 0, 0xFF]
        assert sum(written) == 3 * PAGE
    assert gpus[A].state == b"state"


@pytest.mark.parametrize("times", [(10, 10), (10, None), (None, None)])
def test_images_of_which_none_is_known_to_be_newer_are_refused(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings, times: tuple[int | None, int | None]
) -> None:
    one, other = (image_of(tmp_path / f"{n}", {1: n + 1, 2: n + 1}, time=time) for n, time in enumerate(times))
    target = tmp_path / "target"
    target.write_bytes(bytes(PAGES * PAGE))
    with pytest.raises(MismatchError, match="both have memory at 0x1000, and nothing tells which is newer"):
        restore_all([(A, str(one)), (B, str(other))], settings, memory=maps(target))
    assert gpus[A].calls == gpus[B].calls == []
    assert not any(target.read_bytes())
    apart = image_of(tmp_path / "apart", {5: 5}, time=times[1])
    restore_all([(A, str(one)), (B, str(apart))], settings, memory=maps(target))
    assert [page(target, number) for number in (1, 2, 5)] == [1, 1, 5]


def test_of_three_images_any_two_that_are_in_doubt_are_refused() -> None:
    pages = [[(0, PAGE)], [(0, PAGE)], [(0, PAGE)]]
    images: Any = [SimpleNamespace(name=name, time=time) for name, time in (("a", 1), ("b", 2), ("c", 1))]
    with pytest.raises(MismatchError, match="a and c both have memory at 0x0"):
        memoryplan._refuse_doubt(images, pages)
    images[2].time = 3
    memoryplan._refuse_doubt(images, pages)


@given(st.sets(st.integers(0, 24)), st.integers(0, 24), st.integers(1, 24))
def test_of_a_range_exactly_what_is_allowed_is_written(allowed: set[int], start: int, size: int) -> None:
    spans = merge((number, number + 1) for number in allowed)
    found = list(memoryplan._parts(start, start + size, spans))
    assert [at for one in found for at in range(*one)] == sorted(allowed & set(range(start, start + size)))


def test_overlapping_members_write_no_more_than_the_memory_has(tmp_path: Path) -> None:
    path = tmp_path / "image"
    device = Device(A, -1)
    with path.open("wb") as file:
        writer = ArchiveWriter(file, describe_device(Session(found(A), device, Knowing(device, Vgpu()))))
        for number in range(200):
            writer.add_zero([(0, PAGES * PAGE)])
            writer.add_pages([(number % PAGES * PAGE, bytes([number]) * PAGE)])
        writer.finish()
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * PAGE * PAGES)
    written: list[int] = []
    with pytest.raises(UsageError, match="nowhere to write to"):
        load_pages(str(path), memory=[])
    report = load_pages(str(path), memory=maps(target), progress=written.append)
    assert sum(written) == PAGES * PAGE
    assert report.pages_written == PAGES
    assert [page(target, number) for number in range(PAGES)] == [0] * (199 % PAGES) + [199] + [0] * (15 - 199 % PAGES)


# --- what rounds know


def test_a_page_that_was_written_and_unmapped_between_rounds_is_not_old(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings
) -> None:
    """The first fetch looks outside of the memory; 7 is dirty in the first round only, and written after it."""

    def play() -> None:
        gpus[A].rounds = [{1, 7}, {1}]
        turn: list[int] = []

        def fetch() -> None:
            turn.append(1)
            if len(turn) == 2:
                set_page(memory, 7, 0x55)

        gpus[A].on_fetch = fetch

    play()
    save(A, str(tmp_path / "image"), settings, memory=maps(memory), live=Live(2))
    assert pages_of(tmp_path / "image")[7] == 0x55
    set_page(memory, 7, 0x87)
    play()
    sync_dirty(A, str(tmp_path / "copy"), settings, memory=maps(memory), rounds=2)
    assert page(tmp_path / "copy", 7) == 0x55


@pytest.mark.parametrize("runs", [True, False])
def test_a_state_is_read_live_from_where_it_was_begun_and_every_round_is_told(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, warned: list[str], *, runs: bool
) -> None:
    gpus[A].protocol, gpus[A].running = Streaming, runs
    gpus[A].rounds = [{1, 2}, {2}]
    seen: list[Round] = []
    live = Live(2, precopy=True, on_round=seen.append)
    report = save(A, str(tmp_path / "image"), settings, memory=maps(memory), live=live)
    with (tmp_path / "image").open("rb") as file, read_archive(file) as archive:
        assert archive.state() == (b"liverest" if runs else b"rest")
    first, *live_calls, stop, rest = gpus[A].calls
    assert (first, set(live_calls), stop, rest) == (
        "begin_live",
        {"read_live"} if runs else set(),
        "stop",
        "read_state",
    )
    assert (report.precopy_bytes, report.state_bytes) == ((4, 8) if runs else (0, 4))
    assert len(report.state_rounds) == len(live_calls)
    assert [one for one in warned if "its state is read as usual" in one] == ([] if runs else warned[-1:])
    assert report.rounds == seen
    assert [one.stopped for one in report.rounds] == [False] * (len(seen) - 1) + [True]
    assert len(seen) >= 2


@pytest.mark.parametrize("link", [False, True])
def test_pages_are_not_copied_onto_themselves(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, *, link: bool
) -> None:
    """Else a page of zeros might become a hole under the feet of the guest."""
    same = memory
    if link:
        same = tmp_path / "other name"
        same.hardlink_to(memory)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UsageError, match="is the guest's memory itself") as caught:
        sync_dirty(A, str(same), settings, memory=maps(memory), rounds=0)
    assert gpus[A].calls == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before, caught


@pytest.mark.parametrize(
    ("holder", "is_ours"),
    [
        (None, False),  # borrowed of somebody whom we do not see
        (Holder(4711, "qemu-system-x86", is_hold=False, fd=3), False),
        (Holder(4711, "vfio-mig", is_hold=True, fd=3), True),
    ],
)
def test_a_borrowed_device_is_ours_if_our_holder_has_it(holder: Holder | None, *, is_ours: bool) -> None:
    device = Device(A, -1, how="borrowed", holder=holder)
    assert Session(found(A), device, Knowing(device, Vgpu())).is_ours is is_ours
    own = Device(A, -1, how="group")
    assert Session(found(A), own, Knowing(own, Vgpu())).is_ours


def test_of_a_device_that_nobody_is_seen_to_have_it_is_not_said_that_nobody_has_it() -> None:
    for unseen, words in (
        (None, "nobody has it open, .*vfio-mig hold"),
        (NAMESPACE, f"no process that can be seen .*{NAMESPACE.reason}"),
    ):
        seen: Any = SimpleNamespace(holder_of=lambda _: None, unseen=unseen)
        with pytest.raises(DeviceBusyError, match=words):
            session.require_holder(found(A), "stop", seen)


@pytest.mark.parametrize("step", ["_open_found", "_take_over"])
def test_a_device_that_cannot_be_opened_is_not_left_locked(
    gpus: dict[str, Vgpu], settings: Settings, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whoever calls this package may keep the error, and with it what was open when it was raised."""

    def fail(*_: object, **__: object) -> None:
        raise OpenError("it cannot be", device=A)

    with monkeypatch.context() as patched:
        patched.setattr(session, step, fail)
        with pytest.raises(OpenError) as caught:
            session.open_session(A, settings, job="save")
    session.open_session(A, settings, job="save").close()
    assert caught.value.__traceback__ is not None
    assert gpus[A].calls == []


def test_a_log_tells_only_what_is_written_from_now_on(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, warned: list[str]
) -> None:
    gpus[A].protocol = Logging
    gpus[A].rounds = [{3}, {4}, set()]
    report = save(A, str(tmp_path / "image"), settings, memory=maps(memory), live=Live(2))
    assert pages_of(tmp_path / "image") == {3: 0x83, 4: 0x84}
    assert (report.memory, report.guest_paused) == ("dirty", False)
    assert warned == [f"{A}: {SINCE_NOW}"]


def test_an_image_of_a_device_that_lost_its_log_says_that_it_has_every_page(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, warned: list[str]
) -> None:
    def lose() -> None:
        raise DeviceError("REPORT failed: EIO", device=A)

    gpus[A].protocol, gpus[A].on_fetch = Logging, lose
    report = save(A, str(tmp_path / "image"), settings, memory=maps(memory))
    assert pages_of(tmp_path / "image").keys() == set(range(PAGES))
    assert report.memory == "all"
    assert any("every page is taken as dirty" in one for one in warned)


@pytest.mark.parametrize("paused", [True, False])
def test_every_page_is_copied_if_asked_for_or_where_no_cpu_runs(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, warned: list[str], *, paused: bool
) -> None:
    gpus[A].protocol = Logging
    gpus[A].rounds = [{3}, {4}, set()]
    image = tmp_path / "image"
    report = save(
        A, str(image), settings, memory=maps(memory), live=Live(2), all_memory=not paused, guest_paused=paused
    )
    assert pages_of(image) == {number: 0x80 + number for number in range(PAGES)}
    assert (report.memory, report.guest_paused) == ("all", paused)
    assert warned == ([] if paused else [f"{A}: {MAY_BE_OLD}"])
    warned.clear()
    again = restore(A, str(image), settings, memory=maps(memory))
    assert again.warnings == ([] if paused else [f"{image}: {OLD_PAGES}"])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("job", ["save", "sync"])
def test_dirty_pages_outside_of_the_memory_are_told_before_the_stop(
    gpus: dict[str, Vgpu],
    memory: Path,
    tmp_path: Path,
    settings: Settings,
    warned: list[str],
    *,
    job: str,
    strict: bool,
) -> None:
    settings = Settings(warn=warned.append)
    gpus[A].rounds = [{1, 20, 40}]
    target = str(tmp_path / "out")

    def run() -> object:
        if job == "save":
            return save(A, target, settings, memory=maps(memory), strict=strict)
        return sync_dirty(A, target, settings, memory=maps(memory), strict=strict)

    if strict:
        with pytest.raises(UnsupportedError, match=r"2 pages .* the first at 0x14000"):
            run()
        assert gpus[A].calls == []
        assert not (tmp_path / "out").exists()
        return
    run()
    text = "2 pages that it may have written are in no memory that --memory names, the first at 0x14000"
    assert warned == [f"{A}: {text}: they are not copied"]


def test_a_range_beyond_the_memory_is_no_way_round(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, warned: list[str]
) -> None:
    gpus[A].protocol = Logging
    gpus[A].rounds = [{1, 20}]
    ranges = [PageRange(0, 64)]
    save(A, str(tmp_path / "image"), settings, memory=maps(memory), ranges=ranges)
    assert any("1 pages that it may have written are in no memory" in text for text in warned)
    with pytest.raises(UnsupportedError, match="are in no memory"):
        save(A, str(tmp_path / "other"), settings, memory=maps(memory), ranges=ranges, strict=True)
    assert gpus[A].running
    assert not (tmp_path / "other").exists()


# --- what a restore does to guest memory


def test_an_image_with_pages_is_refused_without_a_place_for_them(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings
) -> None:
    image = image_of(tmp_path / "image", {1: 1})
    with pytest.raises(UsageError, match="no --memory to write it to"):
        restore(A, str(image), settings)
    assert gpus[A].calls == []
    assert restore(A, str(image), settings, no_memory=True).pages_written == 0


def test_pages_go_nowhere_in_a_migration_only_if_that_is_said() -> None:
    with pytest.raises(UsageError, match="have no place to go to"):
        _check_memory([MemoryMap("x", 0)], [], no_memory=False)
    with pytest.raises(UsageError, match="nothing to write"):
        _check_memory([], ["x@0"], no_memory=False)
    _check_memory([MemoryMap("x", 0)], ["x@0"], no_memory=False)
    _check_memory([MemoryMap("x", 0)], [], no_memory=True)
    _check_memory([], [], no_memory=False)


@pytest.mark.parametrize("failure", ["EIO", "ENOSPC", "sigterm"])
@pytest.mark.parametrize("step", ["writing-pages", "after-pages"])
def test_a_device_whose_guest_memory_may_be_half_written_is_reset_and_never_just_started(
    gpus: dict[str, Vgpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, step: str, failure: str
) -> None:
    image = image_of(tmp_path / "image", {1: 1})
    target = tmp_path / "target"
    target.write_bytes(bytes(PAGES * PAGE))
    monkeypatch.setenv(FAULT, f"restore:{step}={failure}")
    interrupts.install()
    noted: list[Leftover | None] = []
    LISTENERS.append(lambda _, name: noted.append(gpus[A].left) if name == step else None)
    with pytest.raises((DeviceError, HostError, KeyboardInterrupt)) as caught:
        restore(A, str(image), memory=maps(target))
    assert gpus[A].calls == ["stop", "reset", "start"]
    assert gpus[A].left is None
    said = [*getattr(caught.value, "consequences", ()), *getattr(caught.value, "__notes__", ())]
    assert said == ([] if step == "writing-pages" else ["guest memory has the image's pages already"])


def test_a_write_that_fails_half_way_is_told_as_such(
    gpus: dict[str, Vgpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    image = image_of(tmp_path / "image", {1: 1, 5: 5})
    target = tmp_path / "target"
    target.write_bytes(bytes(PAGES * PAGE))
    real = MemoryMap.write

    def write(self: MemoryMap, gpa: int, view: memoryview) -> None:
        if gpa == 5 * PAGE:
            raise HostError("disk on fire")
        real(self, gpa, view)

    monkeypatch.setattr(MemoryMap, "write", write)
    with pytest.raises(HostError, match="disk on fire; guest memory is partly new: write it again before its guest"):
        restore(A, str(image), settings, memory=maps(target))
    assert gpus[A].calls == ["stop", "reset", "start"]
    with pytest.raises(HostError, match="disk on fire; guest memory is partly new"):
        load_pages(str(image), settings, memory=maps(target))


def test_an_image_that_changes_while_it_is_loaded_is_the_host_s_failure(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings
) -> None:
    image = image_of(tmp_path / "image", {1: 1, 5: 5})
    target = tmp_path / "target"
    target.write_bytes(bytes(PAGES * PAGE))

    at = image.read_bytes().index(b"\x05" * PAGE)
    with image.open("r+b") as file:  # open already, so that the restore gets no lease on it

        def spoil(_job: str, name: str) -> None:
            if name == "writing-pages":
                os.pwrite(file.fileno(), b"\x06", at)

        LISTENERS.append(spoil)
        with pytest.raises(HostError, match=r"image has changed while it was loaded: .*; guest memory is partly new"):
            restore(A, str(image), settings, memory=maps(target))
    assert gpus[A].calls == ["stop", "reset", "start"]
    assert page(target, 5) == 0


def test_memory_that_cannot_be_written_is_found_before_the_stop(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings
) -> None:
    import fcntl

    image = image_of(tmp_path / "image", {1: 1})
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGES * PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(HostError):
            restore(A, str(image), settings, memory=[MemoryMap(f"/proc/self/fd/{fd}", 0)])
    finally:
        os.close(fd)
    assert gpus[A].calls == []


def test_a_signal_while_pages_are_written_is_looked_at_between_pieces(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings
) -> None:
    size = 64 << 20
    path = tmp_path / "image"
    device = Device(A, -1)
    with path.open("wb") as file:
        writer = ArchiveWriter(file, describe_device(Session(found(A), device, Knowing(device, Vgpu()))))
        writer.add_zero([(0, size)])
        writer.add_state(b"state")
        writer.finish()
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(size)
    pieces: list[int] = []

    def progress(done: int) -> None:
        pieces.append(done)
        signal.raise_signal(signal.SIGINT)

    interrupts.install()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            restore(A, str(path), settings, memory=maps(target), progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(pieces) == 1
    assert pieces[0] <= 16 << 20
    assert "guest memory is partly new" in caught.value.__notes__[0]
    assert gpus[A].calls == ["stop", "reset", "start"]


# --- a state that has gone elsewhere


@pytest.fixture
def moved(gpus: dict[str, Vgpu], settings: Settings) -> Leftover:
    with Job("migrate", settings) as job:
        opened = job.open(A)
        opened.protocol.stop()
        opened.journal(MOVED)
    gpus[A].calls.clear()
    return Leftover("migrate", os.getpid(), MOVED)


def test_a_device_whose_state_was_moved_is_started_and_saved_by_force_only(
    gpus: dict[str, Vgpu], moved: Leftover, tmp_path: Path, settings: Settings
) -> None:
    assert gpus[A].left == moved
    assert device_status(A).left == str(moved)
    for job in (lambda: start_device(A, settings), lambda: save(A, str(tmp_path / "x"), settings)):
        with pytest.raises(DeviceError, match="its state was moved to another device"):
            job()
    stop_device(A, settings)
    assert gpus[A].left == moved  # a stop changes nothing about that
    assert gpus[A].calls == ["stop"]
    save(A, str(tmp_path / "x"), settings, force=True)
    assert gpus[A].left == moved
    assert not gpus[A].running
    start_device(A, settings, force=True)
    assert gpus[A].running
    assert gpus[A].left is None


def test_a_forced_save_that_fails_does_not_start_a_device_whose_state_was_moved(
    gpus: dict[str, Vgpu], moved: Leftover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "save:after-state=EIO")
    with pytest.raises(DeviceError, match="fault"):
        save(A, str(tmp_path / "x"), Settings(warn=str), force=True)
    assert not gpus[A].running
    assert gpus[A].left == moved


@pytest.mark.usefixtures("moved")
def test_a_new_state_makes_a_device_whose_state_was_moved_whole_again(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings
) -> None:
    restore(A, str(image_of(tmp_path / "image", {})), settings)
    assert gpus[A].left is None
    start_device(A, settings)


@pytest.mark.usefixtures("gpus")
def test_what_a_kill_leaves_between_pages_is_loading(tmp_path: Path, settings: Settings) -> None:
    image = image_of(tmp_path / "image", {1: 1})
    target = tmp_path / "target"
    target.write_bytes(bytes(PAGES * PAGE))
    seen: list[str] = []

    def look(_job: str, name: str) -> None:
        text = (tmp_path / f"locks/{A}.lock").read_text()
        seen.append(f"{name}:{'loading' if LOADING in text else 'stopped' if 'stopped' in text else '-'}")

    LISTENERS.append(look)
    restore(A, str(image), settings, memory=maps(target))
    assert seen[-4:] == ["after-stop:stopped", "writing-pages:loading", "after-pages:loading", "after-state:loading"]


@pytest.mark.parametrize(("one", "several"), [(save, save_all), (restore, restore_all)], ids=["save", "restore"])
def test_a_job_on_one_device_passes_on_all_that_it_was_asked(
    monkeypatch: pytest.MonkeyPatch, one: Callable[..., Any], several: Callable[..., Any]
) -> None:
    given = {
        name: object()
        for name, parameter in inspect.signature(one).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    calls: list[tuple[Any, ...]] = []

    def play(*args: Any, **kwargs: Any) -> list[str]:
        inspect.signature(several).bind(*args, **kwargs)
        calls.append((args, kwargs))
        return ["report"]

    monkeypatch.setattr(sys.modules[several.__module__], several.__name__, play)
    assert one("gpu", "file", "settings", **given) == "report"
    assert calls == [(([("gpu", "file")], "settings"), given)]


@pytest.mark.parametrize("left", [LOADING, MOVED, "stopped", ""])
def test_what_an_earlier_job_has_left_stays_written_down_until_it_is_not_so_any_more(left: Effect) -> None:
    written: list[str] = []
    device, lock = Device(A, -1), SimpleNamespace(journal=written.append)
    opened = Session(found(A), device, Knowing(device, Vgpu()), cast("DeviceLock", lock))
    opened.leftover = Leftover("restore", 1, left) if left else None
    passing: tuple[Effect, ...] = ("stopped", "live", "")  # a stop and its undo
    changes: tuple[Effect, ...] = ("loading", "moved")
    for effect in passing:
        opened.journal(effect)
    assert written == ([] if left in {LOADING, MOVED} else [*passing])
    written.clear()
    for effect in changes:
        opened.journal(effect)
    opened.clear_journal()
    assert written == [LOADING, MOVED, ""]


@pytest.mark.parametrize("no_memory", [True, False])
def test_who_says_that_the_memory_is_there_is_not_told_that_it_must_be(
    gpus: dict[str, Vgpu], tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, *, no_memory: bool
) -> None:
    image = image_of(tmp_path / "image", {})
    found = [FitCheck(MEMORY, NOTE, "the target must have the rest"), FitCheck("kernel", NOTE, "another one")]
    monkeypatch.setattr(restoring, "fit_checks", lambda *_, **__: found)
    report = restore(A, str(image), settings, no_memory=no_memory)
    told = ["guest memory: the target must have the rest"]
    assert [one for one in report.warnings if "must have" in one] == ([] if no_memory else told)
    assert gpus[A].state == b"state"


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("is_hold", [True, False])
def test_another_process_s_device_is_not_reset_after_a_failure_unless_by_force(
    gpus: dict[str, Vgpu], settings: Settings, *, is_hold: bool, force: bool
) -> None:
    """Its owner would lose interrupts and configuration."""
    gpus[A].holder = Holder(4711, "qemu-system-x86", is_hold=is_hold, fd=3)
    with session.open_session(A, settings, job="restore") as opened:
        if is_hold or force:
            restoring._abandon(opened, force=force)
            assert "reset" in gpus[A].calls
            return
        with pytest.raises(DeviceError, match=f"left stopped.*vfio-mig reset --force {A}', or end PID 4711"):
            restoring._abandon(opened, force=force)
        assert gpus[A].calls == []


def test_only_one_image_from_standard_input_has_a_word_behind_it(gpus: dict[str, Vgpu], settings: Settings) -> None:
    cases: list[tuple[list[tuple[str, str]], dict[str, Any]]] = [
        ([(A, "file")], {}),
        ([(A, "-"), (B, "file")], {}),
        ([(A, "-")], {"start": True}),
        ([(A, "-")], {"raw": True}),
    ]
    for pairs, asked in cases:
        with pytest.raises(UsageError, match="to wait for a word is for one image from standard input"):
            restore_all(pairs, settings, await_verdict=True, **asked)
    with pytest.raises(UsageError, match="two devices cannot be restored from standard input"):
        restore_all([(A, "-"), (B, "-")], settings)
    assert gpus[A].calls == gpus[B].calls == []


# --- several devices stop and start as one


def test_no_device_stands_or_runs_while_another_could_write_to_it(gpus: dict[str, Vgpu], settings: Settings) -> None:
    order: list[str] = []
    for gpu in gpus.values():
        gpu.protocol, gpu.note = PciWithP2p, order.append
    stop_devices([A, B], settings)
    assert order == ["quiet 1", "quiet 2", "stop 1", "stop 2"]
    order.clear()
    start_devices([A, B], settings)
    assert order == ["wake 1", "wake 2", "start 1", "start 2"]
    order.clear()
    stop_device(A, settings)
    start_device(A, settings)
    assert order == ["stop 1", "start 1"]


@pytest.mark.parametrize("which", [A, B])
def test_of_several_devices_each_must_have_the_p2p_states_that_could_write_to_another(
    gpus: dict[str, Vgpu], memory: Path, tmp_path: Path, settings: Settings, which: str
) -> None:
    for name, gpu in gpus.items():
        gpu.protocol = Pci if name == which else PciWithP2p
    pairs = [(name, str(tmp_path / name)) for name in gpus]
    for job in (stop_devices, start_devices):
        with pytest.raises(UnsupportedError, match=f"{which}: it has no P2P states"):
            job([A, B], settings)
    with pytest.raises(UnsupportedError, match=f"{which}: it has no P2P states"):
        save_all(pairs, settings, memory=maps(memory))
    assert {gpu.running for gpu in gpus.values()} == {True}
    assert gpus[A].calls == gpus[B].calls == []
    stop_devices([A, B], settings, without_p2p=True)
    assert {gpu.running for gpu in gpus.values()} == {False}
    stop_device(which, settings)  # one alone needs none
    gpus[which].protocol = Knowing  # nor one that reaches no other
    start_devices([A, B], settings)
    assert {gpu.running for gpu in gpus.values()} == {True}


# --- several devices are started


def test_a_signal_between_two_starts_is_no_success_and_says_which_run(
    gpus: dict[str, Vgpu], settings: Settings
) -> None:
    for gpu in gpus.values():
        gpu.running = False
    interrupts.install()
    gpus[A].after["start"] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        start_devices([A, B], settings)
    assert (gpus[A].running, gpus[B].running) == (True, False)
    assert caught.value.__notes__ == [f"started: {A}; not started: {B}"]


def test_a_device_that_fails_to_start_is_told_apart_from_those_that_run(
    gpus: dict[str, Vgpu], settings: Settings
) -> None:
    for gpu in gpus.values():
        gpu.running = False

    def fail() -> None:
        raise DeviceError("START failed", device=B)

    gpus[B].before["start"] = fail
    with pytest.raises(DeviceError, match=f"START failed; started: {A}; not started: {B}"):
        start_devices([A, B], settings)
    assert (gpus[A].running, gpus[B].running) == (True, False)


@pytest.mark.parametrize("is_hold", [True, False])
def test_a_device_that_its_vm_may_have_stopped_for_good_is_started_with_a_warning(
    gpus: dict[str, Vgpu], settings: Settings, warned: list[str], monkeypatch: pytest.MonkeyPatch, *, is_hold: bool
) -> None:
    gpus[A].holder = Holder(os.getpid(), "qemu-system-x86", is_hold=is_hold, fd=3)
    monkeypatch.setattr(Knowing, "state", lambda _: "stop")
    start_device(A, settings)
    assert gpus[A].running
    assert [("postmigrate" in text) for text in warned] == ([] if is_hold else [True])
