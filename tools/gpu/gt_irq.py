# SPDX-License-Identifier: MIT
"""The GT's interrupt registers: identities, masks, enables, and the master register that leads to an MSI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tools.gpu.registers import ENGINES, GT_BANK, GT_IER, GT_IIR, GT_IMR, MASTER_IRQ

if TYPE_CHECKING:
    from tools.gpu.irq import Interrupts
    from tools.gpu.mmio import Mmio
    from tools.gpu.registers import EngineLayout

USER: Final = 1 << 0
"""An engine's own interrupts, before they are shifted: MI_USER_INTERRUPT and its like."""
CONTEXT_SWITCH: Final = 1 << 8

_ENABLE: Final = 1 << 31
_MASTER_BITS: Final = {"rcs0": 1 << 0, "bcs0": 1 << 1, "vcs0": 1 << 2, "vecs0": 1 << 6}


class GtInterrupts:
    """Raises the engines' interrupts and passes them on."""

    def __init__(self, mmio: Mmio, interrupts: Interrupts) -> None:
        self._mmio: Final = mmio
        self._interrupts: Final = interrupts
        mmio.readers["master_irq", MASTER_IRQ] = lambda: mmio.get(MASTER_IRQ) & _ENABLE | self.pending()
        mmio.writers["master_irq", MASTER_IRQ] = self._write_master

    def raise_(self, engine: EngineLayout, bits: int) -> None:
        """Raise an engine's interrupts, except those that its mask register has masked."""
        bank = GT_BANK * engine.bank
        raised = bits << engine.shift & ~self._mmio.get(GT_IMR + bank)
        if raised:
            self._mmio.put(GT_IIR + bank, self._mmio.get(GT_IIR + bank) | raised)
            self._pass_on()

    def pending(self) -> int:
        """Return the master register's bits: the engines that have an interrupt which is enabled."""
        found = 0
        for engine in ENGINES:
            bank = GT_BANK * engine.bank
            active = self._mmio.get(GT_IIR + bank) & self._mmio.get(GT_IER + bank)
            if active >> engine.shift & 0xFFFF:
                found |= _MASTER_BITS[engine.name]
        return found

    def _write_master(self, value: int) -> None:
        """Keep the enable bit; interrupts that came while it was off are sent when it comes on."""
        self._mmio.put(MASTER_IRQ, value & _ENABLE)
        self._pass_on()

    def _pass_on(self) -> None:
        if self._mmio.get(MASTER_IRQ) & _ENABLE and self.pending():
            self._interrupts.fire()
