# SPDX-License-Identifier: MIT
"""A device that speaks no migration protocol: it can be kept open, reset, and asked what its container knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn

from vfio_mig.protocols.base import MigrationProtocol

if TYPE_CHECKING:
    from vfio_mig.device import Device
    from vfio_mig.errors import UnsupportedError


class NoMigration(MigrationProtocol):
    """In the place of a protocol, for jobs that take any device.

    :param refusal: raised by everything that takes a protocol.
    """

    name: ClassVar[str] = "none"

    def __init__(self, device: Device, refusal: UnsupportedError) -> None:
        super().__init__(device)
        self.refusal: UnsupportedError = refusal

    @property
    def has_dirty(self) -> bool:
        """Never: what is known of its writes is known elsewhere."""
        return False

    @property
    def state_size_max(self) -> int:
        """Nothing."""
        return 0

    def _refuse(self) -> NoReturn:
        raise self.refusal

    def stop(self) -> None:
        """Refuse."""
        self._refuse()

    def start(self) -> None:
        """Refuse."""
        self._refuse()

    def read_state(self) -> memoryview:
        """Refuse."""
        self._refuse()

    def write_state(self, state: memoryview) -> None:
        """Refuse."""
        del state
        self._refuse()

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        """Refuse."""
        del start_page, nr_pages
        self._refuse()
