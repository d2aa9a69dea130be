# SPDX-License-Identifier: MIT
"""A QEMU with a vGPU of the real driver, with its guest's CPU played: memory by a mapping of the guest's RAM, the vGPU
through QEMU's own emulation of it (the qtest protocol).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tools.lab.borrowing import borrowed_fd
from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import MEMORY, MEMORY_PAGES, SEMAPHORE, Driver
from tools.lab.qemu import QemuDevice, QemuVm, Qtest, running
from tools.lab.vfio import raw
from tools.lab.vfio.raw import Memory

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

MEGABYTES: Final = (MEMORY + MEMORY_PAGES * raw.PAGE >> 20) + 8
"""Of RAM, all of it below the PCI hole: what the driver uses, and a little behind it."""
_RAM: Final = f"memory-backend-memfd,id=ram,size={MEGABYTES}M,share=on"
_MEMFD: Final = "/memfd:"


class Ram(Memory):
    """The guest's RAM as its CPU sees it; :attr:`whole` is all of it."""

    def __init__(self, pid: int) -> None:
        fd = os.open(_ram_of(pid), os.O_RDWR | os.O_CLOEXEC)
        try:
            self.whole: Final = mmap.mmap(fd, MEGABYTES << 20)
            self.bytes = mmap.mmap(fd, MEMORY_PAGES * raw.PAGE, offset=MEMORY)  # type: ignore[misc]
        finally:
            os.close(fd)
        self.iova = MEMORY  # type: ignore[misc]
        self.size = MEMORY_PAGES * raw.PAGE  # type: ignore[misc]


def _ram_of(pid: int) -> Path:
    """Find the file of a QEMU's RAM among those that it has open."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(path.readlink()).startswith(_MEMFD) and path.stat().st_size == MEGABYTES << 20:
                return path
    raise LookupError(f"PID {pid} has no memfd of {MEGABYTES} MiB")


class PlayedDevice(QemuDevice):
    """The vGPU as its guest sees it, but for what no guest can do: *outside* is an fd of it."""

    def __init__(self, qtest: Qtest, outside: raw.Device) -> None:
        super().__init__(qtest)
        self._outside: Final = outside

    def stop(self) -> None:
        self._outside.stop()


class GvtQemu(QemuVm):
    """A running QEMU with a vGPU of kvmgt's, and the driver in its guest.

    :ivar outside: another fd of the vGPU, for what its guest is not to see.
    """

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], qtest: Qtest, paths: Path, outside: raw.Device
    ) -> None:
        super().__init__(name, process, qtest, paths)
        self.outside: Final = outside
        self.ram: Final = Ram(process.pid)
        device = PlayedDevice(qtest, outside)
        device.set_up()
        self.driver: Final = Driver(name, self.ram, device)

    @classmethod
    @contextlib.contextmanager
    def started(cls, paths: Path) -> Iterator[Self]:
        """Make a vGPU and start a VM with it; its sockets and files begin with *paths*."""
        with kvmgt.instance() as name:
            qemu = running(kvmgt.DEVICES / name, paths, ram=_RAM, megabytes=MEGABYTES, accel="kvm")
            with qemu as (process, qtest), contextlib.closing(raw.Device(borrowed_fd(name), name)) as outside:
                self = cls(name, process, qtest, paths, outside)
                try:
                    with self.qmp:
                        yield self
                        self.quit()
                finally:  # QEMU cannot end as long as work of its vGPU waits
                    self.ram.write(MEMORY + SEMAPHORE, b"\1\0\0\0")
