# SPDX-License-Identifier: MIT
"""Between images and the streams that a real QEMU writes and reads: its ``migrate file:`` and ``exec:``, both ways.

The device is the kernel's own mtty. QEMU is the one that runs this VM, as Debian 12's does not speak protocol v2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from tools.l2 import moves
from tools.l2.machine import GuestError
from tools.lab import cli
from tools.lab.mtty import STATE_SIZE, held_mtty, instance, scratch, set_scratch
from tools.lab.qemu import SLOT, QemuVm, running
from vfio_mig.vm.monitor import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.mtty

DEVICES: Final = Path("/sys/bus/mdev/devices")
# mtty logs its dirty pages, but Debian's kernels lack what QEMU would read the log by (IOMMUFD)
PROPERTIES: Final = f"{moves.DEVICE},x-device-dirty-page-tracking=off"
MEGABYTES: Final = 16
SECTION: Final = f"0000:00:{SLOT:02x}.0/vfio"
OTHER_SLOT: Final = SLOT + 1
OTHER_SECTION: Final = f"0000:00:{OTHER_SLOT:02x}.0/vfio"


class Way(NamedTuple):
    """How QEMU writes a stream: a format of the URI, and capabilities that both sides need."""

    uri: str
    capabilities: Sequence[str] = ()


WAYS: Final = {
    "file": Way("file:{}"),
    "exec": Way("exec:cat >{}"),
    "mapped": Way("file:{}", ("mapped-ram",)),
    "mapped-multifd": Way("file:{}", ("mapped-ram", "multifd")),
}


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


@contextlib.contextmanager
def qemu(name: str, way: Way, *behind: str, more: str = "") -> Iterator[QemuVm]:
    """Have a QEMU with an mtty; its guest's CPU halts at once."""
    with (
        tempfile.TemporaryDirectory(prefix="q", dir="/run") as directory,
        running(
            DEVICES / name,
            Path(directory) / "vm",
            ram=f"memory-backend-memfd,id=ram,size={MEGABYTES}M,share=on",
            megabytes=MEGABYTES,
            program=shlex.split(os.environ["VFIO_MIG_QEMU"]),
            device=PROPERTIES + more,
            behind=behind,
        ) as (process, qtest),
    ):
        vm = QemuVm(name, process, qtest, Path(directory) / "vm")
        with vm.qmp:
            if way.capabilities:
                wanted = [{"capability": one, "state": True} for one in way.capabilities]
                vm.qmp.execute("migrate-set-capabilities", capabilities=wanted)
            yield vm
            vm.quit()


def written(vm: QemuVm, way: Way, stream: Path) -> Path:
    """Have a VM with its devices written to a stream."""
    assert moves.migrate(vm.qmp, way.uri.format(stream)).vfio_bytes >= STATE_SIZE
    return stream


@pytest.mark.parametrize("kind", ["file", "mapped-multifd"])
def test_a_device_goes_from_qemu_s_stream_into_another_one_and_back_into_qemu(kind: str, tmp_path: Path) -> None:
    way = WAYS[kind]
    with instance() as name, qemu(name, way) as vm:
        set_scratch(name, 0x5A)
        stream = written(vm, way, tmp_path / "stream")

    taken = js("extract", stream, tmp_path / "taken.vfm", "--device", SECTION)
    assert (taken["device"], taken["layout"], taken["state_bytes"]) == (SECTION, "mtty", STATE_SIZE)
    assert taken["problems"] == []
    assert js("verify", tmp_path / "taken.vfm")["protocol"] == "mainline-v2"
    with held_mtty() as name:
        checks = {one["name"]: one["result"] for one in js("check", tmp_path / "taken.vfm", name)["checks"]}
        # what QEMU's stream does not say
        assert (checks["device-type"], checks["machine"], checks["state"]) == ("note", "note", "ok")
        js("restore", name, tmp_path / "taken.vfm", "--start")
        assert scratch(name) == 0x5A
        js("save", name, tmp_path / "same.vfm")
        assert js("diff", tmp_path / "taken.vfm", tmp_path / "same.vfm")["counts"].keys() == {"image"}
        js("start", name)
        set_scratch(name, 0xA5)
        js("save", name, tmp_path / "changed.vfm")

    packed = js("pack", tmp_path / "changed.vfm", tmp_path / "packed", "--into", stream)
    assert (packed["device"], packed["state_bytes"], packed["warnings"]) == (SECTION, STATE_SIZE, [])
    with instance() as name, qemu(name, way, *moves.INCOMING) as vm:
        moves.receive(vm.qmp, f"file:{tmp_path / 'packed'}")
        moves.await_running(vm.qmp)
        assert scratch(name) == 0xA5
        # and what QEMU writes of it is what was put in
        again = written(vm, way, tmp_path / "again")
    js("extract", again, tmp_path / "again.vfm", "--device", SECTION)
    assert js("diff", tmp_path / "changed.vfm", tmp_path / "again.vfm")["counts"].keys() == {"image"}


@pytest.mark.parametrize("kind", ["exec", "mapped"])
def test_a_device_is_taken_out_of_what_qemu_writes_in_other_ways(kind: str, tmp_path: Path) -> None:
    with instance() as name, qemu(name, WAYS[kind]) as vm:
        set_scratch(name, 0x5A)
        stream = written(vm, WAYS[kind], tmp_path / "stream")
    js("extract", stream, tmp_path / "taken.vfm", "--device", "vfio0")
    sections = {one["name"]: one["values"] for one in js("inspect", tmp_path / "taken.vfm")["sections"]}
    assert sections["port0"]["registers"]["scr"] == 0x5A


def test_of_two_devices_the_user_chooses_one_and_the_other_stays(tmp_path: Path) -> None:
    way = WAYS["file"]
    with instance() as one, instance() as other:
        device = f"vfio-pci,sysfsdev={DEVICES / other},addr={OTHER_SLOT:#x},{PROPERTIES}"
        with qemu(one, way, "-device", device) as vm:
            set_scratch(one, 1)
            set_scratch(other, 2)
            stream = written(vm, way, tmp_path / "stream")
    cli.refused(
        *("pack", tmp_path / "x", tmp_path / "y", "--into", stream), code=7, words=("ENOENT",), warm=True
    )  # fmt: skip
    cli.refused(
        *("extract", stream, tmp_path / "image", "--device", "gpu"),
        code=2, words=("no VFIO device 'gpu'", SECTION, OTHER_SECTION), warm=True,
    )  # fmt: skip
    images = {}
    for number, section in enumerate((SECTION, OTHER_SECTION)):
        images[section] = tmp_path / f"{number}.vfm"
        js("extract", stream, images[section], "--device", section)
    cli.refused(
        *("pack", images[SECTION], tmp_path / "packed", "--into", stream),
        code=2, words=("2 VFIO devices", "--device", SECTION, OTHER_SECTION), warm=True,
    )  # fmt: skip
    js("pack", images[OTHER_SECTION], tmp_path / "packed", "--into", stream, "--device", SECTION)
    with instance() as one, instance() as other:
        device = f"vfio-pci,sysfsdev={DEVICES / other},addr={OTHER_SLOT:#x},{PROPERTIES}"
        with qemu(one, way, "-device", device, *moves.INCOMING) as vm:
            moves.receive(vm.qmp, f"file:{tmp_path / 'packed'}")
            moves.await_running(vm.qmp)
            assert (scratch(one), scratch(other)) == (2, 2)


def test_qemu_itself_puts_no_device_s_state_into_channels_beside_a_file(tmp_path: Path) -> None:
    """What docs/inspect.md says of multifd; if this fails, QEMU does by now, and the parser has something to learn."""
    with instance() as name:
        with (
            qemu(name, Way("", ("multifd",))) as vm,
            pytest.raises(RefusedError, match="requires multi-channel URIs"),
        ):
            moves.migrate(vm.qmp, f"file:{tmp_path / 'stream'}")
        with (
            qemu(name, WAYS["mapped-multifd"], more=",x-migration-multifd-transfer=on") as vm,
            pytest.raises(GuestError, match="Multifd device transfer requested but unsupported"),
        ):
            moves.migrate(vm.qmp, f"file:{tmp_path / 'stream'}")
