# SPDX-License-Identifier: MIT
"""How it ends: reset and close in every state, and two devices beside each other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import CLOSE, FSM, LEAVING, Check, Checks
from vfio_mig.conform.kit.rig import require_ended
from vfio_mig.conform.kit.v2_device import STATES, errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, Weakness, require
from vfio_mig.conform.v2.dirty import start, stop
from vfio_mig.uapi.v2 import ERROR, LOG_START, NAMES, RESUMING, RUNNING, SET, STOP, STOP_COPY, state_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.conform.kit.rig import Rig

RESET_FLAG: Final = 1
"""VFIO_DEVICE_FLAGS_RESET."""
KEEPS: Final = "no rule says what the next user finds; but most begin with a device that runs"
CLOSED_IN_RESUMING: Final = "mtty oopses when a device that was closed in it leaves it by anything but a reset"
HINT: Final = "no rule, but whoever believes the flags, as QEMU does, never resets it"


def _whole_save(rig: Rig) -> str:
    """Make sure that the device works: it saves something, and as much as before if it always saves the same."""
    saved = rig.v2.save()
    if len(saved) != len(rig.stream()):
        rig.compare(saved)
    return f"{len(saved)} bytes saved afterwards"


def _reset(state: int, rig: Rig) -> str:
    v2 = rig.v2
    rig.stream()
    fd = rig.bring_to(state)
    try:
        v2.reset()
    except OSError as error:
        raise Deviation(f"RESET: {errno_name(error)}") from error
    now = v2.state()
    require(now == RUNNING, f"after RESET it is in {state_name(now)}")
    dead = f", fd {rig.require_dead(fd, writing=state == RESUMING)}" if fd >= 0 else ""
    return f"running{dead}, {_whole_save(rig)}"


def _close(state: int, rig: Rig) -> str:
    rig.require_own()
    v2 = rig.v2
    rig.stream()
    fd = rig.bring_to(state)
    fates = []

    def look() -> None:
        if fd >= 0:
            fates.append(rig.fate(fd, writing=state == RESUMING))

    rig.reopen(before=look)
    found = v2.state()
    for one in fates:
        require_ended(one, writing=state == RESUMING)
    v2.settle()
    saved = _whole_save(rig)
    fate = "".join(f"fd {name}, " for name in fates)
    if found != RUNNING:
        raise Weakness(f"{fate}the next user finds it in {state_name(found)}; after RESET {saved}", KEEPS)
    return f"{fate}the next user finds it running, {saved}"


def _by_state() -> Iterator[Check]:
    for state in STATES:
        has_fd = state in (STOP_COPY, RESUMING) or NAMES[state].startswith("pre-copy")
        yield Check(
            f"v2.reset.{NAMES[state]}",
            f"RESET in {NAMES[state]} leads to RUNNING" + (" and ends the session" if has_fd else ""),
            FSM,
            "running" + (", ENODEV on the fd" if has_fd else ""),
            partial(_reset, state),
        )
    for state in STATES:
        yield Check(
            f"v2.close.{NAMES[state]}",
            f"a device that was closed in {NAMES[state]} can be opened and used",
            CLOSE,
            "running, and works",
            partial(_close, state),
            danger=CLOSED_IN_RESUMING if state == RESUMING else "",
        )


MORE: Final = Checks("v2", FSM)


@MORE.add("reset.twice", "RESET may be repeated", "running")
def _reset_twice(rig: Rig) -> str:
    for _ in range(2):
        rig.v2.reset()
        require(rig.v2.state() == RUNNING, state_name(rig.v2.state()))
    return "running"


@MORE.add(
    "reset.flag",
    "a device that can be reset says so",
    "VFIO_DEVICE_FLAGS_RESET",
    source="linux/vfio.h, VFIO_DEVICE_GET_INFO",
)
def _reset_flag(rig: Rig) -> str:
    flags = rig.device.info().flags
    try:
        rig.v2.reset()
    except OSError as error:
        raise Deviation(f"flags {flags:#x}, RESET: {errno_name(error)}") from error
    if not flags & RESET_FLAG:
        raise Weakness(f"flags {flags:#x} without it, but RESET works", HINT)
    return f"flags {flags:#x}"


@MORE.add("reset.error", "RESET leads out of ERROR", "running")
def _reset_error(rig: Rig) -> str:
    v2 = rig.v2
    if not rig.fail_into_error():
        raise NotApplicable(f"a refused stream leaves it in {state_name(v2.state())}")
    require(v2.state() == ERROR, state_name(v2.state()))
    v2.reset()
    require(v2.state() == RUNNING, state_name(v2.state()))
    return f"running, {_whole_save(rig)}"


@MORE.add("close.logging", "a device that was closed while it logged can log for the next user", "0", source=CLOSE)
def _close_logging(rig: Rig) -> str:
    rig.require_own()
    v2 = rig.v2
    if not v2.offers(LOG_START, SET):
        raise NotApplicable("it has no DMA logging")
    start(v2)
    rig.reopen()
    try:
        start(v2)
    except OSError as error:
        raise Deviation(f"START: {errno_name(error)}") from error
    stop(v2)
    return "0"


def _second(rig: Rig, *, same_type: bool | None = None) -> Rig:
    if rig.second is None:
        raise NotApplicable("no --second device")
    if same_type is not None and same_type != rig.same_type:
        raise NotApplicable(f"--second is of {'the same' if rig.same_type else 'another'} type")
    return rig.second


@MORE.add("second.independent", "what is done to one device is not done to another", "each its own state")
def _independent(rig: Rig) -> str:
    other = _second(rig)
    other.stream()
    fd = rig.v2.session(STOP_COPY)
    require(other.v2.state() == RUNNING, f"the second is in {state_name(other.v2.state())}")
    other.v2.go(STOP)
    other.v2.reset()
    require(rig.v2.state() == STOP_COPY, f"a reset of the second led to {state_name(rig.v2.state())}")
    require(not rig.fate(fd), "a reset of the second ended the session")
    return "each its own state"


@MORE.add("second.round-trip", "a device of the same type takes the stream, and saves the same", "the same bytes")
def _second_round_trip(rig: Rig) -> str:
    other = _second(rig, same_type=True)
    stream = rig.stream()
    other.stream()
    refused = other.try_to_load(stream)
    require(refused is None, str(refused))
    saved = other.v2.save()
    if saved != stream:
        rig.require_repeatable()
    return rig.compare(saved, stream)


@MORE.add("second.other-type", "a device of another type refuses the stream", "an error", source=LEAVING)
def _other_type(rig: Rig) -> str:
    other = _second(rig, same_type=False)
    other.stream()
    refused = other.try_to_load(rig.stream())
    require(refused is not None, "it was loaded")
    return str(refused)


CHECKS: Final = [*_by_state(), *MORE]
