# SPDX-License-Identifier: MIT
"""What a guest's GPU driver does: commands, contexts, rings, submission by ELSP (tools/kmod/hw/gvt_cmd.h, submit.c)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tools.lab.vfio.raw import PAGE
from tools.lab.waiting import wait_until

if TYPE_CHECKING:
    from tools.lab.sample.guest import Guest

RCS: Final = 0
BCS: Final = 1
RING_BASE: Final = {0: 0x02000, 1: 0x22000, 2: 0x12000, 3: 0x1C000, 4: 0x1A000}

RING_HEAD: Final = 0x34
RING_HWS_PGA: Final = 0x80
RING_ELSP: Final = 0x230
RING_MODE: Final = 0x29C
RING_CSB: Final = 0x370
RING_GPR: Final = 0x600
RESET_REGISTER: Final = 0x941C

MASTER_IRQ: Final = 0x44200
GT_IMR: Final = 0x44304
GT_IIR: Final = 0x44308
GT_IER: Final = 0x4430C

NOOP: Final = 0
ARB_CHECK: Final = 0x02800000
USER_INTERRUPT: Final = 0x01000000
BATCH_END: Final = 0x05000000

# Context descriptor: valid, 32-bit three-level addressing, privileged
DESC_FLAGS: Final = 0x1 | 1 << 3 | 1 << 8
CTX_HEAD: Final = PAGE + 0x14
CTX_TAIL: Final = PAGE + 0x1C
CTX_START: Final = PAGE + 0x24
CTX_CTL: Final = PAGE + 0x2C


def store_dword(gma: int, value: int) -> list[int]:
    return [0x10400002, gma, 0, value]


def store_dwords(gma: int, *values: int) -> list[int]:
    return [0x10400000 + 1 + len(values), gma, 0, *values]


def store_qword(gma: int, value: int) -> list[int]:
    return [0x10600003, gma, 0, value & 0xFFFFFFFF, value >> 32]


def load_register(register: int, value: int) -> list[int]:
    return [0x11000001, register, value]


def load_register_mem(register: int, gma: int) -> list[int]:
    return [0x14C00002, register, gma, 0]


def store_register_mem(register: int, gma: int) -> list[int]:
    return [0x12400002, register, gma, 0]


def flush_dword(gma: int, value: int) -> list[int]:
    return [0x13004002, gma | 4, 0, value]


def flush_qword(gma: int, value: int) -> list[int]:
    return [0x13004003, gma | 4, 0, value & 0xFFFFFFFF, value >> 32]


def pipe_control(gma: int, value: int) -> list[int]:
    return [0x7A000004, 1 << 24 | 1 << 14, gma, 0, value & 0xFFFFFFFF, value >> 32]


def batch_start(gma: int) -> list[int]:
    return [0x18800001, gma, 0]


@dataclass(frozen=True)
class Context:
    """A context that can be submitted, with the guest's addresses of its parts."""

    low: int
    high: int
    image: int  # IOVA of its per-process page; registers are one page behind it
    ring: int  # IOVA of its ring

    @property
    def descriptor(self) -> tuple[int, int]:
        return self.high, self.low


class Engine:
    """The guest's driver of one engine."""

    def __init__(self, guest: Guest, ring: int = RCS) -> None:
        self.guest: Final = guest
        self.ring: Final = ring
        self.base: Final = RING_BASE[ring]
        self.status_gma, self.status_iova = guest.bind()
        self._next_id = 1
        guest.device.set_reg(self.base + RING_MODE, 1 << 31 | 1 << 15)
        guest.device.set_reg(self.base + RING_HWS_PGA, self.status_gma)

    def context(self, *commands: list[int] | int) -> Context:
        """Make a context whose ring holds *commands*, padded to 8 bytes."""
        words: list[int] = []
        for command in commands:
            words += [command] if isinstance(command, int) else command
        words += [NOOP] * (len(words) % 2)
        if len(words) * 4 >= PAGE:
            raise ValueError("the ring is one page")
        memory = self.guest.memory
        ring_gma, ring_iova = self.guest.bind()
        image_gma, image_iova = self.guest.bind(2)
        memory.write(ring_iova, struct.pack(f"<{len(words)}I", *words))
        for offset, register, value in (
            (CTX_HEAD, RING_HEAD, 0),
            (CTX_TAIL, 0x30, len(words) * 4),
            (CTX_START, 0x38, ring_gma),
            (CTX_CTL, 0x3C, 1),  # one page, valid
        ):
            memory.write(image_iova + offset - 4, struct.pack("<II", self.base + register, value))
        self._next_id += 1
        return Context(image_gma | DESC_FLAGS, self._next_id, image_iova, ring_iova)

    def elsp(self, *words: int) -> None:
        for word in words:
            self.guest.device.set_reg(self.base + RING_ELSP, word)

    def submit(self, first: Context, second: Context | None = None) -> None:
        """Write the four words in the guest's order: element 1 high, low, element 0 high, low."""
        self.elsp(*(second.descriptor if second else (0, 0)), *first.descriptor)

    def run(self, *commands: list[int] | int) -> tuple[Context, bool]:
        """Submit one workload and wait for its end; says whether the driver counts it as completed."""
        counters = self.guest.instance.counters()
        context = self.context(*commands)
        self.submit(context)
        wait_ended(self.guest, counters, 1)
        return context, self.guest.instance.counters()["workloads_completed"] > counters["workloads_completed"]


def ended(counters: dict[str, int]) -> int:
    return counters["workloads_completed"] + counters["workloads_failed"]


def wait_ended(guest: Guest, before: dict[str, int], number: int) -> None:
    """Wait until *number* workloads more than in *before* have come to an end, good or bad."""
    wait_until(
        f"end of {number} workloads",
        lambda: ended(guest.instance.counters()) >= ended(before) + number,
    )
