# SPDX-License-Identifier: MIT
"""What every protocol offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfio_mig.device import Device


class MigrationProtocol(ABC):
    """How one family of devices is stopped, read and loaded; an instance drives one open device.

    :param device: stays the caller's.
    """

    name: ClassVar[str]
    """As the user, the image's header and ``--abi`` spell it."""
    streams: ClassVar[bool] = False
    """Whether the state is a stream of any size, to be moved in chunks."""
    has_dirty: ClassVar[bool] = True
    """Whether the device can be asked for its dirty pages."""

    def __init__(self, device: Device) -> None:
        self.device = device

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

    def undo_stop(self) -> None:
        """Bring a stopped device back to where it was found, or to run where that is not known."""
        self.start()

    def state(self) -> str:
        """Return the name of the device's state; ``unknown`` where it cannot be asked."""
        return "unknown"

    def require_rest(self) -> None:  # noqa: B027 -- as a rule every device is fit
        """Refuse a device that a job must not begin with.

        :raises DeviceError: says what to do about it.
        """

    def read_chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the state of the stopped device, chunk by chunk; see :meth:`read_state`."""
        yield self.read_state()

    def write_chunks(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Load a state chunk by chunk; see :meth:`write_state`."""
        self.write_state(memoryview(b"".join(chunks)))

    @abstractmethod
    def read_state(self) -> memoryview:
        """Return the device's internal state; the device must be stopped, and keeps its state.

        :raises DeviceError: the kernel refused, or what it gave is no state.
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

    def reset(self) -> None:
        """Reset the device: its state is lost."""
        self.device.reset()
