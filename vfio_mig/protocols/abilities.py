# SPDX-License-Identifier: MIT
"""What some devices can do and others cannot; a protocol names the object that does it, or None."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Pending(NamedTuple):
    """What is still to be read of a state that is being saved while the device runs; bytes.

    :param initial_bytes: of what is to be read before a stop, so that that takes no longer than it must.
    :param dirty_bytes: of what has changed since it was read.
    :param rest_bytes: the device's own estimate of what a stop now would leave to be read.
    :param is_anew: what was read as initial has become useless, and there is new initial data (REINIT).
    """

    initial_bytes: int
    dirty_bytes: int
    rest_bytes: int
    is_anew: bool = False


class SavesLive(Protocol):
    """Its state can be read while it runs."""

    def begin_live(self) -> bool:
        """Begin to save the state of the running device; False when it does not run, and there is nothing to begin.

        :raises DeviceError: the kernel refused; the device still runs.
        """

    def read_live(self, limit: int) -> Iterator[bytes | memoryview]:
        """Yield what there is of the state for now, up to *limit* bytes: it may grow as fast as it is read.

        A chunk may be overwritten by the next one.

        :raises DeviceError: what was read so far is worthless.
        """

    def pending(self) -> Pending:
        """Tell what is still to be read; the device runs.

        :raises DeviceError: the kernel refused.
        """


class LogsWrites(Protocol):
    """Its dirty pages count from the log's begin on, and each is told once; a device without always knows them all."""

    def start_log(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Have dirty pages counted from now on.

        :param ranges: (IOVA, bytes), multiples of 4096.
        :raises UnsupportedError: it cannot.
        :raises DeviceError: refused.
        """

    def stop_log(self) -> None:
        """End what :meth:`start_log` has begun.

        :raises DeviceError: refused.
        """


class HasP2p(Protocol):
    """It can be kept from accessing other devices while it answers them."""

    def quiet(self) -> None:
        """Keep a running device from accessing others; it still answers them. A stopped one is left alone.

        Several devices all do this before the first is stopped.

        :raises DeviceError: the kernel refused.
        """

    def wake(self) -> None:
        """Let a stopped device answer others, without accessing them.

        Several devices all do this before the first runs again.

        :raises DeviceError: the kernel refused.
        """

    def undo_wake(self) -> None:
        """Bring a device back that :meth:`wake` has woken and nobody has started; one that runs is left alone."""


class HasStates(Protocol):
    """It can be asked for its state, and be put into one by hand."""

    def state(self) -> str:
        """Return the state's name, as QEMU spells it."""

    def go_to(self, name: str) -> None:
        """Go to a state by hand.

        :raises UsageError: it has a stream that would be lost.
        :raises UnsupportedError: the device does not have it.
        """
