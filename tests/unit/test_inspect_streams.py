# SPDX-License-Identifier: MIT
"""Streams of v2 drivers and of QEMU in words, made by the rules of their formats; one QEMU stream is QEMU's own."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_image_gvt import image
from tools.fuzz import builders
from vfio_mig.decode import qemu, qemu_parts, streams
from vfio_mig.decode.section import LISTED_MAX, listed, plain
from vfio_mig.errors import ImageError
from vfio_mig.image.bytesource import BufferSource, FileSource, PartSource, PiecesSource, find

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_mig.decode.qemu_parts import QemuStream
    from vfio_mig.decode.section import Decoded

QEMU = "qemu-system-x86_64"


def decode(content: bytes, driver: str = "") -> Decoded:
    return streams.decode(BufferSource(content), driver=driver)


def values(decoded: Decoded, name: str) -> dict[str, Any]:
    (section,) = [one for one in decoded.sections if one.name == name]
    return section.values


def test_mtty_is_decoded_port_by_port() -> None:
    # The example of a real one in the facts on VFIO migration, section 5
    content = bytes.fromhex(
        "4e2c3e8c89099d7e010000000000000002000000000000000000000300000"
        "05a" + "00" * 25 + "100000" + "00000000000000a5" + "00" * 25 + "100000"
    )
    assert len(content) == 96
    decoded = decode(content)
    assert (decoded.layout, decoded.problems) == ("mtty", [])
    assert values(decoded, "header") == {"major": 1, "minor": 0, "ports": 2, "flags": 0}
    assert values(decoded, "port0")["registers"]["lcr"] == 3
    assert values(decoded, "port0")["registers"]["scr"] == 0x5A
    assert values(decoded, "port1")["registers"]["scr"] == 0xA5
    assert values(decoded, "port1")["fifo_size"] == 16
    assert [(one.offset, one.size) for one in decoded.sections] == [(0, 24), (24, 36), (60, 36)]


def test_mtty_fields_are_where_the_driver_has_them() -> None:
    port = bytes(range(1, 9)) + b"FIFO".ljust(16, b"\0") + bytes((1, 2, 3, 1, 1, 0xEE)) + struct.pack("<H", 600)
    decoded = decode(builders.mtty(0)[:16] + struct.pack("<II", 1, 7) + port + bytes((0xC1, 16, 14, 0xEE)))
    found = values(decoded, "port0")
    assert decoded.problems == []
    assert found["fifo"][:8] == b"FIFO".hex()
    assert [found[key] for key in ("head", "tail", "count", "dlab", "overrun")] == [1, 2, 3, 1, 1]
    assert [found[key] for key in ("divisor", "fcr", "fifo_size", "trigger")] == [600, 0xC1, 16, 14]
    assert list(found["registers"].values()) == list(range(1, 9))


def test_a_cut_mtty_says_so() -> None:
    decoded = decode(builders.mtty()[:70])
    assert decoded.problems == ["70 bytes, 2 ports have 96"]
    assert [one.name for one in decoded.sections] == ["header", "port0"]


def test_our_sample_is_decoded_down_to_the_image_in_it() -> None:
    state = image()
    decoded = decode(builders.gvt_sample(state, filler=100, pages=2))
    assert (decoded.layout, decoded.problems) == ("gvt_sample", [])
    assert values(decoded, "stream")["vgpu_type"] == "GVTg_V4_8"
    assert values(decoded, "records") == {"dirty_pages": 2, "image": len(state), "image_at": 64 + 100 + 2 * 4096 + 16}
    (config,) = [one for one in decoded.sections if one.name == "cfg"]
    assert config.offset == 64 + 100 + 2 * 4096 + 16 + 0x220
    assert config.values["device"] == 0x1912


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (builders.gvt_sample(b"")[:40], "the header is cut off at byte 40"),
        (builders.gvt_sample(b"", total=99), "the header says 99"),
        (builders.gvt_sample(b"x" * 9)[:-1], "record at 0x50: number 0, type 2, 9 bytes: impossible"),
        (builders.gvt_sample(b"")[:-20], "16 bytes of filler promised"),
        (builders.gvt_sample(b"")[:-10], "record at 0x50: cut off"),
        (builders.gvt_sample(b"") + b"\0", "1 bytes behind the image"),
        (builders.gvt_sample(bytes(600)), "type 0 with 0 bytes instead of HEAD"),
    ],
)
def test_a_broken_one_of_our_sample_says_where(content: bytes, problem: str) -> None:
    decoded = decode(content)
    assert decoded.layout == "gvt_sample"
    assert any(problem in one for one in decoded.problems)


@pytest.mark.parametrize(
    ("content", "driver", "layout"),
    [
        (builders.mlx5(5, 9), "", "mlx5"),
        (builders.mlx5(5)[24:], "", "mlx5-or-virtio"),
        (builders.mlx5(5)[24:], "mlx5_vfio_pci", "mlx5"),
        (builders.mlx5(5)[24:], "virtio_vfio_pci", "virtio"),
        (builders.xe((3, 16)), "", "xe"),
        (builders.qat(), "", "qat"),
        (builders.hisi(), "", "hisi_acc"),
        (builders.hisi(0xCDCDCDCDFEEDAACC), "", "hisi_acc"),
        (image(), "", "gvt-rfc"),
        (b"", "", "unknown"),
        (b"something else", "", "unknown"),
        (bytes(100), "", "unknown"),
        (struct.pack("<QII", 100, 0, 0) + bytes(5), "", "unknown"),
    ],
)
def test_a_stream_is_known_by_its_first_bytes(content: bytes, driver: str, layout: str) -> None:
    decoded = decode(content, driver)
    assert decoded.layout == layout
    assert decoded.problems == []


def test_what_other_drivers_streams_have_is_listed() -> None:
    records = values(decode(builders.mlx5(5, 9)), "records")["records"]
    assert records == {
        "count": 3,
        "listed": [
            {"offset": 0, "size": 8, "tag": 1, "tag_name": "stop-copy-size", "flags": 1},
            {"offset": 24, "size": 5, "tag": 0, "tag_name": "data", "flags": 0},
            {"offset": 45, "size": 9, "tag": 0, "tag_name": "data", "flags": 0},
        ],
    }
    packets = values(decode(builders.xe((3, 16), (6, 4))), "records")["records"]["listed"]
    assert [(one["name"], one["size"]) for one in packets] == [
        ("descriptor", 8),
        ("ggtt", 16),
        ("vram", 4),
        ("trailer", 0),
    ]
    assert values(decode(builders.qat()), "header") == {
        "magic": 0xADF5CAEA,
        "version": 1,
        "header_size": 16,
        "sections": 5,
        "size": 4096,
    }
    assert values(decode(builders.hisi()), "header")["version"] == 2
    assert values(decode(b"something else"), "state") == {"size": 14, "first_bytes": b"something else".hex()}


def test_records_that_do_not_fit_end_the_walk() -> None:
    decoded = decode(builders.mlx5(5, 9)[:-1])
    assert decoded.problems == ["record at 0x2d: 9 bytes promised, 8 left"]
    assert values(decoded, "records")["records"]["count"] == 2


def test_a_search_finds_what_lies_across_its_blocks() -> None:
    content = bytes((1 << 20) - 2) + b"mark" + bytes(10)
    assert find(BufferSource(content), b"mark", 0) == (1 << 20) - 2
    assert find(BufferSource(content), b"mark", (1 << 20) - 1) == -1
    assert find(BufferSource(content), b"mark", 0, (1 << 20) + 1) == -1
    assert find(BufferSource(content), b"mark", 0, (1 << 20) + 2) == (1 << 20) - 2


@settings(deadline=None)
@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=6))
def test_pieces_of_a_window_read_as_if_they_were_joined(content: bytes, frames: list[tuple[int, int]]) -> None:
    frames = [(at, min(size, max(0, len(content) - at))) for at, size in frames]
    joined = b"".join(content[at : at + size] for at, size in frames)
    source = PiecesSource(BufferSource(content), frames)
    assert source.size == len(joined)
    for at, size in [(0, len(joined)), *frames]:
        assert source.read(at, size) == joined[at : at + size]
        assert PartSource(source, at, size).read(1, 5) == joined[at : at + size][1:6]


# QEMU ----------------------------------------------------------------------------------------------------------------


def read(content: bytes) -> QemuStream:
    return qemu.read_stream(BufferSource(content))


def states(stream: QemuStream, content: bytes) -> list[bytes]:
    return [b"".join(content[at : at + size] for at, size in device.frames) for device in stream.devices]


def test_the_vfio_devices_of_a_stream_are_taken_out() -> None:
    pieces = [builders.mtty()[:24], builders.mtty()[24:90], builders.mtty()[90:]]
    content = builders.qemu_stream(pieces, [b"other"])
    stream = read(content)
    assert (stream.machine, stream.complete, stream.problems) == ("pc-q35-7.2", True, [])
    assert states(stream, content) == [builders.mtty(), b"other"]
    assert [device.name for device in stream.devices] == ["0000:00:07.0/vfio", "0000:00:08.0/vfio"]
    assert stream.devices[0].config is not None
    at, size = stream.devices[0].config
    assert content[at : at + size] == builders.DEVICE_CONFIG
    assert qemu_parts.device_config(content[at : at + size])["device"] == 0x1912
    assert {kind.name: kind.how for kind in stream.kinds.values()} == {
        "ram": "parsed",
        "0000:00:07.0/vfio": "parsed",
        "0000:00:08.0/vfio": "parsed",
        "timer": "footer",
    }


def test_a_state_full_of_markers_and_footers_is_still_taken_whole() -> None:
    trap = builders.be64(builders.END) + b"\x7e\0\0\0\7\0" + builders.be64(builders.DATA, 4) + b"QEVM"
    content = builders.qemu_stream([trap, trap])
    assert states(read(content), content) == [trap * 2]


def test_a_stream_without_footers_goes_as_far_as_its_sections_are_known() -> None:
    content = builders.qemu_stream([builders.mtty()], footer=False)
    stream = read(content)
    assert (stream.problems, states(stream, content)) == ([], [builders.mtty()])
    content = builders.qemu_stream(
        [builders.mtty()], footer=False, tail=builders.begin(9, b"timer", bytes(9), footer=False)
    )
    stream = read(content)
    assert states(stream, content) == [builders.mtty()]
    assert "'timer': its length is not known, and the stream has no footers" in stream.problems[0]


def test_behind_what_is_not_understood_vfio_sections_are_searched_for() -> None:
    late = builders.begin(0x30, b"vfio", builders.be64(builders.SETUP, builders.END))
    late += builders.part(0x30, builders.frame(b"late") + builders.be64(builders.END))
    content = builders.qemu_stream([b"early"], tail=b"\xfe junk " + builders.be64(builders.DATA) + b" junk" + late)
    stream = read(content)
    assert not stream.complete
    assert "type 0xfe is unknown; behind it VFIO sections are only searched for" in stream.problems[0]
    assert states(stream, content) == [b"early", b"late"]
    assert stream.kinds[0x30].how == "searched"


def test_a_part_that_cannot_be_taken_is_passed_over_and_said() -> None:
    bad = builders.part(7, builders.be64(builders.MARK + 9) + b"unknown")
    good = builders.part(7, builders.frame(b"good") + builders.be64(builders.END))
    content = builders.qemu_stream([b"first"], tail=bad + good + b"\0")
    stream = read(content)
    assert stream.complete
    assert states(stream, content) == [b"firstgood"]
    (problem,) = stream.problems
    assert "'0000:00:07.0/vfio' at 0x" in problem
    assert "marker 0xffffffffef100009 is unknown; passed over up to its footer" in problem
    ram = builders.qemu_stream([b"first"], tail=builders.part(2, builders.be64(0x400)) + b"\0")
    assert "'ram' at 0x" in read(ram).problems[0]


def test_a_cut_stream_gives_what_came_before() -> None:
    whole = builders.qemu_stream([b"first", b"second"])
    content = whole[: whole.index(b"second") + 3]
    stream = read(content)
    assert states(stream, content) == [b"first"]
    assert not stream.complete
    assert any("6 bytes promised" in one or "no end found" in one for one in stream.problems)


@pytest.mark.parametrize("content", [b"", b"QEVM", b"QEVM\0\0\0\2", b"QEVN\0\0\0\3"])
def test_what_is_no_stream_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="no QEMU migration stream"):
        read(content)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_in_a_stream_give_a_report(junk: bytes, at: int) -> None:
    whole = builders.qemu_stream([builders.mtty()])
    at = min(at * 12, len(whole))
    content = b"QEVM\0\0\0\3" + (whole[:at] + junk + whole[at:])[8:]
    for device in read(content).devices:
        for start, size in device.frames:
            assert start + size <= len(content)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(builders.state_seeds()))
def test_any_bytes_are_a_state_of_some_layout(junk: bytes, seed: bytes) -> None:
    for content in (junk, seed + junk, seed[: len(junk)] + junk):
        decoded = decode(content)
        json.dumps([one.as_dict() for one in decoded.sections])
        assert all(one.offset >= 0 for one in decoded.sections)


@pytest.fixture(scope="module")
def own_stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Let a QEMU without a guest write a stream of itself."""
    path = tmp_path_factory.mktemp("qemu") / "stream"
    program = shutil.which(QEMU)
    if program is None:
        pytest.skip(f"{QEMU} is not installed")
    words = [program, "-M", "pc", "-m", "8", "-S", "-display", "none", "-accel", "tcg", "-nodefaults", "-qmp", "stdio"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(command: str, **arguments: str) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            process.stdin.flush()
            while "return" not in (answer := json.loads(process.stdout.readline())):
                assert "error" not in answer, answer
            return answer["return"]

        try:
            ask("qmp_capabilities")
            ask("migrate", uri=f"exec:cat > {path}")
            end = time.monotonic() + 30
            while ask("query-migrate").get("status") != "completed":
                assert time.monotonic() < end
                time.sleep(0.05)
            ask("quit")
        finally:
            process.kill()
    return path.read_bytes()


def test_a_stream_of_qemus_own_is_walked_to_its_end(own_stream: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(own_stream)
    with path.open("rb") as file:
        stream = qemu.read_stream(FileSource(file))
    assert stream.complete
    assert stream.problems == []
    assert stream.machine is not None
    assert stream.machine.startswith("pc-i440fx-")
    assert {"ram", "timer", "cpu", "globalstate"} <= {kind.name for kind in stream.kinds.values()}
    (ram,) = [kind for kind in stream.kinds.values() if kind.name == "ram"]
    assert (ram.how, ram.parts >= 3) == ("parsed", True)


def described(content: bytes, at: int, device: dict[str, Any]) -> bytes:
    """Add a section to a stream's description, before the *at*-th."""
    start = content.rindex(b"\0\6") + 2
    values = json.loads(content[start + 4 :])
    values["devices"].insert(at, device)
    text = json.dumps(values).encode()
    return content[:start] + struct.pack(">I", len(text)) + text


def test_a_vfio_device_put_into_qemus_own_stream_is_found(own_stream: bytes) -> None:
    """No device of this host can be migrated by a QEMU, so its sections are put where QEMU would write them."""
    before = own_stream.index(b"\4\0\0\0\0\5timer")
    device = builders.begin(0x77, b"0000:00:05.0/vfio", builders.be64(builders.SETUP, builders.END))
    device += builders.part(0x77, builders.frame(builders.mtty()) + builders.be64(builders.END), last=True)
    config = builders.be64(builders.CONFIG) + builders.DEVICE_CONFIG + builders.be64(builders.END)
    after = own_stream.index(b"\4", own_stream.index(b"globalstate") - 8)
    config = builders.begin(0x77, b"0000:00:05.0/vfio", config, full=True)
    undescribed = own_stream[:before] + device + own_stream[before:after] + config + own_stream[after:]
    stream = read(undescribed)
    assert (stream.complete, stream.proved) == (False, False)
    assert stream.problems == [
        "QEMU's own description has a section 'globalstate' 0 where '0000:00:05.0/vfio' 0 is found"
    ]
    size = 8 + len(builders.DEVICE_CONFIG) + 8
    content = described(undescribed, -1, {"name": "0000:00:05.0/vfio", "instance_id": 0, "size": size})
    stream = read(content)
    assert (stream.complete, stream.problems) == (True, [])
    assert states(stream, content) == [builders.mtty()]
    assert stream.devices[0].config is not None
    assert stream.devices[0].config[1] == len(builders.DEVICE_CONFIG)


def deep(kind: type) -> Any:
    """Return lists or objects in each other, too deep for a recursion."""
    found: Any = 1
    for _ in range(100_000):
        found = [found] if kind is list else {"x": found}
    return found


def test_what_comes_of_a_file_is_cut_to_what_can_be_read() -> None:
    assert listed([1, 2]) == {"count": 2, "listed": [1, 2]}
    assert listed([1, 2], 5)["count"] == 5
    assert listed([], 0) == {"count": 0, "listed": []}
    many = list(range(LISTED_MAX + 2))
    assert listed(many) == {"count": LISTED_MAX + 2, "listed": many[:-2]}
    assert plain(many)[-1] == "… 2 more"
    for nested in (deep(list), deep(dict)):
        assert len(json.dumps(plain(nested))) < 10_000
