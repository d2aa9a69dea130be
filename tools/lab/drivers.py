# SPDX-License-Identifier: MIT
"""Two drivers of vGPUs behind one face: the sample driver, and the kernel's own kvmgt on the emulated GPU.

Each has its truth through a door of its own: the sample driver's debugfs, the emulated GPU's control port.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple

from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import Kvm
from tools.lab.sample import host
from tools.lab.vfio.raw import FENCE, PAGE, Container, Device, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.gpu.control import Control

IOVA: Final = 0x100000
PAGES: Final = 256
SHARES: Final = (8, 4, 2, 1)
"""A type ends with how many of it there could be, if nothing else were in the way."""


class Opened(NamedTuple):
    """A vGPU in use, with guest memory."""

    name: str
    container: Container
    memory: Memory
    device: Device

    def page(self, number: int) -> int:
        """Return the IOVA of a page of guest memory."""
        return self.memory.iova + number * PAGE


class Driver(ABC):
    """A driver of vGPUs."""

    parent: Path
    """The mdev parent's directory."""
    prefix: str
    """What its types' names begin with."""
    warns: bool
    """Whether it WARNs, beside an error, of an access past the end of the configuration space or of BAR0."""
    msi_at_first: int
    """Whether MSI is enabled in a fresh vGPU's configuration; kvmgt copies the host's, whose i915 has enabled it."""

    def type_directory(self, share: int) -> Path:
        """Return a type's directory."""
        (found,) = (self.parent / "mdev_supported_types").glob(f"{self.prefix}*_{share}")
        return found

    def text(self, share: int, name: str) -> str:
        """Read a file of a type's directory."""
        return (self.type_directory(share) / name).read_text().strip()

    def description(self, share: int) -> dict[str, str]:
        """Read what a type says of itself."""
        pairs = (line.partition(":") for line in self.text(share, "description").splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs}

    def available(self) -> list[int]:
        """Return how many more of each type there may be."""
        return [int(self.text(share, "available_instances")) for share in SHARES]

    def create(self, share: int, name: str) -> None:
        """Create an mdev in one write."""
        with (self.type_directory(share) / "create").open("wb", buffering=0) as file:
            file.write(name.encode())

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Opened]:
        """Open a vGPU as a VMM does."""
        with contextlib.ExitStack() as stack:
            memory = Memory(IOVA, PAGES)
            container = Container(int((kvmgt.DEVICES / name / "iommu_group").readlink().name))
            stack.callback(container.close)
            container.map(memory)
            self.before_opening(stack, memory, container)
            device = Device(container, name)
            stack.callback(device.close)
            device.reset()  # kvmgt keeps what an earlier holder has left
            yield Opened(name, container, memory, device)

    @abstractmethod
    def before_opening(self, stack: contextlib.ExitStack, memory: Memory, container: Container) -> None:
        """Do what the driver demands of whoever opens a vGPU."""

    @abstractmethod
    def reached(self, vgpu: Opened, gma: int) -> int | None:
        """Return the IOVA of the guest page that the hardware reaches at a guest's graphics address, None for none."""

    @abstractmethod
    def hardware_fences(self, vgpu: Opened) -> list[int]:
        """Return the hardware's 32 fences."""


class Sample(Driver):
    """The sample driver."""

    parent = host.PARENT
    prefix = f"{host.MODULE}-GVTg_V4"
    warns = False
    msi_at_first = 0

    def before_opening(self, stack: contextlib.ExitStack, memory: Memory, container: Container) -> None:
        """Do nothing."""

    def reached(self, vgpu: Opened, gma: int) -> int | None:
        """Look into the simulated GGTT."""
        instance = host.Instance(vgpu.name, "")
        layout = instance.layout()
        is_low = gma in range(layout.guest_low, layout.guest_low + layout.low_size)
        hgma = gma - layout.guest_low + layout.host_low if is_low else gma - layout.guest_high + layout.host_high
        entry = instance.hw_entry(hgma)
        return entry & -PAGE if entry & 1 else None

    def hardware_fences(self, vgpu: Opened) -> list[int]:
        """Read the simulated registers."""
        del vgpu
        return host.host_fences()


class Kvmgt(Driver):
    """The kernel's own kvmgt; its hardware is the emulated GPU."""

    parent = kvmgt.PARENT
    prefix = "i915-GVTg_V5"
    warns = True
    msi_at_first = 1

    def __init__(self, gpu: Control) -> None:
        self._gpu: Final = gpu

    def before_opening(self, stack: contextlib.ExitStack, memory: Memory, container: Container) -> None:
        """Attach a KVM."""
        stack.callback(Kvm(memory, container.group_fd).close)

    def reached(self, vgpu: Opened, gma: int) -> int | None:
        """Ask the GPU where its GGTT leads to; a page that is not the guest's is kvmgt's scratch page."""
        from tools.gpu.control import ControlError

        try:
            address = self._gpu.translate(gma)
        except ControlError:
            return None
        pages = range(0, vgpu.memory.size, PAGE)
        return next((IOVA + at for at in pages if kvmgt.host_address(vgpu.memory, at) == address), None)

    def hardware_fences(self, vgpu: Opened) -> list[int]:
        """Read the GPU's registers."""
        del vgpu
        return [
            self._gpu.register(FENCE + 8 * number + 4) << 32 | self._gpu.register(FENCE + 8 * number)
            for number in range(32)
        ]


def is_there() -> bool:
    """Whether either driver can be tested here."""
    return kvmgt.available() or host.TYPES.exists()


@contextlib.contextmanager
def driver() -> Iterator[Driver]:
    """Give the driver that is loaded."""
    if not kvmgt.available():
        yield Sample()
        return
    with kvmgt.gpu() as gpu:
        yield Kvmgt(gpu)
