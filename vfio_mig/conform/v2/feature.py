# SPDX-License-Identifier: MIT
"""VFIO_DEVICE_FEATURE itself: sizes, operations, the migration feature's flags, the state and size that it gets."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import ENVELOPE, MIGRATION, SIZE, STATE, Checks
from vfio_mig.conform.kit.v2_device import NUMBER, errno_name
from vfio_mig.conform.kit.v2_device import STATE as STATE_PAYLOAD
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, recommend, require
from vfio_mig.uapi.v2 import DATA_SIZE, DEVICE_STATE, GET, PROBE, RUNNING, SAVING, SET, STOP, STOP_COPY_FLAG, state_name
from vfio_mig.uapi.v2 import MIGRATION as MIGRATION_FEATURE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.conform.kit.rig import Rig

KNOWN_FLAGS: Final = 7
KNOWN_COMBINATIONS: Final = (1, 3, 5, 7)
UNKNOWN_FEATURE: Final = 0xFFFE
ESTIMATE: Final = "the header calls it an estimate: do not allocate by it"

FEATURE: Final = Checks("v2.feature", ENVELOPE)
STATES: Final = Checks("v2.state", STATE)
SIZES: Final = Checks("v2.size", SIZE)


def refusal(call: Callable[[], object], *allowed: int) -> str:
    """Do what has to fail with one of these errnos, any if there are none; returns the errno's name."""
    try:
        call()
    except OSError as error:
        name = errno_name(error)
        require(not allowed or error.errno in allowed, name)
        return name
    raise Deviation("accepted")


@FEATURE.add(
    "migration-flags", "the migration feature's flags have STOP_COPY and nothing unknown", "STOP_COPY", source=MIGRATION
)
def _flags(rig: Rig) -> str:
    flags = rig.v2.read_flags()
    require(flags & STOP_COPY_FLAG, f"flags {flags:#x}")
    recommend(not flags & ~KNOWN_FLAGS, f"flags {flags:#x}", "bits of a later header, or of none")
    return f"flags {flags:#x}"


@FEATURE.add("flag-combination", "only defined combinations of flags are used", "1, 3, 5 or 7", source=MIGRATION)
def _combination(rig: Rig) -> str:
    flags = rig.v2.read_flags()
    require(flags & KNOWN_FLAGS in KNOWN_COMBINATIONS, f"flags {flags:#x}")
    return f"flags {flags:#x}"


@FEATURE.add("migration-probe", "MIGRATION can be probed for GET", "0")
def _probe_migration(rig: Rig) -> str:
    rig.v2.feature(PROBE | GET | MIGRATION_FEATURE)
    return "0"


@FEATURE.add("migration-set", "MIGRATION cannot be set", "EINVAL")
def _set_migration(rig: Rig) -> str:
    return refusal(lambda: rig.v2.feature(SET | MIGRATION_FEATURE, bytes(8)), errno.EINVAL)


@FEATURE.add("state-probe", "MIG_DEVICE_STATE can be probed for GET and SET", "0")
def _probe_state(rig: Rig) -> str:
    rig.v2.feature(PROBE | GET | SET | DEVICE_STATE)
    return "0"


@FEATURE.add("state-short-argsz", "argsz without room for the payload is refused", "EINVAL, state kept")
def _short(rig: Rig) -> str:
    v2, payload = rig.v2, STATE_PAYLOAD.pack(STOP, -1)
    for operation in (GET, SET):
        refusal(partial(v2.feature, operation | DEVICE_STATE, payload, argsz=15), errno.EINVAL)
    now = v2.state()
    require(now == RUNNING, f"EINVAL, but it is now in {state_name(now)}")
    return "EINVAL, state kept"


@FEATURE.add("state-long-argsz", "a larger argsz than needed is accepted", "0")
def _long(rig: Rig) -> str:
    reply = rig.v2.feature(GET | DEVICE_STATE, bytes(64))
    require(STATE_PAYLOAD.unpack_from(reply)[0] == RUNNING, f"state {STATE_PAYLOAD.unpack_from(reply)[0]}")
    return "0"


@FEATURE.add("envelope-argsz", "argsz smaller than the struct is refused", "EINVAL")
def _envelope(rig: Rig) -> str:
    return refusal(lambda: rig.v2.feature(GET | DEVICE_STATE, bytes(8), argsz=7), errno.EINVAL)


@FEATURE.add("get-and-set", "GET and SET exclude each other without PROBE", "EINVAL")
def _both(rig: Rig) -> str:
    payload = STATE_PAYLOAD.pack(STOP, -1)
    seen = refusal(lambda: rig.v2.feature(GET | SET | DEVICE_STATE, payload), errno.EINVAL)
    require(rig.v2.state() == RUNNING, "EINVAL, but the state has changed")
    return seen


@FEATURE.add("no-operation", "GET, SET or PROBE is needed", "EINVAL")
def _neither(rig: Rig) -> str:
    return refusal(lambda: rig.v2.feature(DEVICE_STATE, bytes(8)), errno.EINVAL)


@FEATURE.add("unknown-flag", "an unknown flag is refused", "EINVAL")
def _unknown_flag(rig: Rig) -> str:
    return refusal(lambda: rig.v2.feature(GET | 1 << 24 | DEVICE_STATE, bytes(8)), errno.EINVAL)


@FEATURE.add("unknown-feature", "a feature that there is not is refused", "ENOTTY")
def _unknown_feature(rig: Rig) -> str:
    seen = refusal(lambda: rig.v2.feature(PROBE | GET | UNKNOWN_FEATURE))
    recommend(seen == "ENOTTY", seen, "older kernels say EINVAL; both are a refusal")
    return seen


@STATES.add("after-reset", "after RESET the device is in RUNNING", "running")
def _after_reset(rig: Rig) -> str:
    rig.v2.reset()
    now = rig.v2.state()
    require(now == RUNNING, state_name(now))
    return state_name(now)


@STATES.add("get-fd", "GET gives data_fd -1, also in a session", "-1")
def _get_fd(rig: Rig) -> str:
    v2 = rig.v2
    for state in v2.states():
        v2.settle()
        rig.bring_to(state)
        fd = v2.get()[1]
        require(fd == -1, f"data_fd {fd} in {state_name(state)}")
    return "-1"


@STATES.add("get-changes-nothing", "GET changes nothing: twice the same, and a session goes on", "the same")
def _get_changes_nothing(rig: Rig) -> str:
    v2 = rig.v2
    for state in v2.states():
        v2.settle()
        fd = rig.bring_to(state)
        seen = [v2.state(), v2.state()]
        require(seen == [state, state], f"{state_name(state)}: {', '.join(map(state_name, seen))}")
        if state in SAVING:
            require(not rig.fate(fd), f"{state_name(state)}: the session has ended")
    return "the same"


def _size(rig: Rig) -> int:
    if not rig.v2.offers(DATA_SIZE, GET):
        raise NotApplicable("it has no MIG_DATA_SIZE (Linux 6.2)")
    size: int = NUMBER.unpack(rig.v2.feature(GET | DATA_SIZE, bytes(8)))[0]
    return size


@SIZES.add("every-state", "MIG_DATA_SIZE can be asked for in every state, and changes none", "0")
def _every_state(rig: Rig) -> str:
    v2, sizes = rig.v2, []
    _size(rig)
    for state in v2.states():
        v2.settle()
        rig.bring_to(state)
        try:
            sizes.append(_size(rig))
        except OSError as error:
            raise Deviation(f"{state_name(state)}: {errno_name(error)}") from error
        require(v2.state() == state, f"{state_name(state)}: now in {state_name(v2.state())}")
    return f"0 in {len(sizes)} states, {min(sizes)} to {max(sizes)} bytes"


@SIZES.add("covers", "MIG_DATA_SIZE in STOP is what the stream has, or more", "at least the stream's size")
def _covers(rig: Rig) -> str:
    _size(rig)
    real = len(rig.stream())
    rig.v2.go(STOP)
    size = _size(rig)
    recommend(size >= real, f"{size} bytes announced, {real} read", ESTIMATE)
    return f"{size} bytes announced, {real} read"


@SIZES.add("set", "MIG_DATA_SIZE cannot be set", "EINVAL")
def _set_size(rig: Rig) -> str:
    _size(rig)
    return refusal(lambda: rig.v2.feature(SET | DATA_SIZE, bytes(8)), errno.EINVAL)


@SIZES.add("short-argsz", "argsz without room for the size is refused", "EINVAL")
def _short_size(rig: Rig) -> str:
    _size(rig)
    return refusal(lambda: rig.v2.feature(GET | DATA_SIZE, bytes(8), argsz=15), errno.EINVAL)


CHECKS: Final = [*FEATURE, *STATES, *SIZES]
