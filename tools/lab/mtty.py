# SPDX-License-Identifier: MIT
"""The kernel's own mtty, held open, and its guest's view: a scratch register, through a second fd of the device."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.lab import cli
from tools.lab.borrowing import borrowed_fd

if TYPE_CHECKING:
    from collections.abc import Iterator

TYPES: Final = Path("/sys/class/mdev_bus/mtty/mdev_supported_types")
TWO_PORTS: Final = "mtty-2"
SCRATCH: Final = 7  # the UART's register that does nothing
STATE_SIZE: Final = 96  # samples/vfio-mdev/mtty.c: 24 bytes, and 36 for each port


@contextlib.contextmanager
def registers(name: str) -> Iterator[int]:
    """Give a second fd of a held device, as its guest would have it; region 0 begins at offset 0."""
    fd = borrowed_fd(name)
    try:
        yield fd
    finally:
        os.close(fd)


def scratch(name: str) -> int:
    with registers(name) as fd:
        return os.pread(fd, 1, SCRATCH)[0]


def set_scratch(name: str, value: int) -> None:
    with registers(name) as fd:
        os.pwrite(fd, bytes([value]), SCRATCH)


@contextlib.contextmanager
def instance(kind: str = TWO_PORTS) -> Iterator[str]:
    """Make one, and remove it at the end."""
    name = str(uuid.uuid4())
    (TYPES / kind / "create").write_text(name)
    try:
        yield name
    finally:
        (Path("/sys/bus/mdev/devices") / name / "remove").write_text("1")


@contextlib.contextmanager
def held_mtty(kind: str = TWO_PORTS) -> Iterator[str]:
    with instance(kind) as name, cli.held(name):
        yield name
