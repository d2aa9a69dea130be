# SPDX-License-Identifier: MIT
"""The whole function: configuration space, registers, aperture, engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tools.gpu import pci, registers
from tools.gpu.clock import Clock
from tools.gpu.dma import DmaSpace
from tools.gpu.engine import Engine
from tools.gpu.gt_irq import GtInterrupts
from tools.gpu.irq import Interrupts
from tools.gpu.misbehaviour import Misbehaviour
from tools.gpu.mmio import GGTT, Mmio
from tools.gpu.mmio import SIZE as BAR0_SIZE
from tools.gpu.record import Record
from tools.gpu.server import BAR0, BAR2, BAR4, CONFIG, Region
from tools.gpu.translate import PAGE, FaultError, Ggtt

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS: Final = {"skl": 0x1912, "kbl": 0x5912}
"""GT2 of Skylake and Kaby Lake, PCI device ids."""
APERTURES: Final = (256, 512, 1024)
"""MiB. GVT-g's four types of vGPU all fit 1 GiB only: the host keeps 128 MiB low and 384 MiB high, gvt/gvt.h."""
MAX_COMMANDS: Final = 1 << 20
_IO_SIZE: Final = 64
_FULL_RESET: Final = 1 << 0
_TIMESTAMP_CTR: Final = 0x44070
_TRACED: Final = {BAR0: "register", CONFIG: "config"}


class Gpu:
    """A gen9 GPU; what it does to the client's memory and interrupts, it does when it is accessed or advanced."""

    def __init__(
        self,
        model: str = "skl",
        *,
        aperture: int = 1024,
        max_commands: int = MAX_COMMANDS,
        clock: Clock | None = None,
        trace: Callable[[str], None] | None = None,
        conventional: bool = False,
    ) -> None:
        """Make a GPU after power-on.

        :param model: one of MODELS.
        :param aperture: MiB, one of APERTURES.
        :param max_commands: executed of one submission before the engine hangs.
        :param trace: is told of each access to registers and configuration space; the client then maps no register.
        :param conventional: a function of conventional PCI, with 256 bytes of configuration.
        """
        self.model: Final = model
        self._trace: Final = trace
        self.clock: Final = clock or Clock()
        self.misbehaviour: Final = Misbehaviour()
        self.record: Final = Record()
        self.memory: Final = DmaSpace()
        self.interrupts: Final = Interrupts(self.misbehaviour)
        self.mmio: Final = Mmio(registers.table())
        self.ggtt: Final = Ggtt(self.mmio.ggtt)
        gt = GtInterrupts(self.mmio, self.interrupts)
        self.engines: Final = {
            layout.name: Engine(
                layout, mmio=self.mmio, dma=self.memory, ggtt=self.ggtt, interrupts=gt,
                misbehaviour=self.misbehaviour, record=self.record, clock=self.clock, max_commands=max_commands,
            )
            for layout in registers.ENGINES
        }  # fmt: skip
        self.mmio.writers["gdrst", registers.GDRST] = self._write_reset
        self.mmio.readers["timestamp", _TIMESTAMP_CTR] = self.clock.ticks
        sizes = {BAR0: BAR0_SIZE, BAR2: aperture << 20, BAR4: _IO_SIZE}
        self._config: Final = pci.ConfigSpace(MODELS[model], sizes, conventional=conventional)
        self.regions: Final = {
            BAR0: Region(BAR0_SIZE, self.mmio.fd, [(GGTT, BAR0_SIZE - GGTT)] if trace else self.mmio.areas()),
            BAR2: Region(sizes[BAR2]),
            BAR4: Region(_IO_SIZE),
            CONFIG: Region(self._config.size),
        }

    def close(self) -> None:
        """Let go of the client's memory and interrupts."""
        self.memory.clear()
        self.interrupts.close()
        self.mmio.close()

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read from a region."""
        data = self._read(region, offset, size)
        if self._trace is not None and region in _TRACED:
            self._trace(f"read  {_TRACED[region]} {offset:#x} {data[::-1].hex()}")
        return data

    def _read(self, region: int, offset: int, size: int) -> bytes:
        if region == BAR0:
            return self.mmio.read_bytes(offset, size)
        if region == CONFIG:
            return self._config.read(offset, size)
        if region == BAR2:
            return b"".join(self._read_aperture(*piece) for piece in _pieces(offset, size))
        return bytes(size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region."""
        if self._trace is not None and region in _TRACED:
            self._trace(f"write {_TRACED[region]} {offset:#x} {data[::-1].hex()}")
        if region == BAR0:
            self.mmio.write_bytes(offset, data)
        elif region == CONFIG:
            self._config.write(offset, data)
        elif region == BAR2:
            for position, size in _pieces(offset, len(data)):
                self._write_aperture(position, data[position - offset : position - offset + size])

    def reset(self) -> None:
        """Bring the function to the state after power-on."""
        for engine in self.engines.values():
            engine.reset()
        self.mmio.reset()
        self._config.reset()
        self.interrupts.reset()

    def wait(self) -> float | None:
        """Return the seconds after which :meth:`advance` can do something; None while all engines are idle."""
        waits = [wait for engine in self.engines.values() if (wait := engine.wait()) is not None]
        return min(waits, default=None)

    def advance(self) -> None:
        """Let all engines execute what they can; one may have to wait for what another one does."""
        for engine in self.engines.values():
            if engine.wait() is not None:
                engine.advance()

    def _read_aperture(self, offset: int, size: int) -> bytes:
        try:
            return self.memory.read(self.ggtt.translate(offset), size)
        except FaultError:
            return b"\xff" * size

    def _write_aperture(self, offset: int, data: bytes) -> None:
        try:
            self.memory.write(self.ggtt.translate(offset), data)
        except FaultError:
            return

    def _write_reset(self, value: int) -> None:
        """Reset the engines that GDRST names; it is done at once, and reads as zero."""
        for engine in self.engines.values():
            if value & (_FULL_RESET | engine.layout.reset):
                engine.reset()
        self.mmio.put(registers.GDRST, 0)


def _pieces(offset: int, size: int) -> list[tuple[int, int]]:
    """Cut an access at the borders of pages."""
    found = []
    end = offset + size
    while offset < end:
        piece = min(end, (offset | PAGE - 1) + 1) - offset
        found.append((offset, piece))
        offset += piece
    return found
