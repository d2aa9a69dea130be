# SPDX-License-Identifier: MIT
"""Our kvmgt (tools/kvmgt) on the emulated GPU: loading it, what a guest leaves half done, what an image has where."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.gpu.control import ControlError
from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import CONTEXT, ENGINES, MEMORY, RESULT, RING, SEMAPHORE, TARGET, Driver, Engine
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.control import Control

RCS, BCS, VCS = ENGINES[:3]

MODULES: Final = Path(os.environ.get("VFIO_MIG_KVMGT") or "/nonexistent")
"""The directory of a kvmgt that ``scripts/kvmgt build --build-all`` has made."""

# Of an image: tools/kvmgt/gvt/migrate_image.h, cdefs/gvt_image.h
CRC_AT: Final = 0x1228 + 12
VREG: Final = 0x201230

_FENCES: Final = 32
_PIPE_CONTROL: Final = 0x7A00_0004
_STORE: Final = 0x1040_0002  # MI_STORE_DATA_IMM, through the GGTT
_USER_INTERRUPT: Final = 2 << 23

# Contexts beside the first one, and a ring behind each: mapped at the offsets that they have in guest memory
_CONTEXT_PAGES: Final = 22
_SPARE: Final = 0x60000
_EACH: Final = (_CONTEXT_PAGES + 1) * PAGE
CONTEXTS: Final = (CONTEXT, *range(_SPARE, _SPARE + 3 * _EACH, _EACH))

QUEUED: Final = {BCS: (0xA1, 0xA2), RCS: (0xB1, 0xB2)}
"""What the pair of contexts stores that :func:`queue_work` leaves in each engine's queue."""
BATCH_VALUE: Final = 0xBA7C
HALF_PTE: Final = CONTEXTS[-1] + _EACH
"""The guest's graphics address of the entry that :func:`queue_work` leaves half written; it is to lead to TARGET.

Behind all contexts: else kvmgt, which writes a context's pages back when it has ended, writes one of them to TARGET.
"""


# --- the module


def modprobe(*arguments: str) -> None:
    """Load or remove modules of the distribution's."""
    subprocess.run(["modprobe", "-d", os.environ["VFIO_MIG_GVT_MODULES"], *arguments], check=True)


def rmmod() -> None:
    """Remove kvmgt alone: what it needs, ours needs as well, and insmod loads nothing else."""
    kvmgt.remove_all()
    subprocess.run(["rmmod", "kvmgt"], check=True)


def load_ours(mutation: str | None = None, *parameters: str) -> None:
    """Replace kvmgt by the series, or by a mutation of it."""
    rmmod()
    name = "kvmgt.ko" if mutation is None else f"kvmgt-{mutation}.ko"
    subprocess.run(["insmod", MODULES / name, *parameters], check=True)


def load_stock() -> None:
    """Replace kvmgt by the distribution's."""
    rmmod()
    modprobe("kvmgt")


# --- the hardware's side


def dma(gpu: Control, address: int) -> int | None:
    """Where the hardware's GGTT leads, None for an entry that is not present."""
    try:
        return gpu.translate(address)
    except ControlError as error:
        if error.name != "EFAULT":
            raise
        return None


def host_fences(gpu: Control) -> list[int]:
    numbers = range(raw.FENCE, raw.FENCE + 8 * _FENCES, 8)
    return [gpu.register(number) | gpu.register(number + 4) << 32 for number in numbers]


def fence_of(gpu: Control, vgpu: Driver, low: int, high: int) -> int:
    """Write the vGPU's first fence; the one value that came into the GPU by it, 0 for none."""
    vgpu.device.set_fence(0, 0, 0)
    before = host_fences(gpu)
    vgpu.device.set_fence(0, low, high)
    return next((new for old, new in zip(before, host_fences(gpu), strict=True) if old != new), 0)


def host_low(gpu: Control, vgpu: Driver) -> int:
    """Where the vGPU's aperture is in the host's GGTT: its guest does not see that any more, a fence shows it."""
    fence = fence_of(gpu, vgpu, vgpu.low | 1, vgpu.low)
    vgpu.device.set_fence(0, 0, 0)
    return fence & 0xFFFF_F000


def stored(gpu: Control, since: int) -> dict[int, int]:
    """Where in the machine's memory the GPU has stored each value since then."""
    return {
        value: address
        for engine in ENGINES
        for entry in gpu.record(since, engine.name)
        for address, value in entry["writes"]
    }


def work_done(gpu: Control, since: int) -> set[int]:
    """What of :func:`queue_work`'s the GPU has stored since then, beside the heartbeats of the host's own i915."""
    return stored(gpu, since).keys() & {BATCH_VALUE, *itertools.chain(*QUEUED.values())}


# --- the guest's side


def at(vgpu: Driver, offset: int) -> int:
    """Return the guest's graphics address of an offset in RESULT's page."""
    return vgpu.low + RESULT + offset


def store(vgpu: Driver, engine: Engine, offset: int, value: int) -> list[int]:
    """Return the command that stores *value* into RESULT's page through the GGTT."""
    if engine == RCS:
        return [_PIPE_CONTROL, 1 << 24 | 1 << 20 | 1 << 14, at(vgpu, offset), 0, value, 0]
    return [_STORE, at(vgpu, offset), 0, value]


def result_of(engine: Engine, number: int) -> int:
    """Return the offset in guest memory of what the engine's first or second queued context stores."""
    return RESULT + 0x100 + 16 * list(QUEUED).index(engine) + 8 * number


def ring_of(context: int) -> int:
    """Return the offset in guest memory of a context's ring."""
    return RING if context == CONTEXT else context + _CONTEXT_PAGES * PAGE


def queue_work(vgpu: Driver, *, wait: bool = False, stop: Callable[[], object] | None = None) -> None:
    """Leave on two engines a pair of contexts queued, and half a submission and half an entry of the GGTT pending.

    The first context of each pair runs the batch before it stores its value. Leaves the vGPU stopped.

    :param wait: the batch waits until SEMAPHORE is 1.
    :param stop: stops it, instead of the RFC's ioctl.
    """
    for engine in QUEUED:
        vgpu.prepare(engine)
    vgpu.enable(VCS)
    for offset in range(_SPARE, _SPARE + 3 * _EACH, PAGE):
        vgpu.device.set_pte(vgpu.low + offset, MEMORY + offset | 1)
    vgpu.submit(BCS, 0x11, 0x12)
    vgpu.await_u32(RESULT, 0x12)
    (stop or vgpu.device.stop)()
    vgpu.put(SEMAPHORE, 0)
    vgpu.make_batch(BATCH_VALUE, wait=wait)
    for number, (engine, values) in enumerate(QUEUED.items()):
        pair = CONTEXTS[2 * number : 2 * number + 2]
        for turn, (context, value) in enumerate(zip(pair, values, strict=True)):
            ring = [] if turn else vgpu.run_batch()
            ring += [*store(vgpu, engine, result_of(engine, turn) - RESULT, value), _USER_INTERRUPT]
            vgpu.make_context(engine, ring, context=context, at=ring_of(context))
        vgpu.run_contexts(engine, *pair)
    vgpu.device.set_reg(VCS.base + kvmgt.ELSP, 0)
    vgpu.device.set_reg(VCS.base + kvmgt.ELSP, 0)
    vgpu.device.set_reg(raw.GTT + (vgpu.low + HALF_PTE >> 12) * 8, MEMORY + TARGET | 1)


def view(device: raw.Device) -> bytes:
    """Return what the guest can see of its device."""
    high = device.guest_high()
    return b"".join(
        [
            device.read(raw.CONFIG, 0, 256),
            device.read(raw.BAR0, raw.PVINFO, 0x100),
            device.read(raw.BAR0, raw.GTT, 8 * 256),
            device.read(raw.BAR0, raw.GTT + (high >> 12) * 8, 8 * 16),
            *(device.fence(number).to_bytes(8, "little") for number in range(4)),
            *(
                struct.pack("<I", device.reg(engine.base + offset))
                for engine in (RCS, BCS, VCS)
                for offset in (0x30, 0x34, 0x38, 0x80, 0x234, 0x238, 0x29C, kvmgt.CSB_POINTER, *range(0x370, 0x3A0, 4))
            ),
        ]
    )


# --- images


def patched(image: bytes, offset: int, data: bytes) -> bytes:
    return image[:offset] + data + image[offset + len(data) :]


def seal(image: bytearray) -> None:
    """Give an image the checksum that it needs, so that what is behind that is looked at."""
    image[CRC_AT : CRC_AT + 4] = bytes(4)
    image[CRC_AT : CRC_AT + 4] = zlib.crc32(image).to_bytes(4, "little")


def sealed(image: bytes | bytearray) -> bytes:
    """Return the image with the checksum that it needs."""
    buffer = bytearray(image)
    seal(buffer)
    return bytes(buffer)


def assert_same(one: bytes, other: bytes) -> None:
    """Compare images; pytest's own explanation of 5 MiB takes minutes."""
    if one != other:
        pages = (at for at in range(0, max(len(one), len(other)), PAGE) if one[at : at + PAGE] != other[at : at + PAGE])
        words = (at for page in pages for at in range(page, page + PAGE, 4) if one[at : at + 4] != other[at : at + 4])
        seen = [f"{at:#x}: {one[at : at + 4].hex()} {other[at : at + 4].hex()}" for at in itertools.islice(words, 20)]
        raise AssertionError(f"{len(one)} and {len(other)} bytes; {', '.join(seen)}")
