# SPDX-License-Identifier: MIT
"""The stream: there and back, and every way in which it can be wrong.

What was only almost the device's own state may have been loaded: then its own is loaded again before the next check.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import FSM, LEAVING, STATE, Checks
from vfio_mig.conform.kit.rig import first_difference
from vfio_mig.conform.kit.v2_device import errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, Weakness, require
from vfio_mig.ranges import PAGE
from vfio_mig.uapi.v2 import RESUMING, RUNNING, STOP, state_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio_mig.conform.kit.rig import Rig

CHECKS: Final = Checks("v2.stream", LEAVING)
HEAD: Final = 64
"""Bytes at the beginning of a stream that are likely to be a header."""
FLIPS: Final = 16
NO_INTEGRITY: Final = (
    "the header asks a driver for consistency checks, not for a checksum; whoever keeps a stream has to keep one"
)
NOT_DETERMINISTIC: Final = "no rule; but saved states of it cannot be compared"
MAGICS: Final = {
    "mtty": bytes.fromhex("4e2c3e8c89099d7e"),
    "hisi_acc": bytes.fromhex("dedecaedfecc"),
    "qat": bytes.fromhex("eacaf5ad"),
    "gvt_sample": b"gvt_v2\0\0",
}
"""The first bytes of other drivers' streams, from their sources."""


@CHECKS.add("not-empty", "a stopped device's stream has bytes and an end", "bytes, then 0", source=FSM)
def _not_empty(rig: Rig) -> str:
    stream = rig.v2.save()
    require(stream, "0 bytes")
    return f"{len(stream)} bytes"


@CHECKS.add("repeat", "a stopped device's state saved twice is the same", "the same bytes", source=FSM)
def _repeat(rig: Rig) -> str:
    v2 = rig.v2
    one, other = v2.save(), v2.save()
    require(one and other, f"{len(one)} and {len(other)} bytes")
    if one != other:
        raise Weakness(f"{len(one)} and {len(other)} bytes, other at {first_difference(one, other)}", NOT_DETERMINISTIC)
    return f"the same {len(one)} bytes"


@CHECKS.add("round-trip", "what was saved is saved again after it was restored", "the same bytes", source=FSM)
def _round_trip(rig: Rig) -> str:
    stream = rig.stream()
    rig.v2.load(stream)
    return rig.compare(rig.v2.save(), stream)


@CHECKS.add("restore-running", "RESUMING can be left for RUNNING at once", "the same bytes", source=FSM)
def _restore_running(rig: Rig) -> str:
    v2, stream = rig.v2, rig.stream()
    rig.bring_to(RESUMING)
    v2.go(RUNNING)
    return rig.compare(v2.save(), stream)


# --- cut off


def _cut(rig: Rig, length: int) -> str:
    stream = rig.stream()
    if not 0 <= length < len(stream):
        raise NotApplicable(f"the stream has {len(stream)} bytes")
    refused = rig.try_to_load(stream[:length])
    if refused is None:
        raise Deviation(f"{length} of {len(stream)} bytes were loaded, now in {state_name(rig.v2.state())}")
    return f"{refused}, now in {state_name(rig.v2.state())}"


@CHECKS.add("empty", "RESUMING cannot be left with nothing written", "an error")
def _empty(rig: Rig) -> str:
    return _cut(rig, 0)


@CHECKS.add("cut-first-byte", "a stream cut off behind its first byte is refused", "an error")
def _cut_first(rig: Rig) -> str:
    return _cut(rig, 1)


@CHECKS.add("cut-head", "a stream cut off behind 16 bytes is refused", "an error")
def _cut_head(rig: Rig) -> str:
    return _cut(rig, 16)


@CHECKS.add("cut-half", "half a stream is refused", "an error")
def _cut_half(rig: Rig) -> str:
    return _cut(rig, len(rig.stream()) // 2)


@CHECKS.add("cut-last-byte", "a stream without its last byte is refused", "an error")
def _cut_last(rig: Rig) -> str:
    return _cut(rig, len(rig.stream()) - 1)


def _recovers(rig: Rig) -> str:
    """Reset the device, and load its own state."""
    v2, stream = rig.v2, rig.stream()
    v2.reset()
    now = v2.state()
    require(now == RUNNING, f"after RESET it is in {state_name(now)}")
    v2.load(stream)
    return f"running after RESET, {rig.compare(v2.save(), stream)}"


@CHECKS.add(
    "cut-recovers", "after a stream cut off a reset recovers", "running, and the whole stream loads", source=FSM
)
def _cut_recovers(rig: Rig) -> str:
    _cut(rig, len(rig.stream()) // 2)
    return _recovers(rig)


# --- too much


def _longer(rig: Rig, more: bytes) -> str:
    refused = rig.try_to_load(rig.stream() + more)
    if refused is None:
        raise Deviation(f"{len(more)} bytes behind the end were taken")
    return str(refused)


@CHECKS.add("trailing-byte", "a byte behind the end is refused", "an error")
def _trailing_byte(rig: Rig) -> str:
    return _longer(rig, b"\0")


@CHECKS.add("trailing-page", "a page behind the end is refused", "an error")
def _trailing_page(rig: Rig) -> str:
    return _longer(rig, bytes(PAGE))


# --- changed


def flipped(stream: bytes, at: int) -> bytes:
    """Return a copy with one bit the other way round."""
    changed = bytearray(stream)
    changed[at] ^= 1
    return bytes(changed)


def _flip(rig: Rig, places: Iterable[int]) -> str:
    stream = rig.stream()
    tried, taken = 0, []
    for at in places:
        tried += 1
        if rig.try_to_load(flipped(stream, at)) is None:
            taken.append(at)
    if not tried:
        raise NotApplicable(f"the stream has {len(stream)} bytes")
    if taken:
        shown = ", ".join(map(str, taken[:4])) + (", …" if len(taken) > 4 else "")  # noqa: PLR2004 -- enough to look into
        raise Weakness(f"{len(taken)} of {tried} were loaded, at {shown}", NO_INTEGRITY)
    return f"all {tried} refused"


def _body(length: int) -> list[int]:
    """Return places all over the stream behind its head, the last byte among them."""
    if length <= HEAD:
        return []
    step = max((length - HEAD) // FLIPS, 1)
    return sorted({*range(HEAD, length, step)[:FLIPS], length - 1})


@CHECKS.add("flip-head", "a flipped bit in the first 64 bytes is refused", "an error for each")
def _flip_head(rig: Rig) -> str:
    return _flip(rig, range(0, min(HEAD, len(rig.stream())), HEAD // FLIPS))


@CHECKS.add("flip-body", "a flipped bit behind them is refused", "an error for each")
def _flip_body(rig: Rig) -> str:
    return _flip(rig, _body(len(rig.stream())))


@CHECKS.add("takes-effect", "what is loaded is what the device has then", "a bit that was loaded is saved", source=FSM)
def _takes_effect(rig: Rig) -> str:
    stream, taken = rig.stream(), 0
    for at in _body(len(stream)):
        changed = flipped(stream, at)
        if rig.try_to_load(changed) is not None:
            continue
        taken += 1
        if rig.v2.save()[at : at + 1] == changed[at : at + 1]:
            return f"the bit at {at} is there"
    if taken < FLIPS // 2:  # single bits may mean nothing
        raise NotApplicable(f"it takes {taken} streams with a flipped bit, which is too few to judge by")
    raise Deviation(f"none of {taken} bits that were loaded is in the next save")


@CHECKS.add("swapped", "a stream in another order is refused", "an error", source=STATE)
def _swapped(rig: Rig) -> str:
    stream = rig.stream()
    half = len(stream) // 2
    changed = stream[half:] + stream[:half]
    if changed == stream:
        raise NotApplicable("both halves are the same")
    refused = rig.try_to_load(changed)
    if refused is None:
        raise Weakness("it was loaded", NO_INTEGRITY)
    return str(refused)


def _foreign(rig: Rig, stream: bytes) -> str:
    """Write what is nothing of this device's; if write() takes it, leaving RESUMING must not."""
    refused = rig.try_to_load(stream)
    if refused is None:
        raise Deviation("it was loaded")
    return str(refused)


@CHECKS.add("random", "random bytes are refused", "an error")
def _random(rig: Rig) -> str:
    return _foreign(rig, random.Random(2017).randbytes(len(rig.stream())))  # noqa: S311 -- no secret


@CHECKS.add("zeros", "zeros are refused", "an error")
def _zeros(rig: Rig) -> str:
    if not any(rig.stream()):
        raise NotApplicable("its own stream is all zeros")
    return _foreign(rig, bytes(len(rig.stream())))


@CHECKS.add("foreign-magic", "a stream that begins as another driver's is refused", "an error for each")
def _foreign_magic(rig: Rig) -> str:
    stream, seen = rig.stream(), []
    for name, magic in MAGICS.items():
        if stream.startswith(magic) or len(stream) < len(magic):
            continue
        if rig.try_to_load(magic + stream[len(magic) :]) is None:
            raise Deviation(f"{name}'s was loaded")
        seen.append(name)
    return f"{', '.join(seen)} refused"


@CHECKS.add(
    "refused-then-stop", "after a write that was refused RESUMING cannot be left with success either", "an error"
)
def _refused_then_stop(rig: Rig) -> str:
    stream = rig.stream()
    fd = rig.v2.session(RESUMING)
    try:
        rig.v2.write_all(fd, flipped(stream, 0))
    except OSError as error:
        name = errno_name(error)
    else:
        raise NotApplicable("no write is refused; leaving resuming decides")
    refused = rig.try_to_leave(STOP)
    if refused is None:
        raise Deviation(f"write() {name}, but going to stop succeeds and loads it")
    return f"write() {name}, {refused}"


@CHECKS.add(
    "refused-recovers", "after a stream was refused a reset recovers", "running, and the whole stream loads", source=FSM
)
def _refused_recovers(rig: Rig) -> str:
    _foreign(rig, random.Random(5).randbytes(len(rig.stream())))  # noqa: S311 -- no secret
    return _recovers(rig)


@CHECKS.add(
    "abandoned", "RESUMING is given up by a reset", "running, fd ENODEV, and the whole stream loads", source=FSM
)
def _abandoned(rig: Rig) -> str:
    stream = rig.stream()
    fd = rig.v2.session(RESUMING)
    rig.v2.write_all(fd, stream[: len(stream) // 2])
    rig.v2.reset()
    dead = rig.require_dead(fd, writing=True)
    return f"fd {dead}, {_recovers(rig)}"
