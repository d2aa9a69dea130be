# SPDX-License-Identifier: MIT
"""Find VFIO devices in sysfs: mdevs, PCI functions bound to a VFIO driver, and those of other buses."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, TypedDict

from vfio_mig.errors import DeviceNotFoundError, UsageError
from vfio_mig.host.devices import ATTRIBUTE_MAX, HostDevice, parse_number
from vfio_mig.host.drivers import better_driver, is_vfio_driver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.device import Holder
    from vfio_mig.host.holders import Unseen, View

UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID_BEGIN: Final = re.compile(r"[0-9a-f]{4,8}|[0-9a-f]{8}-[0-9a-f-]{0,26}")
PCI_ADDRESS: Final = re.compile(r"(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_GROUP_NODE: Final = re.compile(r"/dev/vfio/(?:noiommu-)?[0-9]{1,9}")


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
                return file.read(ATTRIBUTE_MAX).rstrip("\n")
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

    def snapshot(self, names: Sequence[str] = ()) -> Snapshot:
        """Look once: at sysfs for devices, and at /proc for who has them open.

        :param names: of the devices that matter, each by any of its names; all devices by default.
        :raises DeviceNotFoundError, UsageError: as :meth:`find`.
        """
        from vfio_mig.host.holders import look

        devices = [self.find(name) for name in names] if names else self.devices()
        return Snapshot(self, devices, look(devices))

    def _others(self) -> list[HostDevice]:
        """Return what VFIO has registered, of any bus."""
        return [
            HostDevice(
                name=os.path.basename(directory),
                sysfs=directory,
                kind=self.link(directory, "subsystem") or "other",
                type="",
                parent="",
                driver=self.link(directory, "driver"),
                **self._group(directory),
            )
            for directory in sorted(self._registered())
            if os.path.isdir(directory)
        ]

    def _registered(self) -> list[str]:
        """Return their directories; before Linux 6.1 of those in VFIO's groups with a driver of VFIO's."""
        if self._has_class():
            entries = self.names("sys/class/vfio-dev")
            return [os.path.realpath(self.path("sys/class/vfio-dev", entry, "device")) for entry in entries]
        found: list[str] = []
        for group in self.names("sys/class/vfio"):
            members = f"sys/kernel/iommu_groups/{group.removeprefix('noiommu-')}/devices"
            found += [
                os.path.realpath(self.path(members, name))
                for name in self.names(members)
                if is_vfio_driver(self.link(members, name, "driver"))
            ]
        return found

    def _has_class(self) -> bool:
        """Tell whether this kernel lists the devices that VFIO knows (since Linux 6.1)."""
        return os.path.isdir(self.path("sys/class/vfio-dev"))

    def _is_vfio_pci(self, address: str) -> bool:
        directory = f"sys/bus/pci/devices/{address}"
        if self.names(directory, "vfio-dev"):
            return True
        if self._has_class() or not is_vfio_driver(self.link(directory, "driver")):
            return False
        return self._group_entry(self.link(directory, "iommu_group")) is not None

    def _group_entry(self, number: str) -> str | None:
        """Return what VFIO calls an IOMMU group, None when it does not know it."""
        for name in (number, f"noiommu-{number}"):
            if number and os.path.isdir(self.path("sys/class/vfio", name)):
                return name
        return None

    def _group(self, directory: str) -> _Group:
        number = self.link(directory, "iommu_group")
        if not (number.isascii() and number.isdigit()):
            return {"group": None, "group_number": None, "is_noiommu": False}
        # A PCI function has an IOMMU group also where VFIO has no groups
        has_groups = not self._has_class() or os.path.isdir(self.path("sys/class/vfio"))
        entry = self._group_entry(number) or number
        return {
            "group": int(number) if has_groups else None,
            "group_number": parse_number(self.read("sys/class/vfio", entry, "dev")) if has_groups else None,
            "is_noiommu": entry != number,
        }

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
            **self._group(directory),
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
            **self._group(directory),
        )

    def find(self, name: str, devices: Sequence[HostDevice] | None = None) -> HostDevice:
        """Find a device by UUID or its beginning, PCI address, path in /sys, or /dev/vfio/N of a group with one device.

        :param devices: those there are, where that is known already.
        :raises DeviceNotFoundError: there is none.
        :raises UsageError: it is not a form of name, or the group has several devices.
        """
        if not name or "\0" in name:
            raise UsageError(f"{name!r} is not a device name")
        if "/" not in name:
            return self._find_by_name(name, devices or ())
        if devices is None:
            devices = self.devices()
        if _GROUP_NODE.fullmatch(name):
            return self._find_by_group(name, devices)
        if name.startswith("/dev/vfio/devices/"):
            return self._find_by_cdev(name, devices)
        return _find_by_path(name, devices)

    def _find_by_name(self, name: str, devices: Sequence[HostDevice]) -> HostDevice:
        wanted = name.lower()
        if PCI_ADDRESS.fullmatch(wanted) and wanted.count(":") == 1:
            wanted = f"0000:{wanted}"
        for device in devices:
            if device.name in (name, wanted):
                return device
        if UUID.fullmatch(wanted):
            if os.path.isdir(self.path("sys/bus/mdev/devices", wanted)):
                return self._mdev(wanted)
            raise DeviceNotFoundError(
                "there is no such mdev", device=name, hint="'vfio-mig list' shows those there are"
            )
        if PCI_ADDRESS.fullmatch(wanted):
            return self._find_pci(name, wanted)
        for device in self._others():
            if device.name == name:
                return device
        if _UUID_BEGIN.fullmatch(wanted):
            return self._find_by_begin(name, wanted)
        raise UsageError(
            f"{name!r} is not a device name",
            hint="give an mdev UUID, a PCI address, a path in /sys, /dev/vfio/devices/vfioN, or /dev/vfio/N",
        )

    def _find_by_begin(self, name: str, wanted: str) -> HostDevice:
        found = [uuid for uuid in self.names("sys/bus/mdev/devices") if uuid.startswith(wanted)]
        if len(found) > 1:
            raise UsageError(f"{name!r} is the beginning of several mdevs: {', '.join(found)}", hint="give more of it")
        if not found:
            raise DeviceNotFoundError(
                "there is no mdev whose UUID begins so", device=name, hint="'vfio-mig list' shows those there are"
            )
        return self._mdev(found[0])

    def _find_pci(self, name: str, address: str) -> HostDevice:
        if not os.path.isdir(self.path("sys/bus/pci/devices", address)):
            raise DeviceNotFoundError("there is no such PCI device", device=name)
        device = self._pci(address)
        if self._is_vfio_pci(address):
            return device
        if is_vfio_driver(device.driver):
            raise DeviceNotFoundError(
                f"its driver is {device.driver}, which has not registered it with VFIO",
                device=name,
                hint="the kernel's log says why: dmesg",
            )
        if device.driver == "nvidia":
            raise DeviceNotFoundError(
                "its driver is nvidia, which makes it a VFIO device only once it has a vGPU type",
                device=name,
                hint="write a type's number to nvidia/current_vgpu_type in the directory of this virtual function; "
                "nvidia/creatable_vgpu_types lists them",
            )
        variant = better_driver(device, self.root)
        raise DeviceNotFoundError(
            f"its driver is {device.driver or 'none'}, which is not a VFIO driver",
            device=name,
            hint="bind it to vfio-pci" if variant is None else f"bind it to {variant}",
        )

    def _find_by_group(self, node: str, devices: Sequence[HostDevice]) -> HostDevice:
        members = [device for device in devices if device.node == node]
        if len(members) > 1:
            names = ", ".join(device.name for device in members)
            raise UsageError(f"group {members[0].group} has several devices: {names}", hint="name the one you mean")
        if members:
            return members[0]
        problem, hint = "no VFIO device is in this group", None
        number = os.path.basename(node).removeprefix("noiommu-")
        for name in self.names("sys/kernel/iommu_groups", number, "devices"):
            try:
                self._find_by_name(name, ())
            except DeviceNotFoundError as error:  # the first one that could be a device says what it lacks
                problem, hint = f"{problem}; {name}: {error.problem}", error.hint
                break
            except UsageError:
                continue
        raise DeviceNotFoundError(problem, device=node, hint=hint)

    def _find_by_cdev(self, path: str, devices: Sequence[HostDevice]) -> HostDevice:
        node = os.path.basename(path)
        for device in devices:
            if node in self.names(device.sysfs, "vfio-dev"):
                return device
        raise DeviceNotFoundError("no VFIO device has this node", device=path)


class _Group(TypedDict):
    """The part of a :class:`HostDevice` that is its group's."""

    group: int | None
    group_number: int | None
    is_noiommu: bool


def _find_by_path(path: str, devices: Sequence[HostDevice]) -> HostDevice:
    real = os.path.realpath(path)
    for device in devices:
        if device.sysfs == real:
            return device
    raise DeviceNotFoundError("is not a directory of a VFIO device", device=path)


class Snapshot:
    """The devices of a host, and who has them open, at one moment; what a command is told is not looked for again.

    :param devices: in order.
    :param view: who has them open, as far as /proc shows it.
    """

    def __init__(self, host: Host, devices: Sequence[HostDevice], view: View) -> None:
        self.host: Final = host
        self.devices: Final = tuple(devices)
        self.view: Final = view

    @property
    def unseen(self) -> Unseen | None:
        """Why a process that has a device open may be missing, None when none can be."""
        return self.view.unseen

    def find(self, name: str) -> HostDevice:
        """Find one of the devices by any of its names, as :meth:`Host.find`."""
        return self.host.find(name, self.devices)

    def holder_of(self, device: HostDevice, pid: int | None = None) -> Holder | None:
        """Return the process to borrow a device from, None when none is seen.

        :param pid: this process only.
        """
        return next(iter(self.view.of(device, pid)), None)
