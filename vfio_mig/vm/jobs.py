# SPDX-License-Identifier: MIT
"""Save and restore a vGPU together with the pause of the VM that uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from vfio_mig import interrupts
from vfio_mig.dirty.memory import MemoryMap
from vfio_mig.dirty.runs import preload
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceNotFoundError,
    HostError,
    MismatchError,
    UnsupportedError,
    UsageError,
)
from vfio_mig.jobs.check import check_image
from vfio_mig.jobs.control import device_status
from vfio_mig.jobs.engine.rollback import Rollback
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.jobs.restore import restore
from vfio_mig.jobs.save import save
from vfio_mig.vm.machine import (
    RUNNING,
    find_iommu,
    require_no_migration,
    require_paused,
    require_physical,
    require_state,
    run_state,
    vfio_devices,
)
from vfio_mig.vm.memory import find_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.jobs.restore import RestoreReport
    from vfio_mig.jobs.save import SaveReport
    from vfio_mig.report import Report
    from vfio_mig.vm.monitor import Monitor

T = TypeVar("T", bound="Report")

AUTO: Final = "auto"
NONE: Final = "none"
_WRITTEN: Final = "written"
"""The last step of a save before its commit."""


class Done(NamedTuple, Generic[T]):
    """What came of a job.

    :param report: the library's.
    :param pid: QEMU's.
    :param state: the VM's run state afterwards.
    :param memory: where the guest's RAM was found, as ``--memory`` takes it.
    """

    report: T
    device: str
    pid: int
    state: str
    memory: list[str]

    def summary(self) -> dict[str, Any]:
        """Return it as ``qemu-save`` and ``qemu-restore`` print it."""
        return {**self.report.as_dict(), "pid": self.pid, "vm": self.state, "memory": self.memory}


class Owner:
    """The VM behind a monitor, proved to be the one that has a device.

    :ivar device: the device's name.
    :ivar pid: QEMU's.
    :ivar given: the device as QEMU has it, None where QEMU does not know which of several it is.
    """

    def __init__(self, qmp: Monitor, name: str) -> None:
        """Prove it: QEMU names its devices, and the kernel tells who has them open.

        :raises DeviceNotFoundError: the VM does not have it.
        :raises DeviceBusyError: another process has it, or nobody can tell which.
        :raises UnsupportedError: it speaks no migration protocol.
        """
        status = device_status(name)
        if status.holder_pid is not None and status.migratable is False:
            raise UnsupportedError(
                "it speaks no migration protocol",
                device=status.device,
                hint=f"'vfio-mig info {status.device}' says why",
            )
        self.device: str = status.device
        self.pid = qmp.pid
        there = vfio_devices(qmp)
        self.given = next((one for one in there if one.name == self.device), None)
        nameless = [one for one in there if not one.name]
        if self.given is None and not nameless:
            raise _not_there("the VM does not have it", self.device, [one.name for one in there])
        if qmp.listed is not None and self.device not in qmp.listed:
            raise _not_there("the domain's XML does not have it", self.device, qmp.listed)
        if not self.pid:
            raise DeviceBusyError(
                "the process behind the monitor is in a PID namespace that is not seen from here",
                device=self.device,
                hint="use the host's PID namespace (in a container: --pid=host)",
            )
        if status.holder_pid != self.pid:
            raise DeviceBusyError(
                f"{_holder(status.holder_pid)}, and the monitor is PID {self.pid}'s",
                device=self.device,
                hint=qmp.words.proof,
            )
        if self.given is None and len(nameless) == 1 and len(there) == 1:
            self.given = nameless[0]


def _not_there(problem: str, device: str, there: Sequence[str]) -> DeviceNotFoundError:
    hint = f"it has {', '.join(there)}" if there else "it has no VFIO device"
    return DeviceNotFoundError(problem, device=device, hint=hint)


def _holder(pid: int | None) -> str:
    """Say who has a device open."""
    if pid is None:
        return "nobody that is seen from here has it open"
    return f"it is open in PID {pid}" if pid else "it is open in another PID namespace"


def owner(qmp: Monitor, name: str) -> tuple[str, int]:
    """Prove that the VM behind a monitor is the one that has a device; returns the device's name and QEMU's PID.

    :raises DeviceNotFoundError, DeviceBusyError: as :class:`Owner`.
    """
    proved = Owner(qmp, name)
    return proved.device, proved.pid


def memory_maps(qmp: Monitor, pid: int, memory: Sequence[str]) -> list[MemoryMap]:
    """Find the guest's RAM: as told, or by itself."""
    if list(memory) == [NONE]:
        return []
    if AUTO in memory or NONE in memory:
        if len(memory) > 1:
            raise UsageError(f"--memory {AUTO} and --memory {NONE} stand alone")
        memory = find_memory(qmp, pid)
    return [MemoryMap.parse(text) for text in memory]


class _Vm:
    """One VM for one job: its device and its memory, and what must be said of them.

    :param settings: what the library's jobs take; its *warn* gets what the user must read.
    """

    def __init__(self, qmp: Monitor, name: str, memory: Sequence[str], settings: Settings) -> None:
        self._qmp = qmp
        self._memory = memory
        self._settings = settings
        self._warned: set[str] = set()
        self._owner = Owner(qmp, name)
        self.device, self.pid = self._owner.device, self._owner.pid
        self.maps: list[MemoryMap] = []

    def find_memory(self) -> None:
        """Find the guest's RAM, and prove that the device names it by the guest's physical addresses.

        :raises UnsupportedError: it is private to QEMU, or behind a virtual IOMMU.
        """
        self.maps = memory_maps(self._qmp, self.pid, self._memory)
        warning = require_physical(find_iommu(self._qmp, self._owner.given)) if self.maps else None
        if warning is not None and warning not in self._warned:
            self._warned.add(warning)
            self._settings.warn_user(warning)

    @property
    def settings(self) -> Settings:
        """What the library's jobs take."""
        return self._settings._replace(pid=self.pid)

    def command(self, words: str, file: str) -> str:
        """Say what would be typed."""
        return (
            f"vfio-mig {words} {self.device} {file} --pid {self.pid}{''.join(f' --memory {one}' for one in self.maps)}"
        )

    def done(self, report: T, state: str) -> Done[T]:
        """Return what came of it."""
        return Done(report, self.device, self.pid, state, [str(one) for one in self.maps])


@interrupts.protected
def _continue(qmp: Monitor) -> None:
    qmp.ignores_signals = True
    qmp.execute("cont")


def _pause(qmp: Monitor) -> str:
    """Pause a running VM; returns the state that it is in then."""
    qmp.execute("stop")
    state = run_state(qmp)
    require_state(state, may_run=False, cont=False, words=qmp.words)
    return state


def save_vgpu(
    qmp: Monitor,
    name: str,
    file: str,
    *,
    memory: Sequence[str] = (AUTO,),
    all_memory: bool = False,
    cont: bool = False,
    force: bool = False,
    settings: Settings | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Done[SaveReport]:
    """Pause the VM and save its vGPU; both stay stopped unless *cont*. After a failure the VM is as it was found.

    That the VM stood still from before the first page was copied until the image was written is proved before the
    image becomes final.

    :param all_memory: put all of the guest's RAM into the image, not only what the vGPU may have written.
    :param tell: called with what is done.
    :raises UsageError: the VM is in a state in which it cannot be saved; or all of no memory is asked for.
    :raises HostError: also when somebody else has let the VM go on meanwhile; there is no image then.
    """
    if all_memory and list(memory) == [NONE]:
        raise UsageError(f"--all-memory and --memory {NONE} exclude each other")
    vm = _Vm(qmp, name, memory, settings or Settings())
    vm.find_memory()  # what cannot be, need not interrupt the VM
    preload()
    state = run_state(qmp)
    require_state(state, may_run=True, cont=cont, words=qmp.words)
    require_no_migration(qmp)
    saved: list[str] = []
    with Rollback() as rollback:
        if state == RUNNING:
            # once the image is there, nothing is undone: the device is stopped, and the VM must not run without it
            rollback.push(lambda: _continue(qmp) if cont or not saved else None)
            tell(f"pausing the VM of PID {vm.pid}")
            state = _pause(qmp)
        qmp.news.clear()
        vm.find_memory()  # again, as a guest's firmware may have moved it
        tell(vm.command("save --all-memory" if all_memory else "save", file))
        watched = _watched(vm.settings, lambda: require_paused(qmp, state), lambda: saved.append(file))
        return _save(qmp, vm, file, rollback, watched, all_memory=all_memory, cont=cont, force=force)


def _watched(settings: Settings, prove: Callable[[], object], note: Callable[[], object]) -> Settings:
    """Return settings by which a save is watched besides: *prove* is called before its commit, *note* at it."""
    asked_step, asked_commit = settings.on_step, settings.on_commit

    def on_step(job: str, step: str, device: str) -> None:
        if step == _WRITTEN:
            prove()
        if asked_step is not None:
            asked_step(job, step, device)

    def on_commit() -> None:
        note()
        if asked_commit is not None:
            asked_commit()

    return settings._replace(on_step=on_step, on_commit=on_commit)


# From the commit on nothing is undone, and a VM whose vGPU goes on goes on: a signal must not come between
@interrupts.protected
def _save(
    qmp: Monitor,
    vm: _Vm,
    file: str,
    rollback: Rollback,
    settings: Settings,
    *,
    all_memory: bool,
    cont: bool,
    force: bool,
) -> Done[SaveReport]:
    # That the guest was paused is proved before the commit, by the settings' on_step
    report = save(
        vm.device, file, settings,
        memory=vm.maps, all_memory=all_memory, leave_running=cont, force=force, guest_paused=True,
    )  # fmt: skip
    rollback.disarm()
    return vm.done(report, _finish(qmp, cont=cont, done=f"{file} is whole"))


def restore_vgpu(
    qmp: Monitor,
    name: str,
    file: str,
    *,
    memory: Sequence[str] = (AUTO,),
    cont: bool = False,
    force: bool = False,
    settings: Settings | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Done[RestoreReport]:
    """Load an image into the vGPU of a paused VM; both stay stopped unless *cont*. A failure leaves the VM paused.

    :param force: go on over mismatches of which ``vfio-mig check`` says that they may be forced.
    :param tell: called with what is done.
    """
    if file == "-":
        raise UsageError("the image is read twice and must be a file")
    state = run_state(qmp)
    require_state(state, may_run=False, cont=cont, words=qmp.words)
    require_no_migration(qmp)
    vm = _Vm(qmp, name, memory, settings or Settings())
    vm.find_memory()
    # restore's own force also means "a device in use", which this one is
    found = check_image(vm.device, file, vm.settings._replace(on_step=None, on_commit=None))
    misfits = [one.text for one in found.checks if one.result == "mismatch"]
    if misfits and not force:
        raise MismatchError(f"{file}: {misfits[0]}", device=vm.device, hint=f"see 'vfio-mig check {file} {vm.device}'")
    tell(vm.command("restore --force", file))
    return _restore(qmp, vm, file, cont=cont)


@interrupts.protected  # as for a save
def _restore(qmp: Monitor, vm: _Vm, file: str, *, cont: bool) -> Done[RestoreReport]:
    report = restore(vm.device, file, vm.settings, memory=vm.maps, start=cont, force=True, no_memory=not vm.maps)
    for warning in report.warnings:
        vm.settings.warn_user(f"{vm.device}: {warning}")
    return vm.done(report, _finish(qmp, cont=cont, done="what was restored ends with QEMU"))


def _finish(qmp: Monitor, *, cont: bool, done: str) -> str:
    """Continue the VM if asked to; returns its state.

    :param done: what to tell of the work before when this fails.
    """
    qmp.ignores_signals = True
    try:
        if cont:
            _continue(qmp)
        return run_state(qmp)
    except HostError as error:
        error.hint = done
        raise
