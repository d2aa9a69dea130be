# SPDX-License-Identifier: MIT
"""A real QEMU that has a vGPU, with its guest's CPU played through the qtest protocol.

The CPU itself only halts. What a guest's driver would do (PCI set-up, page tables, fences, submissions, memory) is done
on the guest's address space, so it takes QEMU's own way to the device: its vfio-pci emulation.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
from typing import IO, TYPE_CHECKING, Final, Self

from tools.lab.sample.guest import Guest
from tools.lab.vfio.raw import BAR0, BAR2, CONFIG, Device, Memory
from vfio_mig.vm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tools.lab.sample.host import Instance

PROGRAM: Final = "qemu-system-x86_64"
COMMAND: Final = "qemu-system-x86"
"""As the kernel calls it."""
SECONDS: Final = 60
MEGABYTES: Final = 64

# The guest's own choice; Intel graphics at slot 2 would get QEMU's quirks
SLOT: Final = 3
BAR_ADDRESS: Final = {BAR0: 0xC000_0000, BAR2: 0x8000_0000}
PCI_COMMAND: Final = 0x04
PCI_BAR: Final = 0x10
MEMORY_AND_MASTER: Final = 0x06

# Where the guest's driver has its pages
DRIVER_MEMORY: Final = 0x0100_0000
DRIVER_PAGES: Final = 256

HALT: Final = b"\xf4"
SHARED: Final = f"memory-backend-memfd,id=ram,size={MEGABYTES}M,share=on"
PRIVATE: Final = f"memory-backend-ram,id=ram,size={MEGABYTES}M"


class Qtest:
    """The guest's CPU, one access at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket: Final = connected
        self._stream: Final = connected.makefile("rwb")

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def ask(self, words: str) -> str:
        self._stream.write(f"{words}\n".encode())
        self._stream.flush()
        while True:
            line = self._stream.readline().decode()
            if line.startswith("IRQ "):
                continue
            if not line.startswith("OK"):
                raise ConnectionError(f"qtest {words[:60]!r}: {line or 'QEMU has gone'}")
            return line[2:].strip()

    def read(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(f"read {address:#x} {size}").removeprefix("0x"))

    def write(self, address: int, data: bytes) -> None:
        self.ask(f"write {address:#x} {len(data)} 0x{data.hex()}")

    def out(self, port: int, value: int, width: str = "l") -> None:
        self.ask(f"out{width} {port:#x} {value:#x}")

    def in_(self, port: int) -> int:
        return int(self.ask(f"inl {port:#x}"), 16)


class QemuDevice(Device):
    """The vGPU as the guest reaches it: BARs at addresses of its choice, configuration through two ports."""

    def __init__(self, qtest: Qtest) -> None:
        self._qtest: Final = qtest

    def set_up(self) -> None:
        """Do what a guest's firmware does."""
        for bar, address in BAR_ADDRESS.items():
            self._set_config(PCI_BAR + 4 * bar, address)
            self._set_config(PCI_BAR + 4 * bar + 4, 0)
        self._set_config(PCI_COMMAND, MEMORY_AND_MASTER, "w")

    def read(self, region: int, offset: int, size: int) -> bytes:
        if region != CONFIG:
            return self._qtest.read(BAR_ADDRESS[region] + offset, size)
        words = range(offset & ~3, offset + size, 4)
        whole = b"".join(self._config(word).to_bytes(4, "little") for word in words)
        return whole[offset % 4 :][:size]

    def write(self, region: int, offset: int, data: bytes | bytearray | memoryview) -> int:
        self._qtest.write(BAR_ADDRESS[region] + offset, bytes(data))
        return len(data)

    def _config(self, register: int) -> int:
        self._qtest.out(0xCF8, 1 << 31 | SLOT << 11 | register)
        return self._qtest.in_(0xCFC)

    def _set_config(self, register: int, value: int, width: str = "l") -> None:
        self._qtest.out(0xCF8, 1 << 31 | SLOT << 11 | register)
        self._qtest.out(0xCFC, value, width)


class QemuMemory(Memory):
    """The part of the guest's RAM that its driver uses."""

    def __init__(self, qtest: Qtest) -> None:
        self._qtest: Final = qtest
        self.iova = DRIVER_MEMORY  # type: ignore[misc]  # its own, as nothing is mapped here
        self.size = DRIVER_PAGES * 4096  # type: ignore[misc]

    def read(self, iova: int, size: int) -> bytes:
        return self._qtest.read(iova, size)

    def write(self, iova: int, data: bytes) -> None:
        self._qtest.write(iova, data)


class QemuGuest(Guest):
    """What runs in the VM."""

    def __init__(self, instance: Instance, qtest: Qtest) -> None:
        device = QemuDevice(qtest)
        device.set_up()
        super().__init__(instance, None, QemuMemory(qtest), device)

    def go_on_as(self, other: QemuGuest) -> None:
        """Be the guest of another VM, whose vGPU and pages are now in this one."""
        self._next_page, self._next_low, self._next_high = other._next_page, other._next_low, other._next_high


class QemuVm:
    """A running QEMU, and who works with it.

    :param name: of its vGPU.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], qtest: Qtest, paths: Path) -> None:
        self.name: Final = name
        self.process: Final = process
        self.qtest: Final = qtest
        self.socket: Final = paths.with_suffix(".qmp")
        """For who is under test; QEMU talks to one at a time."""
        self.qmp: Final = Qmp(str(paths.with_suffix(".own")))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def holder(self) -> str:
        """As `vfio-mig list` names it."""
        return f"{self.pid}:{COMMAND}"

    def status(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    def pause(self) -> None:
        self.qmp.execute("stop")

    def cont(self) -> None:
        self.qmp.execute("cont")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)

    def quit(self) -> None:
        if self.process.poll() is None:
            self.qmp.execute("quit")
            self.process.wait(SECONDS)


class Qemu(QemuVm):
    """A running QEMU with a vGPU of the sample driver."""

    def __init__(self, instance: Instance, process: subprocess.Popen[bytes], qtest: Qtest, paths: Path) -> None:
        super().__init__(instance.uuid, process, qtest, paths)
        self.instance: Final = instance
        self.guest: Final = QemuGuest(instance, qtest)

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, instance: Instance, paths: Path, *, paused: bool = False, ram: str = SHARED, more: Sequence[str] = ()
    ) -> Iterator[Self]:
        """Start one that has *instance*; the rest is as :func:`running` has it."""
        with running(instance.sysfs, paths, paused=paused, ram=ram, more=more) as (process, qtest):
            self = cls(instance, process, qtest, paths)
            with self.qmp:
                yield self
                self.quit()


@contextlib.contextmanager
def running(
    sysfs: Path,
    paths: Path,
    *,
    paused: bool = False,
    ram: str = SHARED,
    megabytes: int = MEGABYTES,
    more: Sequence[str] = (),
    behind: Sequence[str] = (),
    accel: str = "tcg",
    program: Sequence[str] = (PROGRAM,),
    device: str = "",
) -> Iterator[tuple[subprocess.Popen[bytes], Qtest]]:
    """Have a QEMU with the vGPU at *sysfs*; its sockets and files begin with *paths*.

    :param ram: the memory backend, as -object takes it, of as many *megabytes*.
    :param more: options in front of the vGPU's: an IOMMU has to be there before it.
    :param behind: options behind it.
    :param program: how QEMU is started.
    :param device: more properties of the vGPU.
    """
    firmware = paths.with_suffix(".bin")
    firmware.write_bytes(HALT * 65536)
    with socket.socket(socket.AF_UNIX) as listener, paths.with_suffix(".log").open("w+b") as log:
        listener.bind(str(paths.with_suffix(".qtest")))
        listener.listen()
        command = [
            *(*program, "-accel", accel, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-M", "q35,memory-backend=ram", "-m", str(megabytes), "-object", ram, "-bios", str(firmware)),
            *more,
            *("-device", ",".join(filter(None, (f"vfio-pci,sysfsdev={sysfs},addr={SLOT:#x}", device)))),
            *behind,
            *("-qmp", f"unix:{paths.with_suffix('.qmp')},server=on,wait=off"),
            *("-qmp", f"unix:{paths.with_suffix('.own')},server=on,wait=off"),
            *("-qtest", f"unix:{paths.with_suffix('.qtest')}", "-qtest-log", "none"),
            *(["-S"] if paused else []),
        ]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
            try:
                qtest = Qtest(_accept(listener, process, log))
                try:
                    qtest.in_(0xCF8)  # is answered once all devices are there
                    yield process, qtest
                finally:
                    qtest.close()
            finally:
                if process.poll() is None:
                    process.kill()


def _accept(listener: socket.socket, process: subprocess.Popen[bytes], log: IO[bytes]) -> socket.socket:
    """Wait until QEMU has connected; it has opened its devices by the time it greets on QMP."""
    pidfd = os.pidfd_open(process.pid)
    try:
        ready = select.select([listener.fileno(), pidfd], [], [], SECONDS)[0]
        if listener.fileno() not in ready:
            log.seek(0)
            raise RuntimeError(f"{PROGRAM} did not start: {log.read()[-2000:].decode(errors='replace')}")
        return listener.accept()[0]
    finally:
        os.close(pidfd)
