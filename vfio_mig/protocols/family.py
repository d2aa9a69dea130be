# SPDX-License-Identifier: MIT
"""What a family of devices offers to the rest of the house; a new one is one module and one line in ``registry``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_mig.device import Device
    from vfio_mig.protocols.base import MigrationProtocol
    from vfio_mig.uapi.profile import RfcProfile


class Condition(NamedTuple):
    """One condition of a family's rule: does it hold, and what was found."""

    name: str
    ok: bool
    text: str


class Compared(NamedTuple):
    """One thing that must be the same: in the image, and here; None here is not known."""

    name: str
    saved: str
    here: str | None


class KnownState(Protocol):
    """A state of a layout that its family knows, parsed to the last byte."""

    @property
    def summary(self) -> str:
        """What it is, in a few words."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is unusual about it and forbids nothing."""

    @property
    def relies_on(self) -> str:
        """What of it is in guest memory, in a few words, and has to be in a target's too; empty for nothing."""

    def compare(self, device: Device) -> Iterator[Compared]:
        """Compare it with the device that it is to be loaded into; changes nothing there."""


class Family(ABC):
    """How devices of one family are recognised, driven, and their states judged."""

    name: ClassVar[str]
    """As the user, an image's header and ``--abi`` spell it."""
    knows_states: ClassVar[bool] = False
    """Whether :meth:`parse_state` tells a good state from a bad one, the device types apart as well."""

    @abstractmethod
    def conditions(self, device: Device, profile: RfcProfile) -> list[Condition]:
        """Look whether an open device is of this family, by no request that could mean something else there.

        :param profile: the numbers of the RFC, for those that need them.
        :returns: every condition that could be looked at; the device speaks it if all hold.
        """

    @abstractmethod
    def open(self, device: Device, profile: RfcProfile) -> MigrationProtocol:
        """Return what drives a device for which all conditions hold."""

    def parse_state(self, state: memoryview) -> KnownState | None:
        """Parse a state strictly; None where its layout is not known.

        :raises ImageError: it is broken; the message has the byte offset.
        """
        del state
        return None
