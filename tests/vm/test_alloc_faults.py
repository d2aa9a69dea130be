# SPDX-License-Identifier: MIT
"""Each allocation that the sample driver makes or causes fails once: an error or no harm, no leak, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab import waiting
from tools.lab.kernel import alloc_faults
from tools.lab.kernel.alloc_faults import Faults
from tools.lab.sample import gpu, host
from tools.lab.sample.v2 import V2
from tools.lab.vfio.raw import BAR2, CONFIG, IRQ_MSI, PAGE
from tools.lab.vfio.v2 import LOG_STOP, PRE_COPY, PRE_COPY_P2P, RESUMING, RUNNING, SET, STOP, STOP_COPY, write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.vm.conftest import MakeGuest
    from tools.lab.sample.guest import Guest

    Undo = Callable[[int], object]
    Operation = tuple[Callable[[], object], Undo]

pytestmark = pytest.mark.custom


@pytest.fixture(scope="module", autouse=True)
def no_leak() -> Iterator[None]:
    """Fail the last test of this file when the kernel finds memory that nothing points to."""
    yield
    if alloc_faults.available():
        assert alloc_faults.leaks() == []


class Vgpu(V2):
    """A vGPU with both protocols; what is put on its stack goes away before it."""

    def __init__(self, guest: Guest, stack: contextlib.ExitStack) -> None:
        super().__init__(guest)
        self.stack: Final = stack


@pytest.fixture
def vgpu(make_guest: MakeGuest, resources: contextlib.ExitStack) -> Vgpu:
    with host.parameter_set("v2", 7):
        return Vgpu(make_guest(), resources)


def nothing(_code: int) -> None:
    pass


# --- one vGPU


def region_info(vgpu: Vgpu) -> Operation:
    return lambda: vgpu.guest.device.region(BAR2), nothing


def dirty_bitmap(vgpu: Vgpu) -> Operation:
    return lambda: vgpu.guest.device.dirty_bytes(0, 1000), nothing


def eventfd(vgpu: Vgpu) -> Operation:
    fd = os.eventfd(0)
    vgpu.stack.callback(os.close, fd)
    return lambda: vgpu.guest.device.set_eventfd(IRQ_MSI, fd), nothing


def rfc_save(vgpu: Vgpu) -> Operation:
    vgpu.guest.device.stop()
    return vgpu.guest.device.save, nothing


def rfc_restore(vgpu: Vgpu) -> Operation:
    device = vgpu.guest.device
    device.stop()
    engine = gpu.Engine(vgpu.guest)
    device.make_ppgtt(4, [0x1000])
    device.make_ppgtt(3, [1, 2, 3, 4])
    engine.submit(engine.context(gpu.NOOP), engine.context(gpu.NOOP))
    image = device.save()

    def same(_code: int) -> None:
        assert device.save() == image  # restored or untouched, it is the same

    return lambda: device.restore(image), same


def aperture(vgpu: Vgpu) -> Operation:
    at = iter(range(0, 64 << 20, PAGE << 6))  # a page of its own each time, in a node of the tree of its own
    return lambda: vgpu.guest.device.write(BAR2, next(at), b"x"), nothing


def begin(vgpu: Vgpu, state: int, rest: int) -> Operation:
    """Go to a state with a data fd, from *rest*, where a failure has to leave the device."""
    opened: list[int] = []

    def go() -> None:
        opened.append(vgpu.go(state))

    def undo(code: int) -> None:
        reached, got = vgpu.state(), len(opened)
        while opened:
            os.close(opened.pop())
        assert (reached, got) == ((rest, 0) if code else (state, 1))
        vgpu.guest.device.reset()
        vgpu.go(rest)

    vgpu.go(rest)
    return go, undo


def stop_copy(vgpu: Vgpu) -> Operation:
    return begin(vgpu, STOP_COPY, STOP)


def resuming(vgpu: Vgpu) -> Operation:
    return begin(vgpu, RESUMING, STOP)


def pre_copy(vgpu: Vgpu) -> Operation:
    return begin(vgpu, PRE_COPY, RUNNING)


def end_of_pre_copy(vgpu: Vgpu) -> Operation:
    """Go on to STOP_COPY with the same data fd, by way of PRE_COPY_P2P."""
    opened = [vgpu.go(PRE_COPY)]
    vgpu.stack.callback(lambda: os.close(opened.pop()))

    def undo(code: int) -> None:
        reached = vgpu.state()
        os.close(opened.pop())
        vgpu.guest.device.reset()
        opened.append(vgpu.go(PRE_COPY))
        assert reached in ((PRE_COPY, PRE_COPY_P2P) if code else (STOP_COPY,))

    return lambda: vgpu.go(STOP_COPY), undo


def load(vgpu: Vgpu) -> Operation:
    """Load a whole state: a failure is for good, and after a reset it works."""
    occupied = gpu.Engine(vgpu.guest)
    vgpu.guest.device.make_ppgtt(4, [0x1000])
    vgpu.go(STOP)
    occupied.submit(occupied.context(gpu.NOOP))
    stream = vgpu.save()

    def whole() -> None:
        fd = vgpu.go(RESUMING)
        try:
            write_all(fd, stream)
            vgpu.go(STOP)
        finally:
            os.close(fd)

    def undo(_code: int) -> None:
        vgpu.guest.device.reset()
        vgpu.go(STOP)

    return whole, undo


def logging(vgpu: Vgpu) -> Operation:
    memory = vgpu.guest.memory

    def undo(_code: int) -> None:
        vgpu.feature(SET | LOG_STOP)

    return lambda: vgpu.log_start(memory.iova, memory.size), undo


OPERATIONS: Final[dict[str, Callable[[Vgpu], Operation]]] = {
    "region info": region_info,
    "dirty bitmap": dirty_bitmap,
    "eventfd": eventfd,
    "RFC save": rfc_save,
    "RFC restore": rfc_restore,
    "aperture": aperture,
    "STOP_COPY": stop_copy,
    "RESUMING": resuming,
    "PRE_COPY": pre_copy,
    "end of PRE_COPY": end_of_pre_copy,
    "load": load,
}


def usable(guest: Guest, iova: int, gma: int) -> None:
    """Check that the vGPU still does its work: state, registers, commands."""
    guest.device.reset()
    guest.device.start()
    engine = gpu.Engine(guest)
    guest.device.set_pte(gma, iova | 1)
    _, done = engine.run(gpu.store_dword(gma, 0x600D))
    assert done
    assert guest.memory.u32(iova) == 0x600D


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failed_allocation_is_enomem_and_changes_nothing(name: str, vgpu: Vgpu) -> None:
    gma, iova = vgpu.guest.bind()
    operation, undo = OPERATIONS[name](vgpu)
    # First no memory at all: a buffer that is made once is not there yet, and there is no other way to get one.
    with Faults.opened(pages=True) as faults:
        none = faults.from_each(operation, undo)
    with Faults.opened() as faults:
        single = faults.each(operation, undo)
    print(f"{name}: {none} {single}")  # noqa: T201  # shown when the test fails, and with -s
    assert none[0] == errno.ENOMEM
    # The caller's own memory may be what is missing, where the driver writes to it.
    assert set(none + single) <= {0, errno.ENOMEM, *((errno.EFAULT,) if name == "RFC save" else ())}
    usable(vgpu.guest, iova, gma)


def test_an_entry_whose_page_cannot_be_pinned_is_scratch(vgpu: Vgpu) -> None:
    """As in GVT-g the write itself is not an error; an entry is present if and only if its page is pinned."""
    guest = vgpu.guest
    gma, _ = guest.bind()
    slot = (gma - guest.device.guest_low()) >> 12
    spread = iter(range(guest.memory.iova + 64 * PAGE, guest.memory.iova + guest.memory.size, PAGE))  # not pinned yet
    at = 0
    scratch = 0

    def write() -> None:
        nonlocal at
        at = next(spread)
        guest.device.set_pte(gma, at | 1)

    def check(_code: int) -> None:
        nonlocal scratch
        entry = guest.instance.hw_ggtt()[slot]
        assert entry in (0, at | 1)
        assert (at in guest.instance.pinned()) == bool(entry)
        scratch += not entry

    with Faults.opened() as faults:
        codes = faults.each(write, check)
    assert set(codes) == {0}
    assert scratch
    assert guest.instance.hw_ggtt()[slot] == at | 1


def test_a_root_or_a_workload_that_cannot_be_kept_is_refused(vgpu: Vgpu) -> None:
    """Registers are written as in GVT-g, where every failure is EFAULT."""
    guest = vgpu.guest
    guest.device.stop()
    engine = gpu.Engine(guest)
    context = engine.context(gpu.NOOP)
    roots = iter(range(1, 1000))
    queued = len(guest.instance.queue())

    def undo_submit(code: int) -> None:
        nonlocal queued
        # Both of a pair, or none
        assert len(guest.instance.queue()) == queued + (0 if code else 2)
        queued = len(guest.instance.queue())

    with Faults.opened() as faults:
        codes = faults.each(lambda: guest.device.make_ppgtt(4, [next(roots) << 12]), nothing)
        assert errno.EFAULT in codes
        assert set(codes) <= {0, errno.EFAULT}
        codes = faults.each(lambda: engine.submit(context, context), undo_submit)
        assert errno.EFAULT in codes
        assert set(codes) <= {0, errno.EFAULT}
    assert queued
    guest.device.write(CONFIG, 4, struct.pack("<H", 6))
    before = guest.instance.counters()
    guest.device.start()
    gpu.wait_ended(guest, before, queued)
    assert guest.instance.queue() == []


def test_a_workload_that_cannot_be_scanned_is_dropped_and_counted(vgpu: Vgpu) -> None:
    guest = vgpu.guest
    engine = gpu.Engine(guest)
    gma, iova = guest.bind()
    outcomes = set()
    with Faults.opened() as faults:
        for skip in (0, 0, 64, 100, 200, 300, 400, 600, 1000, 2000):
            guest.memory.set_u32(iova, 0xFFFF)
            context = engine.context(*[gpu.store_dword(gma, number) for number in range(8)])
            before = guest.instance.counters()
            with faults.one_of_any_thread(skip) as has_failed:
                submitted = alloc_faults.errno_of(lambda: engine.submit(context)) == 0  # noqa: B023  # called here
                with contextlib.suppress(TimeoutError):  # by now it has been scanned, without a failure
                    waiting.wait_until("a failure", has_failed, seconds=1)
                fired = has_failed()
            # Not before: to read the counters allocates, too.
            if submitted:
                gpu.wait_ended(guest, before, 1)
            after = guest.instance.counters()
            failed = after["workloads_failed"] - before["workloads_failed"]
            completed = after["workloads_completed"] - before["workloads_completed"]
            assert failed + completed == after["workloads_submitted"] - before["workloads_submitted"]
            assert guest.memory.u32(iova) == (7 if completed else 0xFFFF)
            assert fired or completed
            outcomes.add((failed, completed))
    assert (1, 0) in outcomes  # in the worker, and not when it was submitted
    _, done = engine.run(gpu.store_dword(gma, 0x600D))
    assert done


def test_a_state_on_its_way_is_refused_for_good_when_memory_runs_out(vgpu: Vgpu) -> None:
    vgpu.set_knob("v2_extra_bytes", 10_000)
    stream = vgpu.save()
    with Faults.opened(pages=True) as faults, vgpu.session(RESUMING) as fd:
        assert faults.behind(0, lambda: write_all(fd, stream)) == errno.ENOMEM
        with pytest.raises(OSError) as caught:
            os.write(fd, b"x")
        assert caught.value.errno in {errno.ENOMEM, errno.EINVAL}
    vgpu.guest.device.reset()
    vgpu.load(stream)
    assert vgpu.save() == stream


def test_logging_starts_or_does_not(vgpu: Vgpu) -> None:
    memory = vgpu.guest.memory
    gma, iova = vgpu.guest.bind()
    with Faults.opened() as faults:
        codes = faults.each(*logging(vgpu))
        assert set(codes) <= {0, errno.ENOMEM}
    vgpu.log_start(memory.iova, memory.size)
    usable(vgpu.guest, iova, gma)
    assert iova in vgpu.log_report(memory.iova, memory.size)


# --- whole vGPUs, and the driver


def test_a_vgpu_that_cannot_be_made_is_none_and_takes_nothing() -> None:
    free = host.available(host.SMALL)
    names = {path.name for path in host.DEBUGFS.iterdir()}
    made: list[host.Instance] = []

    def undo(code: int) -> None:
        assert bool(code) == (not made)
        while made:
            made.pop().remove()
        assert host.available(host.SMALL) == free
        assert {path.name for path in host.DEBUGFS.iterdir()} == names

    # Linux (6.12) warns when it has no memory for a group's name: it frees a group that it has not emptied.
    spared = alloc_faults.function("vfio_create_group")
    with Faults.opened(spared=spared) as faults:
        codes = faults.each(lambda: made.append(host.create()), undo)
    with Faults.opened(spared=spared, pages=True) as faults:
        codes += faults.from_each(lambda: made.append(host.create()), undo)
    assert errno.ENOMEM in codes
    assert set(codes) <= {0, errno.ENOMEM}


def test_a_driver_that_cannot_be_loaded_leaves_nothing() -> None:
    text = alloc_faults.module_text()
    host.unload_module()
    try:

        def undo(_code: int) -> None:
            if host.module_loaded():
                assert alloc_faults.module_text() == text  # or nothing has been tested
                host.unload_module()
            assert not host.DEBUGFS.exists()
            assert not host.PARENT.exists()

        with Faults.opened(text=text) as faults:
            codes = faults.each(host.load_module, undo)
        assert errno.ENOMEM in codes
        assert set(codes) <= {0, errno.ENOMEM}
    finally:
        if not host.module_loaded():
            host.load_module()
