# SPDX-License-Identifier: MIT
"""Tests on the sample driver's real ioctls: they run inside the VM and nowhere else."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.demo import report
from tools.lab import cli, drivers, mtty
from tools.lab.gvt import kvmgt
from tools.lab.kernel import alloc_faults
from tools.lab.kernel.log import KernelLog
from tools.lab.sample import host
from tools.lab.sample.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tools.gpu.control import Control

    MakeInstance = Callable[..., host.Instance]
    MakeGuest = Callable[..., Guest]
    MakeVgpu = Callable[[], kvmgt.Vgpu]

HERE = Path(__file__).parent
WHERE_TO_RUN = (
    "needs the VM with the sample driver: run `scripts/test --vm`, or `scripts/vm --build-all -- pytest tests/vm`"
)
WHERE_TO_RUN_CUSTOM = (
    "needs a kernel that makes allocations fail: run `scripts/test --vm --kernel custom`, or "
    "`scripts/vm --kernel custom -- pytest tests/vm/test_alloc_faults.py`"
)
WHERE_TO_RUN_MTTY = "needs the VM with mtty: run `scripts/vm --mtty -- pytest tests/vm/test_mtty.py` (kernel 6.12)"
WHERE_TO_RUN_GVT = (
    "needs the VM with the emulated GPU: run `scripts/test --gvt`, or `scripts/vm --gvt -- pytest -m gvt`"
)


WHERE_TO_RUN_L2 = (
    "needs the VM with the emulated GPU and a guest for it: run `scripts/test --gvt`, or `scripts/vm --gvt --l2 -- "
    "pytest -m l2`"
)


def in_vm() -> bool:
    return "VFIO_MIG_KMOD_DIR" in os.environ and host.TYPES.exists() and host.DEBUGFS.exists()


def runnable(item: pytest.Item) -> bool:
    """Tests of the mtty sample need no other driver; those for the custom kernel need what other kernels lack."""
    if item.get_closest_marker("mtty"):
        return "VFIO_MIG_VM" in os.environ and mtty.TYPES.exists()
    if item.get_closest_marker("both"):
        return drivers.is_there()
    if item.get_closest_marker("gvt"):
        return kvmgt.available() and ("VFIO_MIG_L2" in os.environ or not item.get_closest_marker("l2"))
    return in_vm() and (alloc_faults.available() or not item.get_closest_marker("custom"))


def where_to_run(item: pytest.Item) -> str:
    if item.get_closest_marker("mtty"):
        return WHERE_TO_RUN_MTTY
    if item.get_closest_marker("gvt"):
        return WHERE_TO_RUN_L2 if item.get_closest_marker("l2") else WHERE_TO_RUN_GVT
    return WHERE_TO_RUN_CUSTOM if item.get_closest_marker("custom") else WHERE_TO_RUN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if HERE not in item.path.parents or runnable(item):
        return
    if os.environ.get("VFIO_MIG_REQUIRE_VM") == "1":
        pytest.fail(f"VFIO_MIG_REQUIRE_VM=1, but this is not it: {where_to_run(item)}", pytrace=False)
    pytest.skip(where_to_run(item))


@pytest.fixture(scope="session")
def kernel_log() -> Iterator[KernelLog]:
    log = KernelLog()
    yield log
    log.close()


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """Fail the test that makes the kernel complain, and leave no vGPU to the next one."""
    kernel_log.new()
    yield
    host.remove_all()
    kvmgt.remove_all()
    complaints = kernel_log.complaints()
    assert not complaints, "the kernel complained:\n" + "\n".join(complaints)


def _warm_reply(*words: str) -> str:
    done = cli.run(*words, warm=True)
    return (done.stdout + done.stderr).decode()


@pytest.fixture
def warm_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the demonstrations run their commands in forks of this process."""
    monkeypatch.setattr(report, "run", lambda *words: cli.run(*words, warm=True).stdout)
    monkeypatch.setattr(report, "reply_of", _warm_reply)


@pytest.fixture
def resources() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def make_instance(resources: contextlib.ExitStack) -> MakeInstance:
    """Make mdevs that go away with the test."""
    return lambda kind=host.SMALL: resources.enter_context(host.instance(kind))


@pytest.fixture
def make_guest(resources: contextlib.ExitStack, make_instance: MakeInstance) -> MakeGuest:
    """Make vGPUs, opened and with guest memory, that go away with the test."""

    def make(kind: str = host.SMALL, *, pages: int = 256) -> Guest:
        return resources.enter_context(Guest.opened(make_instance(kind), pages=pages))

    return make


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    return make_guest()


@pytest.fixture
def other(guest: Guest, make_guest: MakeGuest) -> Guest:  # noqa: ARG001  # made after it
    """Give a second vGPU, hence one with other host bases, in a container of its own."""
    return make_guest()


# Of the emulated GPU


@pytest.fixture
def gpu() -> Iterator[Control]:
    with kvmgt.gpu() as control:
        yield control
        control.behave()


@pytest.fixture
def make_vgpu(resources: contextlib.ExitStack) -> MakeVgpu:
    """Make open vGPUs of the kernel's driver that go away with the test."""
    return lambda: resources.enter_context(kvmgt.Vgpu.opened(resources.enter_context(kvmgt.instance())))


@pytest.fixture
def vgpu(make_vgpu: MakeVgpu) -> kvmgt.Vgpu:
    return make_vgpu()
