# SPDX-License-Identifier: MIT
"""``vm save`` and ``vm restore``: a VM by its name, and the one of its devices that is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_mig.errors import DeviceNotFoundError, OpenError, UsageError
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.report import Report
from vfio_mig.vm.jobs import AUTO, restore_vgpu, save_vgpu
from vfio_mig.vm.machine import vfio_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.jobs.restore import RestoreReport
    from vfio_mig.jobs.save import SaveReport
    from vfio_mig.vm.monitor import Monitor


@dataclass(frozen=True, kw_only=True)
class VmSaveReport(Report):
    """A device of a VM, saved while the VM stood still.

    :param vm: as it was named: the path of its QMP socket, or the libvirt domain.
    :param pid: QEMU's.
    :param run_state: the VM's afterwards, in QEMU's words: ``running``, ``paused``, ``prelaunch`` and others.
    :param ram: where the guest's RAM was found, as ``--memory`` takes it.
    :param saved: what ``save`` reports.
    """

    vm: str
    device: str
    pid: int
    run_state: str
    ram: list[str]
    saved: SaveReport


@dataclass(frozen=True, kw_only=True)
class VmRestoreReport(Report):
    """A device of a VM, restored while the VM stood still.

    :param vm: as it was named: the path of its QMP socket, or the libvirt domain.
    :param pid: QEMU's.
    :param run_state: the VM's afterwards, in QEMU's words: ``running``, ``paused``, ``prelaunch`` and others.
    :param ram: where the guest's RAM was found, as ``--memory`` takes it.
    :param restored: what ``restore`` reports.
    """

    vm: str
    device: str
    pid: int
    run_state: str
    ram: list[str]
    restored: RestoreReport


def open_vm(vm: str, connect: str | None) -> Monitor:
    """Connect to a VM's monitor: through libvirt's *connect*, or else at the QMP socket that *vm* is the path of.

    :raises OpenError: nobody answers there.
    :raises UnsupportedError: it may be on another host.
    """
    if connect is not None:
        from vfio_mig.vm.domain import Domain

        return Domain(connect, vm)
    from vfio_mig.vm.qmp import Qmp

    try:
        return Qmp(vm)
    except OpenError as error:
        if "/" not in vm:
            error.hint = "a libvirt domain is named with --connect qemu:///system"
        raise


def choose(monitor: Monitor, vm: str, device: str | None) -> str:
    """Return the device that is meant; none is chosen for a user who has to.

    :raises UsageError: the VM has several, and none was named.
    :raises DeviceNotFoundError: it has none.
    """
    if device is not None:
        return device
    names = monitor.listed if monitor.listed is not None else [one.name for one in vfio_devices(monitor)]
    if not names:
        raise DeviceNotFoundError(f"the VM {vm} has no VFIO device", hint="'vfio-mig vm list' tells which VMs have one")
    if len(names) > 1:
        known = ", ".join(name or "one that QEMU cannot name" for name in names)
        raise UsageError(f"the VM {vm} has several devices", hint=f"--device names one: {known}")
    if not names[0]:
        raise UsageError(
            f"QEMU cannot name the device of the VM {vm}", hint="find it with 'vfio-mig list', use --device"
        )
    return names[0]


def _tell(settings: Settings) -> Callable[[str], object]:
    return settings.tell or (lambda _: None)


def save_vm(
    vm: str,
    file: str,
    settings: Settings | None = None,
    *,
    connect: str | None = None,
    device: str | None = None,
    memory: Sequence[str] = (AUTO,),
    all_memory: bool = False,
    leave_running: bool = False,
    force: bool = False,
) -> VmSaveReport:
    """Pause a VM and save a device of its with the guest's pages that the device may have written.

    Both stay stopped unless *leave_running*. After a failure the VM and the device are as they were found, and there is
    no file.

    :param vm: path of a QMP socket, or with *connect*, a URI of libvirt's, the name or the UUID of a domain.
    :param device: of the VM; may be left out where it has only one.
    :param memory: ``auto``, ``none``, or where the guest's RAM is.
    :param all_memory: save all of the guest's RAM.
    :param force: replace an existing file.
    """
    settings = settings or Settings()
    with open_vm(vm, connect) as monitor:
        name = choose(monitor, vm, device)
        done = save_vgpu(
            monitor, name, file, memory=memory, all_memory=all_memory, cont=leave_running, force=force,
            settings=settings, tell=_tell(settings),
        )  # fmt: skip
    return VmSaveReport(
        vm=vm, device=done.device, pid=done.pid, run_state=done.state, ram=done.memory, saved=done.report
    )


def restore_vm(
    vm: str,
    file: str,
    settings: Settings | None = None,
    *,
    connect: str | None = None,
    device: str | None = None,
    memory: Sequence[str] = (AUTO,),
    start: bool = False,
    force: bool = False,
) -> VmRestoreReport:
    """Load an image into a device of a paused VM, and the pages in it into the guest's RAM.

    Both stay stopped unless *start*. A failure leaves the VM paused.

    :param vm: as for :func:`save_vm`, as are *connect*, *device* and *memory*.
    :param start: let device and VM go on.
    :param force: go on over mismatches of which ``vfio-mig check`` says that they may be forced.
    """
    settings = settings or Settings()
    with open_vm(vm, connect) as monitor:
        name = choose(monitor, vm, device)
        done = restore_vgpu(
            monitor, name, file, memory=memory, cont=start, force=force, settings=settings, tell=_tell(settings)
        )
    return VmRestoreReport(
        vm=vm, device=done.device, pid=done.pid, run_state=done.state, ram=done.memory, restored=done.report
    )
