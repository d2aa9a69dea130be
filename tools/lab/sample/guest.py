# SPDX-License-Identifier: MIT
"""A vGPU of the sample driver in use by a guest that the tests play."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Self

from tools.lab.vfio.raw import PAGE, Container, Device, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.sample.host import Instance


class Guest:
    """A vGPU in use: its container, its mapped memory, its open device, and a simple page allocator."""

    def __init__(self, instance: Instance, container: Container | None, memory: Memory, device: Device) -> None:
        self.instance: Final = instance
        self._container: Final = container
        self.memory: Final = memory
        self.device: Final = device
        self._next_page = 0
        self._next_low = device.guest_low() + 0x10 * PAGE
        self._next_high = device.guest_high() + 0x10 * PAGE

    @classmethod
    @contextlib.contextmanager
    def opened(cls, instance: Instance, *, iova: int = 0x100000, pages: int = 256) -> Iterator[Self]:
        container = Container(instance.group)
        try:
            memory = Memory(iova, pages)
            container.map(memory)
            device = Device(container, instance.uuid)
            try:
                yield cls(instance, container, memory, device)
            finally:
                device.close()
        finally:
            container.close()

    @property
    def container(self) -> Container:
        """Its container; not for a guest of a device that another process holds."""
        if self._container is None:
            raise LookupError("the container is another process's")
        return self._container

    def page(self) -> int:
        """IOVA of a page of guest memory that nobody uses yet."""
        iova = self.memory.iova + self._next_page * PAGE
        if iova >= self.memory.iova + self.memory.size:
            raise MemoryError("the test's guest memory is too small")
        self._next_page += 1
        return iova

    def bind(self, pages: int = 1, *, high: bool = False) -> tuple[int, int]:
        """Put fresh pages at fresh consecutive graphics addresses: (gma, IOVA) of the first; IOVAs are consecutive."""
        gma = self._next_high if high else self._next_low
        if high:
            self._next_high += pages * PAGE
        else:
            self._next_low += pages * PAGE
        first = self.page()
        for number in range(pages):
            iova = first if not number else self.page()
            self.device.set_pte(gma + number * PAGE, iova | 1)
        return gma, first
