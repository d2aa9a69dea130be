# SPDX-License-Identifier: MIT
"""What every protocol offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vfio_mig.device import Device
    from vfio_mig.errors import UnsupportedError
    from vfio_mig.protocols.abilities import HasP2p, HasStates, LogsWrites, SavesLive
    from vfio_mig.protocols.states import KnownState


class MigrationProtocol(ABC):
    """How one family of devices is stopped, read and loaded; an instance drives one open device.

    :param device: stays the caller's.
    """

    name: ClassVar[str]
    """As the user, the image's header and ``--abi`` spell it."""
    streams: ClassVar[bool] = False
    """Whether the state is a stream of any size, to be moved in chunks."""
    is_bare: ClassVar[bool] = False
    """Whether a file of nothing but a device state is one of its: no such file says whose it is."""
    knows_states: ClassVar[bool] = False
    """Whether :meth:`parse_state` tells a good state from a bad one, the device types apart as well."""
    reaches_others: ClassVar[bool] = False
    """Whether it may access other devices' memory, so that several stop as one only if each has :attr:`p2p`."""
    refusal: UnsupportedError | None = None
    """Why the device cannot be migrated at all, None if it can."""

    def __init__(self, device: Device) -> None:
        self.device = device

    # What only some can do: the object that does it, or None

    @property
    def live(self) -> SavesLive | None:
        """Reads the state of the running device."""
        return None

    @property
    def dirty_log(self) -> LogsWrites | None:
        """Logs writes; without it the device always knows all of its dirty pages."""
        return None

    @property
    def p2p(self) -> HasP2p | None:
        """Keeps it from accessing other devices."""
        return None

    @property
    def states(self) -> HasStates | None:
        """Tells its state, and changes it by hand."""
        return None

    @classmethod
    def parse_state(cls, state: memoryview) -> KnownState | None:
        """Parse a state strictly; None where its layout is not known.

        :raises ImageError: it is broken; the message has the byte offset.
        """
        del state
        return None

    @property
    def has_dirty(self) -> bool:
        """Whether the device can be asked for its dirty pages."""
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

    def read_chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the state of the stopped device, chunk by chunk; see :meth:`read_state`.

        A chunk may be overwritten by the next one.
        """
        yield self.read_state()

    def stage(self, chunks: Iterable[bytes | memoryview]) -> Callable[[], None]:
        """Take what can be taken of a verified state before the stop; return what loads it into the stopped device.

        See :meth:`write_state`. The device is left alone until then.
        """
        return partial(self.write_chunks, chunks)

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

        The next call may overwrite it. Pages have 4096 bytes and are counted from IOVA 0.

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
