# SPDX-License-Identifier: MIT
"""The library's objects on real devices: a program that holds two vGPUs itself moves the state of one to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vfio_mig
from tools.lab.sample import gpu, host
from tools.lab.sample.held import guest_view, run_some_work, side
from vfio_mig.jobs.engine.steps import STEPS

if TYPE_CHECKING:
    from pathlib import Path


def test_a_state_moves_between_two_devices_of_one_program(tmp_path: Path) -> None:
    image = tmp_path / "gpu.vfm"
    with side(tmp_path / "source.mem") as source, side(tmp_path / "target.mem") as target:
        work = run_some_work(source.guest, gpu.Engine(source.guest))
        here = vfio_mig.Host(vfio_mig.Settings(abi="gvt-rfc"))
        steps: list[vfio_mig.Event] = []
        with here.open(source.name) as one, here.open(target.name) as other:
            assert (one.name, one.protocol) == (source.name, "gvt-rfc")
            assert one.describe().startswith(f"{source.name}: borrowed from PID ")
            memory = [vfio_mig.MemoryMap(str(source.file), 0)]
            saved = one.save(image, memory=memory, on_event=steps.append)
            assert source.instance.run_state() == "stopped"
            assert vfio_mig.Image(image).verify().state_bytes == saved.state_bytes
            assert other.check(image).fits
            loaded = other.restore(image, memory=[vfio_mig.MemoryMap(str(target.file), 0)], start=True)
        assert (saved.state, loaded.state, loaded.device) == ("stop", "running", target.name)
        assert guest_view(target.guest.device) == guest_view(source.guest.device)
        assert work.done_in(target.memory) == len(work)
        assert {event.step for event in steps} <= set(STEPS["save"])
        assert {(event.job, event.device) for event in steps} == {("save", source.name)}


def test_a_listener_that_fails_ends_the_job_and_the_device_runs(tmp_path: Path) -> None:
    def listen(event: vfio_mig.Event) -> None:
        if event.step == "after-stop":
            raise RuntimeError("enough")

    with side(tmp_path / "source.mem") as source, vfio_mig.Host().open(source.name) as one:
        with pytest.raises(RuntimeError, match="enough"):
            one.save(tmp_path / "gpu.vfm", on_event=listen)
        assert source.instance.run_state() == "running"
        assert [path.name for path in tmp_path.iterdir()] == ["source.mem"]


def test_what_a_program_has_opened_itself_stays_stopped_until_its_block_ends() -> None:
    with host.instance() as vgpu:
        with vfio_mig.Host().open(vgpu.uuid) as one:
            assert one.stop().action == "stop"
            assert vgpu.run_state() == "stopped"
            assert one.status().holder_pid is not None
            one.start()
            assert vgpu.run_state() == "running"
        (row,) = [row for row in vfio_mig.Host().devices() if row.device == vgpu.uuid]
        assert row.holder is None
