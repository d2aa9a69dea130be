# SPDX-License-Identifier: MIT
"""Restore a device: verify the whole image, then stop, write memory and state, start if asked."""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from vfio_mig.errors import DeviceError, HostError, ImageError, MismatchError, UsageError, errno_text
from vfio_mig.jobs.rollback import Rollback
from vfio_mig.jobs.save import metered
from vfio_mig.jobs.session import Settings, open_session
from vfio_mig.jobs.state import check_state_fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.image.archive import Archive
    from vfio_mig.jobs.session import Session

STDIN = "-"
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


@contextmanager
def _input(file: str) -> Iterator[BinaryIO]:
    if file == STDIN:
        if sys.stdin.isatty():
            raise UsageError("the image is binary and cannot be typed", hint="redirect a file or name one")
        yield sys.stdin.buffer
        return
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise HostError(f"{file}: cannot open: {errno_text(error.errno or 0)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # before fdopen(), which fails in its own way on a directory
        os.close(fd)
        raise UsageError(f"{file} is no regular file", hint="use - to read from a pipe")
    with os.fdopen(fd, "rb") as stream:
        yield stream


def _read_raw(stream: BinaryIO, limit: int) -> bytes:
    """Read a bare state; one byte more than the region is enough to see that it is too long."""
    try:
        state = stream.read(limit + 1)
    except OSError as error:
        raise HostError(f"cannot read the state: {errno_text(error.errno or 0)}") from error
    if len(state) > limit:
        raise ImageError(f"more than {limit} bytes: too long for the device's state region")
    return state


def check_fit(session: Session, archive: Archive) -> None:
    """Refuse an image of another protocol, device type or size.

    :raises MismatchError: says what differs; nothing was written.
    """
    theirs = archive.header
    device = theirs.get("device")
    saved_type = device.get("type") if isinstance(device, dict) else None
    for what, saved, here in (
        ("protocol", theirs.get("protocol"), session.protocol.name),
        ("device type", saved_type, session.found.type),
    ):
        if saved != here:
            raise MismatchError(f"the image is of {what} {saved!r}, the device of {here!r}", device=session.device.name)
    if archive.state_size > session.protocol.state_size_max:
        raise MismatchError(
            f"the image's state has {archive.state_size} bytes, the device takes {session.protocol.state_size_max}",
            device=session.device.name,
        )


def _check_pages(archive: Archive, guest: Memory) -> None:
    """Refuse an image with pages that the guest memory given does not have.

    :raises MismatchError: says which; nothing was written.
    """
    known = guest.ranges
    for gpa, content in archive.pages():
        first, end = gpa // 4096, (gpa + len(content)) // 4096
        if not any(range_.start <= first and end <= range_.end for range_ in known):
            raise MismatchError(f"the image has {len(content)} bytes of memory at {gpa:#x}, which --memory does not")


def _write_pages(archive: Archive, guest: Memory, progress: Callable[[int], object]) -> int:
    """Write the image's pages into guest memory; returns how many."""
    return sum(guest.write(gpa, content) for gpa, content in metered(archive.pages(), progress))


class _Image(NamedTuple):
    """A verified image: the state, and the archive it came in unless it was raw."""

    state: bytes
    archive: Archive | None


@contextmanager
def _read_image(session: Session, stream: BinaryIO, *, raw: bool) -> Iterator[_Image]:
    from vfio_mig.image.archive import read_archive

    if raw:
        yield _Image(_read_raw(stream, session.protocol.state_size_max), None)
        return
    with read_archive(stream) as archive:
        check_fit(session, archive)
        yield _Image(archive.state(), archive)


def _abandon(session: Session) -> None:
    """Leave a device that may have taken a part of a state in a known one: reset, running.

    Somebody else's device is not reset: its owner would lose interrupts and configuration without a word.
    """
    holder = session.device.holder
    if holder is not None and not holder.is_hold:
        raise DeviceError(
            "may hold a part of the image and was left stopped, as it belongs to another process",
            device=session.device.name,
            hint=f"reset it with 'vfio-mig reset --force {session.device.name}', or end PID {holder.pid}",
        )
    session.protocol.reset()
    session.protocol.start()


def _load(
    session: Session, image: _Image, guest: Memory, progress: Callable[[int], object], *, start: bool
) -> tuple[dict[str, float], int]:
    """Stop the device and write everything; what fails is the caller's to roll back."""
    times = {}
    began = time.perf_counter()
    session.protocol.stop()
    times["stop_time"] = time.perf_counter() - began
    pages = _write_pages(image.archive, guest, progress) if image.archive is not None and guest.maps else 0
    began = time.perf_counter()
    session.protocol.write_state(memoryview(image.state))
    times["state_write_time"] = time.perf_counter() - began
    began = time.perf_counter()
    if start:
        session.protocol.start()
    times["start_time"] = time.perf_counter() - began if start else 0.0
    return times, pages


def restore(
    name: str,
    file: str,
    settings: Settings | None = None,
    *,
    memory: Sequence[MemoryMap] = (),
    start: bool = False,
    raw: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> RestoreReport:
    """Load a saved image, or as ``-`` standard input, into a device.

    Everything that can be verified is, before the first byte reaches the device. It is left stopped unless *start*.

    :param memory: guest memory; the image's pages are written there, and it is mapped when we open the device.
    :param raw: the file is a bare state.
    :param progress: called with the bytes of each piece of guest memory that was written.
    :raises ImageError: the image is broken or does not fit; the device is untouched.
    :raises DeviceError: the device refused the state; it was reset if that is ours to do.
    """
    from vfio_mig.dirty.memory import Memory

    with (
        Memory(memory, writable=True) as guest,
        _input(file) as stream,
        open_session(name, settings, memory=guest.maps) as session,
        ExitStack() as stack,
    ):
        image = stack.enter_context(_read_image(session, stream, raw=raw))
        warnings = check_state_fits(session, image.state)
        if image.archive is not None and guest.maps:
            _check_pages(image.archive, guest)
        if not session.device.borrowed:
            warnings.append(NOT_HELD)
        with Rollback() as rollback:
            rollback.push(lambda: _abandon(session))
            times, pages = _load(session, image, guest, progress, start=start)
        return RestoreReport(
            device=session.device.name,
            file=file,
            state=session.state_after(started=start),
            **times,
            state_bytes=len(image.state),
            pages_written=pages,
            warnings=warnings,
        )
