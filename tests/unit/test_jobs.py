# SPDX-License-Identifier: MIT
"""Whole jobs on a device that is played: what is done in which order, and the promise after any failure.

The promise: the device runs again (reset before, once a restore has begun to load), there is no file and no temporary
one, the first error is the one reported, nothing is noted as left, and the next save works.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import pytest

from tests.unit.test_image_gvt import CFG, SREG, vreg
from tests.unit.test_image_gvt import image as gvt_image
from tools.lab.faults.injection import LISTENERS, install
from tools.lab.faults.injection import VARIABLE as FAULT
from vfio_mig import interrupts
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.device import Device, Holder
from vfio_mig.dirty.memory import MemoryMap
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    HostError,
    ImageError,
    MismatchError,
    UnsupportedError,
    UsageError,
)
from vfio_mig.host import tracking
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.discover import Host, Snapshot
from vfio_mig.host.holders import View
from vfio_mig.host.lock import LOADING, STOPPED, VARIABLE, DeviceLock, Leftover, left_behind
from vfio_mig.host.tracking import HeldTracker
from vfio_mig.image.archive import read_archive
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.interrupts import ENDING
from vfio_mig.jobs import control, hold
from vfio_mig.jobs.check import verify_image
from vfio_mig.jobs.control import device_status, reset_device, start_device, stop_device
from vfio_mig.jobs.dirty import fetch_dirty
from vfio_mig.jobs.engine import session
from vfio_mig.jobs.engine.events import Hooks
from vfio_mig.jobs.engine.export import describe_device
from vfio_mig.jobs.engine.live import Live
from vfio_mig.jobs.engine.session import Session, Settings
from vfio_mig.jobs.engine.steps import STEPS
from vfio_mig.jobs.files.diff import diff_images
from vfio_mig.jobs.files.inspect import InspectReport, inspect_image
from vfio_mig.jobs.hold import hold_device
from vfio_mig.jobs.restore import NOT_HELD, UNVERIFIED, RestoreReport, restore, restore_all
from vfio_mig.jobs.save import SaveReport, save
from vfio_mig.jobs.sync import sync_dirty
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.protocols.none import NoMigration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from vfio_mig.words import Effect, How

NAME: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
FOUND: Final = HostDevice(NAME, "", "mdev", "i915-GVTg_V4_8", "0000:00:02.0", "vfio_mdev", 7)
PAGE: Final = 4096
PAGES: Final = 16
DIRTY: Final = (1, 2, 5)
OLD, SAVED, FRESH = b"state of the device", b"state from the image", b"state after a reset"


class Gpu:
    """A vGPU: what a session's close does not end.

    :param before, after: what to do before or after the next request of a name is carried out, once.
    """

    def __init__(self) -> None:
        self.holder: Holder | None = Holder(os.getpid(), "vfio-mig", is_hold=True, fd=3)
        self.protocol: type[FakeProtocol] = FakeProtocol
        self.refusal: UnsupportedError | None = None
        self.running = True
        self.state = OLD
        self.calls: list[str] = []
        self.warnings: list[str] = []
        self.commits = 0
        self.before: dict[str, Callable[[], object]] = {}
        self.after: dict[str, Callable[[], object]] = {}

    def request(self, name: str, **changes: object) -> None:
        self.calls.append(name)
        self.before.pop(name, int)()
        vars(self).update(changes)
        self.after.pop(name, int)()

    def step(self, name: str) -> None:
        """Write down what is not a request, once, and whether the device ran then."""
        text = f"{name} {'running' if self.running else 'stopped'}"
        if self.calls[-1:] != [text]:
            self.calls.append(text)

    @property
    def left(self) -> Leftover | None:
        return left_behind(FOUND, self.holder)


class FakeProtocol(MigrationProtocol):
    """States of an unknown layout, so that nothing but the jobs' own work is done to them."""

    name: ClassVar[str] = "fake"

    def __init__(self, device: Device, gpu: Gpu) -> None:
        super().__init__(device)
        self.gpu = gpu

    @property
    def state_size_max(self) -> int:
        return 1000

    def stop(self) -> None:
        self.gpu.request("stop", running=False)

    def start(self) -> None:
        self.gpu.request("start", running=True)

    def read_state(self) -> memoryview:
        assert not self.gpu.running
        self.gpu.request("read_state")
        return memoryview(self.gpu.state)

    def write_state(self, state: memoryview) -> None:
        assert not self.gpu.running
        self.gpu.request("write_state", state=bytes(state))

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        self.gpu.request("dirty")
        bits = sum(1 << page - start_page for page in DIRTY if start_page <= page < start_page + nr_pages)
        return memoryview(bits.to_bytes((nr_pages + 7) // 8, "little"))

    def reset(self) -> None:
        self.gpu.request("reset", state=FRESH)


class GvtProtocol(FakeProtocol):
    """One whose states have a layout that is checked."""

    name: ClassVar[str] = GvtRfc.name
    knows_states: ClassVar[bool] = GvtRfc.knows_states
    parse_state = GvtRfc.parse_state


def content_of(page: int) -> bytes:
    return bytes([0x80 + page]) * PAGE


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(b"".join(content_of(page) for page in range(PAGES)))
    return path


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = Gpu()

    def open_found(
        found: HostDevice, settings: Settings, _profile: object, _memory: object, lock: DeviceLock | None,
        _view: object, *, any_device: bool,
    ) -> Session:  # fmt: skip
        how: How = "group" if made.holder is None else "borrowed"
        device = Device(found.name, -1, how=how, holder=made.holder)
        if made.refusal is None:
            return Session(found, device, made.protocol(device, made), lock, settings)
        if not any_device:
            raise made.refusal
        device.reset = lambda: made.request("reset")  # type: ignore[method-assign]
        return Session(found, device, NoMigration(device, made.refusal), lock, settings)

    monkeypatch.setattr(session, "find", lambda _: FOUND)
    monkeypatch.setattr(session, "holder_of", lambda _: made.holder)

    def survey(*_: str) -> Snapshot:
        return Snapshot(Host("/nowhere"), [FOUND], View({NAME: () if made.holder is None else (made.holder,)}, None))

    for module in (session, control, hold):
        monkeypatch.setattr(module, "survey", survey)
    monkeypatch.setattr(session, "_open_found", open_found)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv(FAULT, raising=False)
    install()
    handlers = {number: signal.getsignal(number) for number in ENDING}
    interrupts.install()
    yield made
    LISTENERS.clear()
    interrupts.install()
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Jobs:
    """Every job, with all that it can do."""

    def __init__(self, gpu: Gpu, memory: Path, directory: Path) -> None:
        self.gpu = gpu
        self.memory = memory
        self.directory = directory
        directory.mkdir()
        self.image = directory.parent / "image.vfm"
        self.image.write_bytes(image_of())
        self.settings = Settings(warn=gpu.warnings.append, on_commit=self._commit)

    def _commit(self) -> None:
        self.gpu.commits += 1

    @property
    def maps(self) -> list[MemoryMap]:
        return [MemoryMap(str(self.memory), 0)]

    def save(self, name: str = "new.vfm", **options: Any) -> SaveReport:
        options = {"memory": self.maps, "leave_running": True, **options}
        return save(NAME, str(self.directory / name), self.settings, **options)

    def restore(self, **options: Any) -> RestoreReport:
        options = {"memory": self.maps, "start": True, **options}
        return restore(NAME, str(self.image), self.settings, **options)

    def run(self, job: str, *, leave_running: bool = True) -> object:
        interrupts.install()  # as in a program of its own
        self.gpu.commits = 0
        if job == "save":
            return self.save(leave_running=leave_running)
        if job == "restore":
            return self.restore()
        if job == "sync":
            copy = str(self.directory / "copy")
            return sync_dirty(NAME, copy, self.settings, memory=self.maps, leave_running=leave_running)
        if job == "dirty":
            return fetch_dirty(NAME, self.settings, memory=self.maps)
        return {"stop": stop_device, "start": start_device, "reset": reset_device}[job](NAME, self.settings)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def assert_a_save_works(self) -> None:
        report = self.save("next.vfm", leave_running=False)
        assert report.state == "stop"
        assert not self.gpu.running
        with (self.directory / "next.vfm").open("rb") as file, read_archive(file) as archive:
            assert archive.state() == self.gpu.state
        assert self.gpu.left is None


@pytest.fixture
def jobs(gpu: Gpu, memory: Path, tmp_path: Path) -> Jobs:
    return Jobs(gpu, memory, tmp_path / "files")


def header(**changes: object) -> dict[str, Any]:
    device = Device(NAME, -1)
    described = describe_device(Session(FOUND, device, FakeProtocol(device, Gpu())))
    return {**described, **changes}


def image_of(
    state: bytes = SAVED, pages: tuple[int, ...] = (3,), head: dict[str, Any] | None = None, offset: int = 0
) -> bytes:
    file = io.BytesIO()
    writer = ArchiveWriter(file, header() if head is None else head)
    writer.add_pages([(page * PAGE + offset, b"\x11" * PAGE) for page in pages])
    writer.add_state(state)
    writer.finish()
    return file.getvalue()


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


# --- what is done, in which order


def test_a_save_copies_and_reads_while_the_device_is_stopped_and_writes_the_file_afterwards(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        gpu.step("fsync")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    report = jobs.save(live=Live(progress=lambda _: gpu.step("copy")))
    assert gpu.calls == ["dirty", "stop", "dirty", "copy stopped", "read_state", "start", "fsync running"]
    assert (report.state, report.state_bytes, report.pages_dirty, report.pages_written) == ("running", 19, 3, 3)
    assert jobs.files() == ["new.vfm"]
    with (jobs.directory / "new.vfm").open("rb") as file, read_archive(file) as archive:
        assert archive.state() == OLD
        (dirty,) = archive.dirty()
        assert (dirty.start_page, dirty.nr_pages, dirty.bitmap) == (0, PAGES, bytes([0b100110, 0]))
        assert b"".join(bytes(content) for _, content in archive.pages()) == b"".join(map(content_of, DIRTY))
        assert archive.header.items() >= {"protocol": "fake", "machine": os.uname().machine}.items()
        assert archive.statistics["stopped_time"] == report.stopped_time >= report.stop_time
    assert gpu.left is None


def test_a_save_leaves_the_device_stopped(gpu: Gpu, jobs: Jobs) -> None:
    report = jobs.save(leave_running=False, memory=())
    assert gpu.calls == ["stop", "dirty", "read_state"]
    assert (report.state, report.start_time, report.pages_dirty) == ("stop", 0, 3)
    assert gpu.left is None


def test_a_raw_save_reads_the_state_only(gpu: Gpu, jobs: Jobs) -> None:
    jobs.save(raw=True, memory=())
    assert gpu.calls == ["stop", "read_state", "start"]
    assert (jobs.directory / "new.vfm").read_bytes() == OLD


def test_a_restore_writes_pages_then_state_while_the_device_is_stopped(gpu: Gpu, jobs: Jobs) -> None:
    report = jobs.restore(progress=lambda _: gpu.step("copy"))
    assert gpu.calls == ["stop", "copy stopped", "write_state", "start"]
    assert gpu.state == SAVED
    assert (report.state, report.state_bytes, report.pages_written, report.warnings) == ("running", len(SAVED), 1, [])
    after = jobs.memory.read_bytes()
    assert after[3 * PAGE : 4 * PAGE] == b"\x11" * PAGE
    assert after[: 3 * PAGE] == b"".join(map(content_of, range(3)))
    assert gpu.left is None


def test_a_restore_lays_out_the_state_before_the_stop(gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FakeProtocol.stage

    def stage(self: FakeProtocol, chunks: Iterable[bytes | memoryview]) -> Callable[[], None]:
        gpu.step("stage")
        return real(self, chunks)

    monkeypatch.setattr(FakeProtocol, "stage", stage)
    jobs.restore()
    assert gpu.calls == ["stage running", "stop", "write_state", "start"]


def test_a_restore_leaves_the_device_stopped(gpu: Gpu, jobs: Jobs) -> None:
    assert jobs.restore(start=False, memory=(), no_memory=True).state == "stop"
    assert gpu.calls == ["stop", "write_state"]
    assert gpu.left is None


def test_a_raw_state_is_restored_as_it_is(gpu: Gpu, jobs: Jobs) -> None:
    jobs.image.write_bytes(b"bare")
    jobs.restore(raw=True, memory=())
    assert gpu.state == b"bare"


def test_a_sync_ends_with_a_round_while_the_device_is_stopped(gpu: Gpu, jobs: Jobs) -> None:
    copy = jobs.directory / "copy"
    report = sync_dirty(NAME, str(copy), memory=jobs.maps, progress=lambda _: gpu.step("round"))
    assert gpu.calls == ["dirty", "dirty", "round running", "dirty", "round running", "stop", "dirty", "round stopped"]
    assert (report.state, report.pages_dirty, report.pages_written) == ("stop", 3, 3)
    expected = b"".join(content_of(page) if page in DIRTY else bytes(PAGE) for page in range(PAGES))
    assert copy.read_bytes() == expected
    assert gpu.left is None


def test_dirty_stops_and_notes_nothing(gpu: Gpu, tmp_path: Path) -> None:
    report = fetch_dirty(NAME, ranges=[PageRange(0, 4)], list_ranges=True)
    assert gpu.calls == ["dirty"]
    assert report.ranges == [(PAGE, 2 * PAGE)]
    assert not (tmp_path / "locks").exists()


@pytest.mark.parametrize(("job", "runs"), [("stop", False), ("start", True), ("reset", True)])
def test_a_command_is_one_request(gpu: Gpu, jobs: Jobs, job: str, *, runs: bool) -> None:
    gpu.running = job != "start"
    jobs.run(job)
    assert gpu.calls == [job]
    assert gpu.running == runs
    assert gpu.left is None
    assert gpu.commits == 1


@pytest.mark.parametrize("job", ["stop", "start", "save", "restore", "sync"])
def test_a_device_without_a_protocol_is_refused_by_what_takes_one(gpu: Gpu, jobs: Jobs, job: str) -> None:
    gpu.refusal = UnsupportedError("cannot be migrated: why", device=NAME)
    with pytest.raises(UnsupportedError, match=f"^{NAME}: cannot be migrated: why$"):
        jobs.run(job)
    assert gpu.calls == []
    assert jobs.files() == []


def test_a_device_without_a_protocol_is_reset_described_and_held(gpu: Gpu, jobs: Jobs) -> None:
    gpu.refusal = UnsupportedError("cannot be migrated: why", device=NAME, hint="do this")
    jobs.run("reset")
    assert gpu.calls == ["reset"]
    status = device_status(NAME)
    assert (status.state, status.protocol, status.migratable) == ("unknown", None, False)
    gpu.holder = None
    told: list[str | None] = []

    def ready(held: Session) -> None:
        told.append(held.protocol_name)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    hold_device(NAME, jobs.settings, ready=ready)
    assert told == [None]
    assert gpu.warnings == [f"{NAME}: cannot be migrated: why; do this; it is held all the same"]


def test_a_device_without_a_protocol_is_asked_by_what_its_holder_has_mapped(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tracker(HeldTracker):
        def start(self, ranges: object = ()) -> None:
            assert ranges == [(0, PAGES * PAGE)]
            with pytest.raises(DeviceBusyError, match="is at work on it"):
                DeviceLock(FOUND, "dirty")
            self._is_on = True

        def collect(self) -> None:
            assert self._is_on

        def take(self, start_page: int, nr_pages: int) -> memoryview:
            assert (start_page, nr_pages) == (0, PAGES)
            return memoryview(b"\x26\0")

        def stop(self) -> None:
            self._is_on = False

    tracker = Tracker(NAME, -1)
    gpu.refusal = UnsupportedError("cannot be migrated: why", device=NAME)
    monkeypatch.setattr(
        tracking, "find_tracker", lambda _, of_holder: tracker if of_holder else pytest.fail("not asked")
    )
    report = fetch_dirty(NAME, jobs.settings, memory=jobs.maps, list_ranges=True, log_time=0)
    assert report.ranges == [(PAGE, 2 * PAGE), (5 * PAGE, PAGE)]
    assert not tracker._is_on
    DeviceLock(FOUND, "dirty").close()

    def refuse(_: object, of_holder: bool) -> NoReturn:
        assert of_holder
        raise UnsupportedError("cannot be asked for its dirty pages: nobody knows", device=NAME, hint="ask elsewhere")

    monkeypatch.setattr(tracking, "find_tracker", refuse)
    with pytest.raises(UnsupportedError, match=r"cannot be migrated: why; it cannot be asked .* nobody knows"):
        fetch_dirty(NAME, jobs.settings, memory=jobs.maps)


def test_pinned_goes_with_neither_a_bare_state_nor_a_log(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a bare state has no pages; leave out --pinned or --raw"):
        save(NAME, str(tmp_path / "image"), jobs.settings, raw=True, pinned=True)
    with pytest.raises(UsageError, match="tells its dirty pages by itself; leave out --pinned"):
        save(NAME, str(tmp_path / "image"), jobs.settings, pinned=True)
    assert gpu.running
    assert not (tmp_path / "image").exists()

    class Nothing(HeldTracker):
        def start(self, ranges: object = ()) -> None: ...

    monkeypatch.setattr(tracking, "find_owners_tracker", lambda _: Nothing(NAME, -1))
    monkeypatch.setattr(FakeProtocol, "has_dirty", False)
    with pytest.raises(UsageError, match="with --pinned nothing is logged; leave out --for"):
        fetch_dirty(NAME, jobs.settings, pinned=True, log_time=1)


@pytest.mark.parametrize("job", ["stop", "start", "save", "restore", "sync"])
def test_what_would_end_with_the_job_is_refused(gpu: Gpu, jobs: Jobs, job: str) -> None:
    gpu.holder = None
    with pytest.raises(DeviceBusyError):
        jobs.run(job)
    assert gpu.calls == []


def test_a_device_that_nobody_holds_is_closed_and_nothing_noted(gpu: Gpu, jobs: Jobs, tmp_path: Path) -> None:
    gpu.holder = None
    assert jobs.save(open_closed=True).state == "closed"
    report = jobs.restore(open_closed=True)
    assert (report.state, report.warnings) == ("closed", [NOT_HELD])
    assert (tmp_path / f"locks/{NAME}.lock").read_bytes() == b""


@pytest.mark.parametrize("job", ["save", "restore", "sync", "stop", "start", "reset"])
def test_only_one_job_at_a_time_is_at_work_on_a_device(gpu: Gpu, jobs: Jobs, job: str) -> None:
    with DeviceLock(FOUND, "save") as lock:
        lock.take_over(gpu.holder)
        with pytest.raises(DeviceBusyError, match=rf"PID {os.getpid()} \('vfio-mig save'\)"):
            jobs.run(job)
    assert gpu.calls == []
    assert jobs.files() == []
    jobs.run(job)


def test_asking_is_allowed_during_a_job(gpu: Gpu, jobs: Jobs) -> None:
    with DeviceLock(FOUND, "save"):
        jobs.run("dirty")
        status = device_status(NAME)
    assert (status.state, status.holder_pid, status.protocol, status.left) == ("unknown", os.getpid(), "fake", None)
    assert status.job is not None
    assert device_status(NAME).job is None
    assert gpu.calls == ["dirty"]


# --- the promise


FAILURES: Final[dict[str, type[BaseException]]] = {
    "EIO": DeviceError,
    "ENOSPC": HostError,
    "sigint": KeyboardInterrupt,
    "sigterm": KeyboardInterrupt,
}
CHANGES: Final = ("stop", "write_state", "reset")


LOADED: Final = {"writing-pages", "after-pages", "after-state", "before-start", "after-start"}
"""Steps of a restore behind which the device is reset: guest memory, then it itself, may hold a part of the image."""


def assert_promise(gpu: Gpu, jobs: Jobs, *, loaded: bool) -> None:
    assert gpu.running
    assert gpu.state == (FRESH if loaded else OLD)
    assert gpu.calls.count("reset") == loaded
    assert jobs.files() == []
    assert gpu.left is None
    assert (jobs.directory.parent / f"locks/{NAME}.lock").read_bytes() == b""
    assert gpu.commits == 0
    jobs.assert_a_save_works()
    assert gpu.warnings == []


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    ("job", "step"),
    [
        (job, name)
        for job, names in STEPS.items()
        if job not in {"conform", "dirty", "migrate", "start"}
        for name in names
        if name != "loaded"  # where a migration waits for the source
    ],
)
def test_a_job_that_fails_at_a_point_leaves_what_was(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, *, job: str, step: str, failure: str
) -> None:
    monkeypatch.setenv(FAULT, f"{job}:{step}={failure}")
    with pytest.raises(FAILURES[failure]) as caught:
        jobs.run(job)
    monkeypatch.delenv(FAULT)
    if isinstance(caught.value, (DeviceError, HostError)):
        assert caught.value.problem.startswith(f"fault at {job}:{step}: {failure} ")
        assert caught.value.undo_errors == []
    if step in {"opened", "verified", "after-round", "before-stop"}:
        assert not set(gpu.calls) & {*CHANGES, "start"}
    assert_promise(gpu, jobs, loaded=job == "restore" and step in LOADED)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_that_fails_before_it_began_leaves_a_stopped_device(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    stop_device(NAME)
    monkeypatch.setenv(FAULT, f"start:opened={failure}")
    with pytest.raises(FAILURES[failure]):
        jobs.run("start")
    assert gpu.calls == ["stop"]
    monkeypatch.delenv(FAULT)
    jobs.run("start")
    assert gpu.running


REQUESTS: Final = [
    *[("save", request) for request in ("stop", "dirty", "read_state", "start")],
    *[("restore", request) for request in ("stop", "write_state", "start")],
    *[("sync", request) for request in ("dirty", "stop", "start")],
    ("stop", "stop"),
]


@pytest.mark.parametrize(("job", "request_name"), REQUESTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_job_whose_request_fails_leaves_what_was(
    gpu: Gpu, jobs: Jobs, job: str, request_name: str, when: str
) -> None:
    """*after* is a request that was carried out, and said to have failed."""
    error = DeviceError(f"{request_name} failed", device=NAME, errno=errno.EIO)
    getattr(gpu, when)[request_name] = raising(error)
    with pytest.raises(DeviceError) as caught:
        jobs.run(job)
    assert caught.value is error
    assert error.undo_errors == []
    assert_promise(gpu, jobs, loaded=job == "restore" and request_name != "stop")


@pytest.mark.parametrize(("job", "request_name"), REQUESTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_job_whose_request_is_interrupted_leaves_what_was(
    gpu: Gpu, jobs: Jobs, job: str, request_name: str, when: str
) -> None:
    getattr(gpu, when)[request_name] = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(job)
    assert_promise(gpu, jobs, loaded=job == "restore" and request_name != "stop")


@pytest.mark.parametrize("request_name", ["start", "reset"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_start_and_reset_are_done_in_spite_of_a_signal(gpu: Gpu, jobs: Jobs, request_name: str, when: str) -> None:
    gpu.running = request_name == "reset"
    getattr(gpu, when)[request_name] = lambda: signal.raise_signal(signal.SIGINT)
    jobs.run(request_name)
    assert gpu.running
    assert gpu.calls == [request_name]
    assert gpu.commits == 1


@pytest.mark.parametrize("job", ["save", "restore", "sync"])
def test_a_signal_while_undoing_waits_and_the_error_stays(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    monkeypatch.setenv(FAULT, f"{job}:after-stop=EIO")
    gpu.before["start"] = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(DeviceError, match="EIO"):
        jobs.run(job)
    monkeypatch.delenv(FAULT)
    interrupts.install()  # the process would have ended
    assert_promise(gpu, jobs, loaded=False)


@pytest.mark.parametrize(("job", "last"), [("save", "new.vfm"), ("sync", "copy")])
def test_a_signal_while_committing_comes_too_late(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, job: str, last: str
) -> None:
    real = os.link

    def link(*args: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        real(*args, **options)

    monkeypatch.setattr(os, "link", link)
    jobs.run(job)
    assert jobs.files() == [last]
    assert gpu.calls.count("start") == 1
    assert gpu.left is None
    assert gpu.commits == 1
    interrupts.check()


@pytest.mark.parametrize("job", ["save", "sync", "stop", "restore"])
def test_a_signal_between_the_steps_of_a_commit_comes_too_late(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    real = DeviceLock.journal

    def note(self: DeviceLock, effect: Effect) -> None:
        if not effect:
            signal.raise_signal(signal.SIGTERM)
        real(self, effect)

    monkeypatch.setattr(DeviceLock, "journal", note)
    jobs.run(job, leave_running=False)
    assert gpu.left is None
    assert gpu.commits == 1
    assert gpu.running == (job == "restore")


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("job", ["save", "sync"])
def test_a_file_that_cannot_be_committed_starts_the_device_again(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, job: str, call: str
) -> None:
    stopped: list[bool] = []

    def full(*_: object, **__: object) -> None:
        stopped.append(not gpu.running)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(HostError, match=r"/files/[a-z.]*: cannot .*: ENOSPC"):
        jobs.run(job, leave_running=False)
    monkeypatch.undo()
    assert stopped == [True]
    assert gpu.calls[-1] == "start"
    assert gpu.running
    assert jobs.files() == []


def test_a_state_that_could_not_be_restored_is_not_saved(gpu: Gpu, jobs: Jobs) -> None:
    gpu.protocol = GvtProtocol
    with pytest.raises(ImageError, match="HEAD record"):
        jobs.save()
    gpu.protocol = FakeProtocol
    assert_promise(gpu, jobs, loaded=False)


def test_an_existing_image_is_replaced_by_a_whole_one_only(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jobs.directory / "new.vfm"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists"):
        jobs.save()
    assert gpu.calls == []
    monkeypatch.setenv(FAULT, "save:written=EIO")
    with pytest.raises(DeviceError):
        jobs.save(force=True)
    assert path.read_bytes() == b"old"
    assert jobs.files() == ["new.vfm"]
    monkeypatch.delenv(FAULT)
    jobs.save(force=True)
    assert path.read_bytes()[:11] == b"header.json"
    assert jobs.files() == ["new.vfm"]


def test_a_sync_to_an_existing_file_writes_in_place(gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jobs.directory / "copy"
    path.write_bytes(b"\xee" * PAGE * PAGES)
    path.chmod(0o640)
    before = path.stat()
    monkeypatch.setenv(FAULT, "sync:after-round=ENOSPC")
    with pytest.raises(HostError, match="ENOSPC"):
        jobs.run("sync")
    assert gpu.calls == ["dirty", "dirty"]
    for fault in ("sync:copied=EIO", ""):
        content = path.read_bytes()
        assert [content[page * PAGE] for page in (0, 1, 2, 5)] == [0xEE, 0x81, 0x82, 0x85]
        assert len(content) == PAGE * PAGES
        assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
        assert gpu.running
        monkeypatch.setenv(FAULT, fault)
        if fault:
            with pytest.raises(DeviceError):
                jobs.run("sync")
    jobs.run("sync")
    assert path.stat().st_ino == before.st_ino
    assert jobs.files() == ["copy"]


# --- an undo that fails


@pytest.mark.parametrize("job", ["save", "sync", "restore", "stop"])
def test_a_job_that_cannot_start_the_device_again_says_so_and_leaves_a_note(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    monkeypatch.setenv(FAULT, f"{job}:after-stop=EIO")
    gpu.before["start"] = raising(DeviceError("START failed", device=NAME))
    with pytest.raises(DeviceError) as caught:
        jobs.run(job)
    monkeypatch.delenv(FAULT)
    assert str(caught.value) == (
        f"fault at {job}:after-stop: EIO (Input/output error); while rolling back: {NAME}: START failed"
    )
    assert not gpu.running
    assert jobs.files() == []
    left = Leftover(job, os.getpid(), STOPPED)
    assert gpu.left == left
    status = device_status(NAME)
    assert (status.left, status.repair) == (str(left), f"'vfio-mig start {NAME}' lets it go on")
    jobs.assert_a_save_works()
    assert gpu.warnings == [f"{NAME}: {left}"]


def test_an_interrupted_job_that_cannot_be_undone_says_so(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "stop:after-stop=sigterm")
    gpu.before["start"] = raising(DeviceError("START failed", device=NAME))
    with pytest.raises(KeyboardInterrupt) as caught:
        jobs.run("stop")
    assert caught.value.__notes__ == [f"while rolling back: {NAME}: START failed"]
    assert gpu.left == Leftover("stop", os.getpid(), STOPPED)


@pytest.mark.parametrize("repair", ["start", "reset", "restore", "save"])
def test_what_was_left_stopped_goes_on(gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, repair: str) -> None:
    monkeypatch.setenv(FAULT, "save:after-stop=EIO")
    gpu.before["start"] = raising(DeviceError("START failed"))
    with pytest.raises(DeviceError):
        jobs.save()
    monkeypatch.delenv(FAULT)
    jobs.run(repair)
    assert gpu.running
    assert gpu.left is None
    assert len(gpu.warnings) == 1


@pytest.fixture
def half_loaded(gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Leftover:
    """Have a restore fail of which nothing could be undone."""
    monkeypatch.setenv(FAULT, "restore:after-state=EIO")
    gpu.before["reset"] = raising(DeviceError("RESET failed", device=NAME))
    with pytest.raises(DeviceError, match=f"fault at restore:after-state.*while rolling back: {NAME}: RESET failed"):
        jobs.restore()
    monkeypatch.delenv(FAULT)
    assert not gpu.running
    gpu.calls.clear()
    return Leftover("restore", os.getpid(), LOADING)


@pytest.mark.parametrize("job", ["save", "start", "sync"])
def test_nobody_goes_on_from_a_half_loaded_device(gpu: Gpu, jobs: Jobs, half_loaded: Leftover, job: str) -> None:
    for _ in range(2):
        with pytest.raises(DeviceError) as caught:
            jobs.run(job)
        assert str(caught.value) == f"{NAME}: {half_loaded}; {half_loaded.repair(NAME)}"
        assert caught.value.exit_code == 5
    assert gpu.calls == []
    assert gpu.left == half_loaded
    assert jobs.files() == []


@pytest.mark.parametrize("repair", ["reset", "restore"])
def test_a_half_loaded_device_is_repaired(gpu: Gpu, jobs: Jobs, half_loaded: Leftover, repair: str) -> None:
    jobs.run(repair)
    assert gpu.calls == (["reset", "start"] if repair == "reset" else ["stop", "write_state", "start"])
    assert gpu.running
    assert gpu.left is None
    assert gpu.warnings == [f"{NAME}: {half_loaded}"]
    jobs.assert_a_save_works()


def test_a_stop_does_not_hide_that_a_device_is_half_loaded(gpu: Gpu, jobs: Jobs, half_loaded: Leftover) -> None:
    jobs.run("stop")
    assert gpu.left == half_loaded


@pytest.mark.parametrize(
    ("job", "step"), [("reset", "opened"), ("stop", "after-stop"), ("restore", "verified"), ("restore", "after-stop")]
)
@pytest.mark.parametrize("failure", ["EIO", "sigterm"])
def test_a_half_loaded_device_stays_one_when_its_repair_fails(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, half_loaded: Leftover, *, job: str, step: str, failure: str
) -> None:
    monkeypatch.setenv(FAULT, f"{job}:{step}={failure}")
    with pytest.raises(FAILURES[failure]):
        jobs.run(job)
    assert "start" not in gpu.calls
    assert not gpu.running
    assert gpu.left == half_loaded


def test_a_reset_that_cannot_start_the_device_leaves_a_stopped_one(gpu: Gpu, jobs: Jobs, half_loaded: Leftover) -> None:
    gpu.before["start"] = raising(DeviceError("START failed"))
    with pytest.raises(DeviceError, match="START failed"):
        jobs.run("reset")
    assert gpu.left == Leftover("reset", os.getpid(), STOPPED) != half_loaded
    jobs.run("start")
    assert gpu.running


def test_a_restore_whose_start_fails_ends_reset_and_running(gpu: Gpu, jobs: Jobs) -> None:
    gpu.before["start"] = raising(DeviceError("START failed", device=NAME))
    with pytest.raises(DeviceError) as caught:
        jobs.restore()
    assert str(caught.value) == f"{NAME}: START failed; guest memory has the image's pages already"
    assert gpu.calls == ["stop", "write_state", "start", "reset", "start"]
    assert_promise(gpu, jobs, loaded=True)


def test_somebody_else_s_device_is_restored_and_reset_by_force_only(
    gpu: Gpu, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.holder = Holder(os.getpid(), "qemu", is_hold=False, fd=3)
    for job in ("restore", "reset"):
        with pytest.raises(UsageError) as caught:
            jobs.run(job)
        assert f"PID {os.getpid()} (qemu)" in caught.value.problem
        assert "--force" in str(caught.value)
    assert gpu.calls == []
    monkeypatch.setenv(FAULT, "restore:after-state=EIO")
    with pytest.raises(DeviceError) as fault:
        jobs.restore(force=True)
    assert fault.value.undo_errors == []
    monkeypatch.delenv(FAULT)
    assert_promise(gpu, jobs, loaded=True)
    reset_device(NAME, force=True)
    assert gpu.calls[-1] == "reset"


# --- what can be refused is refused before the stop


def test_a_state_as_large_as_a_header_allows_is_saved_and_read_by_all(gpu: Gpu, jobs: Jobs) -> None:
    gpu.protocol = GvtProtocol
    low, high = (0, 512 << 20), (1 << 30, 2048 << 20)
    table = bytes((low[1] + high[1]) // PAGE * 8)
    gpu.state = gvt_image([(2, CFG), (4, SREG), (3, vreg(low, high)), (5, table)])
    assert len(gpu.state) > gvt.IMAGE_MAX
    save(NAME, str(jobs.image), force=True)
    assert gpu.calls == ["stop", "dirty", "read_state"]
    assert verify_image(str(jobs.image)).state_bytes == len(gpu.state)
    inspected = inspect_image(str(jobs.image))
    assert isinstance(inspected, InspectReport)
    assert (inspected.layout, inspected.problems) == ("gvt-rfc", [])
    assert diff_images(str(jobs.image), str(jobs.image)).equal


def test_the_target_of_a_migration_refuses_a_guest_s_device_before_it_asks_for_the_image(gpu: Gpu) -> None:
    gpu.holder = Holder(os.getpid(), "qemu", is_hold=False, fd=3)
    steps: list[str] = []
    with pytest.raises(UsageError, match="would change the device under"):
        restore_all([(NAME, "-")], Settings(on_step=lambda _, step, __: steps.append(step)), await_verdict=True)
    assert steps == []


@pytest.mark.parametrize(("command", "words"), [("no-such-program x", "ENOENT"), ("/etc/passwd", "EACCES")])
def test_a_hook_that_cannot_run_is_refused_before_the_job(command: str, words: str) -> None:
    with pytest.raises(HostError, match=f"hook post-stop: cannot run {command.split(maxsplit=1)[0]}: {words}"):
        Hooks([f"post-stop={command}"])


# --- what does not fit


MISFITS: Final[dict[str, tuple[bytes, str]]] = {
    "protocol": (image_of(head=header(protocol="other")), "protocol: 'other' in the image, 'fake' here"),
    "type": (image_of(head=header(device={"type": "i915-GVTg_V4_4"})), "device-type: 'i915-GVTg_V4_4'"),
    "no device": (image_of(head=header(device=["x"])), "device-type: None in the image"),
    "machine": (image_of(head=header(machine="s390x")), "machine: 's390x'"),
    "size": (image_of(bytes(1001)), "state-size: 1001 bytes, the device takes 1000"),
    "memory": (image_of(pages=(3, PAGES)), "bytes of memory at"),
    "cut": (image_of()[:-1], "cut off"),
    "damaged": (image_of().replace(SAVED, SAVED[::-1]), "state/0000: differs"),
    "no archive": (b"bare state", "cut off"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", MISFITS)
def test_an_image_that_does_not_fit_changes_nothing(gpu: Gpu, jobs: Jobs, what: str, *, force: bool) -> None:
    content, words = MISFITS[what]
    jobs.image.write_bytes(content)
    before = jobs.memory.read_bytes()
    with pytest.raises(ImageError) as caught:
        jobs.restore(force=force)
    assert words in str(caught.value)
    assert caught.value.exit_code == 6
    assert gpu.calls == []
    assert jobs.memory.read_bytes() == before
    assert gpu.left is None


def test_every_mismatch_is_counted_and_the_first_one_named(jobs: Jobs) -> None:
    jobs.image.write_bytes(image_of(head=header(protocol="other", machine="s390x", device={})))
    with pytest.raises(MismatchError) as caught:
        jobs.restore()
    assert caught.value.problem.startswith("the image does not fit: protocol: ")
    assert caught.value.problem.endswith(" (and 2 more)")
    jobs.image.write_bytes(image_of(head=header(machine="s390x", device={})))
    with pytest.raises(MismatchError, match=r" \(and 1 more\)"):
        jobs.restore()
    jobs.image.write_bytes(image_of(head=header(machine="s390x")))
    with pytest.raises(MismatchError) as caught:
        jobs.restore()
    assert "more" not in caught.value.problem
    assert caught.value.hint == "see 'vfio-mig check'"


def test_force_goes_on_over_what_may_be_forced_only(gpu: Gpu, jobs: Jobs) -> None:
    gpu.protocol = GvtProtocol
    head = header(protocol="gvt-rfc", device={"type": "other"})
    jobs.image.write_bytes(image_of(head={**head, "machine": "s390x"}))
    with pytest.raises(MismatchError) as caught:
        jobs.restore(force=True, verify_state=False)
    assert caught.value.problem.startswith("the image does not fit: machine: ")
    jobs.image.write_bytes(image_of(head=head))
    with pytest.raises(MismatchError) as caught:
        jobs.restore(verify_state=False)
    assert caught.value.hint == "--force goes on all the same"
    assert gpu.calls == []
    report = jobs.restore(force=True, verify_state=False)
    assert gpu.state == SAVED
    assert report.warnings == [
        UNVERIFIED,
        f"forced over a mismatch: device-type: 'other' in the image, '{FOUND.type}' here",
    ]


def test_an_unverified_state_is_loaded_with_a_warning(gpu: Gpu, jobs: Jobs) -> None:
    gpu.protocol = GvtProtocol
    jobs.image.write_bytes(image_of(head=header(protocol="gvt-rfc")))
    with pytest.raises(MismatchError, match="does not fit: state: HEAD record"):
        jobs.restore()
    assert gpu.calls == []
    assert jobs.restore(verify_state=False).warnings == [UNVERIFIED]
    assert gpu.state == SAVED


class Progress:
    """What is told of a copy: how many bytes are to come, and each step."""

    def __init__(self) -> None:
        self.done = 0
        self.left: list[int] = []

    def expect(self, size: int) -> None:
        self.left.append(size)

    def __call__(self, size: int) -> None:
        self.done += size


def test_every_copy_tells_how_many_bytes_are_to_come_and_then_of_each(gpu: Gpu, jobs: Jobs) -> None:
    saved, synced, restored = Progress(), Progress(), Progress()
    jobs.save(live=Live(progress=saved))
    assert saved.left == [saved.done]
    assert saved.done > 0
    copy = str(jobs.directory / "copy")
    sync_dirty(NAME, copy, jobs.settings, memory=jobs.maps, rounds=0, leave_running=True, copied=synced)
    assert (synced.left, synced.done) == ([saved.done], saved.done)
    report = jobs.restore(progress=restored)
    assert restored.left == [restored.done]
    assert restored.done == report.state_bytes + report.pages_written * PAGE
    assert gpu.state == SAVED
