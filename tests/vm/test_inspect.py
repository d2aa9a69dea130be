# SPDX-License-Identifier: MIT
"""What `vfio-mig inspect` and `diff` say of images saved from real devices, next to what the drivers say themselves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.mtty import STATE_SIZE, held_mtty, set_scratch
from tools.lab.sample import gpu, held, host
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.lab.sample.held import Side

pytestmark = pytest.mark.slow  # what is printed is the program's, not the kernel's

REGISTER: Final = 0x5000
FENCE: Final = (0x00100001, 0x001FF003)  # 0x100000 to 0x200000, valid, X tiled, 512 bytes


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


def section(report: Any, name: str) -> Any:
    (found,) = [one["values"] for one in report["sections"] if one["name"] == name]
    return found


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with held.side(tmp_path / "guest.mem") as made:
        yield made


def pages_of(parts: Any, name: str) -> dict[int, int]:
    """Return graphics address: guest-physical address of each mapped page."""
    (part,) = [one for one in parts if one["part"] == name]
    assert part["runs"]["count"] == len(part["runs"]["listed"])
    return {run["gma"] + at: run["gpa"] + at for run in part["runs"]["listed"] for at in range(0, run["size"], PAGE)}


def test_an_image_says_what_the_driver_says_of_its_vgpu(side: Side, tmp_path: Path) -> None:
    guest, instance = side.guest, side.instance
    engine = gpu.Engine(guest)
    held.run_some_work(guest, engine, 4)
    guest.bind(3, high=True)
    guest.device.set_fence(1, *FENCE)
    guest.device.make_ppgtt(4, [0x7000])
    cli.run("stop", side.name, warm=True)
    target, _ = guest.bind()
    context = engine.context(gpu.store_dword(target, 0xFEEDC0DE), gpu.USER_INTERRUPT)
    engine.submit(context)
    js("save", side.name, tmp_path / "image", "--memory", side.memory_option)
    report = js("inspect", tmp_path / "image")
    assert (report["layout"], report["problems"]) == ("gvt-rfc", [])

    layout = instance.layout()
    info = section(report, "pvinfo")
    assert (info["vgt_id"], info["mappable_base"], info["mappable_size"]) == (
        layout.vgpu_id,
        layout.guest_low,
        layout.low_size,
    )
    assert (info["nonmappable_base"], info["nonmappable_size"]) == (layout.guest_high, layout.high_size)
    assert section(report, "header")["vgpu_type"] == "8"
    config = section(report, "cfg")
    assert (config["vendor"], config["device"]) == (0x8086, host.parameter("device_id"))
    assert [one["name"] for one in config["capabilities"]] == ["msi", "power-management"]

    parts = section(report, "gtt")["parts"]
    low, high = pages_of(parts, "low"), pages_of(parts, "high")
    hardware = instance.hw_ggtt()
    low_entries = layout.low_size // PAGE
    for gma, gpa in low.items():
        assert hardware[(gma - layout.guest_low) // PAGE] == gpa | 1
    for gma, gpa in high.items():
        assert hardware[low_entries + (gma - layout.guest_high) // PAGE] == gpa | 1
    assert sum(entry & 1 for entry in hardware) == len(low) + len(high)
    assert sorted({*low.values(), *high.values()}) == instance.pinned()

    fence = section(report, "fences")["fences"][1]
    assert (fence["valid"], fence["tiling"], fence["pitch"]) == (True, "x", 512)
    shift = layout.host_low - layout.guest_low
    assert instance.hw_fence()[1] == (fence["start"] + shift) | 1 | (fence["end"] - PAGE + shift | 3) << 32

    assert section(report, "ppgtt")["roots"]["listed"] == [{"level": 4, "pdp": [0x7000]}]
    (workload,) = section(report, "workload")["workloads"]["listed"]
    (element,) = workload["elements"]
    assert instance.queue() == [(workload["ring_id"], element["context_id"], element["lrca"] | gpu.DESC_FLAGS)]
    assert [(one["name"], one.get("address")) for one in element["commands"]] == [
        ("MI_STORE_DATA_IMM", target),
        ("MI_USER_INTERRUPT", None),
        ("MI_NOOP", None),
    ]


@pytest.mark.core
def test_what_happens_to_a_vgpu_between_two_images_is_named_and_parts_make_an_image_again(
    side: Side, tmp_path: Path
) -> None:
    guest = side.guest
    old, new = tmp_path / "old", tmp_path / "new"
    js("save", side.name, old, "--memory", side.memory_option, "--leave-running")
    js("save", side.name, new, "--memory", side.memory_option, "--leave-running")
    assert js("diff", old, new)["equal"]
    guest.device.set_reg(REGISTER, 0x1234)
    guest.device.set_fence(2, *FENCE)
    gma, gpa = guest.bind(2)
    guest.memory.write(gpa, b"\1" * PAGE)
    js("save", side.name, tmp_path / "third", "--memory", side.memory_option)
    found = js("diff", old, tmp_path / "third")["differences"]
    names = {(one["section"], one["name"]): one for one in found}
    assert names.keys() == {
        ("vreg", f"{REGISTER:#x}"),
        ("vreg", "fence2"),
        ("gtt", f"gma {gma:#x}"),
        ("dirty", "gpa 0x0"),
        ("pages", f"gpa {gpa:#x}"),
    }
    assert names["vreg", f"{REGISTER:#x}"]["new"] == 0x1234
    entry = names["gtt", f"gma {gma:#x}"]
    assert (entry["size"], entry["old"], entry["new"]["gpa"]) == (2 * PAGE, None, gpa)
    assert names["dirty", "gpa 0x0"]["new"]["ranges"] == [[gpa, 2 * PAGE]]
    assert names["pages", f"gpa {gpa:#x}"]["size"] == 2 * PAGE
    assert cli.run("diff", "--exit-code", old, tmp_path / "third", rc=1, warm=True).stdout

    js("extract", tmp_path / "third", tmp_path / "parts")
    js("pack", tmp_path / "parts", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "third").read_bytes()
    guest.device.set_reg(REGISTER, 0)
    js("restore", side.name, tmp_path / "again", "--memory", side.memory_option, "--start")
    assert guest.device.reg(REGISTER) == 0x1234


def test_a_v2_stream_of_the_sample_driver_is_decoded_down_to_its_image(tmp_path: Path) -> None:
    with host.loaded(v2=7, migratable=0), held.side(tmp_path / "guest.mem") as side:
        (side.instance.debugfs / "v2_extra_bytes").write_text("65536")
        side.guest.device.set_reg(REGISTER, 0x1234)
        js("save", side.name, tmp_path / "image")
        report = js("inspect", tmp_path / "image")
        layout = side.instance.layout()
    assert (report["layout"], report["problems"]) == ("gvt_sample", [])
    stream = section(report, "stream")
    assert (stream["vgpu_type"], stream["filler"], stream["total"]) == (host.SMALL, 65536, report["state_bytes"])
    assert section(report, "pvinfo")["nonmappable_base"] == layout.guest_high
    registers = {one["offset"]: one["value"] for one in section(report, "vreg")["registers"]["listed"]}
    assert registers[REGISTER] == 0x1234


@pytest.mark.mtty
def test_a_stream_of_mtty_shows_the_registers_of_its_ports(tmp_path: Path) -> None:
    with held_mtty() as name:
        set_scratch(name, 0x5A)
        js("save", name, tmp_path / "image")
        report = js("inspect", tmp_path / "image")
        assert (report["layout"], report["problems"], report["state_bytes"]) == ("mtty", [], STATE_SIZE)
        assert report["header"]["device"]["driver"] == "mtty"
        assert section(report, "header")["ports"] == 2
        assert section(report, "port0")["registers"]["scr"] == 0x5A
        assert section(report, "port0")["fifo_size"] == 16
        set_scratch(name, 0xA5)
        js("save", name, tmp_path / "other")
        (difference,) = js("diff", tmp_path / "image", tmp_path / "other")["differences"]
        assert (difference["name"], difference["old"], difference["new"]) == ("port0.registers.scr", 0x5A, 0xA5)
