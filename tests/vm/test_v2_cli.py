# SPDX-License-Identifier: MIT
"""The installed `vfio-mig` on the sample driver's v2 migration: live saves, P2P, DMA logging, states of any size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli, waiting
from tools.lab.sample import gpu, held, host
from tools.lab.vfio.v2 import HAS_PRE_COPY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.lab.sample.held import Side

pre_copy = pytest.mark.skipif(not HAS_PRE_COPY, reason="PRE_COPY is of Linux 6.2")
MIB: Final = 1 << 20
EXTRA: Final = 4 * MIB
REGISTER: Final = 0x5000
PARTS: Final = "stop-copy, p2p, pre-copy" if HAS_PRE_COPY else "stop-copy, p2p"
RESIDENT_MAX: Final = 64 * MIB


@pytest.fixture(scope="module", autouse=True)
def v2_driver() -> Iterator[None]:
    if not host.module_loaded():  # not in the VM: every test says so
        yield
        return
    with host.loaded(v2=7, migratable=0):
        yield


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def set_knob(side: Side, name: str, value: int) -> None:
    (side.instance.debugfs / name).write_text(str(value))


def state(side: Side) -> str:
    return side.instance.words("v2_state").strip()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Side]:
    with held.side(tmp_path / "source.mem") as side:
        yield side


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Side]:
    with held.side(tmp_path / "target.mem") as side:
        yield side


@pytest.fixture
def has_log(source: Side) -> bool:
    return "dma-logging" in js("info", source.name)["checks"][0]["text"]


def test_info_names_the_parts_that_the_device_has(source: Side, *, has_log: bool) -> None:
    info = js("info", source.name)
    assert info["protocol"] == "mainline-v2"
    assert info["checks"][0]["text"] == f"mainline-v2 ({PARTS}{', dma-logging' if has_log else ''})"


@pre_copy
def test_a_live_save_reads_all_but_the_rest_while_the_device_runs(source: Side, target: Side, tmp_path: Path) -> None:
    set_knob(source, "v2_extra_bytes", EXTRA)
    source.guest.device.set_reg(REGISTER, 0x1234)
    image = tmp_path / "image"
    report = js("save", source.name, image, "--live", "--max-downtime", "10000")
    assert report["precopy_bytes"] > EXTRA
    assert report["state_bytes"] > report["precopy_bytes"]
    first = report["state_rounds"][0]
    assert (first["bytes_read"], first["initial_bytes"]) == (report["precopy_bytes"], 0)
    assert 0 < first["rest_bytes"] < report["state_bytes"]
    assert (report["state"], state(source)) == ("stop", "stop")
    js("restore", target.name, image, "--start")
    assert target.guest.device.reg(REGISTER) == 0x1234
    assert state(target) == "running"


@pre_copy
def test_rounds_end_when_the_state_does_not_become_less_and_the_user_is_told(
    source: Side, target: Side, tmp_path: Path
) -> None:
    set_knob(source, "v2_extra_bytes", EXTRA)
    set_knob(source, "v2_dirty_rate", 1 << 40)  # all of it, all the time
    image = tmp_path / "image"
    done = cli.run("--json", "-v", "save", source.name, image, "--live", "--max-downtime", "0", warm=True)
    report = json.loads(done.stdout)
    assert 2 <= len(report["state_rounds"]) < 30
    assert report["precopy_bytes"] > EXTRA
    assert b"further rounds bring nothing" in done.stderr
    assert b"state (running): " in done.stderr
    set_knob(source, "v2_dirty_rate", 0)
    js("start", source.name)
    js("restore", target.name, image)
    assert state(target) == "stop"


@pre_copy
def test_new_initial_data_is_read_before_the_stop_however_long_that_may_take(
    source: Side, target: Side, tmp_path: Path
) -> None:
    set_knob(source, "v2_extra_bytes", EXTRA)
    set_knob(source, "v2_reinit", MIB)
    image = tmp_path / "image"
    report = js("save", source.name, image, "--live", "--max-downtime", "100000")
    first, second = report["state_rounds"]
    assert (first["initial_bytes"], second["initial_bytes"]) == (MIB, 0)
    assert second["bytes_read"] == MIB
    js("restore", target.name, image)


@pre_copy
def test_a_device_that_stands_still_is_not_made_to_run_by_a_live_save(source: Side, tmp_path: Path) -> None:
    js("state", source.name, "stop")
    done = cli.run("--json", "save", source.name, tmp_path / "image", "--live", warm=True)
    assert b"does not run" in done.stderr
    assert json.loads(done.stdout)["precopy_bytes"] == 0
    assert state(source) == "stop"


@pre_copy
@pytest.mark.parametrize("fault", ["after-live=EIO", "after-live=sigterm", "after-stop=ENOSPC", "after-state=EIO"])
def test_a_live_save_that_fails_leaves_the_device_running_and_no_file(
    source: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    set_knob(source, "v2_extra_bytes", MIB)
    monkeypatch.setenv("VFIO_MIG_FAULT", f"save:{fault}")
    before = sorted(tmp_path.iterdir())
    cli.run("save", source.name, tmp_path / "image", "--live", rc=None, warm=True)
    assert state(source) == "running"
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.delenv("VFIO_MIG_FAULT")
    assert js("save", source.name, tmp_path / "image", "--live", "--leave-running")["state"] == "running"


@pre_copy
@pytest.mark.parametrize("point", ["after-live", "after-stop"])
def test_what_a_killed_live_save_leaves_is_told_and_the_next_command_goes_on_from_there(
    source: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    for repair in ("start", "save"):
        monkeypatch.setenv("VFIO_MIG_FAULT", f"save:{point}=kill")
        cli.run("save", source.name, tmp_path / "image", "--live", rc=-9, warm=True)
        monkeypatch.delenv("VFIO_MIG_FAULT")
        assert state(source) == {"after-live": "pre-copy", "after-stop": "stop-copy"}[point]
        status = js("status", source.name)
        assert "did not come to its end" in status["left"]
        assert f"vfio-mig start {source.name}" in status["repair"]
        words = ["start", source.name] if repair == "start" else ["save", source.name, tmp_path / "again"]
        assert b"did not come to its end" in cli.run(*words, warm=True).stderr
        assert state(source) == {"start": "running", "save": "stop"}[repair]
        js("start", source.name)


@pre_copy
def test_without_precopy_there_is_nothing_to_read_live(tmp_path: Path) -> None:
    with host.parameter_set("v2", 3), held.side(tmp_path / "memory") as side:
        text = cli.refused("save", side.name, tmp_path / "image", "--live", code=4, words=("PRE_COPY",), warm=True)
        assert "leave out --live" in text
        assert state(side) == "running"


@pre_copy
def test_migrate_live(source: Side, target: Side) -> None:
    set_knob(source, "v2_extra_bytes", EXTRA)
    source.guest.device.set_reg(REGISTER, 0x77)
    report = js("migrate", source.name, target.name, "--live", "--max-downtime", "5000")
    assert report["precopy_bytes"] > EXTRA
    assert (state(source), state(target)) == ("stop", "running")
    assert target.guest.device.reg(REGISTER) == 0x77


def test_several_devices_are_stopped_and_started_by_way_of_p2p(source: Side, target: Side, tmp_path: Path) -> None:
    sides = (source, target)
    pairs = [f"{side.name}={tmp_path / f'{number}.vfm'}" for number, side in enumerate(sides)]
    assert [one["state"] for one in js("save", *pairs)] == ["stop", "stop"]
    # What is between is seen from a hook: none has stopped before all are quiet
    seen = f"post-stop=cat {source.instance.debugfs}/v2_state {target.instance.debugfs}/v2_state"
    js("start", *[side.name for side in sides])
    done = cli.run("--hook", seen, "stop", *[side.name for side in sides], warm=True)
    assert done.stderr.split() == [b"stop", b"running-p2p", b"stop", b"stop"]
    assert [state(side) for side in sides] == ["stop", "stop"]
    js("start", *[side.name for side in sides])
    assert [state(side) for side in sides] == ["running", "running"]


def test_several_devices_of_which_one_lacks_p2p_are_refused(source: Side, tmp_path: Path) -> None:
    with host.parameter_set("v2", 1), held.side(tmp_path / "memory") as other:
        for command in ("stop", "start"):
            cli.refused(command, source.name, other.name, code=4, words=("P2P", other.name, "--no-p2p"), warm=True)
        pairs = [f"{side.name}={tmp_path / side.name}.vfm" for side in (source, other)]
        cli.refused("save", *pairs, code=4, words=("P2P",), warm=True)
        assert (state(source), state(other)) == ("running", "running")
        js("stop", "--no-p2p", source.name, other.name)
        assert (state(source), state(other)) == ("stop", "stop")


def test_the_log_of_writes_tells_what_was_written_since_it_began(
    source: Side, tmp_path: Path, *, has_log: bool
) -> None:
    if not has_log:
        cli.refused("dirty", source.name, code=4, words=("no log of its writes",), warm=True)
        copy = tmp_path / "copy"
        cli.refused("sync", source.name, copy, "--memory", source.memory_option, code=4, words=("log",), warm=True)
        assert not copy.exists()
        return
    engine = gpu.Engine(source.guest)
    held.run_some_work(source.guest, engine, 2)  # before the log: not in there
    assert js("dirty", source.name, "--memory", source.memory_option, "--for", "0")["pages_dirty"] == 0
    process = cli.Forked("--json", "dirty", source.name, "--memory", source.memory_option, "--for", "3", "--list")
    gma, iova = source.guest.bind()
    context = engine.context(gpu.store_dword(gma, 0xABCD))
    while process.runs():
        source.memory.write(context.image + gpu.CTX_HEAD, bytes(4))  # or its commands are done already
        engine.submit(context)
        waiting.wait_until("an idle engine", lambda: not source.instance.queue())
    report = json.loads(process.wait().stdout)
    pages = {address + offset for address, size in report["ranges"] for offset in range(0, size, 4096)}
    assert iova in pages
    assert report["pages_dirty"] < 16


def test_a_device_without_a_log_that_nobody_holds_is_tracked_by_its_container(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(os.urandom(16 * 4096))
    with host.instance() as vgpu:
        info = js("info", "--open", vgpu.uuid)
        words = ("sync", vgpu.uuid, tmp_path / "copy", "--memory", f"{memory}@0", "--all-memory")
        cli.refused(*words, code=3, words=("nobody has it open", "hold", "--open"), warm=True)
        done = cli.run("--json", *words, "--open", warm=True)
    report = json.loads(done.stdout)
    assert (report["state"], report["rounds"][0]["pages_dirty"]) == ("closed", 16)
    assert (tmp_path / "copy").read_bytes() == memory.read_bytes()
    if "dma-logging" not in info["checks"][0]["text"]:
        assert b"a type1 container cannot tell writes" in done.stderr


def test_sync_and_save_copy_every_page_once_and_then_what_the_log_tells(
    source: Side, target: Side, tmp_path: Path, *, has_log: bool
) -> None:
    if not has_log:
        text = cli.refused(
            "save", source.name, tmp_path / "x", "--memory", source.memory_option, code=4, words=("log",), warm=True
        )
        assert "leave out --memory" in text
        return
    engine = gpu.Engine(source.guest)
    work = held.run_some_work(source.guest, engine, 4)
    done = cli.run("--json", "sync", source.name, tmp_path / "some", "--memory", source.memory_option, warm=True)
    assert b"it tells only what it writes from now on" in done.stderr
    assert json.loads(done.stdout)["memory"] == "dirty"
    assert json.loads(done.stdout)["rounds"][0]["pages_dirty"] < held.PAGES
    js("start", source.name)
    report = js("sync", source.name, tmp_path / "copy", "--memory", source.memory_option, "--all-memory")
    assert report["memory"] == "all"
    assert report["rounds"][0]["pages_dirty"] == held.PAGES
    assert report["rounds"][-1]["pages_dirty"] < held.PAGES
    assert (tmp_path / "copy").read_bytes() == source.file.read_bytes()
    js("start", source.name)
    image = tmp_path / "image"
    live = ["--live"] if HAS_PRE_COPY else ["--rounds", "3"]
    js("save", source.name, image, "--memory", source.memory_option, "--all-memory", *live)
    done = cli.run("restore", target.name, image, "--memory", target.memory_option, "--start", warm=True)
    assert b"some are old" in done.stderr  # nobody has said that the guest's CPUs stood still
    assert target.file.read_bytes() == source.file.read_bytes()
    assert work.done_in(target.memory) == len(work)


def test_two_devices_of_one_guest_share_one_copy_and_the_newest_page_is_restored(
    source: Side, tmp_path: Path, *, has_log: bool
) -> None:
    """The first device writes a page behind the rounds in which all of it was copied; the second one knows nothing."""
    if not has_log:
        return  # Debian's 6.12 cannot tell what a device has written; 6.1 can
    engine = gpu.Engine(source.guest)
    held.run_some_work(source.guest, engine, 2)
    gma, iova = source.guest.bind()
    context = engine.context(gpu.store_dword(gma, 0x1EA5E))
    with host.instance() as instance, cli.held(instance.uuid, source.file):
        pairs = [f"{source.name}={tmp_path}/a.vfm", f"{instance.uuid}={tmp_path}/b.vfm"]
        memory = ("--memory", source.memory_option)
        hook = tmp_path / "hook"
        hook.write_text(f"#!/bin/sh\n: >{tmp_path}/copied\nwhile ! [ -e {tmp_path}/written ]; do sleep 0.1; done\n")
        hook.chmod(0o755)
        saving = cli.Forked(
            "--json", "--hook", f"after-live={hook}", "save", *pairs, *memory, "--all-memory", "--rounds", "2"
        )
        waiting.wait_until("the rounds to end", (tmp_path / "copied").exists)
        engine.submit(context)
        waiting.wait_until("an idle engine", lambda: not source.instance.queue())
        assert source.memory.u32(iova) == 0x1EA5E
        (tmp_path / "written").touch()
        done = saving.wait()
        assert done.returncode == 0, done.stderr
        first, second = json.loads(done.stdout)
        assert first["pages_written"] > 0
        assert (second["pages_written"], second["rounds"]) == (0, [])
        source.memory.write(iova, bytes(4096))
        words = ("restore", instance.uuid, tmp_path / "b.vfm", *memory)
        cli.refused(*words, code=6, words=("a.vfm", "--no-memory"), warm=True)
        written = [one["pages_written"] for one in js("restore", *pairs, *memory)]
        assert 0 < written[0] <= held.PAGES
        assert written[1] == 0
        assert source.memory.u32(iova) == 0x1EA5E


def test_every_4_kib_of_a_larger_page_of_the_log_is_told_and_copied(
    source: Side, tmp_path: Path, *, has_log: bool
) -> None:
    if not has_log:
        return  # the tests above
    page, log_page = 4096, 1 << 16
    set_knob(source, "v2_log_page", log_page)
    # pieces that cut a page of the log, as QEMU's holes may; the GPU writes in the second
    pieces = [(0, 0x23000), (0x25000, held.PAGES * page - 0x25000)]
    options = [word for at, size in pieces for word in ("--memory", f"{source.file}@{at:#x}:{size:#x}+{at:#x}")]
    source.guest._next_page = 0x26
    engine = gpu.Engine(source.guest)
    gma, iova = source.guest.bind()
    assert iova // log_page == 2
    context = engine.context(gpu.store_dword(gma, 0xABCD))
    process = cli.Forked("--json", "dirty", source.name, *options, "--for", "3", "--list")
    while process.runs():
        source.memory.write(context.image + gpu.CTX_HEAD, bytes(4))  # or its commands are done already
        engine.submit(context)
        waiting.wait_until("an idle engine", lambda: not source.instance.queue())
    report = json.loads(process.wait().stdout)
    dirty = {at for start, size in report["ranges"] for at in range(start, start + size, page)}
    assert report["pages_dirty"] == len(dirty) < 64
    cut = {at for at in range(2 * log_page, 3 * log_page, page) if not 0x23000 <= at < 0x25000}
    assert cut <= dirty
    assert {at for at in dirty if 2 * log_page <= at < 3 * log_page} == cut
    js("sync", source.name, tmp_path / "copy", *options, "--rounds", "2", "--all-memory")
    content, copy = source.file.read_bytes(), (tmp_path / "copy").read_bytes()
    assert all(copy[at : at + size] == content[at : at + size] for at, size in pieces)


def peak(*words: str, stdin: int = subprocess.DEVNULL) -> int:
    """Run a program and return the most bytes that it had resident."""
    with subprocess.Popen(words, stdin=stdin) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_a_raw_stream_of_any_size_goes_through_a_file_or_a_pipe(source: Side, target: Side, tmp_path: Path) -> None:
    set_knob(source, "v2_extra_bytes", 20 * MIB)  # more than is spooled in memory, and than the RFC's largest state
    source.guest.device.set_reg(REGISTER, 0x4321)
    image, raw = tmp_path / "image", tmp_path / "raw"
    size = js("save", source.name, image)["state_bytes"]
    assert size > 20 * MIB
    assert js("verify", image)["state_bytes"] == size
    assert js("check", image, target.name)["fits"]
    assert js("save", "--raw", source.name, raw)["state_bytes"] == size == raw.stat().st_size
    assert js("restore", "--raw", target.name, raw, "--start")["state_bytes"] == size
    assert target.guest.device.reg(REGISTER) == 0x4321
    js("reset", target.name)
    done = cli.run("--json", "restore", "--raw", target.name, "-", stdin=raw.read_bytes())
    assert json.loads(done.stdout)["state_bytes"] == size
    assert target.guest.device.reg(REGISTER) == 0x4321


@pytest.mark.slow
def test_a_large_state_takes_no_more_memory_than_a_small_one(source: Side, target: Side, tmp_path: Path) -> None:
    set_knob(source, "v2_extra_bytes", 96 * MIB)
    program = shutil.which(cli.PROGRAM)
    assert program is not None
    bare = peak(sys.executable, "-c", "pass")
    image = tmp_path / "image"
    assert peak(program, "-q", "save", source.name, str(image)) - bare < RESIDENT_MAX
    assert image.stat().st_size > 96 * MIB
    assert peak(program, "-q", "restore", target.name, str(image)) - bare < RESIDENT_MAX
    with subprocess.Popen(["cat", image], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert peak(program, "-q", "restore", target.name, "-", stdin=cat.stdout.fileno()) - bare < RESIDENT_MAX
