# SPDX-License-Identifier: MIT
"""The installed `vfio-mig` does what its help says: every command's success, on real ioctls."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.demo.__main__ import Migration
from tools.demo.report import Report
from tools.lab import cli
from tools.lab.sample import gpu, host
from tools.lab.sample.held import Side, guest_view, queue_one, run_some_work, side
from tools.lab.vfio.raw import PAGE
from tools.lab.waiting import wait_until
from vfio_mig.host.discover import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[2]


def js(*args: str | Path) -> Any:
    return json.loads(cli.run("--json", *args, warm=True).stdout)


def text(*args: str | Path) -> str:
    return cli.run(*args, warm=True).stdout.decode()


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def source(shm: Path) -> Iterator[Side]:
    with side(shm / "source.mem") as made:
        yield made


@pytest.fixture
def target(shm: Path, source: Side) -> Iterator[Side]:  # noqa: ARG001  # made after it
    with side(shm / "target.mem") as made:
        yield made


def test_list_and_status_name_device_type_and_holder(source: Side) -> None:
    with host.instance("GVTg_V4_4") as closed:
        node = f"/dev/vfio/{source.instance.group}"
        lines = {line.split()[0]: line.split() for line in text("list").splitlines()}
        held_by = lines[source.name][5]
        assert lines[source.name][1:5] == ["mdev", "gvt_sample-GVTg_V4_8", "gvt_sample_mdev", node]
        assert held_by.endswith(":vfio-mig")
        assert lines[closed.uuid][2] == "gvt_sample-GVTg_V4_4"
        assert lines[closed.uuid][5] == "-"
        pid = int(held_by.partition(":")[0])
        (entry,) = [one for one in js("list") if one["device"] == source.name]
        assert entry == {
            "device": source.name,
            "kind": "mdev",
            "type": "gvt_sample-GVTg_V4_8",
            "parent": "gvt_sample",
            "driver": "gvt_sample_mdev",
            "node": node,
            "holder_pid": pid,
            "holder": "vfio-mig",
            "migratable": None,
            "state": None,
            "cdev": Host().find(source.name).cdev,
            **dict.fromkeys(("job", "job_pid", "job_step")),
        }
        assert lines[source.name][6:] == ["?", "-", entry["cdev"] or "-"]
        status = js("status", source.name)
        assert (status["state"], status["holder_pid"], status["protocol"]) == ("unknown", pid, "gvt-rfc")
        status = js("status", closed.uuid)
        assert (status["state"], status["migratable"], status["driver_state"]) == ("closed", None, None)
        assert f"open in PID {pid} (vfio-mig)" in text("status", source.name)


def test_info_opens_nothing_that_is_closed_unless_it_is_told_to() -> None:
    with host.instance() as closed:
        opened = closed.counters()
        info = js("info", closed.uuid)
        assert (info["how"], info["flags"], info["regions"], info["protocol"]) == ("closed", None, [], None)
        assert (info["driver"], info["migratable"], info["holder_pid"]) == ("gvt_sample_mdev", None, None)
        shown = text("info", closed.uuid)
        assert "migration known only of an open device" in shown
        assert "--open does it" in shown
        assert closed.counters() == opened
        assert closed.run_state() == "stopped"  # as one is that nobody has opened
        info = js("info", "--open", closed.uuid)
        assert info["how"] == ("group" if info["cdev"] is None else "cdev")
        assert (info["protocol"], info["migratable"], info["source"]) == ("gvt-rfc", True, "device")
        assert len(info["regions"]) == 10


def test_info_shows_regions_and_every_check(source: Side) -> None:
    info = js("info", source.name)
    assert info["how"] == "borrowed"
    assert info["protocol"] == "gvt-rfc"
    assert info["flags"] == 0x23
    regions = {region["number"]: region for region in info["regions"]}
    assert regions[9]["size"] == 0x900000
    assert regions[2]["sparse_areas"] == [[0, source.instance.layout().low_size]]
    assert all(check["ok"] for check in info["checks"])
    shown = text("info", source.name)
    assert "ok  migratable: flag 0x20 in 0x23" in shown
    assert "protocol  gvt-rfc" in shown


def test_a_device_has_several_names(source: Side) -> None:
    number = source.instance.group
    for name in (source.name.upper(), str(source.instance.sysfs), f"/dev/vfio/{number}"):
        assert js("status", name)["device"] == source.name


def test_stop_and_start_a_held_device(source: Side) -> None:
    before = source.instance.counters()
    assert js("stop", source.name).keys() == {"device", "action", "seconds"}
    assert source.instance.run_state() == "stopped"
    engine = gpu.Engine(source.guest)
    queued = queue_one(source.guest, engine)
    assert source.instance.queue()
    assert text("start", source.name).startswith(f"{source.name}: started in ")
    gpu.wait_ended(source.guest, before, 1)
    assert source.instance.run_state() == "running"
    assert queued.done_in(source.memory) == 1
    assert text("-q", "stop", source.name) == ""
    assert source.instance.run_state() == "stopped"


def test_reset_drops_what_the_guest_has_set(source: Side) -> None:
    source.guest.device.set_fence(0, 0x00100001, 0x001FF003)
    assert source.guest.device.fence(0)
    js("reset", source.name)
    assert source.guest.device.fence(0) == 0
    assert source.instance.run_state() == "running"


def test_dirty_reports_exactly_what_the_driver_has_pinned(source: Side) -> None:
    run_some_work(source.guest, gpu.Engine(source.guest))
    pinned = sorted(source.instance.pinned())
    everything = js("dirty", source.name, "--list")
    assert everything["pages"] == 1 << 20
    assert everything["pages_dirty"] == len(pinned) > 8
    pages = [at for start, size in everything["ranges"] for at in range(start, start + size, PAGE)]
    assert pages == pinned
    # the same from three requests that meet within the set, and in words
    middle = pinned[len(pinned) // 2]
    parts = [f"0-{middle:#x}", f"{middle:#x}+4K", f"{middle + PAGE:#x}+64M"]
    assert (
        js("dirty", source.name, *(word for part in parts for word in ("--range", part)), "--list")["ranges"]
        == everything["ranges"]
    )
    listed = text("dirty", source.name, "--list").splitlines()
    assert [tuple(int(word, 0) for word in line.split()) for line in listed] == [
        tuple(pair) for pair in everything["ranges"]
    ]
    assert f"{len(pinned)} of 256 pages" in text("dirty", source.name, "--memory", source.memory_option)
    assert source.instance.run_state() == "running"


def test_sync_copies_the_dirty_pages_into_a_sparse_file(source: Side, tmp_path: Path) -> None:
    work = run_some_work(source.guest, gpu.Engine(source.guest))
    copy = tmp_path / "copy.mem"
    report = js("sync", source.name, copy, "--memory", source.memory_option, "--leave-running")
    assert source.instance.run_state() == "running"
    assert report["state"] == "running"
    assert [one["stopped"] for one in report["rounds"]] == [False, False, True]
    pinned = source.instance.pinned()
    assert report["pages_dirty"] == len(pinned)
    content = copy.read_bytes()
    assert len(content) == source.memory.size
    assert all(content[at : at + PAGE] == source.memory.read(at, PAGE) for at in pinned)
    assert all(content[iova : iova + 4] == value.to_bytes(4, "little") for iova, value in work)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    js("sync", source.name, copy, "--memory", source.memory_option, "--rounds", "0")
    assert source.instance.run_state() == "stopped"


@pytest.mark.slow
@pytest.mark.variant  # the pictures have unit tests, and matplotlib takes half a minute here
def test_dirty_pages_and_rounds_can_be_looked_at(source: Side, tmp_path: Path) -> None:
    run_some_work(source.guest, gpu.Engine(source.guest), 2)
    chart = tmp_path / "rounds.svg"
    words = ("sync", source.name, tmp_path / "copy", "--memory", source.memory_option, "--plot")
    cli.refused(*words, tmp_path / "rounds.jpg", code=2, words=(".png or .svg",), warm=True)
    assert source.instance.run_state() == "running"
    cli.run(*words, chart, "--leave-running", warm=True)
    assert b"<svg" in chart.read_bytes()
    drawing = tmp_path / "map.png"
    said = text("dirty", source.name, "--memory", source.memory_option, "--map", "--plot", drawing)
    assert drawing.read_bytes().startswith(b"\x89PNG")
    (row,) = [line for line in said.splitlines() if line.startswith("0x")][:1]
    shown = [at for at, letter in enumerate(row.partition("│")[2].rstrip("│")) if letter != " "]
    assert shown == sorted({page // PAGE for page in source.instance.pinned() if page < 64 * PAGE})


@pytest.mark.parametrize("raw", [False, True], ids=["archive", "raw"])
def test_save_and_restore_through_a_file(source: Side, target: Side, tmp_path: Path, *, raw: bool) -> None:
    image = tmp_path / "gpu.vfm"
    options = ["--raw"] if raw else []
    run_some_work(source.guest, gpu.Engine(source.guest), 2)
    source.guest.device.set_fence(1, 0x00100001, 0x001FF003)
    saved = js("save", source.name, image, *options)
    assert source.instance.run_state() == "stopped"
    assert saved["state"] == "stop"
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.vfm"]
    state = source.guest.device.save()
    assert saved["state_bytes"] == len(state)
    if raw:
        assert image.read_bytes() == state
    else:
        listed = subprocess.run(["tar", "tf", image], capture_output=True, text=True, check=True).stdout.split()
        assert listed == ["header.json", "state/0000", "dirty/0000", "manifest.json"]
    view = guest_view(source.guest.device)
    report = js("restore", target.name, image, *options)
    assert target.instance.run_state() == "stopped"
    assert (report["state"], report["state_bytes"], report["warnings"]) == ("stop", len(state), [])
    assert guest_view(target.guest.device) == view
    assert target.guest.device.save() == state


def test_save_keeps_a_running_device_running_if_asked_and_replaces_a_file_by_force(
    source: Side, tmp_path: Path
) -> None:
    image = tmp_path / "gpu.vfm"
    image.write_bytes(b"old")
    said = cli.run("save", source.name, image, "--leave-running", "--force", warm=True).stderr.decode()
    assert source.instance.run_state() == "running"
    assert said.endswith("; it runs\n")
    assert image.read_bytes()[:11] == b"header.json"
    assert source.instance.counters()["status_set"] == 2


def test_a_report_that_nobody_takes_changes_neither_file_nor_exit_code(source: Side, tmp_path: Path) -> None:
    image = tmp_path / "gpu.vfm"
    done = cli.run("--json", "save", source.name, image, "--leave-running", stdout="/dev/full")
    said = done.stderr.decode()
    assert said.startswith("vfio-mig: warning: standard output: cannot write: ENOSPC ")
    assert said.count("\n") == 1
    assert ": good: " in text("verify", image)
    assert source.instance.run_state() == "running"
    closed = subprocess.run(
        ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", "vfio-mig", "stop", source.name], check=False, timeout=cli.SECONDS
    )
    assert closed.returncode == 0
    assert source.instance.run_state() == "stopped"
    source.guest.device.start()


def test_save_streams_into_restore_through_a_pipe_and_carries_the_dirty_pages(source: Side, target: Side) -> None:
    work = run_some_work(source.guest, gpu.Engine(source.guest))
    program = shutil.which("vfio-mig")
    assert program is not None
    save = subprocess.Popen(
        [program, "-q", "save", source.name, "-", "--memory", source.memory_option], stdout=subprocess.PIPE
    )
    assert save.stdout is not None
    done = subprocess.run(
        [program, "--json", "restore", target.name, "-", "--memory", target.memory_option, "--start"],
        stdin=save.stdout,
        capture_output=True,
        check=True,
    )
    save.stdout.close()
    assert save.wait() == 0
    assert done.stderr == b""
    report = json.loads(done.stdout)
    assert report["state"] == "running"
    assert report["pages_written"] == len(source.instance.pinned())
    assert target.instance.run_state() == "running"
    assert source.instance.run_state() == "stopped"
    assert work.done_in(target.memory) == len(work)
    assert target.instance.pinned() == source.instance.pinned()


def test_a_device_that_nobody_holds_is_saved_and_closed(tmp_path: Path) -> None:
    with host.instance() as vgpu:
        image = tmp_path / "gpu.vfm"
        for words in (("save", vgpu.uuid, image), ("sync", vgpu.uuid, image, "--memory", "/dev/null@0")):
            text = cli.refused(*words, code=3 if words[0] == "save" else 2, warm=True)
            assert words[0] == "sync" or f"'vfio-mig hold {vgpu.uuid}' first, or use --open" in text
        done = cli.run("-v", "save", vgpu.uuid, image, "--open")
        said = done.stderr.decode().splitlines()
        node = Host().find(vgpu.uuid).cdev or f"/dev/vfio/{vgpu.group}"
        assert said[0] == f"{vgpu.uuid}: opened through {node}, protocol gvt-rfc (numbers built in)"
        assert said[1].endswith("; closed, as nobody else has it open")
        cli.refused("restore", vgpu.uuid, image, code=3, words=("nobody has it open", "--open"), warm=True)
        again = js("restore", vgpu.uuid, image, "--open")
        assert again["state"] == "closed"
        assert "run 'vfio-mig hold' first" in again["warnings"][0]


def test_the_numbers_of_the_host_s_own_header_are_used(source: Side, tmp_path: Path) -> None:
    header = tmp_path / "vfio.h"
    numbers = (ROOT / "cdefs/gvt_rfc.h").read_text().replace("VFIO_PCI_RFC_NUM_REGIONS", "VFIO_PCI_NUM_REGIONS")
    for name, number in (("VFIO_DEVICE_PCI_STATUS_SET", 14), ("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP", 15)):
        numbers = numbers.replace(f"{name}_NR {number}", f"{name} _IO(VFIO_TYPE, VFIO_BASE + {number})")
    header.write_text(numbers)
    done = cli.run("-v", "--uapi-header", header, "stop", source.name, warm=True)
    assert f"(numbers {header})" in done.stderr.decode()
    assert source.instance.run_state() == "stopped"


def test_hold_announces_itself_and_ends_on_a_signal() -> None:
    with host.instance() as vgpu:
        for number in (signal.SIGTERM, signal.SIGINT):
            with cli.hold_started(vgpu.uuid) as process:
                assert js("status", vgpu.uuid)["holder_pid"] == process.pid
                process.send_signal(number)
                assert process.wait(cli.SECONDS) == 0
        assert js("status", vgpu.uuid)["state"] == "closed"


def test_the_doctor_finds_nothing_wrong_with_a_host_that_works(source: Side) -> None:
    found = {one["name"]: one["result"] for one in js("doctor")["checks"]}
    assert found["devices"] == found["borrowing"] == found["vfio"] == "ok"
    assert source.instance.run_state() == "running"


def test_a_report_on_the_host_names_no_device_of_it(source: Side) -> None:
    said = text("doctor", "--report")
    assert f"  release: {os.uname().release}" in said.splitlines()
    assert "  gvt_sample-GVTg_V4_8: 1 made, room for " in said
    assert [one for one in (source.name, os.uname().nodename, str(ROOT)) if one in said] == []
    assert js("doctor", "--report")["problems"] == 0


def test_mdevs_are_listed_created_and_removed() -> None:
    kind = "gvt_sample-GVTg_V4_8"
    (offered,) = [one for one in js("mdev", "types") if one["type"] == kind]
    assert offered["parent"] == "gvt_sample"
    assert offered["available"] == host.available("GVTg_V4_8") > 0
    made = text("mdev", "create", "GVTg_V4_8").strip()
    wanted = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    assert js("mdev", "create", kind, wanted, "--parent", "gvt_sample") == {"device": wanted}
    assert host.available("GVTg_V4_8") == offered["available"] - 2
    assert {made, wanted} <= {one["device"] for one in js("list")}
    for uuid in (made, wanted):
        cli.run("mdev", "remove", uuid, warm=True)
    assert not {made, wanted} & {one["device"] for one in js("list")}
    assert host.available("GVTg_V4_8") == offered["available"]


def test_hold_in_the_background_returns_once_all_are_held(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with host.instance() as one, host.instance() as two:
        done = cli.run("hold", one.uuid, two.uuid, "--daemon", "--pidfile", pid_file)
        pid = int(pid_file.read_text())
        try:
            assert done.stdout.decode().splitlines() == [f"{vgpu.uuid}: held open by PID {pid}" for vgpu in (one, two)]
            assert [js("status", vgpu.uuid)["holder_pid"] for vgpu in (one, two)] == [pid, pid]
            cli.run("stop", one.uuid, two.uuid)
            assert (one.run_state(), two.run_state()) == ("stopped", "stopped")
            cli.refused("hold", one.uuid, "--daemon", code=3, words=(f"it is open in PID {pid}",))
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until("the end of the holder", lambda: not pid_file.exists())
        assert js("status", one.uuid)["state"] == "closed"


@pytest.mark.usefixtures("warm_demonstrations")
def test_the_demonstration_s_checks_hold_and_each_command_s_reply_fits_a_terminal(
    source: Side, target: Side, shm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report()
    for one in (source, target):
        report.name(one.name)
    with contextlib.chdir(shm):
        Migration(source, target, shm / "gpu.vfm", report).run()
    said = capsys.readouterr().out
    assert report.failures == 0, said
    assert max(map(len, said.splitlines())) <= 80
    assert not {source.name, target.name, str(shm)} & {*re.findall(r"[^\s:@]+", said)}
    assert "\n  $ vfio-mig stop $A\n    $A: stopped in " in said
    assert re.search(r"\n  sum +\d+\.\d ms\n", said)


def test_the_script_of_functions_in_the_documentation_runs(tmp_path: Path) -> None:
    functions = (ROOT / "docs/python.md").read_text().partition("## Functions")[2]
    code = re.findall(r"```python\n(.*?)```", functions, re.DOTALL)[0]
    memory = Path("/dev/shm/guest")
    try:
        with memory.open("xb") as file:
            file.truncate(1 << 20)
        with host.instance(), host.instance():
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
            )
    finally:
        memory.unlink()
    assert re.fullmatch(r"0 dirty pages, stopped for \d\.\d{3} s, then running\n", done.stdout)
    assert done.stderr == ""
    assert (tmp_path / "gpu.vfm").exists()
