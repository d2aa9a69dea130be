# SPDX-License-Identifier: MIT
"""A third protocol that nobody has: what a new one takes is this file, and its line in the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from vfio_mig.errors import ImageError
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.protocols.family import Condition, Family
from vfio_mig.protocols.states import Compared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.device import Device
    from vfio_mig.uapi.profile import RfcProfile

NAME: Final = "made-up"
FLAG: Final = 1 << 13
"""Of VFIO_DEVICE_GET_INFO, if it existed."""
MAGIC: Final = b"made up\n"


class _State:
    def __init__(self, size: int) -> None:
        self.summary = f"{size} made-up bytes"
        self.warnings = ("it is made up",)
        self.relies_on = "made-up table"

    def compare(self, device: Device) -> Iterator[Compared]:
        yield Compared("made-up-name", "fake", device.name)


class MadeUp(MigrationProtocol):
    """Its devices keep their state in this object."""

    name: ClassVar[str] = NAME
    knows_states: ClassVar[bool] = True

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.runs = True
        self.content = MAGIC + b"at first"

    @property
    def state_size_max(self) -> int:
        return 4096

    def stop(self) -> None:
        self.runs = False

    def start(self) -> None:
        self.runs = True

    def read_state(self) -> memoryview:
        return memoryview(self.content)

    def write_state(self, state: memoryview) -> None:
        self.content = bytes(state)

    @classmethod
    def parse_state(cls, state: memoryview) -> _State:
        if bytes(state[: len(MAGIC)]) != MAGIC:
            raise ImageError("not made up at 0x0")
        return _State(len(state))

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        del start_page
        return memoryview(bytes((nr_pages + 7) // 8))


class _MadeUpFamily(Family):
    protocol: ClassVar[type[MigrationProtocol]] = MadeUp

    def conditions(self, device: Device, profile: RfcProfile) -> list[Condition]:
        del profile
        flags = device.info().flags
        return [Condition("made-up", bool(flags & FLAG), f"flag {FLAG:#x} in {flags:#x}")]

    def open(self, device: Device, profile: RfcProfile) -> MadeUp:
        del profile
        return MadeUp(device)


FAMILY: Final = _MadeUpFamily()
