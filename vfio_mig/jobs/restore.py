# SPDX-License-Identifier: MIT
"""Restore a device: verify the whole image, then stop, write memory and state, start if asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from vfio_mig.errors import DeviceError, MismatchError, UsageError
from vfio_mig.host.lock import LOADING
from vfio_mig.interrupts import waiting
from vfio_mig.jobs.check import MEMORY, fit_checks, require_fit
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.loading import MemoryLoad
from vfio_mig.jobs.engine.pause import Pause, announce_start, require_p2p, stop_all, wake
from vfio_mig.jobs.engine.progress import counted, expect
from vfio_mig.jobs.engine.rehearsal import rehearse
from vfio_mig.jobs.files.input import STDIN, open_input, read_image
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.jobs.engine.session import Session, Settings

JOB: Final = "restore"
START = "start"
UNVERIFIED = "--no-verify-state: the device state was NOT checked; the kernel may believe whatever it says"
NOT_HELD = (
    "nobody else has the device open, so its queued work is dropped now and it starts by itself at the next open; "
    "to keep it as restored, run 'vfio-mig hold' first"
)
OLD_PAGES: Final = (
    "it has every page of guest memory, copied while the guest's CPUs may have run: some are old, and are now written "
    "over what is there"
)


@dataclass(frozen=True, kw_only=True)
class RestoreReport(Report):
    """What a restore did. Times in seconds, sizes in bytes, pages of 4096 bytes.

    :param state_write_time: the one write of the state region.
    :param state: what the device is now: ``stop``, ``running``, or ``closed`` when nobody else has it open.
    :param warnings: what is unusual about the state; nothing that forbids it.
    """

    device: str
    file: str
    state: str
    stop_time: float
    state_write_time: float
    start_time: float
    state_bytes: int
    pages_written: int
    warnings: list[str]


def _require_own(session: Session) -> None:
    """Refuse somebody else's device: a guest would find another one under its feet.

    :raises UsageError: it is open in a process that is not our holder.
    """
    holder = session.device.holder
    if holder is not None and not holder.is_hold:
        raise UsageError(
            f"a restore would change the device under {holder}",
            device=session.device.name,
            hint="pause that VM, then use --force",
        )


def _abandon(session: Session, *, force: bool) -> None:
    """Leave a device that may have taken a part of a state in a known one: reset, running.

    Somebody else's device is not reset unless by force: its owner would lose interrupts and configuration.
    """
    holder = session.device.holder
    if holder is not None and not holder.is_hold and not force:
        raise DeviceError(
            "may hold a part of the image and was left stopped, as it belongs to another process",
            device=session.device.name,
            hint=f"reset it with 'vfio-mig reset --force {session.device.name}', or end PID {holder.pid}",
        )
    session.protocol.reset()
    session.leftover = None  # whatever an earlier job has left, it is gone
    session.resume()


class _Target:
    """One device of a restore and where its image comes from."""

    def __init__(self, name: str, file: str, *, force: bool, await_verdict: bool) -> None:
        self._await_verdict = await_verdict
        self.name = name
        self.file = file
        self._force = force
        self.warnings: list[str] = []

    def open(
        self, job: Job, guest: Memory, *, raw: bool, verify_state: bool, open_closed: bool, no_memory: bool
    ) -> None:
        """Open device and image and verify all of it; nothing is changed yet."""
        self._stream = job.enter(open_input(self.file))
        session = job.open(self.name, memory=guest.maps, held_for=None if open_closed else "restore")
        self.session = session
        if self._await_verdict:  # before the sender of an image stops anything
            self.require_own()
        self.pause = Pause(job, session)
        session.protocol.prepare()
        if self._await_verdict:  # its sender's device stands still from some time on
            rehearse(session)
        job.step("waiting", session)
        limit = None if session.protocol.streams else session.protocol.state_size_max
        self.image = image = job.enter(read_image(self._stream, limit, raw=raw, alone=not self._await_verdict))
        job.step("opened", session)
        found = fit_checks(session, image.state, image.archive, verify_state=verify_state)
        if no_memory:  # whoever says so knows that it is there
            found = [one for one in found if one.name != MEMORY]
        self.warnings = require_fit(session.device.name, found, force=self._force)
        if not verify_state:
            self.warnings.insert(0, UNVERIFIED)
        if not session.device.borrowed:
            self.warnings.append(NOT_HELD)
        self._chunks = image.chunks()

    def require_own(self) -> None:
        """Refuse somebody else's device, unless by force.

        :raises UsageError: it is open in a process that is not our holder.
        """
        if not self._force:
            _require_own(self.session)

    def begin_to_load(self) -> None:
        """Write down that the device, or its guest's memory, holds a part of an image from now on."""
        self.pause.change(LOADING, lambda: _abandon(self.session, force=self._force))

    def stage(self, progress: Callable[[int], object]) -> None:
        """Do what of loading the state need not wait for the stop."""
        self._load = self.session.protocol.stage(counted(self._chunks, progress))

    def write_state(self) -> None:
        """Load the device's state."""
        with self.pause.phase("state_write_time"):
            self._load()
        self.pause.job.step("after-state", self.session)

    @waiting
    def read_verdict(self) -> str:
        """Wait for what the sender of the image wants: ``start``, ``stay``, or nothing when it has gone."""
        try:
            return self._stream.readline(16).decode("ascii", "replace").strip()
        except OSError:
            return ""

    def report(self, *, started: bool) -> RestoreReport:
        """Say what was done, but for guest memory, which is not one device's."""
        times = self.pause.times
        return RestoreReport(
            device=self.session.device.name,
            file=self.file,
            state=self.session.state_after(started=started),
            stop_time=times["stop_time"],
            state_write_time=times["state_write_time"],
            start_time=times["start_time"],
            state_bytes=self.image.state_size,
            pages_written=0,
            warnings=self.warnings,
        )


def _plan_memory(targets: list[_Target], guest: Memory, *, no_memory: bool) -> MemoryLoad | None:
    """Decide what is written to guest memory.

    :raises UsageError: an image has guest memory, there is no place for it, and nobody said that it may be left out.
    """
    from vfio_mig.image.memoryplan import MemoryImage

    if no_memory:
        return None
    images = [MemoryImage(target.file, target.image.archive) for target in targets if target.image.archive is not None]
    _require_memory_images(targets)
    with_memory = [image for image in images if image.archive.has_memory]
    if not with_memory:
        return None
    if not guest.maps:
        raise UsageError(
            f"{with_memory[0].name} has guest memory, and there is no --memory to write it to",
            device=targets[0].session.device.name,
            hint="name the guest's memory, or use --no-memory to load the state alone",
        )
    load = MemoryLoad(with_memory, guest)
    load.prove()
    return load


def _require_memory_images(targets: list[_Target]) -> None:
    """Refuse an image whose guest memory is in one that is not loaded with it; warn of pages that may be old."""
    from vfio_mig.image.memoryplan import memory_note

    notes = [(target, memory_note(target.image.archive)) for target in targets if target.image.archive is not None]
    carried = {note.job for _, note in notes if note.is_in is None}
    for target, note in notes:
        if note.is_in is not None and note.job not in carried:
            raise MismatchError(
                f"the guest memory of {target.file} is in {note.is_in}, an image of the same save",
                device=target.session.device.name,
                hint="restore both together, DEVICE=FILE for each, or use --no-memory to load the state alone",
            )
        if note.is_in is None and note.content == "all" and not note.guest_paused:
            target.warnings.append(f"{target.file}: {OLD_PAGES}")


def _load(job: Job, targets: list[_Target], load: MemoryLoad | None, progress: Callable[[int], object]) -> None:
    """Stop all devices, then write memory and states."""
    pages = 0 if load is None else load.bytes_planned
    expect(progress, lambda: pages + sum(target.image.state_size for target in targets))
    for target in targets:
        target.stage(progress)
    stop_all([target.pause for target in targets])
    if load is not None:
        for target in targets:
            target.begin_to_load()
        job.step("writing-pages", targets[0].session)
        load.write(progress)
    for target in targets:
        job.step("after-pages", target.session)
    for target in targets:
        if load is None:
            target.begin_to_load()
        target.write_state()


def _settle(targets: list[_Target]) -> list[Callable[[], object]]:
    """Return what makes the restore final: the devices hold their states, and do not go with this job."""
    checks: list[Callable[[], object]] = [target.session.require_holder_alive for target in targets]
    return [*checks, *(target.session.clear_journal for target in targets)]


def restore(
    name: str,
    file: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    start: bool = False,
    raw: bool = False,
    force: bool = False,
    verify_state: bool = True,
    no_memory: bool = False,
    open_closed: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> RestoreReport:
    """Load a saved image, or as ``-`` standard input, into a device.

    Everything that can be verified is, before the first byte reaches the device. It is left stopped unless *start*.

    :param memory: guest memory; the image's pages are written there, and it is mapped when we open the device.
    :param raw: the file is a bare state.
    :param force: go on over mismatches of which ``check`` says that they may be forced, and on the device of a
        process that is not our holder.
    :param verify_state: False loads a state whose layout is not understood; what it does to the kernel is then open.
    :param no_memory: leave the image's guest memory out.
    :param open_closed: also a device that no other process has open: what is restored is lost when this returns.
    :param progress: called with the bytes of each piece of guest memory that was written.
    :raises ImageError: the image is broken or does not fit; neither device nor guest memory was touched.
    :raises DeviceError: the device refused the state; it was reset if that is ours to do. ``consequences`` says
        whether guest memory has been written.
    :raises HostError: guest memory could not be written, as ``consequences`` says in part; likewise.
    """
    return restore_all(
        [(name, file)],
        settings,
        memory=memory,
        start=start,
        raw=raw,
        force=force,
        verify_state=verify_state,
        no_memory=no_memory,
        open_closed=open_closed,
        progress=progress,
    )[0]


def restore_all(
    pairs: Sequence[tuple[str, str]],
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    start: bool = False,
    raw: bool = False,
    force: bool = False,
    verify_state: bool = True,
    await_verdict: bool = False,
    without_p2p: bool = False,
    no_memory: bool = False,
    open_closed: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> list[RestoreReport]:
    """Restore several devices as one job: all images are verified before any device is touched, and all loaded before
    any is started; a failure undoes all. Each page of guest memory is written once, the newest of all images.

    :param pairs: (device, file) each; the other parameters are those of :func:`restore`.
    :param await_verdict: one device and standard input: once it is loaded, wait for a line behind the image,
        ``start`` or ``stay``; without one it stays stopped.
    :param without_p2p: also if one of them has no P2P states.
    """
    from vfio_mig.dirty.memory import Memory

    _check_request([file for _, file in pairs], await_verdict=await_verdict and (raw or start), awaits=await_verdict)
    targets = [_Target(name, file, force=force, await_verdict=await_verdict) for name, file in pairs]
    with Job(JOB, settings) as job:
        guest = job.enter(Memory(memory, writable=True))
        for target in targets:
            target.open(job, guest, raw=raw, verify_state=verify_state, open_closed=open_closed, no_memory=no_memory)
        sessions = [target.session for target in targets]
        require_p2p(sessions, waived=without_p2p)
        load = _plan_memory(targets, guest, no_memory=no_memory)
        for target in targets:
            target.require_own()
        for session in sessions:
            job.step("verified", session)
        try:
            _load(job, targets, load, progress)
            if await_verdict:
                start = _await_verdict(job, targets[0])
            if start:
                announce_start(job, sessions)
                wake(sessions)
                for target in targets:
                    target.pause.start()
            reports = [target.report(started=start) for target in targets]
            if load is not None:
                reports[0] = replace(reports[0], pages_written=load.pages)
            job.commit(*_settle(targets))
        except BaseException as error:
            if load is not None:
                load.explain(error)
            raise
        return reports


def _check_request(files: list[str], *, await_verdict: bool, awaits: bool) -> None:
    if await_verdict or (awaits and files != [STDIN]):
        raise UsageError("to wait for a word is for one image from standard input", hint="leave out the other options")
    if files.count(STDIN) > 1:
        raise UsageError("two devices cannot be restored from standard input", hint="name a file for each: DEVICE=FILE")


def _await_verdict(job: Job, target: _Target) -> bool:
    """Tell the sender that the state is here, and wait for what it wants; returns whether to start.

    From here on the state is ours, and nothing is undone: who sent it may have given the device up.
    """
    for final in _settle([target]):
        final()
    job.disarm()
    job.step("loaded", target.session)
    try:
        return target.read_verdict() == START
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("the device holds the whole state, and stays stopped")
        raise
