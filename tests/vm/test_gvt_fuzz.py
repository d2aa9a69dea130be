# SPDX-License-Identifier: MIT
"""Hostile images for the real driver, many of them: the kernel stays quiet, keeps no memory, and hurts no other vGPU.

VFIO_MIG_FUZZ_SEED repeats a run; VFIO_MIG_FUZZ_IMAGES replaces the number of images, of which 20,000 take half an hour.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import time
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import ENGINES, RESULT, SEMAPHORE, Vgpu
from tools.lab.gvt.rfc import BCS, CRC_AT, MODULES, VREG, assert_same, load_ours, load_stock, queue_work, seal
from tools.lab.kernel.memory import SLAB_NOISE, slab_growth, slab_objects, vmalloc_areas
from tools.lab.sample import image
from tools.lab.vfio import raw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.conftest import MakeVgpu

pytestmark = [pytest.mark.gvt, pytest.mark.slow]

IMAGES: Final = int(os.environ.get("VFIO_MIG_FUZZ_IMAGES") or 2_000)
INTERESTING: Final = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFF000, raw.STATE_SIZE)
PLAY_EACH: Final = 8
"""Of so many images that were taken one is let run."""

# What is in SREG: tools/kvmgt/gvt/migrate_image.h
_EXT: Final = CRC_AT - 12
_EXECLISTS: Final = _EXT + 56
_DISPLAY: Final = _EXECLISTS + 5 * 72
_BEHIND: Final = _DISPLAY + 2216

if not MODULES.is_dir():
    pytest.skip("VFIO_MIG_KVMGT is not the directory of a kvmgt that scripts/kvmgt built", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ours() -> Iterator[None]:
    load_ours()
    yield
    load_stock()


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("VFIO_MIG_FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    report(f"VFIO_MIG_FUZZ_SEED={seed}")
    return random.Random(seed)  # noqa: S311


def report(text: str) -> None:
    """Tell about the run; pytest shows it when the test fails, and with -s."""
    print(text, flush=True)  # noqa: T201


class Mutator:
    """A good image, and others made of it. What is changed is undone after use."""

    def __init__(self, saved: bytes, rng: random.Random) -> None:
        self.saved: Final = saved
        self.rng: Final = rng
        self.buffer: Final = bytearray(saved)
        records = image.records(saved)
        engines = [VREG + engine.base for engine in ENGINES]
        self.headers: Final = [at + n for one in records for at in (one.at,) for n in (0, 4)] + [8, 12]
        self.areas: Final = [
            *[(_EXT, 56)] * 2,
            *[(_EXECLISTS, 5 * 72)] * 3,
            (_DISPLAY, 2216),
            *[(_BEHIND, len(image.workloads(saved)) * 32 + 16)] * 4,
            (records[1].payload, 64),
            (records[1].payload + 0xA0, 0x40),
            (VREG + raw.PVINFO, 0x60),
            (VREG + 0x24D0, 48),
            *[(at + 0x80, 4) for at in engines],
            *[(at + 0xD0, 8) for at in engines],
            *[(at + 0x230, 0x18) for at in engines],
            *[(at + 0x29C, 4) for at in engines],
            *[(at + 0x370, 0x34) for at in engines],
            (VREG + 0x70008, 4),
            (VREG + raw.FENCE, 256),
            (VREG, 0x1FF000),
            *[(one.payload, min(one.size, 0x800)) for one in records[4:] if one.size],
            (records[4].payload, records[4].size - 64),
        ]

    def _value(self, at: int) -> bytes:
        rng, old = self.rng, int.from_bytes(self.buffer[at : at + 4], "little")
        number = (
            rng.choice(INTERESTING),
            old + rng.choice((-24, -8, -1, 1, 8, 24, 40)),
            old ^ 1 << rng.randrange(32),
            rng.getrandbits(32),
        )[rng.randrange(4)]
        return (number & 0xFFFF_FFFF).to_bytes(4, "little")

    @contextlib.contextmanager
    def mutated(self) -> Iterator[memoryview]:
        """Have an image that differs; its checksum is right, or nothing behind it would be looked at."""
        rng = self.rng
        undo: list[tuple[int, bytes]] = [(CRC_AT, bytes(self.buffer[CRC_AT : CRC_AT + 4]))]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.1:
                at = rng.choice(self.headers)
            else:
                start, length = rng.choice(self.areas)
                at = start + rng.randrange(max(1, length - 3)) // 4 * 4
            at = min(at, len(self.buffer) - 4)
            undo.append((at, bytes(self.buffer[at : at + 4])))
            self.buffer[at : at + 4] = self._value(at)
        if rng.random() < 0.98:
            seal(self.buffer)
        cut = rng.randrange(len(self.buffer)) if rng.random() < 0.01 else len(self.buffer)
        view = memoryview(self.buffer)
        try:
            yield view[:cut]
        finally:
            view.release()
            for at, old in reversed(undo):
                self.buffer[at : at + len(old)] = old


def play(vgpu: Vgpu) -> None:
    """Let a strange guest run for a moment, and use its device."""
    vgpu.put(SEMAPHORE, 1)
    vgpu.device.start()
    with contextlib.suppress(OSError):
        vgpu.run_contexts(BCS)
    with contextlib.suppress(OSError):
        vgpu.device.set_pte(vgpu.device.guest_high(), 1)
    vgpu.device.read(raw.BAR0, raw.PVINFO, 0x100)
    vgpu.device.stop()


def works(vgpu: Vgpu, value: int) -> None:
    vgpu.put(SEMAPHORE, 1)
    assert vgpu.device.reg64(raw.PVINFO) == kvmgt.PV_MAGIC  # or its driver does not know that it is a vGPU
    vgpu.prepare(BCS)
    vgpu.submit(BCS, value, value + 1)
    vgpu.await_u32(RESULT, value + 1)


@contextlib.contextmanager
def no_leak() -> Iterator[None]:
    """See that what the driver has allocated is back once its vGPUs are closed and removed."""
    slabs, areas = slab_objects(), vmalloc_areas("intel_")
    yield
    kvmgt.remove_all()
    growth = {name: count for name, count in slab_growth(slabs).items() if count > SLAB_NOISE}
    assert not growth
    assert vmalloc_areas("intel_") == areas


def test_mutated_images_never_hurt_the_kernel_or_another_vgpu(rng: random.Random) -> None:
    def opened() -> contextlib.AbstractContextManager[Vgpu]:
        return Vgpu.opened(stack.enter_context(kvmgt.instance()))

    with contextlib.ExitStack() as stack:  # whatever is allocated once, at first use
        vgpu = stack.enter_context(opened())
        works(vgpu, 1)
        vgpu.device.stop()
        vgpu.device.restore(vgpu.device.save())
    with no_leak(), contextlib.ExitStack() as stack:
        vgpu, other = (stack.enter_context(opened()) for _ in range(2))
        works(other, 0x10)
        queue_work(vgpu)
        saved = vgpu.device.save()
        mutator, taken, begin = Mutator(saved, rng), 0, time.monotonic()
        memory = other.memory.bytes[:]
        for done in range(1, IMAGES + 1):
            with mutator.mutated() as bad:
                try:
                    vgpu.device.write(raw.STATE, 0, bad)
                except OSError as error:
                    assert error.errno == errno.EFAULT  # noqa: PT017
                else:
                    taken += 1
                    if taken % PLAY_EACH == 0:
                        play(vgpu)
            if done % 1000 == 0:
                report(f"{done} images, {taken} taken, {time.monotonic() - begin:.0f} s")
        report(f"{IMAGES} images, {taken} taken, {time.monotonic() - begin:.0f} s")
        assert IMAGES // 50 < taken < IMAGES
        assert other.memory.bytes[:] == memory
        works(other, 0x20)
        vgpu.device.reset()
        works(vgpu, 0x30)
        vgpu.device.stop()
        vgpu.memory.bytes[:] = bytes(len(vgpu.memory.bytes))
        vgpu.device.start()
        queue_work(vgpu)
        vgpu.device.restore(vgpu.device.save())


def test_a_cut_image_is_refused_wherever_it_is_cut(make_vgpu: MakeVgpu) -> None:
    vgpu = make_vgpu()
    queue_work(vgpu)
    saved = vgpu.device.save()
    ends = [one.at + n for one in image.records(saved) for n in (0, 4, 8)]
    for end in {*ends, *(end + n for end in ends for n in (-1, 1)), len(saved) - 1}:
        if 0 <= end < len(saved):
            with pytest.raises(OSError):
                vgpu.device.write(raw.STATE, 0, saved[:end] if end else struct.pack("<I", 0))
    assert_same(vgpu.device.save(), saved)
