# SPDX-License-Identifier: MIT
"""What is known of a device state whose layout its protocol knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_mig.device import Device


class Compared(NamedTuple):
    """One thing that must be the same: in the image, and here; None here is not known."""

    name: str
    saved: str
    here: str | None


class KnownState(Protocol):
    """A state of a layout that its protocol knows, parsed to the last byte."""

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
