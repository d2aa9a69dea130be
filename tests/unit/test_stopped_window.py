# SPDX-License-Identifier: MIT
"""What a stopped device does not wait for, on devices that a file plays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tools.bench.played import Played, play
from tools.fuzz.corpus import good_image
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.host import lock
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.engine import job as jobs
from vfio_mig.jobs.engine import session as sessions
from vfio_mig.jobs.engine.dirtylog import DirtyLog
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.jobs.engine.state import StateReader
from vfio_mig.jobs.restore import restore_all
from vfio_mig.jobs.save import save
from vfio_mig.protocols.gvt_rfc import DIRTY_PAGES_MAX, GvtRfc
from vfio_mig.protocols.mainline_v2 import MainlineV2
from vfio_mig.uapi import v2
from vfio_mig.uapi.profile import DEFAULT_PROFILE

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_mig.uapi import Request

pytestmark = pytest.mark.filterwarnings("ignore::vfio_mig.errors.VfioMigWarning")


class Counted(Played):
    """Remembers the requests that the kernel gets."""

    requests: list[str]

    def call(self, request: Request, arg: Any = 0) -> int:
        flags = int.from_bytes(arg[4:8], "little")
        self.requests.append("set" if flags & v2.SET else "get" if flags & v2.GET else "probe")
        return super().call(request, arg)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a file that plays devices."""
    for module, name in ((jobs, "open_session"), (sessions, "survey"), (sessions, "require_holder")):
        monkeypatch.setattr(module, name, getattr(module, name))  # what play() replaces comes back
    monkeypatch.setenv(lock.VARIABLE, str(tmp_path / "locks"))
    file = tmp_path / "state"
    file.write_bytes(bytes(range(256)) * 4096)
    return file


@pytest.fixture
def device(state: Path) -> Counted:
    """Have a device that counts."""
    device = Counted("played", state)
    device.requests = []
    return device


def test_the_kernel_is_asked_no_more_than_it_must_be(device: Counted) -> None:
    protocol = MainlineV2(device, v2.STOP_COPY_FLAG)
    protocol.prepare()
    device.requests.clear()
    protocol.stop()
    assert sum(map(len, protocol.read_chunks())) == 1 << 20
    protocol.start()
    # Each state is looked at once before it is left; STOP_COPY and RESUMING come with what they are for
    assert device.requests == ["get", "set", "set", "get", "set", "get", "set"]
    protocol.stop()
    device.requests.clear()
    protocol.write_state(memoryview(b"state"))
    assert device.requests == ["set", "get", "set"]
    device.close()


def test_a_device_that_logs_is_not_asked_for_a_log_that_nobody_has_begun(state: Path) -> None:
    play(MainlineV2.name, state)
    with Job("save") as job:
        session = job.open("played")
        log = DirtyLog(session, [PageRange(0, 1)])
        assert not log.is_snapshot
        assert "has_dirty" not in vars(session.protocol)


def test_the_note_that_all_is_well_is_written_when_the_device_runs(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk, or a slow interpreter, is not among what it waits for."""
    import time

    real = lock.DeviceLock.journal

    def slow(self: lock.DeviceLock, effect: Any) -> None:
        if not effect:
            time.sleep(0.5)
        real(self, effect)

    monkeypatch.setattr(lock.DeviceLock, "journal", slow)
    play(MainlineV2.name, state)
    report = save("played", str(tmp_path / "image"), leave_running=True)
    assert report.stopped_time < 0.5
    assert report.start_time < 0.5


def test_a_note_says_the_same_at_every_step(state: Path, tmp_path: Path) -> None:
    play(MainlineV2.name, state)
    seen = []
    with Job("save") as job:
        session = job.open("played")
        for step in ("opened", "before-stop"):
            job.step(step, session)
            seen.append(json.loads((tmp_path / "locks/played.lock").read_bytes()))
    assert [one.pop("step") for one in seen] == ["opened", "before-stop"]
    assert seen[0] == seen[1]
    assert seen[0]["job"] == "save"


@pytest.fixture
def region(state: Path) -> Path:
    """Have a file that plays vGPUs of the RFC."""
    state.write_bytes(good_image().ljust(DEFAULT_PROFILE.image_max, b"\0"))
    play(GvtRfc.name, state)
    return state


@pytest.mark.usefixtures("region")
def test_a_state_is_on_its_way_before_it_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads it meanwhile has the same to do, and the end of the image is not there yet."""
    order = []
    write_rest, parse, finish = StateReader.write_rest, GvtRfc.parse_state, ArchiveWriter.finish

    def written(self: StateReader, dirty: Any) -> None:
        write_rest(self, dirty)
        order.append("written")

    def judged(state: memoryview) -> Any:
        order.append("judged")
        return parse(state)

    def finished(self: ArchiveWriter, statistics: Any = None) -> Any:
        order.append("finished")
        return finish(self, statistics)

    monkeypatch.setattr(StateReader, "write_rest", written)
    monkeypatch.setattr(GvtRfc, "parse_state", staticmethod(judged))
    monkeypatch.setattr(ArchiveWriter, "finish", finished)
    save("played", str(tmp_path / "image"))
    assert order == ["written", "judged", "finished"]


@pytest.mark.usefixtures("region")
def test_a_target_has_its_memory_before_it_says_that_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does later, its sender's device stands still for."""
    image = tmp_path / "image"
    save("played", str(image))
    order: list[str] = []
    prepare = GvtRfc.prepare

    def prepared(self: GvtRfc) -> None:
        order.append("prepared")
        prepare(self)

    monkeypatch.setattr(GvtRfc, "prepare", prepared)
    monkeypatch.setattr("vfio_mig.jobs.restore.open_input", lambda _: image.open("rb"))
    settings = Settings(on_step=lambda _job, step, _device: order.append(step))
    restore_all([("played", "-")], settings, await_verdict=True)
    assert order.index("prepared") < order.index("waiting") < order.index("loaded")


def test_a_bitmap_has_its_memory_before_the_stop(region: Path) -> None:
    device = Played("played", region)
    protocol = GvtRfc(device, DEFAULT_PROFILE, device.region(DEFAULT_PROFILE.state_index))
    protocol.prepare()
    there = protocol._request
    assert protocol.dirty(0, DIRTY_PAGES_MAX).obj is there
    device.close()
