# SPDX-License-Identifier: MIT
"""A device of a QEMU stream as an image, and an image's state put into a stream: what is made, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any

import pytest

import vfio_mig
from tests.unit.qemu_streams import stream
from tests.unit.saved_images import gvt_state, js, run, text, write
from tests.unit.test_check import archive_of, header, results, session_with
from tests.unit.test_completion import in_bash
from tools.fuzz import builders
from tools.fuzz.builders import be64, begin, part
from vfio_mig.decode import qemu, qemu_replace
from vfio_mig.errors import HostError, ImageError, MismatchError, UsageError
from vfio_mig.image.archive import read_archive
from vfio_mig.image.bytesource import BufferSource
from vfio_mig.jobs.check import MISMATCH, NOTE, OK, header_checks

if TYPE_CHECKING:
    from pathlib import Path

NAME = "0000:00:03.0/vfio"
V2 = {"protocol": "mainline-v2", "device": {"name": "one", "kind": "mdev", "type": "mtty-2", "driver": "mtty"}}
OURS = ["mtty_pc", "mtty_mapped", "mtty_shared", "mtty_suppress", "mtty_file11", "mtty_multifd11"]


def refusal(kind: type[Exception], *words: str | Path) -> str:
    """Return why a command refuses."""
    error = run(*words).exception
    assert isinstance(error, kind), error
    return str(error)


def state_of(content: bytes, number: int = 0) -> bytes:
    found = qemu.read_stream(BufferSource(content))
    assert (found.complete, found.devices[number].problem) == (True, None)
    return b"".join(content[at : at + size] for at, size in found.devices[number].frames)


def without_state(content: bytes) -> bytes:
    """Return what is left of a stream without the pieces of its first device's state, and what is in front of each."""
    rest, behind = b"", 0
    for at, size in qemu.read_stream(BufferSource(content)).devices[0].frames:
        rest, behind = rest + content[behind : at - 16], at + size
    return rest + content[behind:]


def image(path: Path, state: bytes, **header: Any) -> Path:
    return write(path, state, header={**V2, **header})


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# extract --device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_device_of_qemu_s_own_stream_becomes_an_image_that_says_what_is_known(name: str, tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", stream(name))
    report = js("extract", vm, tmp_path / "image", "--device", "vfio0")
    section = report["device"]
    assert (report["layout"], report["state_bytes"]) == ("mtty", 96)
    assert report["size"] == (tmp_path / "image").stat().st_size
    assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == 0o600
    with (tmp_path / "image").open("rb") as file, read_archive(file) as archive:
        assert archive.state() == state_of(stream(name))
        assert archive.header["protocol"] == "mainline-v2"
        assert archive.header["device"] == {
            "name": section, "kind": None, "type": None, "driver": None, "pci": "4348:3253"
        }  # fmt: skip
        assert "time" not in archive.header
    verified = js("verify", tmp_path / "image")
    assert (verified["type"], verified["time"]) == (None, None)
    assert text("verify", tmp_path / "image").startswith(f"{tmp_path / 'image'}: good: mainline-v2 image, 2 members")
    # by the section's own name, too
    js("extract", vm, tmp_path / "image", "--device", section, "--force")


def test_which_of_several_devices_is_said_and_those_that_there_are_are_named(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", builders.qemu_stream([builders.mtty()], [b"other"]))
    hint = "it has vfio0 ('0000:00:07.0/vfio'), vfio1 ('0000:00:08.0/vfio')"
    for name in ("vfio2", "0000:00:07.0", "", "ram"):
        problem = refusal(UsageError, "extract", vm, tmp_path / "image", "--device", name)
        assert "no VFIO device" in problem
        assert hint in problem
    assert hint in refusal(UsageError, "pack", image(tmp_path / "i", b"x"), tmp_path / "new", "--into", vm)
    js("extract", vm, tmp_path / "image", "--device", "0000:00:08.0/vfio")
    with (tmp_path / "image").open("rb") as file, read_archive(file) as archive:
        assert archive.state() == b"other"
    assert vfio_mig.Image(vm).extract_device(tmp_path / "lib", device="vfio1").device == "0000:00:08.0/vfio"
    assert in_bash("extract", str(vm), "out", "--device", "vf") == ["vfio0", "vfio1"]


def test_devices_of_one_name_are_told_apart_by_number(tmp_path: Path) -> None:
    content = builders.qemu_stream([b"a"], [b"b"]).replace(b"0000:00:08.0", b"0000:00:07.0")
    vm = put(tmp_path / "vm", content)
    problem = refusal(UsageError, "extract", vm, tmp_path / "image", "--device", "0000:00:07.0/vfio")
    assert "2 devices of the stream are called" in problem
    js("extract", vm, tmp_path / "image", "--device", "vfio1")


def test_what_is_not_whole_becomes_no_image(tmp_path: Path) -> None:
    content = builders.qemu_stream([b"first", b"second"])
    for broken, problem in (
        (content[: content.index(b"second") - 16], "the end of its state was not found"),
        (content[:-1], "not understood to its end"),
        (builders.qemu_stream([b""]), "multifd"),
        (builders.qemu_stream(), "no VFIO device"),
    ):
        vm = put(tmp_path / "vm", broken)
        assert problem in refusal(ImageError, "extract", vm, tmp_path / "image", "--device", "vfio0")
        assert problem in refusal(
            ImageError, "pack", image(tmp_path / "i", b"x"), tmp_path / "image", "--into", vm, "--force"
        )
    assert not (tmp_path / "image").exists()
    state = put(tmp_path / "state", builders.mtty())
    assert "no QEMU migration stream" in refusal(UsageError, "extract", state, tmp_path / "image", "--device", "vfio0")


def test_files_are_replaced_by_force_only_and_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", stream("mtty_pc"))
    kept = put(tmp_path / "kept", b"precious")
    assert "exists" in refusal(UsageError, "extract", vm, kept, "--device", "vfio0")
    made = image(tmp_path / "i", builders.mtty())
    assert "exists" in refusal(UsageError, "pack", made, kept, "--into", vm)
    assert kept.read_bytes() == b"precious"
    for words in (
        ("extract", vm, "-", "--device", "vfio0"),
        ("pack", made, "-", "--into", vm),
        ("extract", vm, tmp_path / "parts", "--force"),
        ("pack", tmp_path / "parts", tmp_path / "x", "--device", "vfio0"),
    ):
        refusal(UsageError, *words)
    assert "has no standard output" in refusal(UsageError, "extract", vm, "-", "--device", NAME)
    assert "ENOENT" in refusal(HostError, "pack", tmp_path / "no", tmp_path / "x", "--into", vm)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["i", "kept", "vm"]


# pack --into ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_another_state_stands_in_qemu_s_stream_and_nothing_else_has_changed(name: str, tmp_path: Path) -> None:
    old, state = stream(name), bytes(reversed(builders.mtty(minor=7)))[:50] * 3
    state = builders.mtty()[:24] + state
    vm, made = put(tmp_path / "vm", old), image(tmp_path / "i", state)
    report = js("pack", made, tmp_path / "new", "--into", vm)
    new = (tmp_path / "new").read_bytes()
    assert (report["state_bytes"], report["old_state_bytes"], report["size"]) == (len(state), 96, len(new))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert state_of(new) == state
    assert without_state(new) == without_state(old)
    assert report["warnings"] == (
        ["the stream has no description of QEMU's that would prove where its sections are"]
        if name == "mtty_suppress"
        else []
    )


def test_what_was_taken_out_and_put_back_is_the_same_stream(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", builders.qemu_stream([b"a"], [builders.mtty()]))
    js("extract", vm, tmp_path / "image", "--device", "vfio1")
    js("pack", tmp_path / "image", tmp_path / "again", "--into", vm, "--device", "vfio1")
    assert (tmp_path / "again").read_bytes() == vm.read_bytes()


def test_a_large_state_is_put_in_in_pieces_as_qemu_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_replace, "PIECE", 1000)
    state = os.urandom(2500)
    vm = put(tmp_path / "vm", builders.qemu_stream([b"old"]))
    vfio_mig.Image(image(tmp_path / "i", state)).pack_into(vm, tmp_path / "new")
    new = (tmp_path / "new").read_bytes()
    (device,) = qemu.read_stream(BufferSource(new)).devices
    assert [size for _, size in device.frames] == [1000, 1000, 500]
    assert state_of(new) == state


def test_what_stands_in_front_of_the_stream_stays(tmp_path: Path) -> None:
    made = image(tmp_path / "i", b"another")
    xml = b"<domain><name>vm1</name></domain>\0"
    libvirt = struct.pack("<16s5I56x", b"LibvirtQemudSave", 2, len(xml), 1, 0, len(xml)) + xml
    for before in (bytes(8192), libvirt):
        vm = put(tmp_path / "vm", before + builders.qemu_stream([b"old"]))
        js("pack", made, tmp_path / "new", "--into", vm, "--force")
        new = (tmp_path / "new").read_bytes()
        assert new.startswith(before + b"QEVM")
        assert state_of(new[len(before) :]) == b"another"
    vm = put(tmp_path / "vm", gzip.compress(builders.qemu_stream([b"old"])))
    assert "compressed (gzip)" in refusal(UsageError, "pack", made, tmp_path / "packed", "--into", vm)
    # taking a device out needs no such thing
    js("extract", vm, tmp_path / "out", "--device", "vfio0")


def test_the_holes_of_mapped_memory_stay_holes(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", stream("mtty_multifd11"))
    js("pack", image(tmp_path / "i", builders.mtty()), tmp_path / "new", "--into", vm)
    made = (tmp_path / "new").stat()
    assert made.st_size > 20 << 20
    assert made.st_blocks * 512 < 4 << 20


def test_a_state_of_another_kind_is_not_put_in(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", stream("mtty_pc"))
    for state, changes, problem in (
        (builders.mtty(), {"protocol": "gvt-rfc"}, "the image's protocol is 'gvt-rfc'"),
        (builders.mtty(), {"protocol": None}, "the image's protocol is None"),
        (gvt_state(), {}, "is of layout gvt-rfc, that of"),
        (b"", {}, "the image has no state"),
    ):
        made = image(tmp_path / "i", state, **changes)
        assert problem in refusal(MismatchError, "pack", made, tmp_path / "new", "--into", vm)
    bare = put(tmp_path / "state", builders.mtty())
    assert "is no image (state)" in refusal(UsageError, "pack", bare, tmp_path / "new", "--into", vm)
    assert not (tmp_path / "new").exists()
    # nothing is known of a state of unknown layout but that it is one
    js("pack", image(tmp_path / "i", b"unknown"), tmp_path / "new", "--into", vm)


def test_pages_of_an_image_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", stream("mtty_pc"))
    made = write(tmp_path / "i", builders.mtty(), [(0, b"\1" * 4096)], header=V2)
    result = run("pack", made, tmp_path / "new", "--into", vm)
    assert result.exception is None
    assert "the image's 1 pages of guest memory are left out" in result.stderr


def test_a_stream_whose_memory_would_have_to_move_is_refused(tmp_path: Path) -> None:
    """QEMU writes none, but anybody may: mapped memory has its place in the file, and a package its length."""
    config = b"\7" + struct.pack(">I", 2) + b"pc" + b"\5\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1)
    config += b"\x0amapped-ram"
    early = begin(7, b"vfio", be64(builders.SETUP, builders.END)) + part(7, builders.frame(b"x") + be64(builders.END))
    head = b"QEVM\0\0\0\3" + config + early
    ram = struct.pack(">BI", 1, 2) + b"\3ram" + struct.pack(">II", 0, 4) + be64(0x1000 | builders.RAM_SIZE)
    ram += b"\6pc.ram" + be64(0x1000)
    bitmap = len(head) + len(ram) + 28
    ram += struct.pack(">IQQQ", 1, 4096, bitmap, 1 << 20)
    mapped = (head + ram).ljust((1 << 20) + 4096, b"\0") + be64(builders.RAM_EOS) + struct.pack(">BI", 0x7E, 2)
    end = part(2, be64(builders.RAM_EOS), last=True) + part(7, be64(builders.END), last=True) + b"\0"
    vm, made = put(tmp_path / "vm", mapped + end), image(tmp_path / "i", b"new")
    assert "before mapped memory" in refusal(ImageError, "pack", made, tmp_path / "new", "--into", vm)
    js("extract", vm, tmp_path / "out", "--device", "vfio0")

    package = part(7, builders.frame(b"x") + be64(builders.END), last=True)
    content = b"QEVM\0\0\0\3" + begin(7, b"vfio", be64(builders.SETUP, builders.END))
    content += b"\x08" + struct.pack(">HHI", 7, 4, len(package)) + package + b"\0"
    vm = put(tmp_path / "vm", content)
    assert "a package of sections" in refusal(ImageError, "pack", made, tmp_path / "new", "--into", vm)
    assert not (tmp_path / "new").exists()


def test_a_stream_that_is_written_wrongly_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = put(tmp_path / "vm", stream("mtty_pc"))
    made = image(tmp_path / "i", builders.mtty(minor=1))
    for piece, problem in (
        (lambda *_: [BufferSource(b"QEVM")], "QEMU migration stream"),
        (lambda source, *_: [source], "is another one"),
        (lambda source, *_: [source, BufferSource(b"x")], "not understood as the stream was"),
    ):
        monkeypatch.setattr(qemu_replace, "with_state", piece)
        assert problem in refusal(ImageError, "pack", made, tmp_path / "new", "--into", vm)
    assert not (tmp_path / "new").exists()


# What QEMU does not say ----------------------------------------------------------------------------------------------


def checked(device: dict[str, Any], **changes: Any) -> dict[str, str]:
    return results(list(header_checks(session_with(), archive_of(header(device=device, **changes)))))


def test_what_an_image_of_a_stream_does_not_know_is_a_note_and_what_is_missing_a_mismatch() -> None:
    unknown = checked({"type": None, "driver": None}, machine=None, kernel=None)
    assert (unknown["device-type"], unknown["machine"], unknown["driver"]) == (NOTE, NOTE, NOTE)
    assert checked({"driver": None})["device-type"] == MISMATCH
    assert checked({"type": "other"})["device-type"] == MISMATCH
    assert checked({"type": "i915-GVTg_V4_8"}, machine=...)["machine"] == MISMATCH
    # an mdev's IDs, which its guest sees, are not its type
    assert checked({"type": None, "pci": "8086:1912"})["device-type"] == NOTE


def test_a_pci_device_is_compared_by_its_ids() -> None:
    session = session_with()
    session.found = session.found._replace(kind="pci", type="8086:1912")
    for pci, result in (("8086:1912", OK), ("8086:1913", MISMATCH)):
        archive = archive_of(header(device={"type": None, "pci": pci}))
        assert results(list(header_checks(session, archive)))["device-type"] == result


# Marks that end a part by themselves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [5, 6])
def test_a_part_ends_with_a_mark_behind_which_qemu_reads_nothing(mark: int) -> None:
    content = builders.qemu_stream([b"first", b"second"])
    first = builders.frame(b"first")
    changed = content.replace(first + be64(builders.END), first + be64(builders.MARK + mark))
    assert changed != content
    assert state_of(changed) == b"firstsecond"


def test_extract_says_on_json_what_man_and_schema_promise(tmp_path: Path) -> None:
    vm = put(tmp_path / "vm", stream("mtty_pc"))
    report = vfio_mig.extract_device(str(vm), str(tmp_path / "image"))
    assert json.loads(json.dumps(report.as_dict())) == {
        "file": str(vm),
        "image": str(tmp_path / "image"),
        "device": report.device,
        "layout": "mtty",
        "state_bytes": 96,
        "size": report.size,
        "problems": [],
    }
