# SPDX-License-Identifier: MIT
"""The data fd: direction, position, end, life."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from vfio_mig import uapi
from vfio_mig.conform.kit.check import DATA_FD, FSM, PRECOPY, STATE, Checks
from vfio_mig.conform.kit.v2_device import errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, require
from vfio_mig.conform.v2.feature import refusal
from vfio_mig.uapi.v2 import RESUMING, RUNNING, STOP, STOP_COPY, state_name

if TYPE_CHECKING:
    from vfio_mig.conform.kit.rig import Rig

CHECKS: Final = Checks("v2.fd", DATA_FD)
SINGLE: Final = 512
"""Bytes that are moved one by one; the rest in odd sizes."""
ODD: Final = 4093
_END_READS: Final = 3
_NO_SUCH_IOCTL: Final = uapi.vfio_request("an ioctl that there is not", 99)


@CHECKS.add("save-direction", "a saving session's fd cannot be written to", "EBADF")
def _save_direction(rig: Rig) -> str:
    fd = rig.v2.session(STOP_COPY)
    return refusal(lambda: rig.v2.kernel.write(fd, b"x"), errno.EBADF)


@CHECKS.add("save-seek", "a saving session's fd has no position to choose", "ESPIPE")
def _save_seek(rig: Rig) -> str:
    fd, kernel = rig.v2.session(STOP_COPY), rig.v2.kernel
    refusal(lambda: kernel.seek(fd), errno.ESPIPE)
    return refusal(lambda: kernel.pread(fd, 1, 0), errno.ESPIPE)


@CHECKS.add(
    "save-cloexec",
    "a saving session's fd is closed on exec",
    "close-on-exec",
    source="vfio_main.c, vfio_ioct_mig_return_fd(): O_CLOEXEC",
)
def _save_cloexec(rig: Rig) -> str:
    require(not rig.v2.kernel.is_inheritable(rig.v2.session(STOP_COPY)), "inherited")
    return "close-on-exec"


@CHECKS.add("resume-direction", "a resuming session's fd cannot be read", "EBADF")
def _resume_direction(rig: Rig) -> str:
    fd = rig.v2.session(RESUMING)
    return refusal(lambda: rig.v2.kernel.read(fd, 1), errno.EBADF)


@CHECKS.add("resume-seek", "a resuming session's fd has no position to choose", "ESPIPE")
def _resume_seek(rig: Rig) -> str:
    fd, kernel = rig.v2.session(RESUMING), rig.v2.kernel
    refusal(lambda: kernel.seek(fd), errno.ESPIPE)
    return refusal(lambda: kernel.pwrite(fd, b"x", 0), errno.ESPIPE)


@CHECKS.add(
    "resume-cloexec",
    "a resuming session's fd is closed on exec",
    "close-on-exec",
    source="vfio_main.c, vfio_ioct_mig_return_fd(): O_CLOEXEC",
)
def _resume_cloexec(rig: Rig) -> str:
    require(not rig.v2.kernel.is_inheritable(rig.v2.session(RESUMING)), "inherited")
    return "close-on-exec"


@CHECKS.add("zero-read", "a read of no bytes takes none", "0, and the stream from its first byte")
def _zero_read(rig: Rig) -> str:
    rig.stream()
    fd = rig.v2.session(STOP_COPY)
    require(rig.v2.kernel.read(fd, 0) == b"", "bytes were returned")
    return rig.compare(rig.v2.read_all(fd))


@CHECKS.add("zero-write", "a write of no bytes adds none", "0, and the stream loads")
def _zero_write(rig: Rig) -> str:
    stream = rig.stream()
    fd = rig.v2.session(RESUMING)
    done = rig.v2.kernel.write(fd, b"")
    require(done == 0, f"write() of 0 bytes returned {done}")
    rig.v2.write_all(fd, stream)
    rig.v2.go(STOP)
    return "0, and the stream loads"


@CHECKS.add(
    "eof-sticky", "in STOP_COPY the end of the stream is final: read() gives 0 from then on", "0, 0, 0", source=FSM
)
def _eof_sticky(rig: Rig) -> str:
    fd = rig.v2.session(STOP_COPY)
    rig.v2.read_all(fd)
    for _ in range(_END_READS):
        more = rig.v2.kernel.read(fd, ODD)
        require(more == b"", f"{len(more)} bytes behind the end")
    return "0, 0, 0"


@CHECKS.add("poll", "in STOP_COPY poll() says readable, at the end of the stream too", "POLLIN", source=PRECOPY)
def _poll(rig: Rig) -> str:
    fd = rig.v2.session(STOP_COPY)
    rig.v2.read_all(fd)
    require(rig.v2.kernel.is_readable(fd), "nothing at the end")
    return "POLLIN"


@CHECKS.add("byte-reads", "how the stream is cut into reads makes no difference", "the same bytes", source=STATE)
def _byte_reads(rig: Rig) -> str:
    rig.stream()
    fd = rig.v2.session(STOP_COPY)
    parts = []
    for _ in range(SINGLE):
        byte = rig.v2.kernel.read(fd, 1)
        require(len(byte) <= 1, f"{len(byte)} bytes for 1")
        parts.append(byte)
    parts.append(rig.v2.read_all(fd, ODD << 6))
    return rig.compare(b"".join(parts))


@CHECKS.add("byte-writes", "how the stream is cut into writes makes no difference", "the same state", source=STATE)
def _byte_writes(rig: Rig) -> str:
    stream = rig.stream()
    fd = rig.v2.session(RESUMING)
    head, body, last = stream[:SINGLE], stream[SINGLE:-1], stream[max(SINGLE, len(stream) - 1) :]
    try:
        rig.v2.write_all(fd, head, 1)
        rig.v2.write_all(fd, body, ODD << 6)
        rig.v2.write_all(fd, last)
    except OSError as error:
        raise Deviation(f"write(): {errno_name(error)}") from error
    rig.v2.go(STOP)
    return rig.compare(rig.v2.save())


@CHECKS.add("shared-position", "a duplicate of the fd shares its position", "each byte once")
def _shared_position(rig: Rig) -> str:
    v2, own = rig.v2, rig.stream()
    if len(own) < 2:  # noqa: PLR2004 -- one for each fd
        raise NotApplicable("its stream has one byte")
    fd = v2.session(STOP_COPY)
    copy = v2.keep(v2.kernel.dup(fd))
    first, rest = v2.kernel.read(copy, 1), v2.read_all(fd)
    return rig.compare(first + rest)


@CHECKS.add(
    "close-early",
    "closing the fd half-read loses no more than the session",
    "stop-copy, stop, and a whole save",
    source=STATE,
)
def _close_early(rig: Rig) -> str:
    v2 = rig.v2
    rig.stream()
    fd = v2.session(STOP_COPY)
    v2.kernel.read(fd, 1)
    v2.close(fd)
    now = v2.state()
    require(now == STOP_COPY, f"closing it led to {state_name(now)}")
    v2.go(STOP)
    return rig.compare(v2.save())


@CHECKS.add("new-session", "a second session begins at the first byte", "the same bytes", source=FSM)
def _new_session(rig: Rig) -> str:
    v2 = rig.v2
    rig.stream()
    v2.kernel.read(v2.session(STOP_COPY), ODD)
    v2.go(STOP)
    return rig.compare(v2.read_all(v2.session(STOP_COPY)))


@CHECKS.add("old-stays-dead", "a new session does not revive the fd of an old one", "ENODEV", source=FSM)
def _old_stays_dead(rig: Rig) -> str:
    v2 = rig.v2
    old = v2.session(STOP_COPY)
    v2.go(STOP)
    new = v2.session(STOP_COPY)
    dead = rig.require_dead(old)
    require(not rig.fate(new), f"the new one: {rig.fate(new)}")
    return dead


@CHECKS.add("bad-read-pointer", "a read into memory that there is not loses nothing", "EFAULT, the same bytes")
def _bad_read(rig: Rig) -> str:
    v2 = rig.v2
    rig.stream()
    fd = v2.session(STOP_COPY)
    head = v2.kernel.read(fd, 3)
    refusal(lambda: v2.kernel.read_nowhere(fd, 8), errno.EFAULT)
    return f"EFAULT, {rig.compare(head + v2.read_all(fd))}"


@CHECKS.add("bad-write-pointer", "a write from memory that there is not adds nothing", "EFAULT, and the stream loads")
def _bad_write(rig: Rig) -> str:
    v2, stream = rig.v2, rig.stream()
    fd = v2.session(RESUMING)
    refusal(lambda: v2.kernel.write_nowhere(fd, 8), errno.EFAULT)
    try:
        v2.write_all(fd, stream)
    except OSError as error:
        raise Deviation(f"EFAULT, then write(): {errno_name(error)}") from error
    v2.go(STOP)
    return f"EFAULT, {rig.compare(v2.save())}"


@CHECKS.add(
    "unknown-ioctl",
    "an ioctl that a data fd does not have is refused",
    "ENOTTY",
    source="ioctl(2); PRECOPY_INFO is the only one",
)
def _unknown_ioctl(rig: Rig) -> str:
    fd, kernel = rig.v2.session(STOP_COPY), rig.v2.kernel
    refusal(lambda: kernel.ioctl(fd, uapi.DEVICE_RESET), errno.ENOTTY)
    return refusal(lambda: kernel.ioctl(fd, _NO_SUCH_IOCTL, bytearray(64)), errno.ENOTTY)


@CHECKS.add(
    "emfile",
    "without a free fd the request fails, and a reset recovers",
    "EMFILE, then a whole save",
    source="vfio_main.c, vfio_ioct_mig_return_fd()",
)
def _emfile(rig: Rig) -> str:
    import resource

    v2 = rig.v2
    rig.stream()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for state in (STOP_COPY, RESUMING):
        lowest = v2.kernel.dup(v2.fd)
        v2.kernel.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
        try:
            refusal(partial(v2.set, state), errno.EMFILE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        v2.reset()
        require(v2.state() == RUNNING, f"after RESET it is in {state_name(v2.state())}")
    return f"EMFILE, then {rig.compare(v2.save())}"
