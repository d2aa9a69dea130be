# SPDX-License-Identifier: MIT
"""The state machine: every pair of states, and every state that there is not."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import FSM, NEXT, Check
from vfio_mig.conform.kit.v2_device import FROM_ERROR, HANG, STATES, WITH_FD, errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, require
from vfio_mig.uapi.v2 import ERROR, NAMES, PRE_COPY, PRE_COPY_P2P, RESUMING, SAVING, STOP, STOP_COPY, state_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.conform.kit.rig import Rig

UNKNOWN: Final = (8, 9, 0x7FFFFFFF, 0xFFFFFFFF)
_BLOCKED: Final = tuple((STOP_COPY, state) for state in (PRE_COPY, PRE_COPY_P2P))


def goes_on(source: int, target: int) -> bool:
    """Tell whether a session lives over a change of state: inside of the saving group, or where nothing changes."""
    return source == target or (source in SAVING and target in SAVING)


def gives_fd(source: int, target: int) -> bool:
    """Tell whether a change of state begins a session."""
    return target in WITH_FD and not goes_on(source, target)


def _go(rig: Rig, target: int) -> int:
    v2 = rig.v2
    try:
        return v2.set(target)
    except OSError as error:
        raise Deviation(f"{errno_name(error)}, now in {state_name(v2.state())}") from error


def _first_byte(rig: Rig, fd: int, target: int) -> str:
    """Look into a session that has begun."""
    if target == RESUMING:
        return "new data fd"
    try:
        byte = rig.v2.kernel.read(fd, 1)
    except OSError as error:
        if error.errno == errno.ENOMSG and target != STOP_COPY:
            return "new data fd"
        raise Deviation(f"reading the new data fd failed: {errno_name(error)}") from error
    require(byte or target != STOP_COPY, "the new data fd is at its end at once")
    return "new data fd"


def _legal(source: int, target: int, rig: Rig) -> str:
    v2 = rig.v2
    if not v2.supports(source):
        raise NotApplicable(f"it has no {NAMES[source]}")
    if not v2.supports(target):
        return _refused(source, (target,), rig)
    before = rig.bring_to(source)
    after = _go(rig, target)
    now = v2.state()
    require(now == target, f"ended in {state_name(now)}")
    if gives_fd(source, target):
        require(after >= 0, "no data fd was returned")
        seen = [_first_byte(rig, after, target)]
    else:
        require(after == -1, f"data_fd {after} was returned")
        seen = ["data_fd -1"]
    if before >= 0 and not goes_on(source, target):
        seen.append(f"old fd {rig.require_dead(before, writing=source == RESUMING)}")
    elif before >= 0:
        _require_alive(rig, source, before)
        seen.append("session goes on")
    return ", ".join(seen)


def _require_alive(rig: Rig, source: int, fd: int) -> None:
    """Make sure that a session goes on; one that was written to by leaving it, as then it is loaded."""
    if source == RESUMING:
        rig.v2.go(STOP)
        return
    fate = rig.fate(fd)
    require(not fate, f"the session has ended: read() {fate}")


def _refused(source: int, targets: tuple[int, ...], rig: Rig) -> str:
    v2 = rig.v2
    before = rig.bring_to(source)
    for target in targets:
        try:
            v2.set(target)
        except OSError as error:
            require(error.errno == errno.EINVAL, f"{state_name(target)}: {errno_name(error)}")
        else:
            raise Deviation(f"{state_name(target)} was accepted, now in {state_name(v2.state())}")
        now = v2.state()
        require(now == source, f"{state_name(target)} was refused, but it is now in {state_name(now)}")
    if before >= 0:
        _require_alive(rig, source, before)
    return "EINVAL, state kept" + (", session goes on" if before >= 0 else "")


def _expected(source: int, target: int) -> str:
    fd = "a new data fd" if gives_fd(source, target) else "data_fd -1"
    if source not in WITH_FD:
        return f"0, {fd}"
    return f"0, {fd}, " + ("the session goes on" if goes_on(source, target) else "ENODEV on the old fd")


def _arcs() -> Iterator[Check]:
    for source in STATES:
        name = NAMES[source]
        for target in STATES:
            blocked = (source, target) in _BLOCKED
            rule = (
                f"from {name} to {NAMES[target]}"
                if source != target
                else f"asking for {name} in {name} changes nothing"
            )
            yield Check(
                f"v2.arc.{name}.{NAMES[target]}",
                f"{rule} is not permitted" if blocked else rule,
                FSM,
                "EINVAL, state and session kept" if blocked else _expected(source, target),
                partial(_refused, source, (target,)) if blocked else partial(_legal, source, target),
                danger=HANG if blocked else "",
            )
        yield Check(
            f"v2.arc.{name}.error",
            f"ERROR cannot be asked for in {name}",
            FSM,
            "EINVAL, state and session kept",
            partial(_refused, source, (ERROR,)),
        )
        yield Check(
            f"v2.arc.{name}.unknown",
            f"a state that there is not cannot be asked for in {name}",
            NEXT,
            "EINVAL, state and session kept",
            partial(_refused, source, UNKNOWN),
        )


def _error_refuses(rig: Rig) -> str:
    v2 = rig.v2
    if not rig.fail_into_error():
        raise NotApplicable("a stream cut short does not lead to error here")
    for target in (*v2.states(), *UNKNOWN):
        try:
            v2.set(target)
        except OSError as error:
            require(error.errno == errno.EINVAL, f"{state_name(target)}: {errno_name(error)}")
        else:
            raise Deviation(f"{state_name(target)} was accepted, now in {state_name(v2.state())}")
        require(v2.state() == ERROR, f"asking for {state_name(target)} led to {state_name(v2.state())}")
    return "EINVAL for every state"


CHECKS: Final = [
    *_arcs(),
    Check(
        "v2.error.refuses",
        "only a reset leads out of ERROR",
        FSM,
        "EINVAL for every state, and ERROR stays",
        _error_refuses,
        danger=FROM_ERROR,
    ),
]
