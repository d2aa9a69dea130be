# SPDX-License-Identifier: MIT
"""Tests on the sample driver's real ioctls: they run inside the VM and nowhere else."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm import host
from tests.vm.raw import Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeInstance = Callable[..., host.Instance]
    MakeGuest = Callable[..., Guest]

HERE = Path(__file__).parent
WHERE_TO_RUN = (
    "needs the VM with the sample driver: run `scripts/test --vm`, or `scripts/vm --build-all -- pytest tests/vm`"
)


def in_vm() -> bool:
    return "VFIO_MIG_KMOD_DIR" in os.environ and host.TYPES.exists() and host.DEBUGFS.exists()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if HERE not in item.path.parents or in_vm():
        return
    if os.environ.get("VFIO_MIG_REQUIRE_VM") == "1":
        pytest.fail(f"VFIO_MIG_REQUIRE_VM=1, but this is not it: {WHERE_TO_RUN}", pytrace=False)
    pytest.skip(WHERE_TO_RUN)


@pytest.fixture(scope="session")
def kernel_log() -> Iterator[host.KernelLog]:
    log = host.KernelLog()
    yield log
    log.close()


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: host.KernelLog) -> Iterator[None]:
    """Fail the test that makes the kernel complain, and leave no vGPU to the next one."""
    kernel_log.new()
    yield
    host.remove_all()
    complaints = kernel_log.complaints()
    assert not complaints, "the kernel complained:\n" + "\n".join(complaints)


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
