# SPDX-License-Identifier: MIT
"""The host's side of the tests: the module, mdev instances in sysfs, and the driver's truth in debugfs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULE: Final = "gvt_sample"
MODULE_SYSFS: Final = Path("/sys/module") / MODULE
PARENT: Final = Path("/sys/class/mdev_bus") / MODULE
TYPES: Final = PARENT / "mdev_supported_types"
DEBUGFS: Final = Path("/sys/kernel/debug") / MODULE
SMALL: Final = "GVTg_V4_8"

MIB: Final = 1 << 20
PAGE: Final = 4096

# Declared by <asm/unistd_64.h>; the commands around them need not be on PATH
_SYS_FINIT_MODULE: Final = 313
_SYS_DELETE_MODULE: Final = 176


def module_directory() -> Path:
    """Where the runner keeps gvt_sample.ko and its mutants."""
    return Path(os.environ["VFIO_MIG_KMOD_DIR"])


def module_loaded() -> bool:
    return MODULE_SYSFS.exists()


def _syscall(number: int, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *args) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def load_module(mutant: str | None = None, **parameters: int) -> None:
    """Insert the driver, or its variant with one translation disabled."""
    name = f"{MODULE}-{mutant}.ko" if mutant else f"{MODULE}.ko"
    words = " ".join(f"{key}={value}" for key, value in parameters.items())
    path = module_directory() / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not built; mutants come with `scripts/vm --build-all`")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _syscall(_SYS_FINIT_MODULE, ctypes.c_int(fd), ctypes.c_char_p(words.encode()), ctypes.c_int(0))
    finally:
        os.close(fd)


def unload_module(seconds: float = 5.0) -> None:
    """Remove the driver; a use that does not end within *seconds* is the caller's OSError."""
    end = time.monotonic() + seconds
    while True:
        try:
            _syscall(_SYS_DELETE_MODULE, ctypes.c_char_p(MODULE.encode()), ctypes.c_int(os.O_NONBLOCK))
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EBUSY} or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


@contextlib.contextmanager
def loaded(mutant: str | None = None, **parameters: int) -> Iterator[None]:
    """Have another driver loaded for a while, and the ordinary one again afterwards, come what may."""
    unload_module()
    try:
        load_module(mutant, **parameters)
        yield
    finally:
        remove_all()
        if module_loaded():
            unload_module()
        load_module()


def parameter(name: str) -> int:
    text = (MODULE_SYSFS / "parameters" / name).read_text().strip()
    return {"Y": 1, "N": 0}[text] if text in {"Y", "N"} else int(text, 0)


@contextlib.contextmanager
def parameter_set(name: str, value: int) -> Iterator[None]:
    """Set a module parameter that is read at use."""
    path = MODULE_SYSFS / "parameters" / name
    old = path.read_text()
    path.write_text(str(value))
    try:
        yield
    finally:
        path.write_text(old)


def type_directory(kind: str) -> Path:
    return TYPES / f"{MODULE}-{kind}"


def available(kind: str) -> int:
    return int((type_directory(kind) / "available_instances").read_text())


def description(kind: str) -> dict[str, str]:
    lines = (type_directory(kind) / "description").read_text().splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@dataclass(frozen=True)
class Layout:
    """`gm_layout` of one vGPU: bytes of graphics memory."""

    host_low: int
    host_high: int
    guest_low: int
    guest_high: int
    low_size: int
    high_size: int
    fence_first: int
    vgpu_id: int

    def host_ranges(self) -> list[range]:
        return [
            range(self.host_low, self.host_low + self.low_size),
            range(self.host_high, self.host_high + self.high_size),
        ]


class Instance:
    """One mdev of the sample driver, seen from the host: sysfs and debugfs, never its VFIO device."""

    def __init__(self, name: str, kind: str) -> None:
        self.uuid: Final = name
        self.kind: Final = kind
        self.sysfs: Final = Path("/sys/bus/mdev/devices") / name
        self.debugfs: Final = DEBUGFS / name

    def remove(self) -> None:
        """Remove the mdev; blocks while somebody has it open."""
        (self.sysfs / "remove").write_text("1")

    @property
    def group(self) -> int:
        return int((self.sysfs / "iommu_group").resolve().name)

    def words(self, name: str) -> str:
        return (self.debugfs / name).read_text()

    def layout(self) -> Layout:
        pairs = (line.split(":") for line in self.words("gm_layout").splitlines())
        return Layout(**{key.strip(): int(value, 16) for key, value in pairs})

    def counters(self) -> dict[str, int]:
        pairs = (line.split(":") for line in self.words("counters").splitlines())
        return {key.strip(): int(value) for key, value in pairs}

    def hw_ggtt(self) -> memoryview:
        """Host entries of this vGPU: low graphics memory first, then high."""
        return memoryview((self.debugfs / "hw_ggtt").read_bytes()).cast("Q")

    def hw_entry(self, hgma: int) -> int:
        """Read the one hardware entry behind a host address."""
        with (DEBUGFS / "host_ggtt").open("rb", buffering=0) as file:
            file.seek((hgma >> 12) * 8)
            return int.from_bytes(file.read(8), "little")

    def hw_fence(self) -> list[int]:
        return memoryview((self.debugfs / "hw_fence").read_bytes()).cast("Q").tolist()

    def last_ring(self) -> list[int]:
        return memoryview((self.debugfs / "last_ring").read_bytes()).cast("I").tolist()

    def pinned(self) -> list[int]:
        return [int(line, 16) for line in self.words("pinned").split()]

    def queue(self) -> list[tuple[int, int, int]]:
        rows = (line.split() for line in self.words("queue").splitlines())
        return [(int(ring, 0), _number(high), _number(low)) for ring, high, low in rows]

    def run_state(self) -> str:
        return self.words("run_state").strip()

    def last_error(self) -> str:
        return self.words("last_error").strip()

    def set_exec_delay(self, milliseconds: int) -> None:
        (self.debugfs / "exec_delay_ms").write_text(str(milliseconds))


def _number(text: str) -> int:
    return int(text, 16)


def create(kind: str = SMALL, name: str | None = None) -> Instance:
    name = name or str(uuid.uuid4())
    # One write: Python's files repeat a failed one when they are closed.
    fd = os.open(type_directory(kind) / "create", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, name.encode())
    finally:
        os.close(fd)
    return Instance(name, kind)


@contextlib.contextmanager
def instance(kind: str = SMALL) -> Iterator[Instance]:
    made = create(kind)
    try:
        yield made
    finally:
        made.remove()


def remove_all() -> None:
    """Remove what a failed test left behind."""
    for path in Path("/sys/bus/mdev/devices").glob("*-*-*-*-*"):
        (path / "remove").write_text("1")


def host_fences() -> list[int]:
    return memoryview((DEBUGFS / "host_fence").read_bytes()).cast("Q").tolist()
