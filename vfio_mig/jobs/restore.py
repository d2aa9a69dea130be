# SPDX-License-Identifier: MIT
"""Restore a device: verify the whole image, then stop, write memory and state, start if asked."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vfio_mig import interrupts
from vfio_mig.errors import DeviceError, MismatchError, UsageError
from vfio_mig.host.lock import LOADING, STOPPED
from vfio_mig.interrupts import protected
from vfio_mig.jobs.check import findings, require_fit
from vfio_mig.jobs.points import point
from vfio_mig.jobs.rollback import Rollback
from vfio_mig.jobs.session import Settings, open_session
from vfio_mig.jobs.source import STDIN, open_input, read_image
from vfio_mig.jobs.together import quiet, require_p2p, wake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.image.archive import Archive
    from vfio_mig.jobs.session import Session

JOB = "restore"
START = "start"
LOADED = "loaded"
UNVERIFIED = "--no-verify-state: the device state was NOT checked; the kernel may believe whatever it says"
NOT_HELD = (
    "nobody else has the device open, so its queued work is dropped now and it starts by itself at the next open; "
    "to keep it as restored, run 'vfio-mig hold' first"
)


class RestoreReport(NamedTuple):
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


def reserve_pages(archive: Archive, guest: Memory) -> None:
    """Make sure that every page of the image has a place, before anything is written.

    :raises MismatchError: the guest memory given does not have it.
    :raises HostError: there is no room in its file.
    """
    known = guest.ranges
    for gpa, size, content in archive.memory():
        first, end = gpa // 4096, (gpa + size) // 4096
        if not any(range_.start <= first and end <= range_.end for range_ in known):
            raise MismatchError(f"the image has {size} bytes of memory at {gpa:#x}, which --memory does not")
        if content is not None:
            guest.reserve(gpa, size)


@protected  # a signal in the middle would leave memory of which nobody could say what it is
def write_pages(archive: Archive, guest: Memory, progress: Callable[[int], object]) -> int:
    """Write the image's pages into guest memory; returns how many."""
    pages = 0
    for gpa, size, content in archive.memory():
        pages += guest.clear(gpa, size) if content is None else guest.write(gpa, content)
        progress(size)
    return pages


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
    session.go_on()


class _Target:
    """One device of a restore and where its image comes from; each step says how it is undone."""

    def __init__(self, name: str, file: str, *, force: bool, await_word: bool) -> None:
        self._await_word = await_word
        self.name = name
        self.file = file
        self._force = force
        self.times = {"start_time": 0.0}
        self.pages = 0
        self.warnings: list[str] = []

    def open(
        self, stack: ExitStack, settings: Settings | None, guest: Memory, *, raw: bool, verify_state: bool
    ) -> None:
        """Open device and image and verify all of it; nothing is changed yet."""
        stream = stack.enter_context(open_input(self.file))
        self._stream = stream
        session = stack.enter_context(open_session(self.name, settings, memory=guest.maps, job=JOB))
        self.session = session
        if not self._force:  # before the sender of an image stops anything
            _require_own(session)
        point(JOB, "waiting", session)
        limit = None if session.protocol.streams else session.protocol.state_size_max
        image = stack.enter_context(read_image(stream, limit, raw=raw, alone=not self._await_word))
        self._image = image
        point(JOB, "opened", session)
        found = findings(session, image.state, image.archive, verify_state=verify_state)
        self.warnings = require_fit(session.device.name, found, force=self._force)
        if not verify_state:
            self.warnings.insert(0, UNVERIFIED)
        if image.archive is not None and guest.maps:
            reserve_pages(image.archive, guest)
        if not session.device.borrowed:
            self.warnings.append(NOT_HELD)
        session.protocol.prepare()
        self._chunks = image.chunks()
        self._rollback = stack.enter_context(Rollback())
        point(JOB, "verified", session)

    def may_stop(self) -> None:
        """Have a stop undone if the job fails."""
        if not self.session.is_half_loaded:  # else it stays what it is
            self.session.note(STOPPED)
            self._rollback.push(self.session.go_on)

    def stop(self) -> None:
        session = self.session
        began = time.perf_counter()
        session.protocol.stop()
        self.times["stop_time"] = time.perf_counter() - began
        point(JOB, "after-stop", session)

    def write_pages(self, guest: Memory, progress: Callable[[int], object]) -> None:
        if self._image.archive is not None and guest.maps:
            self.pages = write_pages(self._image.archive, guest, progress)
        point(JOB, "after-pages", self.session)

    def write_state(self) -> None:
        session = self.session
        session.note(LOADING)
        self._rollback.forget()
        self._rollback.push(lambda: _abandon(session, force=self._force))
        began = time.perf_counter()
        session.protocol.write_chunks(self._chunks)
        self.times["state_write_time"] = time.perf_counter() - began
        point(JOB, "after-state", session)

    def start(self) -> None:
        began = time.perf_counter()
        self.session.protocol.start()
        self.times["start_time"] = time.perf_counter() - began
        point(JOB, "after-start", self.session)

    def require_holder(self) -> None:
        """Make sure that the device does not go with this job.

        :raises DeviceError: its holder has ended meanwhile.
        """
        self.session.require_holder_alive()

    def read_word(self) -> str:
        """Wait for what the sender of the image wants: ``start``, ``stay``, or nothing when it has gone."""
        self.session.step(JOB, LOADED)
        try:
            return self._stream.readline(16).decode("ascii", "replace").strip()
        except OSError:
            return ""

    def forget(self) -> None:
        """Take it that the device is restored."""
        self._rollback.forget()
        self.session.note("")

    def report(self, *, started: bool) -> RestoreReport:
        """Say what was done."""
        return RestoreReport(
            device=self.session.device.name,
            file=self.file,
            state=self.session.state_after(started=started),
            **self.times,
            state_bytes=self._image.state_size,
            pages_written=self.pages,
            warnings=self.warnings,
        )


def _load(targets: list[_Target], guest: Memory, progress: Callable[[int], object]) -> None:
    """Stop all devices, then write memory and states."""
    for target in targets:
        target.may_stop()
    quiet([target.session for target in targets])
    for target in targets:
        target.stop()
    for target in targets:
        target.write_pages(guest, progress)
    for target in targets:
        target.write_state()


@protected
def _commit(targets: list[_Target]) -> None:
    """Take it that all devices are restored; from here on nothing is undone."""
    for target in targets:
        target.require_holder()
    for target in targets:
        target.forget()
    interrupts.finish()


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
    progress: Callable[[int], object] = lambda _: None,
) -> RestoreReport:
    """Load a saved image, or as ``-`` standard input, into a device.

    Everything that can be verified is, before the first byte reaches the device. It is left stopped unless *start*.

    :param memory: guest memory; the image's pages are written there, and it is mapped when we open the device.
    :param raw: the file is a bare state.
    :param force: go on over mismatches of which ``check`` says that they may be forced, and on the device of a
        process that is not our holder.
    :param verify_state: False loads a state whose layout is not understood; what it does to the kernel is then open.
    :param progress: called with the bytes of each piece of guest memory that was written.
    :raises ImageError: the image is broken or does not fit; the device is untouched.
    :raises DeviceError: the device refused the state; it was reset if that is ours to do.
    """
    return restore_all(
        [(name, file)],
        settings,
        memory=memory,
        start=start,
        raw=raw,
        force=force,
        verify_state=verify_state,
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
    await_word: bool = False,
    without_p2p: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> list[RestoreReport]:
    """Restore several devices as one job: all images are verified before any device is touched, and all loaded before
    any is started; a failure undoes all.

    :param pairs: (device, file) each; the other parameters are those of :func:`restore`.
    :param await_word: one device and standard input: once it is loaded, wait for a line behind the image, ``start`` or
        ``stay``; without one it stays stopped.
    :param without_p2p: also if one of them has no P2P states.
    """
    from vfio_mig.dirty.memory import Memory

    if await_word and (raw or start or [file for _, file in pairs] != [STDIN]):
        raise UsageError("to wait for a word is for one image from standard input", hint="leave out the other options")
    if [file for _, file in pairs].count(STDIN) > 1:
        raise UsageError("two devices cannot be restored from standard input", hint="name a file for each: DEVICE=FILE")
    targets = [_Target(name, file, force=force, await_word=await_word) for name, file in pairs]
    with Memory(memory, writable=True) as guest, ExitStack() as stack:
        for target in targets:
            target.open(stack, settings, guest, raw=raw, verify_state=verify_state)
        sessions = [target.session for target in targets]
        require_p2p(sessions, waived=without_p2p)
        _load(targets, guest, progress)
        if await_word:
            # From here on the state is ours: who sent it may have given the device up
            _commit(targets)
            start = targets[0].read_word() == START
        if start:
            wake(sessions)
            for target in targets:
                target.start()
        _commit(targets)
        return [target.report(started=start) for target in targets]
