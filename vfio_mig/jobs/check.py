# SPDX-License-Identifier: MIT
"""Does this image fit this device? A list of named checks; the same for ``check`` and ``restore``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, NamedTuple

from vfio_mig.errors import ImageError, MismatchError, excerpt
from vfio_mig.jobs.engine.session import Settings, open_session
from vfio_mig.protocols.registry import parse_state
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.archive import Archive
    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.protocols.states import KnownState

OK: Final = "ok"
NOTE: Final = "note"
MISMATCH: Final = "mismatch"
MEMORY: Final = "guest-memory"
"""Name of the finding on what the state relies on outside of it."""


class FitCheck(NamedTuple):
    """One check.

    :param name: stable; scripts may rely on it.
    :param result: ``ok``, ``note`` (differs, and may), or ``mismatch``.
    :param text: what was compared.
    :param forcible: whether ``restore --force`` may go on: other checks see to it that nothing breaks.
    """

    name: str
    result: Literal["ok", "note", "mismatch"]
    text: str
    forcible: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckReport(Report):
    """What a check found.

    :param fits: no mismatch.
    """

    device: str
    file: str
    fits: bool
    checks: list[FitCheck]


@dataclass(frozen=True, kw_only=True)
class VerifyReport(Report):
    """What a whole image holds. Sizes in bytes, pages of 4096 bytes.

    :param protocol: None for a raw state, as are *type* and *time*.
    :param time: when it was saved, seconds since 1970.
    :param warnings: what is unusual about the state; nothing that forbids a restore.
    """

    file: str
    protocol: str | None
    type: str | None
    time: int | None
    members: int
    state_bytes: int
    pages: int
    warnings: list[str]


def _equal(name: str, saved: object, here: object, *, forcible: bool = False) -> FitCheck:
    if saved == here:
        return FitCheck(name, OK, f"{here}")
    return FitCheck(name, MISMATCH, f"{excerpt(saved)} in the image, {here!r} here", forcible)


def _unless_unknown(found: FitCheck, said: dict[str, Any], key: str) -> FitCheck:
    """Return a check, or a note where an image has null, as one of a QEMU stream has: the stream does not say it."""
    if key in said and said[key] is None:
        return FitCheck(found.name, NOTE, "the image does not say it")
    return found


def _type_check(saved: dict[str, Any], session: Session) -> FitCheck:
    """Compare the type that an image's header says; QEMU knows a PCI device by its IDs alone."""
    here, forcible = session.found.type, session.protocol.knows_states
    if saved.get("type") is None and "pci" in saved and session.found.kind == "pci":
        return _equal("device-type", saved["pci"], here, forcible=forcible)
    # The state's own checks tell types apart where the name of one is all that differs
    return _unless_unknown(_equal("device-type", saved.get("type"), here, forcible=forcible), saved, "type")


def _may_differ(name: str, saved: object, here: object) -> FitCheck:
    same = saved == here
    return FitCheck(name, OK if same else NOTE, f"{here}" if same else f"{excerpt(saved)} in the image, {here!r} here")


def header_checks(session: Session, archive: Archive) -> Iterator[FitCheck]:
    """Compare what the image's header says with a device and this host."""
    header = archive.header
    device = header.get("device")
    saved: dict[str, Any] = device if isinstance(device, dict) else {}
    protocol = session.protocol
    yield FitCheck("format", OK, f"version {header['version']}, every member whole")
    yield _equal("protocol", header.get("protocol"), protocol.name)
    yield _type_check(saved, session)
    yield _unless_unknown(_equal("machine", header.get("machine"), os.uname().machine), header, "machine")
    yield _may_differ("driver", saved.get("driver"), session.found.driver)
    yield _may_differ("kernel", header.get("kernel"), os.uname().release)
    size, limit = archive.state_size, protocol.state_size_max
    yield FitCheck("state-size", OK if size <= limit else MISMATCH, f"{size} bytes, the device takes {limit}")


def state_checks(session: Session, state: bytes | memoryview, archive: Archive | None = None) -> Iterator[FitCheck]:
    """Parse a state and compare it with a device; reads its configuration space and PVINFO and changes nothing.

    :param archive: the image that it is in; None for a bare state.
    """
    if session.protocol.streams:
        yield FitCheck("state", OK, "a stream, for the device's driver to judge")
        return
    try:
        known = session.protocol.parse_state(memoryview(state))
    except ImageError as error:
        yield FitCheck("state", MISMATCH, error.problem)
        return
    if known is None:
        yield FitCheck("state", NOTE, f"the layout of a {session.protocol.name} state is not known")
        return
    yield FitCheck("state", OK, known.summary)
    for one in known.compare(session.device):
        if one.here is None:
            yield FitCheck(one.name, NOTE, "the device's own sizes cannot be read")
        else:
            yield _equal(one.name, one.saved, one.here)
    yield from memory_checks(known, archive)
    for warning in known.warnings:
        yield FitCheck("state-content", NOTE, warning)


def missing_memory(relies_on: str, content: str | None, *, has_pages: bool) -> str:
    """Say what a target needs besides a state that comes without all of the guest's memory.

    :param relies_on: what of the state is in guest memory.
    :param content: which guest memory comes along, as an image's header says it; None where it does not say.
    """
    if not has_pages:
        come = "no page comes along"
    elif content is None:
        come = "not all pages may come along"
    else:
        come = "only the pages that the device may have written come along"
    return f"it has the state's {relies_on}, and {come}: the target must have the rest"


def memory_checks(known: KnownState, archive: Archive | None) -> Iterator[FitCheck]:
    """Say whether what a state relies on in guest memory comes along with it.

    :param archive: None for a bare state, with which nothing comes.
    """
    from vfio_mig.image.memoryplan import memory_note

    if not known.relies_on:
        return
    note = None if archive is None else memory_note(archive)
    if note is not None and note.content == "all":
        yield FitCheck(MEMORY, OK, f"all pages come along, with the state's {known.relies_on}")
        return
    # of the images of one job another one may have the pages
    has_pages = archive is not None and note is not None and (archive.has_memory or note.content == "dirty")
    content = None if note is None else note.content
    yield FitCheck(MEMORY, NOTE, missing_memory(known.relies_on, content, has_pages=has_pages))


def fit_checks(
    session: Session, state: bytes | memoryview, archive: Archive | None, *, verify_state: bool = True
) -> list[FitCheck]:
    """Make all checks of an image, or without *archive* of a raw state, against a device."""
    found = [] if archive is None else list(header_checks(session, archive))
    if verify_state:
        found += state_checks(session, state, archive)
    return found


def require_fit(name: str, found: list[FitCheck], *, force: bool = False) -> list[str]:
    """Refuse an image that does not fit.

    :param force: go on over mismatches that are forcible.
    :returns: what the user must know: what was forced, and notes on the state.
    :raises MismatchError: names the first mismatch and how many there are.
    """
    wrong = [one for one in found if one.result == MISMATCH and not (force and one.forcible)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise MismatchError(
            f"the image does not fit: {wrong[0].name}: {wrong[0].text}{more}",
            device=name,
            hint="--force goes on all the same" if all(one.forcible for one in wrong) else "see 'vfio-mig check'",
        )
    forced = [f"forced over a mismatch: {one.name}: {one.text}" for one in found if one.result == MISMATCH]
    told = [one.text for one in found if one.name == "state-content"]
    memory = [f"guest memory: {one.text}" for one in found if one.name == MEMORY and one.result == NOTE]
    return forced + told + memory


def check_image(name: str, file: str, settings: Settings | None = None, *, raw: bool = False) -> CheckReport:
    """Tell whether an image fits a device, without touching the device's state.

    :param file: an image, ``-`` for standard input; *raw*: a bare state.
    :raises ImageError: it is not a whole image.
    """
    from vfio_mig.jobs.files.input import look_at, open_input

    with open_input(file) as stream:
        look_at(stream, raw=raw)
        return _check_stream(name, file, stream, settings, raw=raw)


def _check_stream(name: str, file: str, stream: BinaryIO, settings: Settings | None, *, raw: bool) -> CheckReport:
    from vfio_mig.jobs.files.input import read_image

    with open_session(name, settings) as session:
        limit = None if session.protocol.streams else session.protocol.state_size_max
        with read_image(stream, limit, raw=raw) as image:
            found = fit_checks(session, image.state, image.archive)
        device = session.device.name
    return CheckReport(device=device, file=file, fits=all(one.result != MISMATCH for one in found), checks=found)


def verify_image(file: str, *, raw: bool = False, verify_state: bool = True) -> VerifyReport:
    """Verify a file on its own: every checksum, and the device state where its layout is known.

    :param raw: the file is a bare GVT-g state.
    :param verify_state: False for a state of a layout that is not known here.
    :raises ImageError: anything is wrong; the message names member or offset.
    """
    from vfio_mig.jobs.files.input import open_input, read_image
    from vfio_mig.ranges import PAGE
    from vfio_mig.uapi.profile import DEFAULT_PROFILE, IMAGE_LARGEST

    limit = DEFAULT_PROFILE.image_max if raw else IMAGE_LARGEST
    with open_input(file) as stream, read_image(stream, limit, raw=raw) as image:
        archive = image.archive
        header: dict[str, Any] = {} if archive is None else archive.header
        protocol = header.get("protocol")
        parsed = parse_state(None if archive is None else str(protocol), image.state) if verify_state else None
        device = header.get("device")
        return VerifyReport(
            file=file,
            protocol=None if archive is None else str(protocol),
            type=str(device["type"]) if isinstance(device, dict) and device.get("type") is not None else None,
            time=header["time"] if type(header.get("time")) is int else None,
            members=0 if archive is None else len(archive.members),
            state_bytes=image.state_size,
            pages=0 if archive is None else sum(size // PAGE for _, size, _ in archive.memory()),
            warnings=[] if parsed is None else list(parsed.warnings),
        )
