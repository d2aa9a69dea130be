# SPDX-License-Identifier: MIT
"""What QEMU says of the VM itself: whether it runs, its VFIO devices, and whether a virtual IOMMU is in their way."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import DeviceBusyError, HostError, UnsupportedError, UsageError, excerpt
from vfio_mig.vm.memory import flat_views, ram_of
from vfio_mig.vm.monitor import QMP_WORDS, GoneError, RefusedError, entries_of, text_of

if TYPE_CHECKING:
    from vfio_mig.vm.memory import FlatView
    from vfio_mig.vm.monitor import Monitor, Words

RUNNING: Final = "running"
PAUSED: Final = ("paused", "prelaunch")
"""Stopped by somebody who will let it go on, or not yet started (-S)."""
ENDED: Final = {
    "postmigrate": "it has been migrated away: the same guest would run twice",
    "io-error": "a disk of it has failed: see to that, then use {cont}",
    "watchdog": "its watchdog has stopped it: see to that, then use {cont}",
}
"""Stopped by QEMU, and its vCPUs stand still: it can be saved, and must not simply go on."""
REFUSED: Final = {
    "colo": "COLO replicates it: end that first",
    "debug": "a debugger has stopped it and may let it go on at any time: detach it first",
    "finish-migrate": "its migration is in its last moments: wait until that has ended",
    "guest-panicked": "its guest has crashed: reset it with {reset}",
    "inmigrate": "it waits for a migration to come in: that brings memory and devices of its own",
    "internal-error": "QEMU cannot run it any more: end it",
    "restore-vm": "QEMU is loading a snapshot: wait until that has ended",
    "save-vm": "QEMU is saving a snapshot: wait until that has ended",
    "shutdown": "its guest has shut down: reset it with {reset}",
    "suspended": "its guest sleeps, while QEMU's devices do not: wake it with {wakeup}",
}
"""Every other state of QEMU 7 to 11 (qapi/run-state.json), and why nothing can be done in it; in braces, by the names
of :class:`~vfio_mig.vm.monitor.Words`, what the user types."""
IDLE: Final = ("none", "completed", "failed", "cancelled")
"""States of a migration that is none (qapi/migration.json); a QEMU that has never migrated tells none at all."""
_CONTAINERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
# Not vfio-user's, which has no device of the kernel's
_VFIO_TYPE: Final = re.compile(r"child<vfio-(?!user)[a-z-]+>")
# intel-iommu, amd-iommu, virtio-iommu-pci, arm-smmuv3, riscv-iommu-pci; and hosts behind which DMA is always translated
_IOMMU_TYPE: Final = re.compile(
    r"child<((?:[a-z0-9-]*-)?(?:iommu|smmu)(?:v?[0-9])?(?:-(?:pci|device|sys|sysbus|accel))*"
    r"|spapr-pci-host-bridge|spapr-pci-vfio-host-bridge|s390-pcihost)>"
)
# How QEMU names a device's own view of memory: VT-d by slot and function, AMD and virtio by devfn, SMMUv3 by both
_IOMMU_VIEW: Final = re.compile(
    r"(?:vtd-(?P<slot>[0-9a-f]{2})\.(?P<function>[0-7])"
    r"|amd_iommu_devfn_(?P<amd>\d+)"
    r"|virtio-iommu-memory-region-\d+-(?P<virtio>\d+)"
    r"|(?P<arm>smmu\S*|arm-smmu\S*)-(?P<arm_devfn>\d+)-\d+"
    r"|riscv-iommu-(?P<riscv>[0-9a-f]+))"
)


class VfioDevice(NamedTuple):
    """A VFIO device of the VM.

    :param path: in QEMU's object tree.
    :param name: as vfio-mig has it, empty for one that QEMU was given by file descriptor: it cannot tell which.
    """

    path: str
    name: str


class Iommu(NamedTuple):
    """A virtual IOMMU in the way of a device.

    :param types: QEMU's names of those the VM has.
    :param is_off: whether the device's own view of memory is now the CPUs', address by address.
    """

    types: tuple[str, ...]
    is_off: bool


def run_state(qmp: Monitor) -> str:
    """Return the VM's run state, as ``query-status`` has it."""
    return text_of(qmp.execute("query-status"), "status", "query-status")


def require_state(state: str, *, may_run: bool, cont: bool, words: Words = QMP_WORDS) -> None:
    """Refuse a VM in a state in which its vGPU cannot be saved, or restored.

    :param may_run: a running one is paused by the caller, and one that QEMU has stopped will do.
    :param cont: it is to go on afterwards.
    :raises UsageError: says why, and what to do.
    """
    if state in PAUSED or (may_run and state == RUNNING):
        return
    why = REFUSED.get(state)
    if state in ENDED and (cont or not may_run):
        why = ENDED[state]
    elif state in ENDED:
        return
    elif state == RUNNING:
        why = "pause it first: {stop}, or {start_paused}"
    hint = "this program does not know what that means" if why is None else why.format_map(words._asdict())
    raise UsageError(f"the VM is in state {excerpt(state)}", hint=hint)


def require_no_migration(qmp: Monitor) -> None:
    """Refuse a VM that QEMU is migrating: it relies on the device and the log of its writes.

    :raises DeviceBusyError: it is.
    """
    answer = qmp.execute("query-migrate")
    status = text_of(answer, "status", "query-migrate", IDLE[0])
    if status not in IDLE:
        raise DeviceBusyError(
            f"QEMU is migrating the VM (query-migrate: {excerpt(status)})",
            hint=f"wait until that has ended, or use {qmp.words.cancel}",
        )


def vfio_devices(qmp: Monitor) -> list[VfioDevice]:
    """Name the VM's VFIO devices, of whatever bus."""
    found = []
    for container in _CONTAINERS:
        for child in entries_of(qmp.execute("qom-list", path=container), "qom-list"):
            if _VFIO_TYPE.fullmatch(text_of(child, "type", "qom-list")):
                path = f"{container}/{text_of(child, 'name', 'qom-list')}"
                found.append(VfioDevice(path, _name_of(qmp, path)))
    return found


def _name_of(qmp: Monitor, path: str) -> str:
    """Return the name of the device that QEMU has opened by a path in sysfs."""
    try:
        sysfs = qmp.execute("qom-get", path=path, property="sysfsdev")
    except RefusedError:  # no such property
        return ""
    sysfs = text_of({"sysfsdev": sysfs}, "sysfsdev", "qom-get")
    # Empty for one given by fd=, as libvirt does with iommufd; a relative path would be resolved in our directory
    return os.path.basename(os.path.realpath(sysfs)) if sysfs.startswith("/") and "\0" not in sysfs else ""


def find_iommu(qmp: Monitor, device: VfioDevice | None) -> Iommu | None:
    """Look for a virtual IOMMU: behind one, the addresses that a device uses are not the guest's physical ones.

    :param device: None when it is not known which of the VM's devices it is: then the views of all count.
    :returns: None when the VM has none.
    """
    types = set()
    for container in (*_CONTAINERS, "/machine/unattached", "/machine"):
        for child in entries_of(qmp.execute("qom-list", path=container), "qom-list"):
            match = _IOMMU_TYPE.fullmatch(text_of(child, "type", "qom-list"))
            if match is not None:
                types.add(match[1])
    if not types:
        return None
    views = flat_views(qmp.monitor("info mtree -f"))
    return Iommu(tuple(sorted(types)), _is_off(views, None if device is None else _devfn(qmp, device)))


def _devfn(qmp: Monitor, device: VfioDevice) -> int | None:
    """Return slot * 8 + function; None where QEMU does not tell: in all but PCI devices."""
    try:
        devfn = qmp.execute("qom-get", path=device.path, property="addr")
    except RefusedError:
        return None
    return devfn if isinstance(devfn, int) and 0 <= devfn < 256 else None  # noqa: PLR2004 -- one byte


def _is_off(views: list[FlatView], devfn: int | None) -> bool:
    """Tell whether all views that an IOMMU gives a device show the RAM where the CPUs see it.

    Devices on several buses may have the same slot: all of these count. Where IOMMUs give views to other devices
    only, this one goes around them (bypass_iommu); where no such view is known, nothing is.
    """
    by_cpu = next((view for view in views if "memory" in view.spaces), None)
    seen = [(view, number) for view in views for number in _devfns(view)]
    if by_cpu is None or not seen:
        return False
    mine = [view for view, number in seen if devfn is None or number in (devfn, None)]
    return all(ram_of(view) == ram_of(by_cpu) for view in mine)


def _devfns(view: FlatView) -> list[int | None]:
    """Return of which devices a flat view is the IOMMU's, None for one that is not known."""
    found: list[int | None] = []
    for match in filter(None, map(_IOMMU_VIEW.fullmatch, [*view.spaces, *view.roots])):
        if match["slot"] is not None:
            found.append(int(match["slot"], 16) << 3 | int(match["function"]))
        else:
            decimal = match["amd"] or match["virtio"] or match["arm_devfn"]
            found.append(None if decimal is None else int(decimal))
    return found


def require_physical(iommu: Iommu | None) -> str | None:
    """Refuse guest memory whose pages a device names by other addresses than the guest's physical ones.

    :returns: what to warn of, None for a VM without a virtual IOMMU.
    :raises UnsupportedError: it translates, or it cannot be told whether it does.
    """
    if iommu is None:
        return None
    names = ", ".join(iommu.types)
    if not iommu.is_off:
        raise UnsupportedError(
            f"the VM has a virtual IOMMU ({names}), so the pages that the device has written are not those of the "
            "guest's memory by the same address",
            hint="--memory none goes on without the guest's pages",
        )
    return (
        f"the VM has a virtual IOMMU ({names}); it is off for this device now, so its addresses are the guest's "
        "physical ones, but the IOMMU's own state is not in the image"
    )


def require_paused(qmp: Monitor, state: str) -> None:
    """Make sure that a VM has stood still since it was found in *state*, or put there.

    A QEMU that has ended has stood still until then, if it has not told otherwise: what was saved is all that is left.

    :raises HostError: somebody else has let it go on, reset it, or shut it down.
    """
    try:
        now = run_state(qmp)  # before the news are looked at: they come in front of the answer
    except GoneError:
        now = state
    if now == state and not qmp.news:
        return
    what = ", ".join(qmp.news) or f"it is in state {excerpt(now)}, and was in {excerpt(state)}"
    raise HostError(
        f"the VM did not stand still while its vGPU was being saved ({what})",
        hint="see who else has a monitor of it, and save it again",
    )
