# SPDX-License-Identifier: MIT
"""What is in a QEMU migration stream: sections, and VFIO devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from vfio_mig.decode import pci
from vfio_mig.decode.section import Section, listed

_VERSION_SIZE: Final = 4
_IRQ_STATE_SIZE: Final = 16


@dataclass
class SectionKind:
    """What a section number stands for, and how much of the stream it has.

    :param how: ``parsed``; ``described`` where its length is QEMU's own word; ``footer`` where an end was found by the
        footer alone; ``searched``.
    """

    name: str
    instance: int
    version: int
    parts: int = 0
    size: int = 0
    how: str = "parsed"


@dataclass
class VfioDevice:
    """A VFIO device in the stream.

    :param frames: (offset, bytes) of the pieces of its state, in order.
    :param config: (offset, bytes) of QEMU's own record of it: configuration space, interrupts.
    :param ended: whether the stream has the last part of its state.
    :param lost: why a part of its state is not in *frames*.
    """

    name: str
    instance: int
    section: int
    frames: list[tuple[int, int]] = field(default_factory=list)
    config: tuple[int, int] | None = None
    ended: bool = False
    lost: str | None = None

    @property
    def state_size(self) -> int:
        """Bytes of device state."""
        return sum(size for _, size in self.frames)

    @property
    def problem(self) -> str | None:
        """Why its state is not whole; None if it is."""
        if self.lost is not None:
            return self.lost
        if not self.ended:
            return "the end of its state was not found"
        if not self.frames:
            return "its state is not in this stream: it went through other channels (multifd)"
        return None


class QemuStream(NamedTuple):
    """What is in a stream.

    :param complete: whether it was understood from its beginning to its end.
    :param problems: why not all of it could be taken apart.
    :param proved: whether names and sizes were compared with QEMU's own description, and agree.
    :param capabilities: of the migration, those that a stream names.
    :param page_size: of the guest's memory, bytes.
    :param work: bytes looked at to find all this, some of them more than once.
    :param mapped_end: where the last of the guest's mapped memory ends, which is named by its place in the file; 0
        where none is mapped.
    :param package_end: where the last package of sections ends, 0 without any.
    """

    machine: str | None
    complete: bool
    kinds: dict[int, SectionKind]
    devices: list[VfioDevice]
    problems: list[str]
    proved: bool
    capabilities: list[str]
    page_size: int
    work: int
    mapped_end: int
    package_end: int

    def sections(self) -> list[Section]:
        """Return it in words, without the devices' states."""
        kinds = [
            {
                "number": number,
                "name": kind.name,
                "instance": kind.instance,
                "version": kind.version,
                "parts": kind.parts,
                "size": kind.size,
                "how": kind.how,
            }
            for number, kind in self.kinds.items()
        ]
        values = {
            "machine": self.machine,
            "complete": self.complete,
            "proved": self.proved,
            "capabilities": self.capabilities,
            "page_size": self.page_size,
            "sections": listed(kinds),
        }
        return [Section("stream", 0, 8, values)]


def is_vfio(name: str) -> bool:
    """Tell whether a section is a VFIO device's: QEMU calls it ``PATH/vfio``, or ``vfio`` without a path."""
    return name == "vfio" or name.endswith("/vfio")


def device_config(content: bytes) -> dict[str, Any]:
    """Decode QEMU's record of a VFIO PCI device: its configuration space; interrupts behind it are left as they are."""
    wide = len(content) >= _VERSION_SIZE + pci.EXTENDED_SIZE + _IRQ_STATE_SIZE
    size = pci.EXTENDED_SIZE if wide else pci.SIZE
    if len(content) < _VERSION_SIZE + size:
        return {"size": len(content)}
    config = content[_VERSION_SIZE : _VERSION_SIZE + size]
    rest = len(content) - _VERSION_SIZE - size
    version = int.from_bytes(content[:_VERSION_SIZE], "big")
    return {"size": len(content), "version": version, "bytes_behind": rest, **pci.decode(config)}
