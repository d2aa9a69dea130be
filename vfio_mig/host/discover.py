# SPDX-License-Identifier: MIT
"""Find VFIO devices in sysfs: mdevs, PCI functions bound to a VFIO driver, and those of other buses."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from vfio_mig.errors import DeviceNotFoundError, UsageError

UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PCI_ADDRESS: Final = re.compile(r"(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ATTRIBUTE_MAX: Final = 4096
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
    """

    name: str
    sysfs: str
    kind: str
    type: str
    parent: str
    driver: str
    group: int | None

    @property
    def node(self) -> str | None:
        """The group's node in /dev."""
        return None if self.group is None else f"/dev/vfio/{self.group}"

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
                number = _DEVICE_NUMBER.fullmatch(file.read(_ATTRIBUTE_MAX))
        except (OSError, ValueError):
            return None
        return None if number is None else (name, os.makedev(int(number[1]), int(number[2])))


class Host:
    """One host's sysfs. Every path comes from here, so a made-up tree can stand in for tests.

    :param root: what stands for ``/``.
    """

    def __init__(self, root: str = "/") -> None:
        self.root: Final = root

    def path(self, *parts: str) -> str:
        """Return a path below the root."""
        return os.path.join(self.root, *parts)

    def read(self, *parts: str) -> str:
        """Return an attribute without its last newline, empty when there is none or it cannot be read."""
        try:
            with open(self.path(*parts), encoding="utf-8", errors="replace") as file:
                return file.read(_ATTRIBUTE_MAX).rstrip("\n")
        except OSError:
            return ""

    def names(self, *parts: str) -> list[str]:
        """Return a directory's entries in order, none when there is no such directory."""
        try:
            return sorted(os.listdir(self.path(*parts)))
        except OSError:
            return []

    def link(self, *parts: str) -> str:
        """Return the last component of what a link points to, empty when it is none."""
        try:
            return os.path.basename(os.readlink(self.path(*parts)))
        except OSError:
            return ""

    def devices(self) -> list[HostDevice]:
        """Return all mdevs, then all PCI functions with a VFIO driver, each in order of name, then all others."""
        mdevs = [self._mdev(name) for name in self.names("sys/bus/mdev/devices")]
        pci = [self._pci(name) for name in self.names("sys/bus/pci/devices") if self._is_vfio_pci(name)]
        known = {device.sysfs for device in mdevs + pci}
        return mdevs + pci + [device for device in self._others() if device.sysfs not in known]

    def _others(self) -> list[HostDevice]:
        """Return what VFIO has registered, of any bus (since Linux 6.1)."""
        entries = self.names("sys/class/vfio-dev")
        directories = [os.path.realpath(self.path("sys/class/vfio-dev", entry, "device")) for entry in entries]
        return [
            HostDevice(
                name=os.path.basename(directory),
                sysfs=directory,
                kind=self.link(directory, "subsystem") or "other",
                type="",
                parent="",
                driver=self.link(directory, "driver"),
                group=self._group(directory),
            )
            for directory in sorted(directories)
            if os.path.isdir(directory)
        ]

    def _is_vfio_pci(self, address: str) -> bool:
        return bool(self.names("sys/bus/pci/devices", address, "vfio-dev"))

    def _group(self, directory: str) -> int | None:
        number = self.link(directory, "iommu_group")
        if not (number.isascii() and number.isdigit()):
            return None
        # A PCI function has an IOMMU group also where VFIO has no groups
        has_groups = not os.path.isdir(self.path("sys/class/vfio-dev")) or os.path.isdir(self.path("sys/class/vfio"))
        return int(number) if has_groups else None

    def _mdev(self, name: str) -> HostDevice:
        directory = f"sys/bus/mdev/devices/{name}"
        real = os.path.realpath(self.path(directory))
        return HostDevice(
            name=name,
            sysfs=real,
            kind="mdev",
            type=self.link(directory, "mdev_type"),
            parent=os.path.basename(os.path.dirname(real)),
            driver=self.link(directory, "driver"),
            group=self._group(directory),
        )

    def _pci(self, name: str) -> HostDevice:
        directory = f"sys/bus/pci/devices/{name}"
        ids = [self.read(directory, word).removeprefix("0x") for word in ("vendor", "device")]
        return HostDevice(
            name=name,
            sysfs=os.path.realpath(self.path(directory)),
            kind="pci",
            type=":".join(ids),
            parent="",
            driver=self.link(directory, "driver"),
            group=self._group(directory),
        )

    def find(self, name: str) -> HostDevice:
        """Find a device by UUID, PCI address, path in /sys, or /dev/vfio/N of a group with one device.

        :raises DeviceNotFoundError: there is none.
        :raises UsageError: it is no form of name, or the group has several devices.
        """
        if not name or "\0" in name:
            raise UsageError(f"{name!r} is no device name")
        if match := re.fullmatch(r"/dev/vfio/([0-9]{1,9})", name):
            return self._find_by_group(int(match[1]))
        if name.startswith("/dev/vfio/devices/"):
            return self._find_by_cdev(name)
        if "/" in name:
            return self._find_by_path(name)
        return self._find_by_name(name)

    def _find_by_name(self, name: str) -> HostDevice:
        wanted = name.lower()
        if UUID.fullmatch(wanted):
            if os.path.isdir(self.path("sys/bus/mdev/devices", wanted)):
                return self._mdev(wanted)
            raise DeviceNotFoundError(
                "there is no such mdev", device=name, hint="'vfio-mig list' shows those there are"
            )
        if not PCI_ADDRESS.fullmatch(wanted):
            for device in self._others():
                if device.name == name:
                    return device
            raise UsageError(
                f"{name!r} is no device name",
                hint="give an mdev UUID, a PCI address, a path in /sys, /dev/vfio/devices/vfioN, or /dev/vfio/N",
            )
        address = wanted if wanted.count(":") == 2 else f"0000:{wanted}"  # noqa: PLR2004 -- domain:bus:device
        if not os.path.isdir(self.path("sys/bus/pci/devices", address)):
            raise DeviceNotFoundError("there is no such PCI device", device=name)
        if not self._is_vfio_pci(address):
            driver = self.link("sys/bus/pci/devices", address, "driver") or "none"
            from vfio_mig.host.drivers import better_driver

            variant = better_driver(self._pci(address), self.root)
            raise DeviceNotFoundError(
                f"its driver is {driver}, which is no VFIO driver",
                device=name,
                hint="bind it to vfio-pci" if variant is None else f"bind it to {variant}",
            )
        return self._pci(address)

    def _find_by_path(self, path: str) -> HostDevice:
        real = os.path.realpath(path)
        for device in self.devices():
            if device.sysfs == real:
                return device
        raise DeviceNotFoundError("is no directory of a VFIO device", device=path)

    def _find_by_group(self, number: int) -> HostDevice:
        members = [device for device in self.devices() if device.group == number]
        if not members:
            raise DeviceNotFoundError("no VFIO device is in this group", device=f"/dev/vfio/{number}")
        if len(members) > 1:
            names = ", ".join(device.name for device in members)
            raise UsageError(f"group {number} has several devices: {names}", hint="name the one you mean")
        return members[0]

    def _find_by_cdev(self, path: str) -> HostDevice:
        node = os.path.basename(path)
        for device in self.devices():
            if node in self.names(device.sysfs, "vfio-dev"):
                return device
        raise DeviceNotFoundError("no VFIO device has this node", device=path)
