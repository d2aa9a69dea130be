# SPDX-License-Identifier: MIT
"""An engine that is given its work by execution lists: two ports, preemption, context status events."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from tools.gpu import context as contexts
from tools.gpu import gt_irq, registers
from tools.gpu.access import Access
from tools.gpu.command import HangError
from tools.gpu.commands import BlockedError, Interpreter
from tools.gpu.mmio import masked
from tools.gpu.translate import FaultError

if TYPE_CHECKING:
    from tools.gpu.clock import Clock
    from tools.gpu.context import Context
    from tools.gpu.dma import DmaSpace
    from tools.gpu.gt_irq import GtInterrupts
    from tools.gpu.misbehaviour import Misbehaviour
    from tools.gpu.mmio import Mmio
    from tools.gpu.record import Record
    from tools.gpu.registers import EngineLayout
    from tools.gpu.translate import Ggtt

# Context status: gt/intel_execlists_submission.c
IDLE_ACTIVE: Final = 1 << 0
PREEMPTED: Final = 1 << 1
ELEMENT_SWITCH: Final = 1 << 2
ACTIVE_IDLE: Final = 1 << 3
COMPLETE: Final = 1 << 4
LITE_RESTORE: Final = 1 << 15

_CSB_BUFFER: Final = 0x40  # in the status page
_CSB_WRITE: Final = 0x7C
_CSB_POINTER: Final = 0x7
_PAGE_MASK: Final = 0xFFFF_F000
_ELSP_WRITES: Final = 4
_MODE_IDLE: Final = 1 << 9
_STOP_RING: Final = 1 << 8
_FAULT_VALID: Final = 1 << 0
_FAULT_ENGINE_SHIFT: Final = 12
_FAULT_IN_GGTT: Final = 1 << 4  # FAULT_GTT_SEL, in FAULT_TLB_DATA1

SLICE: Final = 1024
"""Commands (a blit counts as several) that are executed before the client is listened to again."""
RETRY_SECONDS: Final = (0.001, 0.005)
"""A semaphore is looked at again after the first of them, later after up to the second."""


class _Outcome(Enum):
    FINISHED = auto()
    BLOCKED = auto()  # a semaphore
    SLICE_OVER = auto()


class Engine:
    """One engine. Work begins with the last of the four writes to the ELSP, and goes on in :meth:`advance`.

    :ivar hung: why it executes nothing more, until it is reset; else empty.
    """

    def __init__(
        self,
        layout: EngineLayout,
        *,
        mmio: Mmio,
        dma: DmaSpace,
        ggtt: Ggtt,
        interrupts: GtInterrupts,
        misbehaviour: Misbehaviour,
        record: Record,
        clock: Clock,
        max_commands: int,
    ) -> None:
        """Connect the engine to its registers.

        :param max_commands: executed of one submission; then the engine hangs, as one does that executes an endless
            batch, but without using the host's CPU.
        """
        self.layout: Final = layout
        self.hung = ""
        self.executed = 0
        self._mmio: Final = mmio
        self._interrupts: Final = interrupts
        self._misbehaviour: Final = misbehaviour
        self._record: Final = record
        self._clock: Final = clock
        self._max_commands: Final = max_commands
        self._access: Final = Access(dma, ggtt, misbehaviour)
        self._interpreter: Final = Interpreter(
            layout, mmio, self._access, record,
            user_interrupt=lambda: self._interrupt(gt_irq.USER), status_page=self._status_page,
            ticks=clock.ticks,
        )  # fmt: skip
        self._ports: list[Context] = []
        self._elsp: list[int] = []
        self._started = 0  # ticks
        self._completes_at: float | None = None
        self._blocked_at: float | None = None
        base = layout.base
        mmio.writers["elsp", base + registers.RING_ELSP] = self._write_elsp
        mmio.writers["csb_ptr", base + registers.RING_CSB_PTR] = self._write_csb_pointer
        mmio.readers["mi_mode", base + registers.RING_MI_MODE] = self._read_mode
        mmio.writers["mi_mode", base + registers.RING_MI_MODE] = self._write_mode
        mmio.readers["timestamp", base + registers.RING_TIMESTAMP] = clock.ticks
        mmio.readers["timestamp_udw", base + registers.RING_TIMESTAMP_UDW] = lambda: clock.ticks() >> 32

    @property
    def ports(self) -> list[int]:
        """The contexts that are loaded, as their images' addresses."""
        return [each.lrca for each in self._ports]

    @property
    def state(self) -> str:
        """What it does: idle, hung, blocked (by a semaphore), completing (late, as it was told to), running."""
        if self.hung:
            return "hung"
        if not self._ports:
            return "idle"
        if self._completes_at is not None:
            return "completing"
        return "running" if self._blocked_at is None else "blocked"

    def reset(self) -> None:
        """Forget all work; the registers go back to their values after power-on."""
        if self._ports or self.hung:
            self._record.add(self.layout.name, self._ports[0].lrca if self._ports else 0, "reset", 0)
        self._misbehaviour.hang.discard(self.layout.name)
        self.hung = ""
        self._ports.clear()
        self._elsp.clear()
        self._completes_at = self._blocked_at = None
        for offset in (registers.RING_HEAD, registers.RING_TAIL, registers.RING_MI_MODE, registers.RING_RESET_CTL):
            self._mmio.put(self.layout.base + offset, 0)
        self._mmio.put(self.layout.base + registers.RING_CSB_PTR, registers.CSB_RESET_POINTERS)

    def wait(self) -> float | None:
        """Return the seconds after which :meth:`advance` can do something; None while it has nothing to do."""
        if not self._ports or self.hung or self._stopped():
            return None
        now = self._clock.now()
        if self._completes_at is not None:
            return max(0.0, self._completes_at - now)
        if self._blocked_at is not None:
            shortest, longest = RETRY_SECONDS
            return min(longest, shortest + (now - self._blocked_at) / 100)
        return 0.0

    def advance(self) -> bool:
        """Execute what can be executed now; return whether that was anything."""
        before = self.executed
        try:
            while self._ports and not self.hung and not self._stopped():
                if not self._go_on(self._ports[0]):
                    break
        except HangError as error:
            self._hang(str(error))
        except FaultError as error:
            self._fault(error)
        return self.executed != before

    def _go_on(self, context: Context) -> bool:
        """Execute a context; return whether it is complete, and another one may follow."""
        if self.layout.name in self._misbehaviour.hang:
            raise HangError("told to hang")
        if self._completes_at is None:
            outcome = self._run(context)
            if outcome is not _Outcome.FINISHED:
                return False
            self._completes_at = self._clock.now() + self._misbehaviour.delay.get(self.layout.name, 0.0)
        if self._clock.now() < self._completes_at:
            return False
        self._completes_at = None
        self._leave(context)
        self._ports.pop(0)
        self._status(COMPLETE | (ELEMENT_SWITCH if self._ports else ACTIVE_IDLE), context)
        self._enter()
        return True

    def _run(self, context: Context) -> _Outcome:
        """Execute commands until the context is finished, blocked, or has had its slice."""
        base = self.layout.base
        self._mmio.put(base + registers.RING_START, context.start)
        self._mmio.put(base + registers.RING_CTL, context.control)
        self._mmio.put(base + registers.RING_TAIL, context.tail)
        self._access.use(context.ppgtt)
        done = 0
        try:
            while not context.finished:
                if done >= SLICE:
                    return _Outcome.SLICE_OVER
                if context.commands >= self._max_commands:
                    raise HangError(f"more than {self._max_commands} commands in one submission")
                counted = self._interpreter.step(context)
                done += counted
                context.commands += counted
                self._blocked_at = None
        except BlockedError:
            if self._blocked_at is None:
                self._blocked_at = self._clock.now()
            return _Outcome.BLOCKED
        finally:
            self.executed += done
            position = context.batches[-1].address if context.batches else context.start + context.head
            self._mmio.put(base + registers.RING_HEAD, context.head)
            self._mmio.put(base + registers.RING_ACTHD, position)
            self._mmio.put(base + registers.RING_ACTHD_UDW, position >> 32)
        return _Outcome.FINISHED

    def _write_elsp(self, value: int) -> None:
        """Take a quarter of a list: upper and lower half of the second element, then of the first."""
        self._elsp.append(value)
        if len(self._elsp) < _ELSP_WRITES:
            return
        high1, low1, high0, low0 = self._elsp
        self._elsp.clear()
        if self.hung:
            return
        try:
            self._submit([(low, high) for low, high in ((low0, high0), (low1, high1)) if contexts.is_valid(low)])
        except FaultError as error:
            self._fault(error)
        self.advance()

    def _submit(self, descriptors: list[tuple[int, int]]) -> None:
        """Take a new list; what runs is left, and is the first to be loaded again if it stands first in the list."""
        self._access.use(None)
        status, about = IDLE_ACTIVE, None
        if self._ports:
            about = self._ports[0]
            self._leave(about)
            lite = bool(descriptors) and contexts.lrca_of(descriptors[0][0]) == about.lrca
            status = PREEMPTED | (LITE_RESTORE if lite else 0)
        self._completes_at = self._blocked_at = None
        self._ports.clear()
        self._ports += [contexts.load(self._access, low, high) for low, high in descriptors]
        self._enter()
        about = about or (self._ports[0] if self._ports else None)
        if about is not None:
            self._status(status, about)

    def _enter(self) -> None:
        self._started = self._clock.ticks()

    def _leave(self, context: Context) -> None:
        contexts.save(self._access, context, self._clock.ticks() - self._started)

    def _status(self, status: int, context: Context) -> None:
        """Tell the driver: an entry in the status page and in the registers, then the write pointer, an interrupt."""
        base = self.layout.base
        pointers = self._mmio.get(base + registers.RING_CSB_PTR)
        index = ((pointers & _CSB_POINTER) + 1) % registers.CSB_ENTRIES
        page = self._status_page()
        self._access.poke64(page + _CSB_BUFFER + 8 * index, context.ident << 32 | status)
        self._mmio.put(base + registers.RING_CSB_BUF + 8 * index, status)
        self._mmio.put(base + registers.RING_CSB_BUF + 8 * index + 4, context.ident)
        self._mmio.put(base + registers.RING_CSB_PTR, pointers & ~_CSB_POINTER | index)
        self._access.poke(page + _CSB_WRITE, index)
        self._record.add(self.layout.name, context.lrca, "status", status)
        self._interrupt(gt_irq.CONTEXT_SWITCH)

    def _interrupt(self, bits: int) -> None:
        """Raise an interrupt unless the engine's own mask, whose bits lie as in the GT's registers, has it."""
        mask = self._mmio.get(self.layout.base + registers.RING_IMR) >> self.layout.shift
        self._interrupts.raise_(self.layout, bits & ~mask)

    def _hang(self, why: str) -> None:
        self.hung = why
        self._record.add(self.layout.name, self._ports[0].lrca if self._ports else 0, f"hang: {why}", 0)

    def _fault(self, fault: FaultError) -> None:
        """Hang; the fault registers keep the first fault until the driver clears them."""
        if not self._mmio.get(registers.RING_FAULT) & _FAULT_VALID:
            self._mmio.put(registers.FAULT_TLB_DATA0, fault.address >> 12)
            high = fault.address >> 44 & 0xF | (_FAULT_IN_GGTT if fault.ggtt else 0)
            self._mmio.put(registers.FAULT_TLB_DATA1, high)
            self._mmio.put(registers.RING_FAULT, _FAULT_VALID | self.layout.fault_id << _FAULT_ENGINE_SHIFT)
        self._hang(str(fault))

    def _status_page(self) -> int:
        return self._mmio.get(self.layout.base + registers.RING_HWS_PGA) & _PAGE_MASK

    def _stopped(self) -> bool:
        return bool(self._mmio.get(self.layout.base + registers.RING_MI_MODE) & _STOP_RING)

    def _read_mode(self) -> int:
        """Return MI_MODE: an engine that is stopped is idle between two commands, and that is where it always is."""
        mode = self._mmio.get(self.layout.base + registers.RING_MI_MODE) & ~_MODE_IDLE
        return mode | (_MODE_IDLE if not self._ports or self._stopped() else 0)

    def _write_mode(self, value: int) -> None:
        offset = self.layout.base + registers.RING_MI_MODE
        self._mmio.put(offset, masked(self._mmio.get(offset), value))
        self.advance()

    def _write_csb_pointer(self, value: int) -> None:
        offset = self.layout.base + registers.RING_CSB_PTR
        self._mmio.put(offset, masked(self._mmio.get(offset), value))
