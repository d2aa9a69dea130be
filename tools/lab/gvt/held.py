# SPDX-License-Identifier: MIT
"""A vGPU of the real driver that `vfio-mig hold` keeps open; its guest's memory is a file."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

from tools.lab import cli
from tools.lab.borrowing import borrowed_fd
from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES
from tools.lab.vfio import raw
from tools.lab.vfio.raw import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Side(NamedTuple):
    """The vGPU; *device* is a second fd of it, good for all but what has kvmgt read guest memory."""

    name: str
    pid: int
    file: Path
    memory: Memory
    device: raw.Device

    @property
    def memory_option(self) -> str:
        """What --memory takes."""
        return f"{self.file}@{MEMORY:#x}"

    def u32(self, offset: int) -> int:
        return self.memory.u32(MEMORY + offset)

    def at(self, offset: int) -> int:
        """Where in the machine's memory the guest's is."""
        return kvmgt.host_address(self.memory, offset)

    def await_u32(self, offset: int, value: int, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while self.u32(offset) != value:
            assert time.monotonic() < end, f"{offset:#x} is {self.u32(offset):#x}, and not {value:#x}"
            time.sleep(0.01)


@contextlib.contextmanager
def side(file: Path) -> Iterator[Side]:
    """Make a vGPU, and hold it with *file* as its guest's memory."""
    memory = Memory(MEMORY, MEMORY_PAGES, file)
    with kvmgt.instance() as name, cli.held(name, f"{file}@{MEMORY:#x}") as pid:
        device = raw.Device(borrowed_fd(name), name)
        try:
            yield Side(name, pid, file, memory, device)
        finally:
            device.close()
