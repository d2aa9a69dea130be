# SPDX-License-Identifier: MIT
"""What a family of devices offers to the rest of the house; a new one is one module and one line in ``registry``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from vfio_mig.device import Device
    from vfio_mig.protocols.base import MigrationProtocol
    from vfio_mig.uapi.profile import RfcProfile


class Condition(NamedTuple):
    """One condition of a family's rule: does it hold, and what was found."""

    name: str
    ok: bool
    text: str


class Family(ABC):
    """How devices of one family are recognised, and what drives them."""

    protocol: ClassVar[type[MigrationProtocol]]
    """What drives its devices."""

    @property
    def name(self) -> str:
        """As the user, an image's header and ``--abi`` spell it."""
        return self.protocol.name

    @abstractmethod
    def conditions(self, device: Device, profile: RfcProfile) -> list[Condition]:
        """Look whether an open device is of this family, by no request that could mean something else there.

        :param profile: the numbers of the RFC, for those that need them.
        :returns: every condition that could be looked at; the device speaks it if all hold.
        """

    @abstractmethod
    def open(self, device: Device, profile: RfcProfile) -> MigrationProtocol:
        """Return what drives a device for which all conditions hold."""
