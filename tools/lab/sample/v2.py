# SPDX-License-Identifier: MIT
"""The sample driver's v2 side, whose debugfs tells the truth and has knobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tools.lab.vfio.v2 import NAMES, Client

if TYPE_CHECKING:
    from tools.lab.sample.guest import Guest


class V2(Client):
    """The v2 side of a vGPU that a guest uses."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest.device.fd)
        self.guest: Final = guest

    def state(self) -> int:
        """The state that the kernel tells, once the driver has said the same."""
        state = super().state()
        assert (self.guest.instance.debugfs / "v2_state").read_text() == NAMES[state] + "\n"
        return state

    def set_knob(self, name: str, value: int | str) -> None:
        """Write to one of its files in debugfs."""
        (self.guest.instance.debugfs / name).write_text(str(value))

    def knob(self, name: str) -> int:
        """Read one of its files in debugfs."""
        return int((self.guest.instance.debugfs / name).read_text())
