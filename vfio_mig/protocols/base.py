# SPDX-License-Identifier: MIT
"""What every protocol offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vfio_mig.device import Device


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


class MigrationProtocol(ABC):
    """How one family of devices is stopped, read and loaded; an instance drives one open device.

    :param device: stays the caller's.
    """

    name: ClassVar[str]
    """As the user, the image's header and ``--abi`` spell it."""
    streams: ClassVar[bool] = False
    """Whether the state is a stream of any size, to be moved in chunks."""
    logs: ClassVar[bool] = False
    """Whether dirty pages count from :meth:`start_log` on and a page is told once; else the device always knows all."""

    def __init__(self, device: Device) -> None:
        self.device = device

    @property
    def has_dirty(self) -> bool:
        """Whether the device can be asked for its dirty pages."""
        return True

    @property
    def has_precopy(self) -> bool:
        """Whether its state can be read while it runs."""
        return False

    @property
    def has_p2p(self) -> bool:
        """Whether it can be kept from accessing other devices while it answers them; True if it never does so."""
        return True

    @property
    @abstractmethod
    def state_size_max(self) -> int:
        """Bytes of the largest state that the device can take."""

    @abstractmethod
    def stop(self) -> None:
        """Let the running work finish and bring the device to rest; a second call changes nothing.

        :raises DeviceError: the kernel refused; the device still runs.
        """

    @abstractmethod
    def start(self) -> None:
        """Let the device go on; a second call changes nothing.

        :raises DeviceError: the kernel refused; the device is still stopped.
        """

    def quiet(self) -> None:  # noqa: B027 -- as a rule there is nothing to do
        """Keep a running device from accessing others; it still answers them. A stopped one is left alone.

        Several devices all do this before the first is stopped.

        :raises DeviceError: the kernel refused.
        """

    def wake(self) -> None:  # noqa: B027 -- as a rule there is nothing to do
        """Let a stopped device answer others, without accessing them.

        Several devices all do this before the first runs again.

        :raises DeviceError: the kernel refused.
        """

    def undo_wake(self) -> None:  # noqa: B027 -- as a rule there is nothing to do
        """Bring a device back that :meth:`wake` has woken and nobody has started; one that runs is left alone."""

    def restore_run_state(self) -> None:
        """Bring a stopped device back to where it was found, or to run where that is not known."""
        self.start()

    def state(self) -> str:
        """Return the name of the device's state; ``unknown`` where it cannot be asked."""
        return "unknown"

    def require_idle(self) -> None:  # noqa: B027 -- as a rule every device is fit
        """Refuse a device that a job must not begin with.

        :raises DeviceError: says what to do about it.
        """

    def recover(self, *, may_reset: bool) -> None:
        """Leave what a killed job of ours may have left the device in the middle of.

        :param may_reset: whether its state may be lost.
        :raises DeviceError: only a reset helps.
        """
        del may_reset
        self.require_idle()

    def prepare(self) -> None:  # noqa: B027 -- as a rule there is nothing to do
        """Do what reading or loading the state needs and what need not wait for the stop; the device runs."""

    def begin_live(self) -> bool:
        """Begin to save the state of the running device; False when it does not run, and there is nothing to begin.

        :raises DeviceError: the kernel refused; the device still runs.
        """
        return False

    def read_live(self, limit: int) -> Iterator[bytes | memoryview]:
        """Yield what there is of the state for now, up to *limit* bytes: it may grow as fast as it is read.

        A chunk may be overwritten by the next one.

        :raises DeviceError: what was read so far is worthless.
        """
        raise NotImplementedError

    def pending(self) -> Pending:
        """Tell what is still to be read; the device runs.

        :raises DeviceError: the kernel refused.
        """
        raise NotImplementedError

    def start_log(self, ranges: Sequence[tuple[int, int]]) -> None:  # noqa: B027 -- the device may always know
        """Have dirty pages counted from now on, where the protocol :attr:`logs`.

        :param ranges: (IOVA, bytes), multiples of 4096.
        :raises UnsupportedError: it cannot.
        :raises DeviceError: refused.
        """

    def stop_log(self) -> None:  # noqa: B027 -- the device may always know
        """End what :meth:`start_log` has begun.

        :raises DeviceError: refused.
        """

    def read_chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the state of the stopped device, chunk by chunk; see :meth:`read_state`.

        A chunk may be overwritten by the next one.
        """
        yield self.read_state()

    def write_chunks(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Load a state chunk by chunk; see :meth:`write_state`."""
        self.write_state(memoryview(b"".join(chunks)))

    @abstractmethod
    def read_state(self) -> memoryview:
        """Return the device's internal state; the device must be stopped, and keeps its state.

        :raises DeviceError: the kernel refused, or what it gave is not a state.
        """

    @abstractmethod
    def write_state(self, state: memoryview) -> None:
        """Load a state that the caller has verified into the stopped device.

        :raises DeviceError: the kernel refused; the device may hold a part of it, and only a reset makes it defined.
        """

    @abstractmethod
    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        """Return one dirty bitmap: ceil(nr_pages / 8) bytes, bit *i* of byte *j* is page 8*j* + *i* from *start_page*.

        Pages have 4096 bytes and are counted from IOVA 0.

        :raises DeviceError: the kernel refused; with EINVAL or ENOMEM it may take fewer pages.
        """

    def describe(self) -> str:
        """Say which protocol this is and where its numbers come from."""
        return self.name

    def close(self) -> None:  # noqa: B027 -- as a rule there is nothing but the device
        """Give back what belongs to it beside the device; a second call does nothing."""

    def reset(self) -> None:
        """Reset the device: its state is lost."""
        self.device.reset()
