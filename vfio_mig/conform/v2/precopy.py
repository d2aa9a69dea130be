# SPDX-License-Identifier: MIT
"""PRE_COPY: what there is to read while the device runs, and how much."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.conform.kit.check import FSM, PRECOPY, Checks
from vfio_mig.conform.kit.rig import first_difference
from vfio_mig.conform.kit.v2_device import INFO, STREAM_MAX, errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, Weakness, recommend, require
from vfio_mig.conform.v2.feature import refusal
from vfio_mig.uapi.v2 import (
    PRE_COPY,
    PRE_COPY_FLAG,
    PRE_COPY_P2P,
    PRECOPY_INFO_V2,
    RESUMING,
    RUNNING,
    SET,
    STOP,
    STOP_COPY,
)

if TYPE_CHECKING:
    from vfio_mig.conform.kit.rig import Rig
    from vfio_mig.conform.kit.v2_device import V2Device

CHECKS: Final = Checks("v2.precopy", PRECOPY)
INFO_V2: Final = "linux/vfio.h (2026), VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2"
REINIT: Final = 1
READS_MAX: Final = 4096
"""Reads in PRE_COPY; a device that dirties its state faster than it is read never comes to an end."""
SHOULD: Final = "the header says should"
RUNS: Final = "the header says so of a device that has done nothing since; this one may have"


def _device(rig: Rig, *, p2p: bool = False) -> V2Device:
    """Skip what the device has not."""
    if not rig.v2.flags & PRE_COPY_FLAG:
        raise NotApplicable("it has no pre-copy")
    if p2p and not rig.v2.supports(PRE_COPY_P2P):
        raise NotApplicable("it has no pre-copy-p2p")
    return rig.v2


def _drain(v2: V2Device, fd: int) -> tuple[bytes, str]:
    """Read to the temporary end; returns the bytes, and how the end looks."""
    parts: list[bytes] = []
    total = 0
    for _ in range(READS_MAX):
        try:
            part = v2.kernel.read(fd, 1 << 20)
        except OSError as error:
            if error.errno == errno.ENOMSG:
                return b"".join(parts), "ENOMSG"
            raise
        if not part:
            return b"".join(parts), "0"
        parts.append(part)
        total += len(part)
        if total > STREAM_MAX:
            break
    raise NotApplicable("it dirties its state faster than it is read")


@CHECKS.add("info", "PRECOPY_INFO answers in PRE_COPY", "0")
def _info(rig: Rig) -> str:
    v2 = _device(rig)
    flags, initial, dirty = v2.precopy_info(v2.session(PRE_COPY))
    return f"flags {flags:#x}, initial {initial}, dirty {dirty}"


@CHECKS.add("info-p2p", "PRECOPY_INFO answers in PRE_COPY_P2P", "0")
def _info_p2p(rig: Rig) -> str:
    v2 = _device(rig, p2p=True)
    flags, initial, dirty = v2.precopy_info(v2.session(PRE_COPY_P2P))
    return f"flags {flags:#x}, initial {initial}, dirty {dirty}"


def _should_be_einval(seen: str) -> str:
    recommend(seen == "EINVAL", seen, SHOULD)
    return seen


@CHECKS.add("info-stop-copy", "PRECOPY_INFO is refused in STOP_COPY", "EINVAL")
def _info_stop_copy(rig: Rig) -> str:
    v2 = _device(rig)
    alone = v2.session(STOP_COPY)
    first = refusal(lambda: v2.precopy_info(alone))
    v2.settle()
    fd = v2.session(PRE_COPY)
    v2.go(STOP_COPY)
    _should_be_einval(refusal(lambda: v2.precopy_info(fd)))
    return _should_be_einval(first)


@CHECKS.add("info-ended", "PRECOPY_INFO is refused once the session has ended", "an error")
def _info_ended(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    v2.go(RUNNING)
    return refusal(lambda: v2.precopy_info(fd))


@CHECKS.add("info-short-argsz", "argsz without room for the sizes is refused", "EINVAL")
def _info_short(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    refusal(lambda: v2.precopy_info(fd, argsz=0), errno.EINVAL)
    return refusal(lambda: v2.precopy_info(fd, argsz=INFO.size - 1), errno.EINVAL)


@CHECKS.add("info-long-argsz", "a larger argsz than needed is accepted", "0")
def _info_long(rig: Rig) -> str:
    v2 = _device(rig)
    v2.precopy_info(v2.session(PRE_COPY), argsz=1000)
    return "0"


@CHECKS.add("info-resuming", "PRECOPY_INFO is refused on a resuming session's fd", "an error")
def _info_resuming(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(RESUMING)
    return refusal(lambda: v2.precopy_info(fd))


@CHECKS.add("info-device-fd", "PRECOPY_INFO is none of the device's own ioctls", "ENOTTY")
def _info_device(rig: Rig) -> str:
    v2 = _device(rig)
    v2.session(PRE_COPY)
    return refusal(lambda: v2.kernel.ioctl(v2.fd, uapi.MIG_GET_PRECOPY_INFO, bytearray(INFO.pack(INFO.size, 0, 0, 0))))


@CHECKS.add("info-takes-nothing", "asking does not move the stream", "the same bytes")
def _info_takes_nothing(rig: Rig) -> str:
    v2 = _device(rig)
    asked, head = v2.session(PRE_COPY), b""
    for _ in range(4):
        v2.precopy_info(asked)
        try:
            head += v2.kernel.read(asked, 5)
        except OSError as error:
            if error.errno != errno.ENOMSG:
                raise
    v2.settle()
    other, _ = _drain(v2, v2.session(PRE_COPY))
    require(other.startswith(head), f"other bytes at {first_difference(head, other)}")
    return f"the same {len(head)} bytes"


@CHECKS.add("initial-not-zero", "initial_bytes begins above 0", "more than 0")
def _initial(rig: Rig) -> str:
    v2 = _device(rig)
    _, initial, _ = v2.precopy_info(v2.session(PRE_COPY))
    recommend(initial, "0", SHOULD)
    return str(initial)


@CHECKS.add("dirty-begins-zero", "dirty_bytes begins at 0", "0")
def _dirty(rig: Rig) -> str:
    v2 = _device(rig)
    _, _, dirty = v2.precopy_info(v2.session(PRE_COPY))
    recommend(not dirty, str(dirty), RUNS)
    return "0"


@CHECKS.add("initial-falls", "initial_bytes falls as the stream is read", "less than before")
def _initial_falls(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    _, before, _ = v2.precopy_info(fd)
    if not before:
        raise NotApplicable("initial_bytes is 0 from the beginning")
    read = len(v2.kernel.read(fd, max(before // 2, 1)))
    flags, after, _ = v2.precopy_info(fd)
    require(after < before or flags & REINIT, f"{before}, and {after} after {read} bytes")
    return f"{before}, and {after} after {read} bytes"


def _watch(v2: V2Device, fd: int, seen: list[int]) -> None:
    flags, initial, _ = v2.precopy_info(fd)
    if seen and initial > seen[-1] and not flags & REINIT:
        raise Deviation(f"{seen[-1]}, then {initial}, without REINIT")
    seen.append(initial)


@CHECKS.add("initial-never-rises", "initial_bytes does not rise without REINIT", "never more than before")
def _never_rises(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    seen: list[int] = []
    _watch(v2, fd, seen)
    step = max(seen[0] // 8, 1)
    for turn in range(12):
        try:
            v2.kernel.read(fd, step)
        except OSError as error:
            if error.errno != errno.ENOMSG:
                raise
        if v2.supports(PRE_COPY_P2P) and turn % 4 == 3:  # noqa: PLR2004 -- every fourth
            v2.go(PRE_COPY_P2P)
            _watch(v2, fd, seen)
            v2.go(PRE_COPY)
        _watch(v2, fd, seen)
    return f"{seen[0]} to {seen[-1]}"


@CHECKS.add("drains", "at the temporary end initial_bytes is 0", "0")
def _drains(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    stream, _ = _drain(v2, fd)
    flags, initial, _ = v2.precopy_info(fd)
    require(not initial or flags & REINIT, f"{initial} after {len(stream)} bytes")
    return f"0 after {len(stream)} bytes"


@CHECKS.add("enomsg", "read() at the temporary end is ENOMSG", "ENOMSG")
def _enomsg(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    ends = {_drain(v2, fd)[1] for _ in range(3)}
    recommend(ends == {"ENOMSG"}, ", ".join(sorted(ends)), f'{SHOULD}; take 0 for "nothing now" in pre-copy')
    return "ENOMSG"


@CHECKS.add(
    "opt-in",
    "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 makes the flags reliable",
    "0, flags no more than REINIT",
    source=INFO_V2,
)
def _opt_in(rig: Rig) -> str:
    v2 = _opted_in(rig)
    flags, _, _ = v2.precopy_info(v2.session(PRE_COPY))
    require(not flags & ~REINIT, f"flags {flags:#x}")
    return f"0, flags {flags:#x}"


def _opted_in(rig: Rig) -> V2Device:
    v2 = _device(rig)
    if not v2.offers(PRECOPY_INFO_V2, SET):
        raise NotApplicable("the kernel or driver does not have it")
    v2.feature(SET | PRECOPY_INFO_V2)
    return v2


@CHECKS.add(
    "reinit",
    "REINIT comes with new initial data, and is over when that was read",
    "initial_bytes above 0, then 0",
    source=INFO_V2,
)
def _reinit(rig: Rig) -> str:
    v2 = _opted_in(rig)
    fd = v2.session(PRE_COPY)
    _drain(v2, fd)
    flags, fresh, _ = v2.precopy_info(fd)
    if not flags & REINIT:
        raise NotApplicable("it has no new initial data of its own accord")
    require(fresh, "REINIT with initial_bytes 0")
    stream, _ = _drain(v2, fd)
    require(len(stream) >= fresh, f"{fresh} bytes announced, {len(stream)} read")
    flags, left, _ = v2.precopy_info(fd)
    require(left or not flags & REINIT, "REINIT stays, without new data")
    return f"{fresh}, then {left}"


def _save_live(v2: V2Device, *, unread: bool = False, p2p: bool = False) -> bytes:
    """Save by way of PRE_COPY, and stay in STOP_COPY."""
    fd = v2.session(PRE_COPY)
    stream = b"" if unread else _drain(v2, fd)[0]
    if p2p and v2.supports(PRE_COPY_P2P):
        v2.go(PRE_COPY_P2P)
    after = v2.go(STOP_COPY)
    require(after == -1, "stop-copy came with another data fd")
    try:
        return stream + v2.read_all(fd)
    except OSError as error:
        raise Deviation(f"read() in stop-copy: {errno_name(error)}") from error


@CHECKS.add(
    "one-stream", "PRE_COPY and STOP_COPY share one fd, whose end is final in STOP_COPY", "0 at the end, never ENOMSG"
)
def _one_stream(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    head, _ = _drain(v2, fd)
    v2.go(STOP_COPY)
    try:
        rest = v2.read_all(fd)
        more = [v2.kernel.read(fd, 100) for _ in range(3)]
    except OSError as error:
        raise Deviation(f"read() in stop-copy: {errno_name(error)}") from error
    require(not any(more), "bytes behind the end")
    return f"{len(head)} and {len(rest)} bytes, then 0"


def _lands(rig: Rig, stream: bytes) -> str:
    """Load a stream of a live save; the device was not touched, hence has the state that it had in the end."""
    v2 = rig.v2
    v2.go(STOP)
    expected = v2.save()
    v2.load(stream)
    rig.compare(v2.save(), expected)
    return f"{len(stream)} bytes load, and are the same state"


@CHECKS.add("round-trip", "what was read in PRE_COPY and STOP_COPY is one state", "the same state", source=FSM)
def _round_trip(rig: Rig) -> str:
    return _lands(rig, _save_live(_device(rig), p2p=True))


@CHECKS.add("unread", "PRE_COPY may be left for STOP_COPY with nothing read", "the same state")
def _unread(rig: Rig) -> str:
    return _lands(rig, _save_live(_device(rig), unread=True))


@CHECKS.add("p2p-and-back", "PRE_COPY_P2P and back goes on in the same session", "the same state", source=FSM)
def _p2p_and_back(rig: Rig) -> str:
    v2 = _device(rig, p2p=True)
    fd = v2.session(PRE_COPY)
    stream = v2.kernel.read(fd, 7)
    for state in (PRE_COPY_P2P, PRE_COPY):
        require(v2.go(state) == -1, "a new data fd was returned")
    stream += _drain(v2, fd)[0]
    v2.go(STOP_COPY)
    return _lands(rig, stream + v2.read_all(fd))


@CHECKS.add(
    "called-off",
    "going back to RUNNING ends the session; the next one begins at the first byte",
    "fd ENODEV, and the same state",
    source=FSM,
)
def _called_off(rig: Rig) -> str:
    v2 = _device(rig)
    fd = v2.session(PRE_COPY)
    try:
        v2.kernel.read(fd, 7)
    except OSError as error:
        raise Weakness(f"reading the first bytes: {errno_name(error)}", SHOULD) from error
    v2.go(RUNNING)
    dead = rig.require_dead(fd)
    return f"fd {dead}, {_lands(rig, _save_live(v2))}"
