# SPDX-License-Identifier: MIT
"""vGPUs of the kernel's own kvmgt on the emulated GPU (``scripts/vm --gvt``), held as a VMM holds them.

Sources of the numbers: Intel's open-source PRM for Skylake, volumes 2 and 3 (registers, contexts, commands);
``drivers/gpu/drm/i915/i915_pvinfo.h`` (PVINFO); <linux/kvm.h>. Graphics addresses are the guest's, which on an
unpatched kvmgt are the host's, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tools.gpu import control
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE, Container, Device, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

PARENT: Final = Path("/sys/class/mdev_bus/0000:00:02.0")
TYPES: Final = PARENT / "mdev_supported_types"
DEVICES: Final = Path("/sys/bus/mdev/devices")
CONTROL_PORT: Final = Path("/dev/virtio-ports/gpu.control")
DEBUGFS: Final = Path("/sys/kernel/debug/dri")

SMALL: Final = "i915-GVTg_V5_8"
MEMORY: Final = 0x1000_0000  # GPA; and with it the IOVA
MEMORY_PAGES: Final = 2048

# <linux/kvm.h>
_CREATE_VM: Final = 0xAE01
_SET_USER_MEMORY_REGION: Final = 0x4020_AE46
_CREATE_DEVICE: Final = 0xC00C_AEE0
_SET_DEVICE_ATTR: Final = 0x4018_AEE1
_DEV_TYPE_VFIO: Final = 4
_DEV_VFIO_FILE: Final = 1
_DEV_VFIO_FILE_ADD: Final = 1

# PVINFO
PV_MAGIC: Final = 0x4776_5447_7654_4776
PV_G2V_L4_CREATE: Final = 4

# Registers: of all engines, and relative to an engine's base
MASTER_IRQ: Final = 0x44200
_GT_IMR: Final = 0x44304
_GT_IER: Final = 0x4430C
_HWS_PGA: Final = 0x80
_IMR: Final = 0xA8
ELSP: Final = 0x230
_MODE: Final = 0x29C
CSB_POINTER: Final = 0x3A0
_MODE_EXECLISTS: Final = 0x8000_8000  # masked
_CSB_START: Final = 0xFFFF_0505
_MSI_ENABLE: Final = 0xAC + 2  # in the configuration space

# Commands
_SDI: Final = 0x20 << 23 | 2
_SEMAPHORE_WAIT: Final = 0x1C << 23 | 1 << 15 | 4 << 12 | 2  # poll until memory is equal to the value
_BATCH_START: Final = 0x31 << 23 | 1 << 8 | 1  # in the PPGTT
_BATCH_END: Final = 0x0A << 23
_FLUSH_DW: Final = 0x26 << 23 | 1 << 14 | 2  # with a store
_FLUSH_GGTT: Final = 1 << 2
_PIPE_CONTROL: Final = 0x7A00_0004
_PIPE_STORE: Final = 1 << 14 | 1 << 24 | 1 << 20  # a value, to the GGTT, and stall
_USER_INTERRUPT: Final = 2 << 23

# A context's image
_LRI: Final = 0x1100_101B
_CONTEXT_VALID: Final = 0x119  # 64 bits, privileged, valid: the descriptor's low bits
_CONTEXT_PAGES: Final = 22


@dataclass(frozen=True)
class Engine:
    """An engine: its name in the GPU's record, where its registers are, and its bit among the interrupts."""

    name: str
    base: int


ENGINES: Final = (
    Engine("rcs0", 0x2000),
    Engine("bcs0", 0x22000),
    Engine("vcs0", 0x12000),
    Engine("vecs0", 0x1A000),
)

# Where things are in guest memory, as offsets; the first ones are mapped into the GGTT in this order
HWSP: Final = 0
RING: Final = 0x1000
RESULT: Final = 0x2000
CONTEXT: Final = 0x3000
STATE: Final = CONTEXT + PAGE
_MAPPED: Final = CONTEXT + _CONTEXT_PAGES * PAGE
PML4: Final = 0x40000
PDP: Final = 0x41000
PD: Final = 0x42000
PT: Final = 0x43000
BATCH: Final = 0x44000
TARGET: Final = 0x45000
SEMAPHORE: Final = 0x46000


def available() -> bool:
    """Whether this is a VM with the emulated GPU."""
    return "VFIO_MIG_GPU" in os.environ and TYPES.exists()


def types() -> dict[str, int]:
    """How many more vGPUs of each type there may be."""
    return {path.name: int((path / "available_instances").read_text()) for path in TYPES.iterdir()}


@contextlib.contextmanager
def instance(kind: str = SMALL) -> Iterator[str]:
    """Have an mdev; its UUID."""
    name = str(uuid.uuid4())
    (TYPES / kind / "create").write_text(name)
    try:
        yield name
    finally:
        if (DEVICES / name).exists():
            (DEVICES / name / "remove").write_text("1")


def remove_all() -> None:
    """Remove every vGPU that a test has left."""
    for path in PARENT.glob("*-*-*-*-*"):
        (path / "remove").write_text("1")


def host_address(memory: Memory, offset: int) -> int:
    """Where the page at *offset* of guest memory is in the machine's memory, which is what the hardware sees."""
    memory.bytes[offset]  # present
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek((memory.address + offset) // PAGE * 8)
        entry = int.from_bytes(pagemap.read(8), "little")
    assert entry >> 63, "the page is not present"
    return (entry & (1 << 55) - 1) * PAGE + offset % PAGE


class Kvm:
    """A VM without a CPU: what kvmgt needs of KVM."""

    def __init__(self, memory: Memory, group_fd: int) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm: Final = fcntl.ioctl(kvm, _CREATE_VM, 0)
        os.close(kvm)
        slot = struct.pack("<IIQQQ", 0, 0, memory.iova, memory.size, memory.address)
        fcntl.ioctl(self.vm, _SET_USER_MEMORY_REGION, slot)
        made = fcntl.ioctl(self.vm, _CREATE_DEVICE, struct.pack("<III", _DEV_TYPE_VFIO, 0, 0))
        self.device: Final = int(struct.unpack("<III", made)[1])
        group = ctypes.c_int32(group_fd)
        attribute = struct.pack("<IIQQ", 0, _DEV_VFIO_FILE, _DEV_VFIO_FILE_ADD, ctypes.addressof(group))
        fcntl.ioctl(self.device, _SET_DEVICE_ATTR, attribute)

    def close(self) -> None:
        os.close(self.device)
        os.close(self.vm)


class Driver:
    """What a driver in the guest does with its vGPU, through the *device* and *memory* that it sees."""

    def __init__(self, name: str, memory: Memory, device: Device) -> None:
        self.name: Final = name
        self.memory: Final = memory
        self.device: Final = device
        self.low, self.low_size, self.high, self.high_size, self.fences = (
            device.reg(raw.PV_MAPPABLE_BASE + 4 * number) for number in range(5)
        )

    # --- guest memory

    def u32(self, offset: int) -> int:
        return self.memory.u32(MEMORY + offset)

    def put(self, offset: int, *dwords: int) -> None:
        self.memory.write(MEMORY + offset, struct.pack(f"<{len(dwords)}I", *dwords))

    def put64(self, offset: int, value: int) -> None:
        self.memory.write(MEMORY + offset, value.to_bytes(8, "little"))

    def at(self, offset: int) -> int:
        """Return the machine's address of guest memory."""
        return host_address(self.memory, offset)

    def has_page(self, address: int) -> bool:
        """Say whether a machine's address is in this guest's memory."""
        return any(self.at(offset) == address & -PAGE for offset in range(0, SEMAPHORE + PAGE, PAGE))

    # --- as a driver in the guest

    def map_ggtt(self) -> None:
        """Map guest memory into the mappable part of the GGTT, from its beginning on."""
        for offset in range(0, _MAPPED, PAGE):
            self.device.set_pte(self.low + offset, MEMORY + offset | 1)

    def make_ppgtt(self) -> None:
        """Make page tables: the batch at 0, the target and the semaphore behind it; tell the host about them."""
        for table, entry in ((PML4, PDP), (PDP, PD), (PD, PT)):
            self.put64(table, MEMORY + entry | 3)
        for number, page in enumerate((BATCH, TARGET, SEMAPHORE)):
            self.put64(PT + 8 * number, MEMORY + page | 3)
        self.device.set_reg(raw.PV_PDP, MEMORY + PML4 & 0xFFFF_FFFF)
        self.device.set_reg(raw.PV_PDP + 4, MEMORY + PML4 >> 32)
        self.device.set_reg(raw.PV_G2V_NOTIFY, PV_G2V_L4_CREATE)

    def set_up_pci(self) -> None:
        """Do what the bus needs, where nobody has done it."""

    def enable(self, engine: Engine) -> None:
        """Turn interrupts, memory access and execution lists on."""
        self.set_up_pci()
        for bank in range(4):
            self.device.set_reg(_GT_IMR + 16 * bank, 0)
            self.device.set_reg(_GT_IER + 16 * bank, 0xFFFF_FFFF)
        self.device.set_reg(MASTER_IRQ, 1 << 31)
        self.device.set_reg(engine.base + _IMR, 0)
        self.device.set_reg(engine.base + _HWS_PGA, self.low + HWSP)
        self.device.set_reg(engine.base + _MODE, _MODE_EXECLISTS)
        self.device.set_reg(engine.base + CSB_POINTER, _CSB_START)

    def prepare(self, engine: Engine) -> None:
        self.map_ggtt()
        self.make_ppgtt()
        self.enable(engine)

    def flush(self, engine: Engine, value: int) -> list[int]:
        """Return the command that stores *value* into RESULT through the GGTT when all before it is done."""
        if engine.name == "rcs0":
            return [_PIPE_CONTROL, _PIPE_STORE, self.low + RESULT, 0, value, 0, 0, 0]
        return [_FLUSH_DW, self.low + RESULT | _FLUSH_GGTT, 0, value]

    def make_batch(self, target: int, *, wait: bool = False) -> None:
        """Make the batch store *target* through the PPGTT.

        :param wait: it first waits until SEMAPHORE is 1.
        """
        semaphore = [_SEMAPHORE_WAIT, 1, 2 * PAGE, 0] if wait else []
        self.put(BATCH, *semaphore, _SDI, PAGE, 0, target, _BATCH_END)

    def run_batch(self) -> list[int]:
        """Return the command that runs the batch."""
        return [_BATCH_START, 0, 0, 0]

    def make_context(self, engine: Engine, ring: list[int], *, context: int = CONTEXT, at: int = RING) -> None:
        """Make a context that is about to execute *ring*; both are mapped where they are in guest memory.

        :param context: offset of its first page, :param at: and of the ring's.
        """
        ring = [*ring, *[0] * (len(ring) % 2)]
        self.put(at, *ring)
        state = context + PAGE
        for offset in range(state, state + PAGE, 4):
            self.put(offset, 0)
        self.put(state, 0, _LRI)
        registers = {
            2: (0x244, 0x0009_0009), 4: (0x34, 0), 6: (0x30, 4 * len(ring)), 8: (0x38, self.low + at), 10: (0x3C, 1),
            0x30: (0x274, MEMORY + PML4 >> 32), 0x32: (0x270, MEMORY + PML4 & 0xFFFF_FFFF),
        }  # fmt: skip
        for index, (register, value) in registers.items():
            self.put(state + 4 * index, engine.base + register, value)

    def run_contexts(self, engine: Engine, first: int = CONTEXT, second: int | None = None) -> None:
        """Submit a context, or a pair of them, by their offsets, which are their IDs, too."""
        pair = (0, 0) if second is None else (second // PAGE, self.low + second | _CONTEXT_VALID)
        for dword in (*pair, first // PAGE, self.low + first | _CONTEXT_VALID):
            self.device.set_reg(engine.base + ELSP, dword)

    def submit(self, engine: Engine, target: int, result: int, *, wait: bool = False) -> None:
        """Run a batch that stores *target* through the PPGTT, then a flush that stores *result* through the GGTT.

        :param wait: the batch first waits until SEMAPHORE is 1.
        """
        self.make_batch(target, wait=wait)
        self.make_context(engine, [*self.run_batch(), *self.flush(engine, result), _USER_INTERRUPT, 0, 0, 0])
        self.run_contexts(engine)

    def await_u32(self, offset: int, value: int, seconds: float = 20.0) -> None:
        """Wait until guest memory has a value."""
        end = time.monotonic() + seconds
        while self.u32(offset) != value:
            if time.monotonic() > end:
                raise TimeoutError(f"{offset:#x} is {self.u32(offset):#x}, and not {value:#x} within {seconds:g} s")
            time.sleep(0.01)


class Vgpu(Driver):
    """An open vGPU of this process, with guest memory and a VM around it."""

    def __init__(self, name: str, memory: Memory, container: Container, kvm: Kvm) -> None:
        device = Device(container, name)
        device.reset()  # what an earlier holder left survives its close
        super().__init__(name, memory, device)
        self.container: Final = container
        self.kvm: Final = kvm
        self.eventfd: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, name: str, file: Path | None = None) -> Iterator[Self]:
        """Have it open; the guest's memory is a *file*, as of a VMM with shared memory, or nobody else's."""
        with contextlib.ExitStack() as stack:
            memory = Memory(MEMORY, MEMORY_PAGES, file)
            container = Container(int((DEVICES / name / "iommu_group").readlink().name))
            stack.callback(container.close)
            container.map(memory)
            kvm = Kvm(memory, container.group_fd)
            stack.callback(kvm.close)
            vgpu = cls(name, memory, container, kvm)
            stack.callback(vgpu.device.close)
            stack.callback(os.close, vgpu.eventfd)
            yield vgpu

    def set_up_pci(self) -> None:
        self.device.set_eventfd(raw.IRQ_MSI, self.eventfd)
        self.device.write(raw.CONFIG, _MSI_ENABLE, b"\1\0")
        self.device.write(raw.CONFIG, 4, b"\6\0")

    def await_interrupt(self, seconds: float = 20.0) -> int:
        """Wait for an interrupt; how many there were."""
        end = time.monotonic() + seconds
        while True:
            try:
                return os.eventfd_read(self.eventfd)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"no interrupt within {seconds:g} s") from None
                time.sleep(0.01)


def gpu() -> contextlib.AbstractContextManager[control.Control]:
    """Talk to the emulated GPU."""
    return control.connect(CONTROL_PORT)
