# SPDX-License-Identifier: MIT
"""Several devices as one job: none may access another that is stopped already, or does not run yet.

What the kernel asks for is in <linux/vfio.h>, VFIO_DEVICE_STATE_RUNNING_P2P: every device goes there before the first
is stopped, and before the first runs again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_mig.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.jobs.session import Session


def require_p2p(sessions: Sequence[Session], *, waived: bool) -> None:
    """Refuse several devices of which one lacks the P2P states.

    :raises UnsupportedError: names it.
    """
    if len(sessions) < 2 or waived:  # noqa: PLR2004 -- several
        return
    for session in sessions:
        if not session.protocol.has_p2p:
            raise UnsupportedError(
                "it has no P2P states, and could write to another device that is stopped already",
                device=session.device.name,
                hint="one device at a time, or use --no-p2p if they do not know of each other",
            )


def quiet(sessions: Sequence[Session]) -> None:
    """Keep several devices from accessing each other, before the first is stopped.

    :raises DeviceError: the kernel refused.
    """
    if len(sessions) > 1:
        for session in sessions:
            session.protocol.quiet()


def wake(sessions: Sequence[Session]) -> None:
    """Let several devices answer each other, before the first runs again.

    :raises DeviceError: the kernel refused.
    """
    if len(sessions) > 1:
        for session in sessions:
            session.protocol.wake()
