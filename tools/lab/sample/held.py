# SPDX-License-Identifier: MIT
"""A vGPU that `vfio-mig hold` keeps open, with a guest at work on it: its memory is a file, as a VMM with shared RAM
has it, and its driver is played through a second fd of its own, from the holder's group or of the device's node.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

from tools.lab import cli
from tools.lab.borrowing import borrowed_fd
from tools.lab.sample import gpu, host
from tools.lab.sample.guest import Guest
from tools.lab.vfio.raw import BAR0, FENCE, GTT, PAGE, PVINFO, Device, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES: Final = 256


class Side(NamedTuple):
    """A held vGPU with its guest: the guest's memory is in *file*, from guest-physical address 0 on."""

    instance: host.Instance
    memory: Memory
    file: Path
    guest: Guest

    @property
    def name(self) -> str:
        """What vfio-mig calls the device."""
        return self.instance.uuid

    @property
    def memory_option(self) -> str:
        """What --memory takes."""
        return f"{self.file}@0"


@contextlib.contextmanager
def guest_of(instance: host.Instance, memory: Memory) -> Iterator[Guest]:
    """Play the guest of a held device."""
    device = Device(borrowed_fd(instance.uuid), instance.uuid)
    try:
        yield Guest(instance, None, memory, device)  # the container is the holder's
    finally:
        device.close()


@contextlib.contextmanager
def side(file: Path, kind: str = host.SMALL, *, via: str = "auto") -> Iterator[Side]:
    """Make a vGPU, hold it with *file* as its guest's memory, and play its guest."""
    memory = Memory(0, PAGES, file)
    with host.instance(kind) as instance, cli.held(instance.uuid, file, via=via), guest_of(instance, memory) as guest:
        yield Side(instance, memory, file, guest)


class Work(list[tuple[int, int]]):
    """(guest-physical address, value) of what the GPU has been told to write."""

    def done_in(self, memory: Memory) -> int:
        """Count what is there."""
        return sum(memory.u32(iova) == value for iova, value in self)


def run_some_work(guest: Guest, engine: gpu.Engine, number: int = 8) -> Work:
    """Have the GPU write one page per workload, through low and high graphics memory in turn."""
    work = Work()
    for turn in range(number):
        gma, iova = guest.bind(high=bool(turn % 2))
        value = 0xC0DE0000 + turn
        engine.run(gpu.store_dword(gma + 16, value))
        work.append((iova + 16, value))
    return work


def queue_one(guest: Guest, engine: gpu.Engine) -> Work:
    """Submit a workload to the stopped vGPU: it stays queued."""
    gma, iova = guest.bind()
    engine.submit(engine.context(gpu.store_dword(gma, 0xFEEDC0DE)))
    return Work([(iova, 0xFEEDC0DE)])


def guest_view(device: Device) -> bytes:
    """Return what a guest can see of its device: PVINFO, fences, low and high page table entries."""
    high = GTT + (device.guest_high() >> 12) * 8
    return b"".join(
        device.read(BAR0, offset, size)
        for offset, size in ((PVINFO, PAGE), (FENCE, 32), (GTT, 0x10000), (high, 0x10000))
    )
