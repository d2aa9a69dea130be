# SPDX-License-Identifier: MIT
"""What every protocol offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from vfio_mig.device import Device


class MigrationProtocol(ABC):
    """How one family of devices is stopped, read and loaded; an instance drives one open device.

    :param device: stays the caller's.
    """

    name: ClassVar[str]
    """As the user, the image's header and ``--abi`` spell it."""

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
