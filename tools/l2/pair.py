# SPDX-License-Identifier: MIT
"""Two vGPUs of our kvmgt, and a guest that QEMU moves from one to the other: inside of ``scripts/vm --gvt --l2``.

QEMU is the one that runs this VM (``VFIO_MIG_QEMU``), as Debian 12's does not speak the migration protocol v2.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from tools.l2 import moves
from tools.l2.image import Image
from tools.l2.machine import L2, GuestError
from tools.lab.gvt import kvmgt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.l2.moves import Move

_POLL_SECONDS: Final = 0.01
_WORDS_SECONDS: Final = 60.0

KIND: Final = "i915-GVTg_V5_4"
"""The smallest type of which the GPU has room for two."""


class Moved(NamedTuple):
    """A guest that has moved.

    :param guest: where it is now.
    :param move: what QEMU says of it.
    :param silence: seconds from its last word on the old console to its first on the new one, which is what somebody
        outside sees of the move. It says something some times per second.
    """

    guest: L2
    move: Move
    silence: float


class Pair:
    """Two vGPUs, and the QEMUs that have them one after the other."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        self._stack: Final = stack
        self._directory: Final = directory
        self._image: Final = Image.of(Path(os.environ["VFIO_MIG_L2"]))
        self.guests: Final[list[L2]] = []
        self.vgpus: Final = [stack.enter_context(kvmgt.instance(KIND)) for _ in range(2)]

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator[Self]:
        """Make the vGPUs; they and all QEMUs have gone when the block is left."""
        with contextlib.ExitStack() as stack:
            # In memory with room for a guest's; a socket's path may have 107 bytes
            yield cls(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l2-", dir="/dev/shm"))))

    @property
    def stream(self) -> Path:
        """A file for a guest."""
        return self._directory / "stream"

    def start(self, vgpu: int, *more: str) -> L2:
        """Start a QEMU with one of the vGPUs."""
        own = self._directory / str(len(self.guests))
        own.mkdir()
        guest = self._stack.enter_context(
            L2.started(
                self._image, str(kvmgt.DEVICES / self.vgpus[vgpu]), own,
                qemu=shlex.split(os.environ["VFIO_MIG_QEMU"]), device=moves.DEVICE, more=more,
            )
        )  # fmt: skip
        self.guests.append(guest)
        return guest

    def move(self, guest: L2, vgpu: int) -> Moved:
        """Have QEMU move a running guest to a new QEMU with that vGPU; the old one is ended.

        :raises GuestError: it did not come about.
        """
        target = self.start(vgpu, *moves.INCOMING)
        uri = f"unix:{target.console.parent / 'migration'}"
        moves.receive(target.qmp, uri)
        done = moves.migrate(guest.qmp, uri)
        moves.await_running(target.qmp)
        silence = _first_word(target) - guest.console.stat().st_mtime
        guest.end()
        return Moved(target, done, silence)

    def save(self, guest: L2) -> Move:
        """Have QEMU write a running guest to :attr:`stream`; it is ended."""
        done = moves.migrate(guest.qmp, f"file:{self.stream}")
        guest.end()
        return done

    def load(self, vgpu: int) -> L2:
        """Start a QEMU with one of the vGPUs that takes the guest from :attr:`stream`; returns when it runs."""
        guest = self.start(vgpu, *moves.INCOMING)
        moves.receive(guest.qmp, f"file:{self.stream}")
        moves.await_running(guest.qmp)
        return guest


def _first_word(guest: L2) -> float:
    """Wait for the first word on a console, and return when it came, in seconds since the epoch.

    :raises GuestError: there is none.
    """
    end = time.monotonic() + _WORDS_SECONDS
    while not guest.console.stat().st_size:
        guest.require_good()
        if time.monotonic() > end:
            raise GuestError(f"the guest says nothing within {_WORDS_SECONDS:g} s after its move")
        time.sleep(_POLL_SECONDS)
    return time.time()
