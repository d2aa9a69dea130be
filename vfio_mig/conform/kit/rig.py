# SPDX-License-Identifier: MIT
"""The device under test, with what the checks share: its own saved state, a second device, a way to open it again."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.conform.kit.v2_device import V2Device, errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, Weakness
from vfio_mig.uapi.v2 import ERROR, RESUMING, RUNNING, SAVING, STOP, state_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.conform.kit.rfc_device import Rfc
    from vfio_mig.device import Device
    from vfio_mig.host.guest import GuestMemory


class Refusal(NamedTuple):
    """Where a stream was refused, ``write`` or ``leaving resuming``, and with which errno."""

    where: str
    name: str

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"


def first_difference(one: bytes, other: bytes) -> int:
    """Return the offset of the first byte that differs."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # the longest common prefix, by halves
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def require_ended(fate: str, *, writing: bool) -> str:
    """Judge what :meth:`Rig.fate` says of a session that has to have ended.

    :raises Deviation: it goes on, or is full, which a live one may be.
    """
    call = "write()" if writing else "read()"
    if not fate:
        raise Deviation(f"{call} on the ended session's fd works")
    if fate != "ENODEV" and writing:
        raise Deviation(f"{call} on the ended session's fd: {fate}, as on one that goes on")
    if fate != "ENODEV":
        raise Weakness(f"{call} on the ended session's fd: {fate}", "no rule names the errno; every driver says ENODEV")
    return fate


class Rig:
    """One device under test.

    :param device: it; closed and opened again by :meth:`reopen`.
    :param v2: how it is driven, if it speaks v2.
    :param rfc: how it is driven, if it speaks the RFC.
    :param opener: opens it again, with guest memory mapped; None for a device that another process has open, too.
    :param second: another device, of the same type if *same_type*.
    """

    def __init__(
        self,
        device: Device,
        *,
        v2: V2Device | None = None,
        rfc: Rfc | None = None,
        opener: Callable[[Sequence[GuestMemory]], Device] | None = None,
        second: Rig | None = None,
        same_type: bool = False,
    ) -> None:
        self.device = device
        self._v2 = v2
        self._rfc = rfc
        self._opener = opener
        self.second: Final = second
        self.same_type: Final = same_type
        self._stream: bytes | None = None
        self._repeats = True
        self._altered = False
        self._is_closed = False
        self._memory: Sequence[GuestMemory] = ()

    @property
    def v2(self) -> V2Device:
        """The device as one of v2."""
        if self._v2 is None:
            raise NotApplicable("it does not speak v2")
        return self._v2

    @property
    def rfc(self) -> Rfc:
        """The device as one of the RFC."""
        if self._rfc is None:
            raise NotApplicable("it does not speak the RFC")
        return self._rfc

    def begin(self) -> None:
        """Bring the device to where every check begins, also when the last one has ended anywhere."""
        self._open_again()
        if self._v2 is not None:
            self._v2.settle()
            if self._altered:
                self.heal()
        elif self._rfc is not None:
            self._rfc.settle()
        if self.second is not None:
            self.second.begin()

    def require_own(self) -> None:
        """Skip what closes the device, when that would not close it."""
        if self._opener is None:
            raise NotApplicable("another process has it open, too")

    def reopen(self, *, before: Callable[[], None] | None = None, memory: Sequence[GuestMemory] = ()) -> None:
        """Close the device and open it again.

        :param before: called in between.
        :param memory: mapped for its DMA, until the next check that closes it.
        """
        self.require_own()
        self._set_fd(-1)
        self.device.close()
        if before is not None:
            before()
        self._memory = memory
        self._open_again()

    def _open_again(self) -> None:
        if self._opener is not None and self._is_closed:
            self.device = self._opener(self._memory)
            self._set_fd(self.device.fileno())

    def _set_fd(self, fd: int) -> None:
        self._is_closed = fd < 0
        for driven in (self._v2, self._rfc):
            if driven is not None:
                driven.fd = fd

    # --- v2

    def stream(self) -> bytes:
        """Return the device's own state, saved once for all checks; leaves it RUNNING.

        :raises NotApplicable: it is too large to be kept.
        """
        if self._stream is None:
            saves = []
            for _ in range(2):
                self.v2.settle()
                self.v2.reset()  # so that no check's reset changes what is compared with
                saves.append(self.v2.save())
            self.v2.go(RUNNING)
            if not all(saves):
                raise Deviation("its saved stream is empty")
            self._stream, self._repeats = saves[0], saves[0] == saves[1]
        return self._stream

    def require_repeatable(self) -> None:
        """Skip where two states that should be the same cannot be told from two that are not."""
        self.stream()
        if not self._repeats:
            raise NotApplicable("it never saves the same bytes twice")

    def compare(self, saved: bytes, expected: bytes | None = None) -> str:
        """Compare what was saved with what was loaded, or saved before; the device's own stream by default.

        :raises Deviation: it differs, on a device that can save the same bytes twice.
        """
        own = self.stream() if expected is None else expected
        if saved == own:
            return f"the same {len(own)} bytes"
        if not saved:
            raise Deviation("0 bytes")
        self.require_repeatable()
        if len(saved) != len(own):
            raise Deviation(
                f"{len(saved)} bytes, not {len(own)}; the first other one at {first_difference(saved, own)}"
            )
        raise Deviation(f"other bytes, the first at {first_difference(saved, own)}")

    def bring_to(self, state: int) -> int:
        """Go from RUNNING to a state; in RESUMING the device's own stream is written. Returns the data fd or -1."""
        if not self.v2.supports(state):
            raise NotApplicable(f"it has no {state_name(state)}")
        stream = self.stream() if state == RESUMING else b""
        if state == RUNNING:
            return -1
        fd = self.v2.session(state) if state in SAVING or state == RESUMING else self.v2.go(state)
        if state == RESUMING:
            try:
                self.v2.write_all(fd, stream)
            except OSError as error:
                raise Deviation(f"writing its own stream failed: {errno_name(error)}") from error
        return fd

    def try_to_load(self, stream: bytes, target: int = STOP) -> Refusal | None:
        """Load a stream that should not load; returns who refused it, None when it was taken."""
        self.v2.settle()
        fd = self.v2.session(RESUMING)
        try:
            self.v2.write_all(fd, stream)
        except OSError as error:
            return Refusal("write()", errno_name(error))
        self._altered = True
        return self.try_to_leave(target)

    def try_to_leave(self, target: int = STOP) -> Refusal | None:
        """Leave RESUMING, when what was written is not to be taken; None when it was taken."""
        self._altered = True
        try:
            self.v2.set(target)
        except OSError as error:
            return Refusal("leaving resuming", errno_name(error))
        return None

    def heal(self) -> None:
        """Load the device's own state after something else may have been loaded."""
        if self._stream is not None:
            self.v2.settle()
            self.v2.load(self._stream)
            self.v2.go(RUNNING)
        self._altered = False

    def require_dead(self, fd: int, *, writing: bool = False) -> str:
        """Make sure that a session has ended; returns the errno's name."""
        return require_ended(self.fate(fd, writing=writing), writing=writing)

    def fate(self, fd: int, *, writing: bool = False) -> str:
        """Tell by one byte whether a session is alive: empty, or the errno's name."""
        try:
            if writing:
                self.v2.kernel.write(fd, b"\0")
            else:
                self.v2.kernel.read(fd, 1)
        except OSError as error:
            return "" if error.errno == errno.ENOMSG else errno_name(error)
        return ""

    def fail_into_error(self) -> bool:
        """Leave RESUMING with nothing written; tells whether the device is in ERROR now."""
        self.v2.settle()
        self.v2.session(RESUMING)
        self.try_to_leave()
        return self.v2.state() == ERROR
