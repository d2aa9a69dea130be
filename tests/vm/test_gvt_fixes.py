# SPDX-License-Identifier: MIT
"""What the distribution's kvmgt does wrong, on it and on one with the fixes at the front of our series.

``VFIO_MIG_KVMGT`` is the directory of the latter. It is loaded with ``migration=off``: no fix belongs to an interface.
A fault that would take the kernel down is only shown to be gone.
"""

from __future__ import annotations

import contextlib
import errno
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import RESULT, TARGET, Engine, Vgpu
from tools.lab.gvt.rfc import BCS, MODULES, RCS, load_ours, load_stock, modprobe
from tools.lab.vfio.raw import Device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.gpu.control import Control

pytestmark = pytest.mark.gvt

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)

PIPE_CONTROL_TIME: Final = (0x7A00_0004, 3 << 14 | 1 << 24 | 1 << 20)
FLUSH_OF_5: Final = 0x1300_4003
FLUSH_GGTT: Final = 4
UNREADABLE: Final = "cannot be read"
GGTT_END: Final = 1 << 32


@pytest.fixture(scope="module", params=[False, True], ids=["stock", "fixed"])
def fixed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Load one of the two; says whether it has the fixes."""
    if request.param:
        load_ours(None, "migration=off")
    yield request.param
    if request.param:
        load_stock()


def dmesg() -> str:
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def test_what_the_last_one_mapped_is_not_reached_by_the_next(
    fixed: bool, gpu: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvmgt.instance() as name:
        with Vgpu.opened(name) as first:
            first.prepare(BCS)
            first.submit(BCS, 0x101, 0x201)
            first.await_u32(RESULT, 0x201)
            # it stays, so what is written there is seen and hurts nobody
            left = first.at(TARGET)
        first.put(TARGET, 0)
        monkeypatch.setattr(Device, "reset", lambda _device: None)
        with Vgpu.opened(name) as second:
            second.prepare(BCS)
            since = gpu.last()
            second.submit(BCS, 0x102, 0x202)
            second.await_u32(RESULT, 0x202)
            own = second.at(TARGET)
            stored = [write for entry in gpu.record(since, BCS.name) for write in entry["writes"]]
            assert ([own, 0x102] in stored) is fixed
            assert (left in {address for address, _ in stored}) is not fixed
            assert first.u32(TARGET) == (0 if fixed else 0x101)  # the old batch, too
            monkeypatch.undo()
            second.device.reset()


def test_a_context_that_cannot_be_read_is_not_made_up(fixed: bool, gpu: Control) -> None:
    with kvmgt.instance() as name, Vgpu.opened(name) as vgpu:
        vgpu.prepare(BCS)
        vgpu.make_context(BCS, vgpu.flush(BCS, 0xBAD))
        before, since = dmesg().count(UNREADABLE), gpu.last()
        vgpu.container.unmap(vgpu.memory)
        with pytest.raises(OSError):
            vgpu.run_contexts(BCS)
        assert (dmesg().count(UNREADABLE) > before) is fixed
        assert not any(value == 0xBAD for entry in gpu.record(since, BCS.name) for _, value in entry["writes"])


@pytest.mark.parametrize("engine", [RCS, BCS], ids=["PIPE_CONTROL's time", "FLUSH_DW of 5 dwords"])
def test_a_guest_cannot_write_into_another_guest_s_graphics_memory(fixed: bool, gpu: Control, engine: Engine) -> None:
    with contextlib.ExitStack() as stack:
        attacker, victim = (stack.enter_context(Vgpu.opened(stack.enter_context(kvmgt.instance()))) for _ in range(2))
        victim.map_ggtt()
        attacker.prepare(engine)
        address = victim.low + RESULT + 0x40
        ring = (
            [*PIPE_CONTROL_TIME, address, 0, 0, 0]
            if engine is RCS
            else [FLUSH_OF_5, address | FLUSH_GGTT, 0, 0x5EC, 0x5ED, 0]
        )
        attacker.make_context(engine, [*ring, *attacker.flush(engine, 0x600D), 0, 0])
        since = gpu.last()
        with contextlib.suppress(OSError):
            attacker.run_contexts(engine)
        if not fixed:
            attacker.await_u32(RESULT, 0x600D)
        time.sleep(0.5)
        reached = {where for entry in gpu.record(since, engine.name) for where, _ in entry["writes"]}
        assert (victim.at(RESULT + 0x40) in reached) is not fixed
        assert (victim.u32(RESULT + 0x40) != 0) is not fixed
        assert (attacker.u32(RESULT) == 0x600D) is not fixed


@pytest.fixture
def wedged(gpu: Control) -> Iterator[None]:
    """Have i915 find engines that cannot read their contexts; the next test has a GPU and kvmgt as ever."""
    kvmgt.remove_all()
    subprocess.run(["rmmod", "kvmgt", "i915"], check=True)
    gpu.misbehave(fault=[{"space": "ggtt", "start": 0, "end": GGTT_END}])
    try:
        modprobe("i915", "enable_gvt=1")
        yield
    finally:
        gpu.behave()
        loaded = [name for name in ("kvmgt", "i915") if Path("/sys/module", name).exists()]
        subprocess.run(["rmmod", *loaded], check=True)
        modprobe("i915", "enable_gvt=1")
        modprobe("kvmgt")


@pytest.mark.usefixtures("wedged")
def test_a_gpu_that_is_wedged_has_no_vgpus_and_the_kernel_lives(gpu: Control) -> None:
    """The distribution's dereferences NULL here."""
    # what i915 says of it
    assert re.search(r"CI tainted: ?0x\w+ by intel_gt_init", dmesg())
    subprocess.run(["insmod", MODULES / "kvmgt.ko"], check=True)
    with pytest.raises(OSError) as caught, kvmgt.instance():
        pass
    assert caught.value.errno == errno.EIO
    gpu.behave()
