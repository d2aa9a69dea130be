# SPDX-License-Identifier: MIT
"""Protocol v2 on the real driver: the installed ``vfio-mig`` moves vGPUs of our kvmgt, loaded with ``migration=v2``."""

from __future__ import annotations

import errno
import json
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.gvt import kvmgt
from tools.lab.gvt.held import Side, side
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES, SEMAPHORE, Vgpu
from tools.lab.gvt.rfc import (
    MODULES,
    QUEUED,
    load_ours,
    load_stock,
    patched,
    queue_work,
    result_of,
    stored,
    view,
)
from tools.lab.vfio import v2
from tools.lab.vfio.raw import PAGE
from vfio_mig.decode import gvt_image

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from tools.gpu.control import Control

    MakeSide = Callable[[str], "Side"]

pytestmark = pytest.mark.gvt

EXT: Final = 0x100  # tools/kvmgt/gvt/migrate_image.h
FIXED_BYTES: Final = 3_021_968
"""An image of a ``_8``, with no page table and no work."""
RECORD: Final = struct.Struct("<II")

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours(None, "migration=v2")
    yield
    load_stock()


@pytest.fixture
def shm(resources: contextlib.ExitStack) -> Path:
    """Have a directory for what processes share."""
    return Path(resources.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))


@pytest.fixture
def make_side(resources: contextlib.ExitStack, shm: Path) -> MakeSide:
    """Make vGPUs that a process each holds, with memory of their own."""

    return lambda label: resources.enter_context(side(shm / label))


@pytest.fixture
def player(resources: contextlib.ExitStack, shm: Path) -> Vgpu:
    """Have a vGPU of this process, which is its guest's driver."""
    name = resources.enter_context(kvmgt.instance())
    return resources.enter_context(Vgpu.opened(name, shm / "player"))


def vfio_mig(*words: str | Path, rc: int = 0) -> Any:
    """Run the command in a fork of this process; its JSON."""
    return json.loads(cli.run("--json", *words, rc=rc, warm=True).stdout)


def queue(vgpu: Vgpu) -> None:
    """Have work that waits for the guest, and more queued behind it; leaves the vGPU in STOP."""
    queue_work(vgpu, wait=True, stop=lambda: v2.Client(vgpu.device.fd).go(v2.STOP))


def records(image: bytes) -> dict[int, bytes]:
    """Return the payloads of an image's records by their types."""
    found, at = {}, 0
    while at < len(image):
        kind, size = RECORD.unpack_from(image, at)
        found[kind] = image[at + RECORD.size : at + RECORD.size + size]
        at += RECORD.size + size
    assert at == len(image)
    return found


def sections(report: Any) -> dict[str, Any]:
    """Return what ``inspect`` tells of each section of the state."""
    return {one["name"]: one["values"] for one in report["sections"]}


def await_queue(a: Side) -> None:
    for engine, values in QUEUED.items():
        for number, value in enumerate(values):
            a.await_u32(result_of(engine, number), value)


def test_it_offers_v2_and_nothing_of_the_rfc(player: Vgpu) -> None:
    info = vfio_mig("info", player.name)
    assert (info["protocol"], info["migratable"]) == ("mainline-v2", True)
    client = v2.Client(player.device.fd)
    assert client.flags() == v2.FLAG_STOP_COPY | v2.FLAG_P2P
    assert client.state() == v2.RUNNING
    with pytest.raises(OSError) as failed:
        player.device.stop()
    assert failed.value.errno in {errno.ENOTTY, errno.EINVAL}


def test_the_state_has_the_rfc_s_records_and_one_of_ours(player: Vgpu) -> None:
    client = v2.Client(player.device.fd)
    told = client.data_size() if v2.HAS_PRE_COPY else FIXED_BYTES  # both are there since 6.2
    client.go(v2.STOP)
    state = client.save()
    assert told == FIXED_BYTES == len(state)
    assert list(records(state)) == [
        gvt_image.HEAD, gvt_image.CFG_SPACE, EXT, gvt_image.VREG, gvt_image.GTT, gvt_image.PPGTT, gvt_image.WORKLOAD,
    ]  # fmt: skip


def test_a_vgpu_at_work_moves_with_its_queue(player: Vgpu, make_side: MakeSide, gpu: Control, shm: Path) -> None:
    a, b = make_side("A"), make_side("B")
    queue(player)
    seen = view(player.device)
    vfio_mig("save", player.name, shm / "player.vfm")
    ext = sections(vfio_mig("inspect", shm / "player.vfm"))["ext"]
    assert (ext["queued"]["count"], ext["half_entries"]["count"]) == (4, 1)
    assert [one["engine"] for one in ext["queued"]["listed"]] == ["rcs", "rcs", "bcs", "bcs"]
    a.memory.bytes[:] = player.memory.bytes[:]
    vfio_mig("restore", a.name, shm / "player.vfm")
    assert view(a.device) == seen

    a.memory.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
    b.memory.bytes[:] = a.memory.bytes[:]
    since, untouched = gpu.last(), a.memory.bytes[:]
    cli.run("migrate", a.name, b.name, warm=True)
    await_queue(b)
    for engine, values in QUEUED.items():
        for number, value in enumerate(values):
            assert stored(gpu, since)[value] == b.at(result_of(engine, number))
    assert a.memory.bytes[:] == untouched
    assert b.device.guest_high() == a.device.guest_high()


def test_conform_finds_nothing_wrong() -> None:
    with kvmgt.instance() as one, kvmgt.instance() as other:
        report = vfio_mig("conform", one, "--second", other)
        wrong = [check for check in report["checks"] if check["outcome"] in {"fail", "warn"}]
        assert wrong == []
        assert sum(check["outcome"] == "pass" for check in report["checks"]) >= 110


def test_a_state_that_is_refused_changes_nothing(player: Vgpu, make_side: MakeSide, shm: Path) -> None:
    a = make_side("A")
    queue(player)
    vfio_mig("save", player.name, shm / "player.vfm")
    a.memory.bytes[:] = player.memory.bytes[:]
    vfio_mig("restore", a.name, shm / "player.vfm")
    client = v2.Client(a.device.fd)
    before = client.save()
    assert client.state() == v2.STOP
    seen = view(a.device)
    ext = before.index(b"GVT-EXT1")
    for bad in (
        b"",
        before[: len(before) // 2],
        before[:-1],
        before + b"\0",
        patched(before, len(before) // 2, bytes([before[len(before) // 2] ^ 1])),
        patched(before, ext + 28, b"\0"),  # another set of engines
        patched(before, ext, b"gvt-EXT1"),  # no longer what v2 needs
    ):
        with pytest.raises(OSError) as failed:
            client.load(bad)
        assert failed.value.errno == errno.EINVAL
        assert client.state() == v2.ERROR
        assert view(a.device) == seen
        a.device.reset()
        assert client.state() == v2.RUNNING
        client.go(v2.STOP)
        client.load(before)
        assert view(a.device) == seen
    client.go(v2.STOP)
    assert client.save() == before


def test_more_than_any_vgpu_of_the_type_has_is_not_taken(player: Vgpu) -> None:
    client = v2.Client(player.device.fd)
    with client.session(v2.RESUMING) as fd:
        with pytest.raises(OSError) as failed:
            v2.write_all(fd, bytes(16 << 20))
        assert failed.value.errno == errno.EINVAL
    player.device.reset()
    assert client.state() == v2.RUNNING


def test_a_user_s_own_hold_with_a_kvm_is_stopped_saved_restored_and_started(shm: Path) -> None:
    """With processes of their own, as a user starts them."""
    (shm / "A").write_bytes(bytes(MEMORY_PAGES * PAGE))
    with (
        kvmgt.instance() as name,
        cli.hold_started(name, "--kvm", "--memory", f"{shm / 'A'}@{MEMORY:#x}"),
    ):
        cli.run("stop", name, warm=True)
        saved = json.loads(cli.run("--json", "save", name, shm / "image").stdout)
        assert saved["state_bytes"] == FIXED_BYTES
        cli.run("verify", shm / "image", warm=True)
        cli.run("restore", name, shm / "image", warm=True)
        cli.run("start", name, warm=True)
        assert "running" in cli.run("status", name).stdout.decode()
