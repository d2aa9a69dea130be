# SPDX-License-Identifier: MIT
"""`inspect`, `extract` and `pack` on images made here: what they print, write, and refuse."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfio_mig
from tests.unit.saved_images import Memory, gvt_state, js, run, text, write
from tests.unit.test_image_archive import PAGE
from tests.unit.test_image_gvt import CFG
from tools.fuzz import builders, corpus
from vfio_mig.errors import HostError, ImageError, UsageError, VfioMigError
from vfio_mig.image.archive import read_archive

# inspect -------------------------------------------------------------------------------------------------------------


def test_an_image_is_shown_with_header_members_statistics_and_state(tmp_path: Path) -> None:
    path = write(tmp_path / "image", gvt_state(), [(0x10000, b"\1" * PAGE)], (0, 8, b"\5"))
    report = js("inspect", path)
    assert (report["kind"], report["layout"], report["problems"]) == ("image", "gvt-rfc", [])
    assert report["header"]["device"]["type"] == "GVTg_V4_8"
    assert [member["name"] for member in report["members"]["listed"]] == [
        "header.json",
        "dirty/0000",
        "pages/0000",
        "state/0000",
    ]
    assert report["statistics"] == {"stop_time": 0.5}
    shown = text("inspect", path)
    assert shown.startswith(
        f"{path}: image, {path.stat().st_size} bytes, {report['state_bytes']} bytes of state, 1 pages"
    )
    assert report["pages"] == 1
    assert "  time 1970-01-01 " in shown or "  time 1969-12-31 " in shown
    for line in (
        "  vendor 0x8086",
        "pvinfo  at 0x279230, 4096 bytes",
        "  stop_time 500.0 ms",
        "    level 4  pdp 0x1000",
    ):
        assert line in shown.splitlines()
    assert vfio_mig.inspect_image(str(path)).layout == "gvt-rfc"


def test_one_section_is_shown_alone_in_words_or_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "image", gvt_state())
    assert text("inspect", path, "--section", "ppgtt").splitlines() == [
        "ppgtt",
        "  roots (1)",
        "    level 4  pdp 0x1000",
    ]
    assert js("inspect", path, "--section", "ppgtt")["values"]["roots"]["count"] == 1
    assert text("inspect", path, "--section", "ppgtt", "--hex").splitlines() == [
        "004e1240  04 00 00 00 00 00 00 00  00 10 00 00 00 00 00 00  |................|",
        "004e1250  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
        "004e1260  00 00 00 00 00 00 00 00                           |........|",
    ]
    dump = js("inspect", path, "--section", "cfg", "--hex")
    assert (bytes.fromhex(dump["content"]), dump["offset"], dump["size"]) == (CFG, 0x220, 4096)
    lines = text("inspect", path, "--section", "sreg", "--hex").splitlines()
    assert lines == [f"00001228  {' '.join(['00'] * 8)}  {' '.join(['00'] * 8)}  |{'.' * 16}|", "*"]


def test_a_section_that_is_not_there_is_wrong_usage_and_names_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "image", builders.mtty())
    for options, more in (([], "image.header, image.members, image.statistics, "), (["--hex"], "")):
        result = run("inspect", path, "--section", "gtt", *options)
        assert isinstance(result.exception, UsageError)
        assert str(result.exception) == f"{path} has no section 'gtt'; it has {more}header, port0, port1"
    assert js("inspect", path, "--section", "image.members")["values"]["members"]["count"] == 2
    assert text("inspect", path, "--section", "image.statistics") == "image.statistics\n  stop_time 500.0 ms\n"
    assert run("inspect", path, "--hex").exit_code == 2


def test_the_graphics_memory_of_a_vgpu_is_drawn_to_a_new_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    picture = tmp_path / "gm.png"
    path = write(tmp_path / "image", gvt_state())
    done = run("inspect", path, "--plot", picture)
    assert (done.stdout, done.stderr) == ("", f"{path}: its graphics memory is drawn in {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = run("inspect", write(tmp_path / "other", b"no layout of ours"), "--plot", tmp_path / "x.png")
    assert isinstance(refused.exception, UsageError)
    assert "gtt" in str(refused.exception)
    assert not (tmp_path / "x.png").exists()


def test_a_bare_state_needs_no_option(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(gvt_state())
    assert js("inspect", tmp_path / "state")["kind"] == "state"
    (tmp_path / "other").write_bytes(b"what is this?")
    shown = text("inspect", tmp_path / "other")
    assert "13 bytes of state: unknown" in shown
    assert f"  first_bytes {b'what is this?'.hex()}" in shown


def test_a_state_in_many_members_is_decoded_as_one(tmp_path: Path) -> None:
    content = builders.mtty()
    path = write(tmp_path / "image", [content[:5], content[5:30], content[30:]])
    report = js("inspect", path)
    assert (report["layout"], report["state_bytes"], report["problems"]) == ("mtty", 96, [])
    dump = js("inspect", path, "--section", "port0", "--hex")
    assert bytes.fromhex(dump["content"]) == content[24:60]


def test_a_queued_workload_is_followed_into_the_pages_that_count(tmp_path: Path) -> None:
    from tests.unit.test_inspect_gvt import RING_AT, queued

    state, pages = queued([0x01000000, 0], [])
    old = (RING_AT + 0x100000, b"\xff" * PAGE)
    memory: Memory = [old, (old[0], PAGE), *pages.items()]
    report = js("inspect", write(tmp_path / "image", state, memory), "--section", "workload")
    commands = report["values"]["workloads"]["listed"][0]["elements"][0]["commands"]
    assert [one["name"] for one in commands] == ["MI_USER_INTERRUPT", "MI_NOOP"]
    report = js("inspect", write(tmp_path / "zero", state, [*memory, (old[0], PAGE)]), "--section", "workload")
    commands = report["values"]["workloads"]["listed"][0]["elements"][0]["commands"]
    assert [one["name"] for one in commands] == ["MI_NOOP", "MI_NOOP"]


def test_a_broken_state_is_shown_with_a_warning_and_a_broken_image_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "image", gvt_state()[:-1])
    result = run("inspect", path)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"vfio-mig: warning: {path}: ")
    assert "cut off" in result.stderr
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert isinstance(run("inspect", path).exception, ImageError)


def test_what_a_header_says_is_escaped(tmp_path: Path) -> None:
    header = (
        b'{"device":"\\u001b[2J\\n\\ud800","format":"vfio-mig","version":1,"x":[1e999,' + b"[" * 99 + b"]" * 99 + b"]}"
    )
    members = [("header.json", header)]
    path = tmp_path / "image"
    path.write_bytes(corpus.tar_of(members, corpus.signed(corpus.manifest_of(corpus.entries_for(members)))))
    shown = text("inspect", path)
    assert "\\x1b[2J\\n\\ud800" in shown
    assert "\x1b" not in shown
    report = js("inspect", path)
    assert report["header"]["device"] == "\x1b[2J\n\ud800"
    assert report["header"]["x"][0] == "inf"


def test_standard_input_may_be_a_pipe_of_any_form(tmp_path: Path) -> None:
    script = [sys.executable, "-m", "vfio_mig", "--json", "inspect", "-"]
    for content, kind in (
        (write(tmp_path / "image", builders.mtty()).read_bytes(), "image"),
        (builders.mtty(), "state"),
        (builders.qemu_stream([builders.mtty()]), "qemu-stream"),
    ):
        done = subprocess.run(script, input=content, capture_output=True, check=True)
        assert json.loads(done.stdout)["kind"] == kind


def test_a_qemu_stream_shows_its_vfio_devices(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(builders.qemu_stream([builders.mtty()[:24], builders.mtty()[24:]], [b"x"]))
    report = js("inspect", path)
    names = [section["name"] for section in report["sections"]]
    assert names == [
        "stream",
        *(f"vfio0.{name}" for name in ("device", "header", "port0", "port1", "config")),
        *(f"vfio1.{name}" for name in ("device", "state", "config")),
    ]
    assert js("inspect", path, "--section", "vfio0.port1")["values"]["registers"]["scr"] == 0xA5
    dump = js("inspect", path, "--section", "vfio0.port0", "--hex")
    assert bytes.fromhex(dump["content"]) == builders.mtty()[24:60]


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=400), st.sampled_from([b"", b"QEVM\0\0\0\3", *builders.state_seeds()]))
def test_any_bytes_give_a_report_or_an_error_of_ours(junk: bytes, seed: bytes) -> None:
    path = Path(f"/proc/self/fd/{_memory_file(seed + junk)}")
    try:
        report = vfio_mig.inspect_image(str(path))
    except VfioMigError as error:
        assert str(error).isprintable()  # noqa: PT017 -- it may also be taken
    else:
        json.dumps(report.as_dict())
        assert all(problem.isprintable() for problem in report.problems)
        assert run("inspect", path).exception is None


_MEMORY_FILES: list[int] = []


def _memory_file(content: bytes) -> int:
    if not _MEMORY_FILES:
        _MEMORY_FILES.append(os.memfd_create("inspected"))
    os.ftruncate(_MEMORY_FILES[0], 0)
    os.pwrite(_MEMORY_FILES[0], content, 0)
    return _MEMORY_FILES[0]


# extract and pack ----------------------------------------------------------------------------------------------------


def full_image(path: Path) -> Path:
    state = [b"a" * 100, b"b" * 70000, b""]
    memory: Memory = [(0x10000, b"\1" * PAGE), (0x20000, 1 << 30), (0x10000, b"\2" * 2 * PAGE)]
    return write(path, state, memory, (16, 11, b"\5\4"))


def test_what_was_extracted_is_packed_to_the_same_bytes(tmp_path: Path) -> None:
    path = full_image(tmp_path / "image")
    os.utime(path, (5, 5))
    report = js("extract", path, tmp_path / "parts")
    assert report["files"] == [
        "header.json",
        "state.bin",
        "dirty/0000",
        "pages/0000",
        "zero/0000",
        "pages/0001",
        "statistics.json",
        "layout.json",
    ]
    assert (tmp_path / "parts/state.bin").read_bytes() == b"a" * 100 + b"b" * 70000
    assert (tmp_path / "parts/dirty/0000").read_bytes() == b"\5\4"
    for one in (tmp_path / "parts").rglob("*"):
        assert stat.S_IMODE(one.stat().st_mode) == (0o700 if one.is_dir() else 0o600)
    packed = js("pack", tmp_path / "parts", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert (packed["members"], packed["size"]) == (7, path.stat().st_size)
    assert stat.S_IMODE((tmp_path / "again").stat().st_mode) == 0o600


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_image_comes_back_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("round")
    states = data.draw(st.lists(st.binary(max_size=300), max_size=3))
    memory: Memory = [
        (page * PAGE, bytes([content]) * PAGE if content else PAGE)
        for page, content in data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=6))
    ]
    path = write(directory / "image", states, memory, header={"x": data.draw(st.text(max_size=9))})
    vfio_mig.extract_image(str(path), str(directory / "parts"))
    vfio_mig.pack_image(str(directory / "parts"), str(directory / "again"))
    assert (directory / "again").read_bytes() == path.read_bytes()


def test_what_was_changed_is_in_the_image_that_is_packed(tmp_path: Path) -> None:
    js("extract", full_image(tmp_path / "image"), tmp_path / "parts")
    (tmp_path / "parts/state.bin").write_bytes(b"another state" * 1000000)
    (tmp_path / "parts/header.json").write_bytes(b'{"format":"vfio-mig","version":1,"new":true}')
    js("pack", tmp_path / "parts", tmp_path / "again")
    with (tmp_path / "again").open("rb") as file, read_archive(file) as archive:
        assert archive.state() == b"another state" * 1000000
        assert archive.header["new"] is True
        assert [one.name for one in archive.members if one.kind == "state"] == ["state/0000", "state/0001"]
        assert archive.statistics == {"stop_time": 0.5}


def test_nothing_is_written_over_and_nothing_left_after_a_failure(tmp_path: Path) -> None:
    path = full_image(tmp_path / "image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("kept")
    for target in ("full", "link", "file"):
        assert isinstance(run("extract", path, tmp_path / target).exception, UsageError)
    (tmp_path / "elsewhere").mkdir()
    assert isinstance(run("extract", path, tmp_path / "link").exception, UsageError)
    assert isinstance(run("extract", path, tmp_path / "no/such").exception, HostError)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["elsewhere", "file", "full", "image", "link"]
    assert (tmp_path / "full/file").read_text() == "kept"


def test_a_failed_write_takes_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = full_image(tmp_path / "image")
    real = os.fsync
    calls = []

    def full_disk(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full_disk)
    (tmp_path / "empty").mkdir()
    for target in ("parts", "empty"):
        calls.clear()
        result = run("extract", path, tmp_path / target)
        assert isinstance(result.exception, HostError)
        assert "ENOSPC" in str(result.exception)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["empty", "image"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_bare_state_is_not_extracted(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(builders.mtty())
    result = run("extract", tmp_path / "state", tmp_path / "parts")
    assert isinstance(result.exception, UsageError)
    assert "nothing to extract" in str(result.exception)
    assert not (tmp_path / "parts").exists()


def test_the_devices_of_a_qemu_stream_are_extracted(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(builders.qemu_stream([builders.mtty()[:30], builders.mtty()[30:]], [b"x"]))
    report = js("extract", tmp_path / "stream", tmp_path / "parts")
    assert report["files"] == ["vfio0.state", "vfio0.config", "vfio1.state", "vfio1.config", "stream.json"]
    assert (tmp_path / "parts/vfio0.state").read_bytes() == builders.mtty()
    assert (tmp_path / "parts/vfio1.config").read_bytes() == builders.DEVICE_CONFIG
    assert json.loads((tmp_path / "parts/stream.json").read_text())["machine"] == "pc-q35-7.2"
    assert isinstance(run("pack", tmp_path / "parts", tmp_path / "image").exception, ImageError)
    (tmp_path / "stream").write_bytes(builders.qemu_stream())
    assert "no VFIO device" in str(run("extract", tmp_path / "stream", tmp_path / "none").exception)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("layout.json", None, "layout.json is missing"),
        ("state.bin", None, "state.bin is missing"),
        ("pages/0001", None, "pages/0001 is missing"),
        ("layout.json", b"[]", "no JSON object"),
        ("layout.json", b"{", "no JSON"),
        ("layout.json", b'{"format":"x","version":1}', "format is 'x', version 1"),
        ("layout.json", {"version": 2}, "version 2: not made by"),
        ("layout.json", {"mtime": -1}, "impossible mtime -1"),
        ("layout.json", {"mtime": True}, "impossible mtime True"),
        ("layout.json", {"members": 1}, "no list of members"),
        ("layout.json", {"members": [[]]}, "bad member"),
        ("layout.json", {"members": [{"name": "pages/../../x", "size": 1}]}, "bad member"),
        ("layout.json", {"members": [{"name": "pages/0000", "size": 1 << 40}]}, "bad member"),
        ("layout.json", {"members": [{"name": "dirty/0000", "size": 2}]}, "bad member"),
        ("layout.json", {"members": [{"name": "dirty/0000", "size": 2, "start_page": 16, "nr_pages": 99}]}, "2 bytes"),
        ("statistics.json", b'{"a":1e999}', "Out of range"),
        ("header.json", b"x" * (1 << 20) + b"x", "header.json has more than 1048576 bytes"),
        ("header.json", b"{}", "format is None"),
        ("pages/0000", b"short", "pages/0000: too short"),
        ("pages/0000", "link", "cannot open: ELOOP"),
        ("pages/0000", "fifo", "not a regular file"),
    ],
)
def test_parts_that_make_no_image_are_refused_and_leave_no_file(
    tmp_path: Path, name: str, change: bytes | dict[str, Any] | str | None, problem: str
) -> None:
    js("extract", full_image(tmp_path / "image"), tmp_path / "parts")
    path = tmp_path / "parts" / name
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change}).encode()
    path.unlink()
    if change == "link":
        path.symlink_to(tmp_path / "image")
    elif change == "fifo":
        os.mkfifo(path)
    elif isinstance(change, bytes):
        path.write_bytes(change)
    result = run("pack", tmp_path / "parts", tmp_path / "again")
    assert isinstance(result.exception, VfioMigError)
    assert problem in str(result.exception)
    assert not (tmp_path / "again").exists()


def test_pack_has_no_standard_output(tmp_path: Path) -> None:
    js("extract", full_image(tmp_path / "image"), tmp_path / "parts")
    assert isinstance(run("pack", tmp_path / "parts", "-").exception, UsageError)


def test_pack_replaces_a_file_only_when_forced(tmp_path: Path) -> None:
    path = full_image(tmp_path / "image")
    js("extract", path, tmp_path / "parts")
    (tmp_path / "there").write_text("kept")
    assert isinstance(run("pack", tmp_path / "parts", tmp_path / "there").exception, UsageError)
    assert (tmp_path / "there").read_text() == "kept"
    js("pack", "--force", tmp_path / "parts", tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == path.read_bytes()
