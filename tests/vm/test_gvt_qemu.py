# SPDX-License-Identifier: MIT
"""Stock QEMU migrates a running Linux guest with a vGPU of our kvmgt, loaded with ``migration=v2``.

The guest's own i915 drives the vGPU, and its load looks at every result, old ones too (tools/l2/load.c). QEMU is the
one that runs this VM, as Debian 12's does not speak protocol v2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.l2 import moves
from tools.l2.machine import MEGABYTES, START_SECONDS
from tools.l2.pair import Pair
from tools.lab import cli
from tools.lab.gvt.rfc import MODULES, load_ours, load_stock

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.gvt, pytest.mark.l2]

TIMES: Final = 10
RESULTS: Final = 60
PINNED: Final = "dri/*/gvt/vgpu*/kvmgt_nr_cache_entries"
"""Below debugfs: kvmgt.c, intel_vgpu_open_device()."""

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours(None, "migration=v2")
    yield
    load_stock()


def report(text: str) -> None:
    """Tell about the run; pytest shows it when the test fails, and with -s."""
    print(text, flush=True)  # noqa: T201


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair.made() as made:
        yield made
        for guest in made.guests:  # pytest shows it if the test has failed
            report(f"QEMU {guest.process.poll()}: {guest.log.read_text(errors='replace')[-2000:]}")


def to_and_fro(pair: Pair, times: int) -> None:
    """Move a guest so many times; each result it got is right, and the count, its own, goes on."""
    guest = pair.start(0)
    guest.await_ready(5 * START_SECONDS)
    right = guest.await_right(RESULTS).right
    for turn in range(times):
        moved = pair.move(guest, (turn + 1) % 2)
        guest = moved.guest
        counts = guest.await_right(RESULTS)
        report(f"{turn + 1}: {moved.move}, silent for {moved.silence * 1e3:.0f} ms, {counts}")
        assert counts.wrong == 0
        assert counts.right > right
        right = counts.right
        assert moved.move.vfio_bytes > 3_000_000


@pytest.mark.slow  # nested KVM under emulation loses a guest now and then: tools/kvmgt/README.md
def test_a_running_guest_moves_there_and_back(pair: Pair) -> None:
    to_and_fro(pair, 2)


def pinned() -> int:
    """Return how many pages of guests kvmgt has pinned, by its own count."""
    files = {path.resolve() for path in Path("/sys/kernel/debug").glob(PINNED)}  # each minor leads to the same
    return sum(int(path.read_text()) for path in files)


@pytest.mark.slow
def test_the_pages_that_a_vgpu_has_pinned_are_told_and_its_guest_moves_afterwards(pair: Pair) -> None:
    guest = pair.start(0)
    guest.await_ready(5 * START_SECONDS)
    guest.await_right(RESULTS)
    assert 0 < js("dirty", pair.vgpus[0], "--pinned")["pages_dirty"] < MEGABYTES * 256
    guest.pause()  # else it maps and unmaps meanwhile
    assert js("dirty", pair.vgpus[0], "--pinned")["pages_dirty"] == pinned() > 0
    guest.cont()
    moved = pair.move(guest, 1)
    assert moved.guest.await_right(RESULTS).wrong == 0


@pytest.mark.slow
def test_a_running_guest_moves_ten_times_back_and_forth(pair: Pair) -> None:
    to_and_fro(pair, TIMES)


@pytest.mark.slow
def test_a_guest_in_a_file_goes_on_with_another_vgpu(pair: Pair) -> None:
    guest = pair.start(0)
    guest.await_ready(5 * START_SECONDS)
    before = guest.await_right(RESULTS)
    report(f"{pair.save(guest)}, {pair.stream.stat().st_size} bytes")
    counts = pair.load(1).await_right(RESULTS)
    assert (counts.wrong, counts.right > before.right) == (0, True)


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


@pytest.mark.slow
def test_a_vgpu_goes_out_of_qemu_s_stream_and_an_image_of_it_back_into_the_guest(pair: Pair) -> None:
    guest = pair.start(0)
    guest.await_ready(5 * START_SECONDS)
    before = guest.await_right(RESULTS)
    # both of the same moment: the VM is paused first
    guest.qmp.execute("stop")
    directory = pair.stream.parent
    js("save", pair.vgpus[0], directory / "saved.vfm")
    pair.save(guest)

    taken = js("extract", pair.stream, directory / "taken.vfm", "--device", "vfio0")
    assert (taken["layout"], taken["problems"]) == ("gvt-rfc", [])
    assert taken["state_bytes"] > 3_000_000
    # what QEMU has read of the vGPU is what vfio-mig has read of it
    report(json.dumps(js("diff", directory / "saved.vfm", directory / "taken.vfm"))[:4000])
    assert js("diff", directory / "saved.vfm", directory / "taken.vfm")["counts"].keys() == {"image"}
    with cli.held(pair.vgpus[1]):
        checks = js("check", directory / "taken.vfm", pair.vgpus[1])
        assert checks["fits"], checks

    packed = js("pack", directory / "saved.vfm", directory / "packed", "--into", pair.stream)
    assert (packed["state_bytes"], packed["warnings"]) == (js("verify", directory / "saved.vfm")["state_bytes"], [])
    pair.stream.unlink()
    guest = pair.start(1, *moves.INCOMING)
    moves.receive(guest.qmp, f"file:{directory / 'packed'}")
    # it was paused when it was written
    moves.await_status(guest.qmp, "paused")
    guest.qmp.execute("cont")
    counts = guest.await_right(RESULTS)
    assert (counts.wrong, counts.right > before.right) == (0, True)
