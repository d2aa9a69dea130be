# SPDX-License-Identifier: MIT
"""Moving devices: `migrate`, live copying, several devices as one job, events and hooks."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.lab import cli
from tools.lab.imports import stopped_window
from tools.lab.sample import gpu, host
from tools.lab.sample.held import Side, guest_view, queue_one, run_some_work, side
from vfio_mig.image.archive import read_archive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.kernel.log import KernelLog

pytestmark = pytest.mark.slow  # what is sent when is the program's, not the kernel's

CUTS = 20


@pytest.fixture(scope="module")
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """As everywhere, but the vGPUs stay for the next test."""
    kernel_log.new()
    yield
    assert kernel_log.complaints() == []


@pytest.fixture(scope="module")
def held_source(shm: Path) -> Iterator[Side]:
    with side(shm / "source.mem") as made:
        yield made


@pytest.fixture(scope="module")
def held_target(shm: Path) -> Iterator[Side]:
    with side(shm / "target.mem") as made:
        yield made


def fresh(made: Side) -> Side:
    """Have a device that runs, with a state of its own: one whose state was moved away is refused."""
    cli.run("-q", "reset", made.name, warm=True)
    made.guest.device.start()
    return made


@pytest.fixture
def source(held_source: Side) -> Side:
    return fresh(held_source)


@pytest.fixture
def target(held_target: Side) -> Side:
    held_target.memory.bytes[:] = bytes(held_target.memory.size)
    return fresh(held_target)


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def move(source: Side, target: str, *options: str) -> Any:
    return js("migrate", source.name, target, *options)


def with_memory(source: Side, target: Side) -> tuple[str, ...]:
    return ("--memory", source.memory_option, "--target-memory", target.memory_option)


@pytest.mark.core
def test_migrate_moves_state_memory_and_queued_work_and_starts_the_target(source: Side, target: Side) -> None:
    engine = gpu.Engine(source.guest)
    work = run_some_work(source.guest, engine, 4)
    source.guest.device.stop()
    queued = queue_one(source.guest, engine)
    view = guest_view(source.guest.device)
    before = target.instance.counters()
    report = move(source, target.name, *with_memory(source, target))
    gpu.wait_ended(target.guest, before, 1)
    assert (report["state"], report["target_state"]) == ("stop", "running")
    assert source.instance.run_state() == "stopped"
    assert target.instance.run_state() == "running"
    assert work.done_in(target.memory) == len(work)
    assert queued.done_in(target.memory) == 1
    assert queued.done_in(source.memory) == 0
    assert guest_view(target.guest.device) == view
    phases = [report[f"{name}_time"] for name in ("stop", "bitmap", "state_read", "transfer", "start")]
    assert sum(phases) == pytest.approx(report["downtime"])
    assert min(phases) >= 0
    assert report["pages_sent"] + report["pages_zero"] == report["pages_dirty"] == len(source.instance.pinned())
    assert report["pages_written"] == report["pages_dirty"]
    state = js("status", source.name)
    assert "its state was moved to another device" in state["left"]
    assert (state["moved"], js("status", target.name)["moved"]) == (True, False)
    for words in (
        ("start", source.name),
        ("save", source.name, "/dev/shm/x.vfm"),
        ("migrate", source.name, target.name),
    ):
        cli.refused(*words, code=5, words=("was moved to another device", "--force"), warm=True)
    assert target.instance.run_state() == "running"


def test_pages_that_were_copied_live_are_not_sent_again(source: Side, target: Side) -> None:
    run_some_work(source.guest, gpu.Engine(source.guest), 4)
    report = move(source, target.name, *with_memory(source, target), "--rounds", "5", "--no-start")
    assert target.instance.run_state() == "stopped"
    assert report["target_state"] == "stop"
    rounds = report["rounds"]
    assert [one["stopped"] for one in rounds] == [False, False, True]
    assert rounds[0]["pages_unchanged"] == 0
    for one in rounds[1:]:  # pinned, hence dirty for ever, and the guest has done nothing meanwhile
        assert one["pages_unchanged"] == one["pages_dirty"] == len(source.instance.pinned())
        assert one["pages_written"] == 0
    for at in source.instance.pinned():
        assert target.memory.read(at, 4096) == source.memory.read(at, 4096)


def connection(directory: Path, cut: int | None) -> Path:
    """Stand in for ssh: run the command line here, and cut what is sent to a restore after so many bytes."""
    path = directory / "rsh"
    head = "" if cut is None else f"stdbuf -o0 head -c {cut} | "  # a buffer would keep what a connection does not
    path.write_text(f'#!/bin/bash\nshift\ncase "$*" in *" restore "*) {head}bash -c "$*" ;; *) bash -c "$*" ;; esac\n')
    path.chmod(0o700)
    return path


def test_migrate_reaches_another_host_through_a_command(source: Side, target: Side, tmp_path: Path) -> None:
    rsh = connection(tmp_path, None)
    report = move(source, f"ssh://other/{target.name}", "--rsh", str(rsh))
    assert report["target"] == f"ssh://other/{target.name}"
    assert (source.instance.run_state(), target.instance.run_state()) == ("stopped", "running")


def test_what_can_be_imported_before_the_stop_is_imported_before_it(source: Side, target: Side, tmp_path: Path) -> None:
    """On both sides, each of which is a new process here."""
    assert stopped_window(tmp_path, source.name, target.name, *with_memory(source, target)) == ([], [])


def stream_size(source: Side, directory: Path) -> int:
    path = directory / "size.vfm"
    cli.run("-q", "save", source.name, path, "--leave-running", "--memory", source.memory_option, warm=True)
    size = path.stat().st_size
    path.unlink()
    return size


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.variant)], ids=["some", "all"])
def test_a_connection_cut_at_any_byte_leaves_the_source_running(
    source: Side, target: Side, tmp_path: Path, *, some: bool
) -> None:
    run_some_work(source.guest, gpu.Engine(source.guest), 2)
    size = stream_size(source, tmp_path)
    view = guest_view(target.guest.device)
    # The manifest is shorter than the save's, but not by so much
    cuts = [0, 1, 511, 512, 513, size - 3000, *range(size // (CUTS - 5), size - 3000, size // (CUTS - 5))]
    assert len(cuts) == CUTS
    for cut in cuts[::5] if some else cuts:
        writes = target.instance.counters()["state_write"]
        rsh = connection(tmp_path, cut)
        arguments = ["migrate", source.name, f"ssh://other/{target.name}", "--rsh", str(rsh)]
        done = cli.run(*arguments, *with_memory(source, target), rc=None, warm=True)
        text = done.stderr.decode()
        assert done.returncode in {6, 7}, f"{cut}: {done.returncode} {text}"
        assert len(text.splitlines()) == 1
        assert source.instance.run_state() == "running", cut
        assert target.instance.run_state() == "running", cut
        assert target.instance.counters()["state_write"] == writes, cut
    assert guest_view(target.guest.device) == view


@pytest.mark.parametrize(
    ("point", "action"),
    [
        pytest.param("after-stop", "EIO", marks=pytest.mark.variant),
        ("after-state", "sigterm"),
        ("sent", "EIO"),
        pytest.param("restored", "EIO", marks=pytest.mark.variant),
    ],
)
def test_a_migration_that_fails_before_the_target_has_all_leaves_the_source_running(
    source: Side, target: Side, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    monkeypatch.setenv("VFIO_MIG_FAULT", f"migrate:{point}={action}")
    cli.refused("migrate", source.name, target.name, code=5 if action == "EIO" else 130, warm=True)
    assert source.instance.run_state() == "running"
    # the source may fail once more when the target has all: it is left loaded and stopped, never run
    assert target.instance.run_state() == ("stopped" if point == "restored" else "running")
    monkeypatch.delenv("VFIO_MIG_FAULT")
    move(source, target.name)
    assert target.instance.run_state() == "running"


def test_a_target_that_refuses_to_start_leaves_both_stopped_and_says_so(source: Side, target: Side) -> None:
    (target.instance.debugfs / "fault").write_text("start 1 errno 16")
    text = cli.refused("migrate", source.name, target.name, code=5, words=("EBUSY", "never both"), warm=True)
    assert target.name in text
    assert (source.instance.run_state(), target.instance.run_state()) == ("stopped", "stopped")
    cli.refused("start", source.name, code=5, words=("was moved", "--force"), warm=True)
    assert source.instance.run_state() == "stopped"
    cli.run("start", "--force", source.name, warm=True)
    assert source.instance.run_state() == "running"
    assert js("status", source.name)["left"] is None


def test_pages_are_moved_or_it_is_said_that_they_are_not(source: Side, target: Side) -> None:
    run_some_work(source.guest, gpu.Engine(source.guest), 2)
    words = ("migrate", source.name, target.name, "--memory", source.memory_option)
    cli.refused(*words, code=2, words=("no place to go to", "--no-memory"), warm=True)
    assert source.instance.run_state() == "running"
    report = js(*words, "--no-memory")
    assert (report["pages_sent"], report["pages_written"], report["memory"]) == (0, 0, "none")
    assert not any(target.memory.bytes[:])


def test_what_cannot_work_is_refused_before_the_stop(source: Side, tmp_path: Path) -> None:
    stops = source.instance.counters()["status_set"]
    with host.instance() as closed, host.instance("GVTg_V4_4") as other:
        cli.refused("migrate", source.name, closed.uuid, code=3, words=("nobody has it open", "hold"), warm=True)
        with cli.held(other.uuid):
            cli.refused("migrate", source.name, other.uuid, code=6, words=("GVTg_V4_4",), warm=True)
    missing = "00000000-0000-4000-8000-000000000000"
    cli.refused("migrate", source.name, missing, code=3, words=("no such mdev",), warm=True)
    cli.refused("migrate", source.name, "ssh://-oProxyCommand=x/y", code=2, words=("ssh://",), warm=True)
    unreachable = str(tmp_path / "none")
    cli.refused("migrate", source.name, "ssh://h/y", "--rsh", unreachable, code=7, words=("ENOENT",), warm=True)
    assert source.instance.counters()["status_set"] == stops


def test_several_devices_are_one_job(source: Side, target: Side, tmp_path: Path) -> None:
    pairs = [f"{one.name}={tmp_path}/{number}.vfm" for number, one in enumerate((source, target))]
    source.guest.device.set_fence(1, 0x00100001, 0x001FF003)
    views = [guest_view(one.guest.device) for one in (source, target)]
    reports = js("save", *pairs)
    assert [report["device"] for report in reports] == [source.name, target.name]
    assert [one.instance.run_state() for one in (source, target)] == ["stopped", "stopped"]
    crossed = [f"{source.name}={tmp_path}/1.vfm", f"{target.name}={tmp_path}/0.vfm"]
    js("restore", *crossed, "--start")
    assert [one.instance.run_state() for one in (source, target)] == ["running", "running"]
    assert [guest_view(one.guest.device) for one in (target, source)] == views
    cli.run("-q", "stop", source.name, target.name, warm=True)
    assert [one.instance.run_state() for one in (source, target)] == ["stopped", "stopped"]
    cli.run("-q", "start", source.name, target.name, warm=True)
    assert [one.instance.run_state() for one in (source, target)] == ["running", "running"]


@pytest.mark.parametrize("rule", ["stop 1 errno 5", "state_read 1 errno 5"])
@pytest.mark.parametrize("job", ["save", "stop"])
def test_when_one_of_several_devices_fails_all_run_and_no_file_is_left(
    source: Side, target: Side, tmp_path: Path, job: str, rule: str
) -> None:
    if (job, rule) == ("stop", "state_read 1 errno 5"):
        rule = "stop 1 after 5"
    (target.instance.debugfs / "fault").write_text(rule)
    names = [source.name, target.name]
    words = [f"{name}={tmp_path}/{name}" for name in names] if job == "save" else names
    cli.refused(job, *words, code=5, words=(target.name,), warm=True)
    assert [one.instance.run_state() for one in (source, target)] == ["running", "running"]
    assert list(tmp_path.iterdir()) == []


def test_a_bad_image_of_one_device_leaves_all_untouched(source: Side, target: Side, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    cli.run("-q", "save", source.name, good, "--leave-running", warm=True)
    bad.write_bytes(good.read_bytes()[:-2000])
    stops = [one.instance.counters()["status_set"] for one in (source, target)]
    cli.refused("restore", f"{source.name}={good}", f"{target.name}={bad}", code=6, words=("cut off",), warm=True)
    assert [one.instance.counters()["status_set"] for one in (source, target)] == stops


def test_a_live_save_holds_each_page_as_it_was_at_the_end(source: Side, tmp_path: Path) -> None:
    work = run_some_work(source.guest, gpu.Engine(source.guest), 4)
    image = tmp_path / "gpu.vfm"
    report = js("save", source.name, image, "--memory", source.memory_option, "--max-downtime", "60000")
    assert [one["stopped"] for one in report["rounds"]] == [False, True]
    assert report["rounds"][0]["estimated_downtime"] < 60
    with image.open("rb") as file, read_archive(file) as archive:
        pages: dict[int, bytes] = {}
        for gpa, size, content in archive.memory():
            for at in range(0, size, 4096):
                pages[gpa + at] = bytes(4096) if content is None else bytes(content[at : at + 4096])
    assert sorted(pages) == source.instance.pinned()
    assert all(pages[at] == source.memory.read(at, 4096) for at in pages)
    assert sum(pages[iova & ~0xFFF][iova & 0xFFF :][:4] == value.to_bytes(4, "little") for iova, value in work) == 4


def test_events_and_hooks_follow_a_job(source: Side, tmp_path: Path) -> None:
    events, seen = tmp_path / "events", tmp_path / "seen"
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$VFIO_MIG_JOB $VFIO_MIG_STEP $VFIO_MIG_DEVICE $1" >>{seen}\n')
    hook.chmod(0o700)
    words = ["--events", str(events), "--hook", f"pre-stop={hook} a", "--hook", f"post-start={hook} 'b c'"]
    cli.run(*words, "-q", "save", source.name, tmp_path / "x.vfm", "--leave-running", warm=True)
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["step"] for line in lines] == [
        "opened", "after-live", "before-stop", "after-stop", "after-dirty", "after-pages", "after-state",
        "before-start", "after-start", "written", "done",
    ]  # fmt: skip
    assert all(line["device"] == source.name and line["job"] == "save" for line in lines[:-1])
    assert lines[-1]["code"] == 0
    assert [one["time"] for one in lines] == sorted(one["time"] for one in lines)
    assert stat.S_IMODE(events.stat().st_mode) == 0o600
    assert seen.read_text() == f"save pre-stop {source.name} a\nsave post-start {source.name} b c\n"


@pytest.mark.core
def test_a_hook_that_fails_rolls_the_job_back_and_the_event_says_so(source: Side, tmp_path: Path) -> None:
    events = tmp_path / "events"
    image = tmp_path / "x.vfm"
    words = ["--events", str(events), "--hook", "post-stop=false"]
    cli.refused(
        *words, "save", source.name, image, code=7, words=("hook post-stop: false ended with status 1",), warm=True
    )
    assert source.instance.run_state() == "running"
    assert not image.exists()
    last = json.loads(events.read_text().splitlines()[-1])
    assert (last["step"], last["code"]) == ("failed", 7)
    for bad in ("nonsense=true", "post-stop=", "post-stop=a 'b", "after-dirty=true", "pre-start=true"):
        cli.refused("--hook", bad, "stop", source.name, code=2, words=("hook",), warm=True)
    os.mkfifo(tmp_path / "fifo")  # without a reader
    cli.refused("--events", str(tmp_path / "fifo"), "stop", source.name, code=7, words=("ENXIO",), warm=True)
