# SPDX-License-Identifier: MIT
"""A VFIO device as sysfs shows it."""

from __future__ import annotations

import os
import re
import stat
from typing import Final, NamedTuple

ATTRIBUTE_MAX: Final = 4096
"""Bytes that are read of an attribute in sysfs."""
_DEVICE_NUMBER: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,9})\n?")


class HostDevice(NamedTuple):
    """A VFIO device as sysfs shows it; nothing was opened.

    :param name: what VFIO_GROUP_GET_DEVICE_FD takes: lower-case mdev UUID, PCI address with domain, or what another
        bus calls it.
    :param sysfs: its directory, symbolic links resolved.
    :param kind: ``mdev``, ``pci``, or another bus: ``platform``, ``fsl-mc``, ``cdx``, ``amba``.
    :param type: mdev type with its prefix; for PCI ``vendor:device``; empty for others.
    :param parent: the mdev's parent device, empty for others.
    :param group: number of its group in VFIO, None when it has none: kernels without CONFIG_VFIO_GROUP.
    :param group_number: device number of the group's node, None when sysfs does not tell.
    :param is_noiommu: whether no IOMMU confines it; its group's node is called ``noiommu-N`` then.
    """

    name: str
    sysfs: str
    kind: str
    type: str
    parent: str
    driver: str
    group: int | None
    group_number: int | None = None
    is_noiommu: bool = False

    @property
    def node(self) -> str | None:
        """The group's node in /dev."""
        if self.group is None:
            return None
        return f"/dev/vfio/noiommu-{self.group}" if self.is_noiommu else f"/dev/vfio/{self.group}"

    @property
    def node_number(self) -> int | None:
        """The number of that node, None when there is none: neither in sysfs nor in /dev."""
        if self.group_number is not None or self.node is None:
            return self.group_number
        try:
            status = os.stat(self.node)
        except OSError:
            return None
        return status.st_rdev if stat.S_ISCHR(status.st_mode) else None

    @property
    def cdev(self) -> str | None:
        """The device's own node in /dev, None on kernels without VFIO_DEVICE_CDEV: its entry has no number there."""
        entry = self._cdev_entry()
        return None if entry is None else f"/dev/vfio/devices/{entry[0]}"

    @property
    def cdev_number(self) -> int | None:
        """The number of that node, by which it is known whatever its path is."""
        entry = self._cdev_entry()
        return None if entry is None else entry[1]

    def _cdev_entry(self) -> tuple[str, int] | None:
        directory = os.path.join(self.sysfs, "vfio-dev")
        try:
            (name,) = os.listdir(directory)
            with open(os.path.join(directory, name, "dev"), encoding="ascii") as file:
                number = parse_number(file.read(ATTRIBUTE_MAX))
        except (OSError, ValueError):
            return None
        return None if number is None else (name, number)


def parse_number(text: str) -> int | None:
    """Take a device number from an attribute ``dev``: ``246:3``; None for anything else."""
    match = _DEVICE_NUMBER.fullmatch(text)
    return None if match is None else os.makedev(int(match[1]), int(match[2]))
