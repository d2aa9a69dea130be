# SPDX-License-Identifier: MIT
"""Saved devices inside of something else: compression, libvirt's header, a hole; and streams that are not whole."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfio_mig
from tests.unit.qemu_streams import stream
from tests.unit.saved_images import js, run, text, write
from tools.fuzz import builders
from vfio_mig.decode import qemu
from vfio_mig.errors import HostError, ImageError
from vfio_mig.image import wrapped
from vfio_mig.image.bytesource import BufferSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

XML = b"<domain type='kvm'><name>vm1</name><uuid>x</uuid></domain>"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def libvirt(content: bytes, *, form: int = 0, version: int = 2, order: str = "<", size: int = 1024) -> bytes:
    """Return what libvirt writes: header, XML filled with zeros to a block, and the stream."""
    rest = size - 92
    head = struct.pack(order + "16s5I56x", b"LibvirtQemudSave", version, rest, 1, form, 0)
    return head + XML.ljust(rest, b"\0") + content


# What is around it is taken away --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", COMPRESS)
def test_a_compressed_stream_is_looked_into(form: str, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(COMPRESS[form](stream("mtty_pc")))
    report = js("inspect", path)
    assert (report["kind"], report["wrapping"], report["problems"]) == ("qemu-stream", [form], [])
    assert report["size"] == path.stat().st_size
    assert report["sections"][0]["values"]["proved"]
    assert text("inspect", path).startswith(f"{path}: qemu-stream in {form}, ")
    assert vfio_mig.extract_image(str(path), str(tmp_path / "out")).complete
    assert (tmp_path / "out" / "vfio0.state").stat().st_size == 96


def test_members_behind_each_other_and_zeros_are_one(tmp_path: Path) -> None:
    content, path = stream("mtty_two"), tmp_path / "stream"
    for form in COMPRESS.values():
        path.write_bytes(
            b"".join(form(content[at : at + 40_000]) for at in range(0, len(content), 40_000)) + bytes(700)
        )
        assert js("inspect", path)["problems"] == []


@pytest.mark.parametrize("form", COMPRESS)
def test_a_compressed_image_and_a_state_are_looked_into(form: str, tmp_path: Path) -> None:
    image, path, state = write(tmp_path / "image", builders.mtty()), tmp_path / "packed", tmp_path / "state"
    path.write_bytes(COMPRESS[form](image.read_bytes()))
    report = js("inspect", path)
    assert (report["kind"], report["layout"], report["wrapping"]) == ("image", "mtty", [form])
    assert text("diff", path, image) == ""
    state.write_bytes(COMPRESS[form](builders.mtty()))
    assert js("inspect", state)["layout"] == "mtty"
    result = run("verify", path)
    assert isinstance(result.exception, ImageError)
    assert f"not a vfio-mig image: it is compressed with {form}; unpack it first: {form} -dc" in str(result.exception)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("form", "pack"), [(0, bytes), (1, gzip.compress), (2, bz2.compress), (3, lzma.compress)])
def test_what_virsh_save_wrote_is_looked_into(
    form: int, pack: Callable[[bytes], bytes], order: str, tmp_path: Path
) -> None:
    path = tmp_path / "vm.save"
    path.write_bytes(libvirt(pack(stream("mtty_pc")), form=form, order=order))
    report = js("inspect", path)
    names = ["libvirt-save", *([["gzip", "bzip2", "xz"][form - 1]] if form else [])]
    assert (report["kind"], report["wrapping"], report["problems"]) == ("qemu-stream", names, [])
    (header,) = [one["values"] for one in report["sections"] if one["name"] == "libvirt"]
    assert header["domain"] == "vm1"
    assert header["xml_size"] == len(XML)
    assert (header["version"], header["stream_at"], header["was_running"]) == (2, 1024, True)
    assert js("extract", path, tmp_path / "out")["files"] == ["vfio0.state", "vfio0.config", "stream.json"]
    values = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert (values["libvirt"]["domain"], values["wrapping"]) == ("vm1", names)


def test_a_whole_file_of_libvirt_may_be_compressed_again(tmp_path: Path) -> None:
    path = tmp_path / "vm.save.gz"
    path.write_bytes(gzip.compress(libvirt(gzip.compress(stream("mtty_pc")), form=1)))
    assert js("inspect", path)["wrapping"] == ["gzip", "libvirt-save", "gzip"]


def test_offsets_of_mapped_memory_are_those_of_the_file(tmp_path: Path) -> None:
    """QEMU's own stream at 8192: behind a hole, as QEMU left it, and behind libvirt's header, as its form `sparse`."""
    content, path = stream("mappedoff10"), tmp_path / "file"
    path.write_bytes(content)
    report = js("inspect", path)
    assert (report["wrapping"], report["problems"]) == (["offset"], [])
    assert report["sections"][0]["values"]["proved"]
    path.write_bytes(libvirt(content[8192:], form=6, size=8192))
    report = js("inspect", path)
    assert (report["wrapping"], report["problems"]) == (["libvirt-save"], [])
    assert report["sections"][0]["values"]["proved"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (libvirt(b"")[:80], "libvirt's header is cut off at byte 80"),
        (libvirt(b"", version=9), "libvirt's header has version 9, which is not known"),
        (libvirt(b"", form=7), "libvirt has stored the stream in form 7, which is not known"),
        (libvirt(b"")[:500], "libvirt's header promises 932 bytes of XML, 408 are there"),
        (libvirt(b""), "empty"),
        (libvirt(b"nothing of QEMU's"), "what follows libvirt's header is not a QEMU stream"),
        (libvirt(b"x").replace(b"QemudSave", b"QemudPart"), "libvirt has not finished this save; save it again"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-9], "compressed with gzip: cut off"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-8] + bytes(8), "compressed with gzip: damaged"),
        (gzip.compress(b"x", mtime=0) + b"more", "compressed with gzip: damaged"),
        (bz2.compress(b"x" * 1000)[:-9], "compressed with bzip2: cut off"),
        (b"BZh9" + b"no blocks" * 9, "compressed with bzip2: damaged"),
        (lzma.compress(b"x" * 1000)[:-20], "compressed with xz: cut off"),
        (b"\xfd7zXZ\0" + bytes(50), "compressed with xz: damaged"),
        (gzip.compress(b"", mtime=0), "empty"),
        (b"\x89LZO\0\r\n\x1a\n", "compressed with lzop, which is not read here; unpack it first: lzop -dc FILE"),
        (b"\x04\x22\x4d\x18", "compressed with lz4, which is not read here; unpack it first: lz4 -dc FILE"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "extract", "diff"])
def test_what_is_broken_around_it_is_said_and_leaves_nothing(
    command: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    more = {"inspect": [], "extract": [tmp_path / "out"], "diff": [path]}[command]
    result = run(command, path, *more)
    assert isinstance(result.exception, ImageError)
    assert str(result.exception).startswith(f"{path}: ")
    assert problem in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_zstd_is_known_and_it_is_said_how_to_unpack_it(tmp_path: Path) -> None:
    path, packed = tmp_path / "file", b"\x28\xb5\x2f\xfd rest"
    path.write_bytes(packed)
    result = run("inspect", path)
    assert "compressed with zstd, which is not read here; unpack it first: zstd -dc FILE" in str(result.exception)
    path.write_bytes(libvirt(packed, form=5))
    result = run("inspect", path)
    assert "unpack it first: tail -c +1025 FILE | zstd -dc > OTHER" in str(result.exception)


def test_a_small_file_that_unpacks_to_too_much_ends_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb"
    for form in COMPRESS.values():
        path.write_bytes(form(bytes(8 << 20)))
        assert path.stat().st_size < 10_000
        assert js("inspect", path)["state_bytes"] == 8 << 20
        with monkeypatch.context() as patch:
            patch.setattr(wrapped, "UNPACKED_MAX", (8 << 20) - 1)
            result = run("inspect", path)
        assert isinstance(result.exception, HostError)
        assert "more than 8388607 bytes when unpacked; unpack it first: " in str(result.exception)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120), st.sampled_from(sorted(COMPRESS)))
def test_any_bytes_behind_a_good_beginning_give_a_report_or_an_error_of_ours(junk: bytes, at: int, form: str) -> None:
    content = COMPRESS[form](b"some content that is packed")
    source = BufferSource(content[:at] + junk)
    if wrapped.compression(source.read(0, 16)) is not None:
        with suppress(ImageError):
            wrapped.unpacked(source, form).close()


# What is not whole is not passed on as if it were ---------------------------------------------------------------------


def cut(name: str) -> bytes:
    content = stream("mtty_pc")
    (device,) = qemu.read_stream(BufferSource(content)).devices
    (_, (at, size)) = device.frames  # a header before the VM was stopped, the ports behind it
    return {"memory": content[:20_000], "state": content[: at + 10], "behind": content[: at + size + 400]}[name]


@pytest.mark.parametrize(
    ("name", "file", "size"),
    [("memory", "vfio0.state.incomplete", 24), ("state", "vfio0.state.incomplete", 24), ("behind", "vfio0.state", 96)],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_extract_of_a_cut_stream_writes_what_there_is_and_says_so(
    name: str, file: str, size: int, tmp_path: Path, *, as_json: bool
) -> None:
    path, into = tmp_path / "cut", tmp_path / "out"
    path.write_bytes(cut(name))
    problems = js("inspect", path)["problems"]
    assert problems
    result = run(*(["--json"] if as_json else []), "extract", path, into)
    assert isinstance(result.exception, ImageError)
    assert result.exception.exit_code == 6
    assert "not all of the stream could be taken apart" in str(result.exception)
    assert (into / file).stat().st_size == size
    for problem in problems:
        assert f"vfio-mig: warning: {path}: {problem}" in result.stderr.splitlines()
    values = json.loads((into / "stream.json").read_text())
    assert values["complete"] is False
    assert values["devices"][0]["state"] == file
    assert values["devices"][0]["complete"] is (file == "vfio0.state")
    if as_json:
        report = json.loads(result.stdout)
        assert (report["complete"], report["problems"]) == (False, problems)
        assert file in report["files"]


def test_every_way_to_look_at_a_cut_stream_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(cut("state"))
    for words in ([], ["--section", "stream"], ["--section", "vfio0.device"], ["--section", "vfio0.device", "--hex"]):
        result = run("inspect", path, *words)
        assert result.exit_code == 0
        assert "vfio0: the end of its state was not found" in result.stderr, words


def test_a_whole_stream_is_extracted_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(stream("mtty_two"))
    result = run("-q", "extract", path, tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "stream.json",
        "vfio0.config",
        "vfio0.state",
        "vfio1.config",
        "vfio1.state",
    ]
