# SPDX-License-Identifier: MIT
"""Save and restore a vGPU together with the pause of the VM that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.qemu_host.memory import find_memory
from vfio_mig import Settings, check_image, device_status, interrupts, restore, save
from vfio_mig.dirty.bitmap import preload
from vfio_mig.dirty.memory import MemoryMap
from vfio_mig.errors import DeviceBusyError, DeviceNotFoundError, HostError, MismatchError, UsageError
from vfio_mig.jobs.rollback import Rollback

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.qemu_host.qmp import Qmp

AUTO: Final = "auto"
NONE: Final = "none"
RUNNING: Final = "running"
PAUSED: Final = ("paused", "prelaunch")
_CONTAINERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")


def owner(qmp: Qmp, name: str) -> tuple[str, int]:
    """Prove that the VM behind a monitor is the one that has a device; returns the device's name and QEMU's PID.

    :raises DeviceNotFoundError: the VM does not have it.
    :raises DeviceBusyError: another process has it.
    """
    status = device_status(name)
    there = _vfio_devices(qmp)
    if status.device not in there:
        have = f"it has {', '.join(there)}" if there else "it has no VFIO device"
        raise DeviceNotFoundError("the VM does not have it", device=status.device, hint=have)
    if status.holder_pid != qmp.pid:
        raise DeviceBusyError(
            f"it is open in PID {status.holder_pid}, and the monitor is PID {qmp.pid}'s",
            device=status.device,
            hint="run as root, and name a socket that QEMU itself listens on",
        )
    return status.device, qmp.pid


def _vfio_devices(qmp: Qmp) -> list[str]:
    """Name the VM's VFIO devices as vfio-mig does."""
    names = []
    for container in _CONTAINERS:
        for child in qmp.execute("qom-list", path=container):
            if str(child["type"]).startswith("child<vfio-pci"):
                path = qmp.execute("qom-get", path=f"{container}/{child['name']}", property="sysfsdev")
                names.append(Path(str(path)).resolve().name)
    return names


def memory_maps(qmp: Qmp, pid: int, memory: Sequence[str]) -> list[MemoryMap]:
    """Find the guest's RAM: as told, or by itself."""
    if list(memory) == [NONE]:
        return []
    if AUTO in memory or NONE in memory:
        if len(memory) > 1:
            raise UsageError(f"--memory {AUTO} and --memory {NONE} stand alone")
        memory = find_memory(qmp, pid)
    return [MemoryMap.parse(text) for text in memory]


def _state_of(qmp: Qmp, allowed: Sequence[str], hint: str) -> str:
    state = str(qmp.execute("query-status")["status"])
    if state not in allowed:
        raise UsageError(f"the VM is in state {state!r}", hint=hint)
    return state


@interrupts.protected
def _go_on(qmp: Qmp) -> None:
    qmp.execute("cont")


def save_vgpu(
    qmp: Qmp,
    name: str,
    file: str,
    *,
    memory: Sequence[str] = (AUTO,),
    cont: bool = False,
    force: bool = False,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Pause the VM and save its vGPU; both stay stopped unless *cont*. After a failure the VM is as it was found.

    :param tell: called with what is done.
    """
    device, pid = owner(qmp, name)
    memory_maps(qmp, pid, memory)  # what cannot be, need not interrupt the VM
    preload()
    state = _state_of(qmp, (RUNNING, *PAUSED), "only a running or paused VM can be saved")
    saved: list[str] = []
    settings = Settings(pid=pid, on_commit=lambda: saved.append(file))
    with Rollback() as rollback:
        if state == RUNNING:
            # once the image is there, nothing is undone: the device is stopped, and the VM must not run without it
            rollback.push(lambda: _go_on(qmp) if cont or not saved else None)
            tell(f"pausing the VM of PID {pid}")
            qmp.execute("stop")
        maps = memory_maps(qmp, pid, memory)  # again, as a guest's firmware may have moved it
        tell(_command("save", device, file, pid, maps))
        report = save(device, file, settings, memory=maps, leave_running=cont, force=force)
        rollback.forget()
        vm = _finish(qmp, cont=cont, done=f"{file} is whole")
    return _summary(report._asdict(), pid, vm, maps)


def restore_vgpu(
    qmp: Qmp,
    name: str,
    file: str,
    *,
    memory: Sequence[str] = (AUTO,),
    cont: bool = False,
    force: bool = False,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Load an image into the vGPU of a paused VM; both stay stopped unless *cont*. A failure leaves the VM paused.

    :param force: go on over mismatches of which ``vfio-mig check`` says that they may be forced.
    :param tell: called with what is done.
    """
    if file == "-":
        raise UsageError("the image is read twice and must be a file")
    _state_of(qmp, PAUSED, "pause it first: 'stop' in its monitor, or start QEMU with -S")
    device, pid = owner(qmp, name)
    maps = memory_maps(qmp, pid, memory)
    settings = Settings(pid=pid)
    # restore's own force also means "a device in use", which this one is
    misfits = [one.text for one in check_image(device, file, settings).checks if one.result == "mismatch"]
    if misfits and not force:
        raise MismatchError(f"{file}: {misfits[0]}", device=device, hint=f"see 'vfio-mig check {file} {device}'")
    tell(_command("restore --force", device, file, pid, maps))
    report = restore(device, file, settings, memory=maps, start=cont, force=True)
    vm = _finish(qmp, cont=cont, done="what was restored ends with QEMU")
    return _summary(report._asdict(), pid, vm, maps)


def _command(words: str, device: str, file: str, pid: int, maps: Sequence[MemoryMap]) -> str:
    return f"vfio-mig {words} {device} {file} --pid {pid}{''.join(f' --memory {one}' for one in maps)}"


def _finish(qmp: Qmp, *, cont: bool, done: str) -> str:
    """Continue the VM if asked to; returns its state.

    :param done: what to tell of the work before when this fails.
    """
    try:
        if cont:
            _go_on(qmp)
        return str(qmp.execute("query-status")["status"])
    except HostError as error:
        error.hint = done
        raise


def _summary(report: dict[str, Any], pid: int, vm: str, maps: Sequence[MemoryMap]) -> dict[str, Any]:
    return {**report, "pid": pid, "vm": vm, "memory": [str(one) for one in maps]}
