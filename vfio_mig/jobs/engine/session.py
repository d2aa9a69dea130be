# SPDX-License-Identifier: MIT
"""From a device's name to an open device and the protocol that drives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vfio_mig.closing import Closing
from vfio_mig.errors import DeviceBusyError, DeviceError, UnsupportedError, UsageError, warn
from vfio_mig.protocols.registry import AUTO, MODULES
from vfio_mig.words import CLOSED, ERROR, RUNNING, STOP, UNKNOWN, WAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig import words
    from vfio_mig.device import Device, Holder
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.host.devices import HostDevice
    from vfio_mig.host.discover import Snapshot
    from vfio_mig.host.holders import View
    from vfio_mig.host.lock import DeviceLock, Leftover
    from vfio_mig.protocols.base import MigrationProtocol
    from vfio_mig.uapi.profile import RfcProfile

FROM_ANY_STATE = ("conform", "reset")
"""Jobs that may begin with a device in the middle of something."""
GOES_ON = ("migrate", "save", "start", "state", "sync")
"""Jobs that go on with the state that a device has."""
PASSING = ("", "stopped", "live")
"""Effects of a job, in the journal's words, that say nothing of whose state a device has."""
GVT_TYPES = "i915-GVTg_"
"""Begin of the mdev types of Intel's kvmgt."""


class Settings(NamedTuple):
    """What holds for every command of a run.

    :param abi: ``auto``, or the name of the one protocol to accept.
    :param uapi_header: path of a patched kernel's ``vfio.h``; its numbers replace the shipped ones.
    :param pid: the process to borrow the device from, None for whichever has it open.
    :param fd: a group's fd, or one of the device's own node, that this process has inherited, instead.
    :param via: how a device that nobody has is opened: ``auto``, ``group``, or ``cdev``, its own node and an iommufd.
    :param tell: takes one sentence at a time on how a device was reached.
    :param warn: takes one sentence at a time that the user must read; without one they are VfioMigWarning, as
        ``warnings`` has them.
    :param on_step: called with job, step and device at each step of a job; an exception ends the job.
    :param on_commit: called when a job is done: what comes later, a signal too, does not undo it.
    :param kvm: give a device that is opened a KVM VM in any case; by default where its driver demands one (kvmgt).
    """

    abi: str = "auto"
    uapi_header: str | None = None
    pid: int | None = None
    fd: int | None = None
    via: words.Via = "auto"
    tell: Callable[[str], object] | None = None
    warn: Callable[[str], object] | None = None
    on_step: Callable[[str, str, str], object] | None = None
    kvm: bool = False
    on_commit: Callable[[], object] | None = None

    def warn_user(self, text: str) -> None:
        """Pass on a sentence that the user must read."""
        (self.warn or warn)(text)


class Session(Closing):
    """An open device, its protocol, and the lock if it is a job's; closes all at the end of the block."""

    def __init__(
        self,
        found: HostDevice,
        device: Device,
        protocol: MigrationProtocol,
        lock: DeviceLock | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.found = found
        self.device = device
        self.protocol = protocol
        self._lock = lock
        self.leftover: Leftover | None = None
        """What an earlier job has left behind that did not come to its end, or moved its state away."""
        self._settings = settings or Settings()

    def close(self) -> None:
        """Close the device and give it free; a second call does nothing."""
        self.protocol.close()
        self.device.close()
        if self._lock is not None:
            self._lock.close()

    def require_holder_alive(self) -> None:
        """Make sure that what was done to a borrowed device does not end with this job.

        :raises DeviceError: its holder has ended meanwhile.
        """
        if self.device.borrowed and not self.device.is_held:
            raise DeviceError(
                f"{self.device.holder} has ended meanwhile, and with it the device's state",
                device=self.device.name,
                hint="open it again, and repeat",
            )

    @property
    def is_half_loaded(self) -> bool:
        """Whether it may hold a part of an image, from an earlier job."""
        return self.leftover is not None and self.leftover.is_loading

    @property
    def is_moved(self) -> bool:
        """Whether another device has its state now."""
        return self.leftover is not None and self.leftover.is_moved

    @property
    def protocol_name(self) -> str | None:
        """What it speaks, None for nothing: only jobs that take any device see one."""
        return None if self.refusal is not None else self.protocol.name

    @property
    def refusal(self) -> UnsupportedError | None:
        """Why it cannot be migrated, None if it can."""
        return self.protocol.refusal

    def journal(self, effect: words.Effect) -> None:
        """Write down what is about to be done to the device, in case this process does not live to undo it.

        That it is half-loaded, or its state has moved away, stays written down over a stop and its undo.
        """
        stays = (self.is_half_loaded or self.is_moved) and effect in PASSING
        if self._lock is not None and not stays:
            self._lock.journal(effect)

    def clear_journal(self) -> None:
        """Write down that all is well: its state is whole, and its own."""
        self.leftover = None
        self.journal("")

    def journal_step(self, name: words.Step) -> None:
        """Write down how far the job has come."""
        if self._lock is not None:
            self._lock.step(name)

    def warn(self, text: str) -> None:
        """Tell the user what must be read."""
        self._settings.warn_user(f"{self.device.name}: {text.removeprefix(f'{self.device.name}: ')}")

    @property
    def is_ours(self) -> bool:
        """Whether nobody but us, or a `vfio-mig hold`, has the device open."""
        return not self.device.borrowed or (self.device.holder is not None and self.device.holder.is_hold)

    def resume(self) -> None:
        """Undo a stop, or a live save; a device that must not run stays stopped.

        :raises DeviceError: the device did not follow; one of ours in the error state was reset.
        """
        if self.let_go_on():
            self.journal("")

    def let_go_on(self) -> bool:
        """Do as :meth:`resume`, but leave it to the caller to write down that all is well: the device need not wait.

        :returns: whether there is something to write down.
        """
        if self.is_half_loaded or (self.is_moved and self._state_or_unknown() == UNKNOWN):
            return False
        try:
            self.protocol.restore_run_state()
        except DeviceError as error:
            if self._state_or_unknown() != ERROR:
                raise
            if not self.is_ours:
                error.hint = f"only 'vfio-mig reset --force {self.device.name}' gets it out of there"
                raise
            self.protocol.reset()
            self.journal("")
            raise DeviceError(
                "it was in the error state and has been reset: what it was doing is lost", device=self.device.name
            ) from error
        return True

    def _state_or_unknown(self) -> str:
        try:
            return self.protocol.state()
        except DeviceError:
            return UNKNOWN

    def state_after(self, *, started: bool) -> str:
        """Tell what the device is after a job that left it running or stopped: a stop ends with the last close.

        :returns: what the device itself says where it can be asked: a job that goes on with a device leaves it as it
            was found. Else ``running`` or ``stop``; ``closed`` when nobody but this job has it open.
        """
        if not self.device.is_held:
            return CLOSED
        state = self._state_or_unknown()
        if state != UNKNOWN:
            return state
        return RUNNING if started else STOP

    def describe(self) -> str:
        """Say in one sentence how the device was reached and what drives it."""
        holder, node = self.device.holder, self.device.node or self.found.node
        how = "inherited" if self.device.borrowed else "opened through"
        reached = f"{how} {node}" if holder is None else f"borrowed from {holder} by {node}"
        return f"{self.device.name}: {reached}, protocol {self.protocol.describe()}"


def survey(*names: str) -> Snapshot:
    """Look once for devices, and for who has them open; what is found is handed on, and not looked for again.

    :param names: of the devices that matter, each by any of its names; all of the host by default.
    :raises DeviceNotFoundError: there is none of such a name.
    """
    from vfio_mig.host.discover import Host

    return Host().snapshot(names)


def find(name: str) -> HostDevice:
    """Find a device by any of its names.

    :raises DeviceNotFoundError: there is none of this name.
    """
    from vfio_mig.host.discover import Host

    return Host().find(name)


def holder_of(found: HostDevice) -> Holder | None:
    """Tell which process has the device's group or node open, None when nobody (or nobody we may see) has."""
    from vfio_mig.host.holders import find_holder

    return find_holder(found)


def require_holder(found: HostDevice, action: str, seen: Snapshot | None = None) -> Holder:
    """Refuse what would be undone by the last close.

    :param seen: who has it open, where that is known already.
    :raises DeviceBusyError: nobody has the device open.
    """
    holder = holder_of(found) if seen is None else seen.holder_of(found)
    if holder is not None:
        return holder
    if seen is None:
        from vfio_mig.host.holders import look

        unseen = look([found]).unseen
    else:
        unseen = seen.unseen
    if unseen is not None:
        raise DeviceBusyError(
            f"no process that can be seen has it open, and a {action} ends with the last close; {unseen.reason}",
            device=found.name,
            hint=unseen.hint,
        )
    raise DeviceBusyError(
        f"nobody has it open, and a {action} ends with the last close",
        device=found.name,
        hint=f"keep it open with 'vfio-mig hold {found.name}' first",
    )


def load_numbers(settings: Settings) -> RfcProfile:
    """Return the RFC's numbers: the shipped ones, or those of the given header.

    :raises UsageError: the header is not one with the RFC's definitions.
    """
    from vfio_mig.uapi.profile import DEFAULT_PROFILE

    if settings.uapi_header is None:
        return DEFAULT_PROFILE
    from vfio_mig.jobs.files.header import load_profile

    return load_profile(settings.uapi_header)


def open_session(
    name: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    job: words.Job | None = None,
    seen: Snapshot | None = None,
    force: bool = False,
    any_device: bool = False,
) -> Session:
    """Open a device, or borrow it from its holder, and choose its protocol.

    :param memory: guest memory; mapped for DMA at its guest-physical addresses when we open the device ourselves.
    :param job: name of the job that needs the device for itself; None for one that changes nothing.
    :param seen: the devices and who has them open, where that is known already.
    :param force: also if an earlier job has moved its state to another device, which goes on with it.
    :param any_device: also one that speaks no protocol: what takes one is refused when it is asked for.
    :raises OpenError: there is no such device, it cannot be opened, or another job is at work on it.
    :raises UnsupportedError: it speaks no protocol of ours; no ioctl of the RFC was sent.
    :raises DeviceError: an earlier job has left it in a state that this one cannot start from.
    """
    settings = settings or Settings()
    if settings.abi not in (AUTO, *MODULES):
        raise UsageError(f"unknown ABI {settings.abi!r}", hint=f"choose one of {', '.join((AUTO, *MODULES))}")
    if settings.via not in WAYS:
        raise UsageError(f"unknown way {settings.via!r} to a device", hint=f"choose one of {', '.join(WAYS)}")
    profile = load_numbers(settings)
    found = find(name) if seen is None else seen.find(name)
    view = None if seen is None else seen.view
    if job is None:
        return _open_found(found, settings, profile, memory, None, view, any_device=any_device)
    from vfio_mig.host.lock import DeviceLock

    lock = DeviceLock(found, job)
    try:
        session = _open_found(found, settings, profile, memory, lock, view, any_device=any_device)
    except BaseException:
        lock.close()
        raise
    try:
        _take_over(session, lock, job, force=force)
    except BaseException:
        session.close()
        raise
    return session


class _DeviceMemory:
    """Guest memory as a device of ours needs it: the device writes there, whatever the job itself does."""

    def __init__(self, piece: MemoryMap) -> None:
        self._piece = piece
        self.gpa = piece.gpa
        self.size = piece.size

    def __str__(self) -> str:
        return str(self._piece)

    def map(self) -> memoryview:
        self._piece.make_writable()
        return self._piece.map()


def _open_found(  # noqa: PLR0917 -- each is one thing
    found: HostDevice,
    settings: Settings,
    profile: RfcProfile,
    memory: Sequence[MemoryMap],
    lock: DeviceLock | None,
    view: View | None,
    *,
    any_device: bool,
) -> Session:
    from vfio_mig.host.opening import open_device

    pieces = [_DeviceMemory(piece) for piece in memory]
    device = open_device(
        found, memory=pieces, pid=settings.pid, fd=settings.fd, via=settings.via, kvm=settings.kvm, view=view
    )
    try:
        protocol = (_detect_any if any_device else _detect)(found, device, profile, settings.abi)
        session = Session(found, device, protocol, lock, settings)
        if settings.tell is not None:
            settings.tell(session.describe())
    except BaseException:
        device.close()
        raise
    return session


def _detect(found: HostDevice, device: Device, profile: RfcProfile, abi: str) -> MigrationProtocol:
    """Choose the protocol; say so when it is kvmgt as distributions have it that speaks none."""
    from vfio_mig.protocols.registry import detect, spoken

    try:
        return detect(device, profile, abi)
    except UnsupportedError as error:
        if found.kind == "mdev" and found.type.startswith(GVT_TYPES) and not spoken(device, profile):
            error.problem = f"it is a GVT-g vGPU of a driver without migration, and {error.problem}"
            error.hint = f"scripts/kvmgt builds a driver with it; {error.hint}"
        raise


def _detect_any(found: HostDevice, device: Device, profile: RfcProfile, abi: str) -> MigrationProtocol:
    """Choose the protocol; where there is none, and none was asked for, what refuses all that takes one."""
    from vfio_mig.protocols.registry import AUTO

    try:
        return _detect(found, device, profile, abi)
    except UnsupportedError as error:
        if abi != AUTO:
            raise
        from vfio_mig.protocols.none import NoMigration

        return NoMigration(device, error)


def _take_over(session: Session, lock: DeviceLock, job: words.Job, *, force: bool) -> None:
    """Look at what an earlier job has left: a stop can be gone on from, a half-loaded or moved state cannot."""
    left = session.leftover = lock.take_over(session.device.holder)
    if left is None:
        if job not in FROM_ANY_STATE:
            session.protocol.require_idle()
        return
    if job in GOES_ON and (session.is_half_loaded or (session.is_moved and not force)):
        name = session.device.name
        raise DeviceError(str(left), device=name, hint=left.repair(name))
    session.warn(str(left))
    if job not in FROM_ANY_STATE:
        session.protocol.recover(may_reset=job == "restore" and session.is_ours)
