# SPDX-License-Identifier: MIT
"""A context as an engine holds it: loaded from its image in graphics memory, saved back when it is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tools.gpu.translate import LEGACY_64, Ppgtt

if TYPE_CHECKING:
    from tools.gpu.access import Access
    from tools.gpu.dma import DmaSpace
    from tools.gpu.translate import Ggtt

PAGE: Final = 4096
_STATE: Final = PAGE  # the state page follows the page for the process's hardware status
_VALID: Final = 1 << 0
_LRCA: Final = 0xFFFF_F000
_MODE_SHIFT, _MODE_MASK = 3, 3

# Dwords of the state page: gt/intel_lrc_reg.h; the registers that they are loaded to: gt/intel_lrc.c, gen9_*_offsets.
CONTROL: Final = 0x03
RING_HEAD, RING_TAIL, RING_START, RING_CTL = 0x05, 0x07, 0x09, 0x0B
BATCH_HIGH, BATCH_LOW, BATCH_STATE = 0x0D, 0x0F, 0x11
SECOND_HIGH, SECOND_LOW, SECOND_STATE = 0x13, 0x15, 0x17
TIMESTAMP: Final = 0x23
PDP0_HIGH, PDP0_LOW = 0x31, 0x33  # PDP1 to PDP3 come before, 4 dwords each
_PDPS: Final = 4

RESTORE_INHIBIT: Final = 1 << 0
BATCH_VALID: Final = 1 << 0  # in the address
BATCH_PPGTT: Final = 1 << 5  # in the state
_HEAD: Final = 0x1F_FFFC
_TAIL: Final = 0x1F_FFF8
_PAGES: Final = 0x1F_F000
_ADDRESS_HIGH: Final = 0xFFFF
_LEVELS: Final = ((BATCH_HIGH, BATCH_LOW, BATCH_STATE), (SECOND_HIGH, SECOND_LOW, SECOND_STATE))
MAX_LEVELS: Final = len(_LEVELS)


@dataclass(slots=True)
class Batch:
    """Where a batch is executed: the next command's graphics address, and through which table it is reached."""

    address: int
    ppgtt: bool


@dataclass(slots=True)
class Context:
    """What a descriptor in the ELSP names.

    :ivar lrca: the image's graphics address; the GGTT leads to it.
    :ivar ident: the descriptor's upper half, by which the driver knows it in the context status buffer.
    :ivar head: the next command's offset in the ring; equals *tail* when nothing is left, and no batch is open.
    :ivar batches: the batch that is executed, and the second-level batch that it has started.
    """

    lrca: int
    ident: int
    head: int
    tail: int
    start: int
    control: int
    ppgtt: Ppgtt
    batches: list[Batch] = field(default_factory=list)
    commands: int = 0  # executed since its submission

    @property
    def size(self) -> int:
        """Bytes of the ring."""
        return (self.control & _PAGES) + PAGE

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to execute."""
        return not self.batches and self.head == self.tail

    def follow(self, length: int) -> None:
        """Go on behind a command of *length* dwords."""
        if self.batches:
            self.batches[-1].address += 4 * length
        else:
            self.head = (self.head + 4 * length) % self.size


def is_valid(descriptor: int) -> bool:
    """Tell whether a descriptor's lower half names a context."""
    return bool(descriptor & _VALID)


def lrca_of(descriptor: int) -> int:
    """Return the address of the image that a descriptor's lower half names."""
    return descriptor & _LRCA


def ppgtt_of(dma: DmaSpace, ggtt: Ggtt, lrca: int) -> Ppgtt:
    """Return the page tables that a context's image names, with 48-bit addresses.

    :raises FaultError: the image cannot be reached.
    """
    state = ggtt.translate((lrca & _LRCA) + _STATE)
    return Ppgtt(dma, LEGACY_64, [dma.read32(state + 4 * PDP0_HIGH) << 32 | dma.read32(state + 4 * PDP0_LOW)])


def load(access: Access, low: int, high: int) -> Context:
    """Load the context that a descriptor names; the batch that it was left in goes on.

    :raises FaultError: the image cannot be reached.
    """
    state = lrca_of(low) + _STATE

    def word(index: int) -> int:
        return access.peek(state + 4 * index)

    roots = [word(PDP0_HIGH - 4 * each) << 32 | word(PDP0_LOW - 4 * each) for each in range(_PDPS)]
    ppgtt = Ppgtt(access.dma, low >> _MODE_SHIFT & _MODE_MASK, roots)
    context = Context(
        lrca=lrca_of(low), ident=high, head=word(RING_HEAD) & _HEAD, tail=word(RING_TAIL) & _TAIL,
        start=word(RING_START) & _LRCA, control=word(RING_CTL), ppgtt=ppgtt,
    )  # fmt: skip
    context.head %= context.size
    context.tail %= context.size
    if not word(CONTROL) & RESTORE_INHIBIT:
        for high_at, low_at, state_at in _LEVELS:
            address = word(low_at)
            if address & BATCH_VALID:
                where = (word(high_at) & _ADDRESS_HIGH) << 32 | address & ~0b11
                context.batches.append(Batch(where, bool(word(state_at) & BATCH_PPGTT)))
    return context


def save(access: Access, context: Context, ticks: int) -> None:
    """Save what has changed: the position in ring and batches, and the time that it has run.

    :param ticks: of the timestamp's clock, to be added.
    :raises FaultError: the image cannot be reached.
    """
    state = context.lrca + _STATE
    access.poke(state + 4 * RING_HEAD, context.head)
    for level, (high_at, low_at, state_at) in enumerate(_LEVELS):
        batch = context.batches[level] if level < len(context.batches) else None
        access.poke(state + 4 * high_at, batch.address >> 32 & _ADDRESS_HIGH if batch else 0)
        access.poke(state + 4 * low_at, batch.address & 0xFFFF_FFFC | BATCH_VALID if batch else 0)
        access.poke(state + 4 * state_at, BATCH_PPGTT if batch is None or batch.ppgtt else 0)
    access.poke(state + 4 * CONTROL, access.peek(state + 4 * CONTROL) & ~RESTORE_INHIBIT)
    access.poke(state + 4 * TIMESTAMP, access.peek(state + 4 * TIMESTAMP) + ticks)
