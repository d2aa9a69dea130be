# SPDX-License-Identifier: MIT
"""Hostile images and hostile guests, many of them: the kernel stays quiet and keeps no memory.

VFIO_MIG_FUZZ_SEED repeats a run; VFIO_MIG_FUZZ_SECONDS replaces the two minimum counts by a time.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.kernel.memory import SLAB_NOISE, kmemleak, slab_growth, slab_objects, vmalloc_areas
from tools.lab.sample import gpu, host, image
from tools.lab.sample.guest import Guest
from tools.lab.vfio.raw import BAR0, CONFIG, FENCE, GTT, IRQ_MSI, PVINFO, STATE, STATE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

PAGE: Final = 4096
IMAGES: Final = 20_000
WRITES: Final = 100_000
INTERESTING: Final = (0, 1, 2, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFF000, STATE_SIZE, PAGE)


class Budget:
    """How long to go on: a number of rounds, or with VFIO_MIG_FUZZ_SECONDS this many seconds, half for each test."""

    def __init__(self, rounds: int) -> None:
        seconds = os.environ.get("VFIO_MIG_FUZZ_SECONDS")
        self._end: Final = time.monotonic() + float(seconds) / 2 if seconds else None
        self._rounds: Final = rounds
        self.done = 0

    def more(self) -> bool:
        if self._end is None:
            return self.done < self._rounds
        return self.done % 64 != 0 or time.monotonic() < self._end


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("VFIO_MIG_FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    report(f"VFIO_MIG_FUZZ_SEED={seed}")  # shown when the test fails, and with -s
    return random.Random(seed)  # noqa: S311


def report(text: str) -> None:
    """Tell about the run; pytest shows it when the test fails, and with -s."""
    print(text)  # noqa: T201


# --- kernel memory


@contextlib.contextmanager
def no_leak() -> Iterator[None]:
    """Check that the module's memory is all back once it is unloaded.

    Large memory is exact: no vmalloc area may be left. Small objects share their caches with the rest of the system,
    which moved none of them by more than +50 in a run (6.12 and 6.1). A leak in each accepted image, in each of the
    refusals behind the tables, or in each workload is 500 objects of one cache and more.
    """
    with host.instance() as one, Guest.opened(one) as guest:  # whatever is allocated once, at first use
        guest.device.restore(guest.device.save())
    host.unload_module()
    before = slab_objects()
    areas = vmalloc_areas("gvt_")
    host.load_module()
    loaded_areas = vmalloc_areas("gvt_")
    try:
        yield
    finally:
        host.remove_all()
    left_areas = vmalloc_areas("gvt_")
    host.unload_module()
    try:
        growth = slab_growth(before)
        assert (left_areas, vmalloc_areas("gvt_")) == (loaded_areas, areas)
        assert kmemleak("gvt_") == []
    finally:
        host.load_module()
    grown = {name: count for name, count in growth.items() if count > SLAB_NOISE}
    report(f"slab growth: { {name: count for name, count in growth.items() if count} }")
    assert not grown


# --- images


class Mutator:
    """One good image in a buffer of the region's size; changes are undone after use."""

    def __init__(self, saved: bytes, rng: random.Random) -> None:
        self.saved: Final = saved
        self.rng: Final = rng
        self.buffer: Final = bytearray(saved) + bytearray(STATE_SIZE - len(saved))
        self.records: Final = image.records(saved)
        headers = [one.at for one in self.records]
        # Refused before the large records are copied; then those that are found later; then what is accepted
        self.early: Final = [0, 4, 8, 12, headers[1], headers[1] + 4, headers[2], headers[2] + 4, image.CFG_AT + 8]
        late = [at + offset for at in headers[3:] for offset in (0, 4)]
        late += [image.PVINFO_AT + offset for offset in (0, 4, 8, 0x40, 0x44, 0x48, 0x4C, 0x50)]
        tail = self.records[-2]
        self.late: Final = late + list(range(tail.payload, len(saved) - 3, 4))
        self.undo: list[tuple[int, bytes]] = []

    def put(self, at: int, data: bytes) -> None:
        self.undo.append((at, bytes(self.buffer[at : at + len(data)])))
        self.buffer[at : at + len(data)] = data

    def restore(self) -> None:
        for at, old in reversed(self.undo):
            self.buffer[at : at + len(old)] = old
        self.undo.clear()

    def value(self, at: int) -> bytes:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            number = rng.choice(INTERESTING)
        elif kind == 1:
            number = int.from_bytes(self.buffer[at : at + 4], "little") + rng.choice((-24, -8, -1, 1, 8, 24, 40))
        elif kind == 2:
            number = int.from_bytes(self.buffer[at : at + 4], "little") ^ 1 << rng.randrange(32)
        else:
            number = rng.getrandbits(32)
        return (number & 0xFFFFFFFF).to_bytes(4, "little")

    def mutate(self) -> int:
        """Change the buffer; returns how many bytes of it to write."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.86:
            at = rng.choice(self.early)
            self.put(at, self.value(at))
            return STATE_SIZE
        if kind < 0.90:
            return rng.choice((1, 7, 8, 100, 535, 536, rng.randrange(1, 0x1228), len(self.saved) - 1))
        if kind < 0.97:
            for _ in range(rng.choice((1, 1, 2))):
                at = rng.choice(self.late)
                self.put(at, self.value(at))
            return STATE_SIZE
        if kind < 0.98:  # the tail moved by some bytes, as if one were lost or doubled
            at = self.records[-2].at
            shift = rng.choice((-8, -1, 1, 8, 24))
            self.put(at, bytes(self.buffer[at + shift : at + shift + 256]))
            return STATE_SIZE
        for _ in range(4):  # payload: most of these are good images of strange guests
            one = rng.choice(self.records[1:6])
            if one.size:
                at = one.payload + rng.randrange(0, one.size - 63)
                if image.CFG_AT + 8 <= at < image.CFG_AT + 20:
                    continue
                self.put(at, rng.randbytes(rng.choice((1, 4, 8, 64))))
        return STATE_SIZE


def test_mutated_images_never_hurt_the_kernel(rng: random.Random) -> None:
    budget = Budget(IMAGES)
    accepted = 0
    with no_leak(), host.instance() as one, Guest.opened(one) as guest:
        guest.device.stop()
        engine = gpu.Engine(guest)
        gma, _ = guest.bind(4)
        guest.bind(4, high=True)
        guest.device.make_ppgtt(4, [0x1000])
        guest.device.make_ppgtt(3, [1, 2, 3, 4])
        context = engine.context(gpu.store_dword(gma, 1))
        engine.submit(context, context)
        engine.submit(context)
        mutator = Mutator(guest.device.save(), rng)
        view, begin = memoryview(mutator.buffer), time.monotonic()
        while budget.more():
            count = mutator.mutate()
            with contextlib.suppress(OSError):
                guest.device.write(STATE, 0, view[:count])
                accepted += 1
                if not accepted % 16:
                    guest.device.start()  # let strange guests run, too
                    guest.device.stop()
            mutator.restore()
            budget.done += 1
        seconds = time.monotonic() - begin
        view.release()
        guest.device.restore(mutator.saved)
        assert guest.device.save() == mutator.saved
    report(f"{budget.done} images, {accepted} accepted, {seconds:.1f} s")
    assert 0 < accepted < budget.done


# --- guests


class HostileGuest:
    """Random use of everything that a guest can reach."""

    def __init__(self, guest: Guest, rng: random.Random) -> None:
        self.guest: Final = guest
        self.rng: Final = rng
        self.engines: Final = [gpu.Engine(guest, ring) for ring in range(5)]
        self.data, data = guest.bind(8)
        guest.memory.write(data, struct.pack("<I", gpu.BATCH_END) * (PAGE // 4))  # a jump there returns
        self.contexts: Final = [engine.context(gpu.NOOP) for engine in self.engines for _ in range(2)]
        high = guest.device.guest_high()
        addresses = [self.data, self.data + PAGE - 4, high, 0, 0x03FFFFFC, 0x04000000, high + 0x17FFFFFC]
        self.addresses: Final = addresses + [context.low & ~0xFFF for context in self.contexts[:2]]
        self.templates: Final = [
            gpu.store_dword(0, 1), gpu.store_qword(0, 1), gpu.flush_dword(0, 1), gpu.flush_qword(0, 1),
            gpu.pipe_control(0, 1), gpu.batch_start(0), gpu.load_register(0x2600, 1),
            gpu.load_register_mem(0x2600, 0), gpu.store_register_mem(0x2600, 0),
            [gpu.USER_INTERRUPT], [gpu.ARB_CHECK], [gpu.NOOP],
        ]  # fmt: skip
        self.registers: Final = [
            *(PVINFO + offset for offset in range(0x800, 0x860, 4)),
            *(PVINFO + offset for offset in range(0, 0x60, 4)),
            *(FENCE + offset for offset in range(0, 0x120, 4)),
            *(base + offset for base in gpu.RING_BASE.values() for offset in (0x230, 0x80, 0x29C, 0x34, 0x370, 0x3A0)),
            *(0x44200 + offset for offset in range(0, 0x140, 4)),
        ]

    def words(self) -> bytes:
        """Commands that are right, nearly right, and noise."""
        rng = self.rng
        words: list[int] = []
        tame = rng.random() < 0.6
        addresses = self.addresses[:1] if tame else self.addresses
        for _ in range(rng.randrange(1, 12)):
            command = list(rng.choice(self.templates))
            if len(command) > 2:
                at = 2 if command[0] >> 23 in {0x24, 0x29} or command[0] >> 29 == 3 else 1
                command[at] = command[at] & 4 | rng.choice(addresses)
            if not tame and rng.random() < 0.15:
                command[rng.randrange(len(command))] ^= 1 << rng.randrange(32)
            words += command
        words += [gpu.NOOP] * (len(words) % 2)
        return struct.pack(f"<{len(words)}I", *words)

    def step(self) -> int:  # noqa: C901  # a list of cases  # a list of cases
        """Do something; returns how many writes it was."""
        rng, device = self.rng, self.guest.device
        kind = rng.random()
        number = rng.getrandbits(32) if rng.random() < 0.5 else rng.choice(INTERESTING)
        if kind < 0.30:
            device.write(BAR0, rng.choice(self.registers), number.to_bytes(4, "little"))
        elif kind < 0.40:
            size = rng.choice((1, 2, 4, 8, 3, 16))
            device.write(BAR0, rng.randrange(0x200000), rng.randbytes(size))
        elif kind < 0.72:
            window = rng.choice((0, self.guest.device.guest_high() >> 12 if kind < 0.41 else 0xE8000, 0x4000))
            entry = self.guest.memory.iova + rng.randrange(-4, 260) * PAGE | rng.randrange(2)
            if rng.random() < 0.1:
                entry = rng.getrandbits(64)
            size = rng.choice((8, 8, 4))
            slot = window + rng.randrange(0x100)  # not where the contexts are bound, or seldom
            device.write(BAR0, GTT + slot * 8 + 0x800, entry.to_bytes(8, "little")[:size])
        elif kind < 0.76:
            device.write(CONFIG, rng.randrange(0x100), rng.randbytes(rng.choice((1, 2, 4))))
        elif kind < 0.90:
            return self.submit()
        elif kind < 0.95:
            device.read(BAR0, rng.randrange(0x1000000), rng.choice((1, 2, 4, 8)))
        elif kind < 0.97:
            device.status(rng.choice((1, 2, 2, 2, 3)))
        elif kind < 0.98:
            device.dirty_bytes(rng.getrandbits(rng.choice((21, 64))), rng.randrange(600))
        elif kind < 0.982:
            device.set_reg(gpu.RESET_REGISTER, rng.randrange(32))
        elif kind < 0.9825:
            device.reset()
        elif kind < 0.983:
            self.guest.container.unmap(self.guest.memory)
            self.guest.container.map(self.guest.memory)
            self.rebind()
        return 1

    def rebind(self) -> None:
        """Bind the pages again that every context needs."""
        device, memory = self.guest.device, self.guest.memory
        for number in range(60):
            device.set_pte((0x10 + number) * PAGE, memory.iova + number * PAGE | 1)

    def submit(self) -> int:
        rng = self.rng
        at = rng.randrange(len(self.contexts))
        context, engine = self.contexts[at], self.engines[at // 2]
        if rng.random() < 0.7:
            data = self.words()
            memory = self.guest.memory
            memory.write(context.ring, data)
            memory.set_u32(context.image + gpu.CTX_HEAD, 0)
            memory.set_u32(context.image + gpu.CTX_TAIL, len(data))
        if rng.random() < 0.1:
            self.rebind()
        low = context.low ^ (1 << rng.randrange(32) if rng.random() < 0.1 else 0)
        engine.elsp(0, 0, context.high, low)
        return 4


def test_a_hostile_guest_never_hurts_the_kernel(rng: random.Random) -> None:
    budget = Budget(WRITES)
    with no_leak(), host.instance() as one, Guest.opened(one) as guest:
        hostile = HostileGuest(guest, rng)
        event = os.eventfd(0, os.EFD_NONBLOCK)
        guest.device.set_eventfd(IRQ_MSI, event)
        os.close(event)  # the driver has it
        begin = time.monotonic()
        while budget.more():
            try:
                budget.done += hostile.step()
            except OSError:
                budget.done += 1
        seconds = time.monotonic() - begin
        counters = one.counters()
        guest.device.reset()
        guest.device.start()
        gma, iova = 0x00300000, guest.memory.iova + 255 * PAGE
        hostile.rebind()
        guest.device.set_pte(gma, iova | 1)
        context = hostile.contexts[0]
        guest.memory.write(context.ring, struct.pack("<4I", *gpu.store_dword(gma, 0x600D)))
        for offset, value in ((gpu.CTX_HEAD, 0), (gpu.CTX_TAIL, 16)):
            guest.memory.set_u32(context.image + offset, value)
        before = one.counters()
        hostile.engines[0].submit(context)
        gpu.wait_ended(guest, before, 1)
    report(f"{budget.done} writes, {seconds:.1f} s, {counters}")
    assert counters["workloads_completed"] > 0
    assert counters["workloads_failed"] > 0
    assert guest.memory.u32(iova) == 0x600D  # after all this, a good guest is served
