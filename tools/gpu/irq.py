# SPDX-License-Identifier: MIT
"""The function's interrupts towards the client: INTx and one MSI, each an eventfd of the client's."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.gpu.errors import RefusedError

if TYPE_CHECKING:
    from tools.gpu.misbehaviour import Misbehaviour

INTX, MSI = 0, 1
COUNTS: Final = (1, 1, 0, 0, 0)  # INTx, MSI, MSI-X, error, request: VFIO_PCI_NUM_IRQS

_EVENTFD: Final = 1 << 0  # VFIO_IRQ_INFO_*
_MASKABLE: Final = 1 << 1
_AUTOMASKED: Final = 1 << 2
_NORESIZE: Final = 1 << 3

DATA_NONE: Final = 1 << 0  # VFIO_IRQ_SET_*
DATA_BOOL: Final = 1 << 1
DATA_EVENTFD: Final = 1 << 2
ACTION_MASK: Final = 1 << 3
ACTION_UNMASK: Final = 1 << 4
ACTION_TRIGGER: Final = 1 << 5
_DATA: Final = frozenset({DATA_NONE, DATA_BOOL, DATA_EVENTFD})
_ACTIONS: Final = frozenset({ACTION_MASK, ACTION_UNMASK, ACTION_TRIGGER})
_DATA_BITS: Final = 0b000111
_ACTION_BITS: Final = 0b111000
_ONE: Final = (1).to_bytes(8, "little")


class Interrupts:
    """The eventfds, and what has been sent through them. Owns the file descriptors it takes."""

    counts: Final = COUNTS

    def __init__(self, misbehaviour: Misbehaviour) -> None:
        self._misbehaviour: Final = misbehaviour
        self._fds: dict[int, int] = {}  # by index; each has one interrupt
        self._masked = False  # INTx
        self._pending = False
        self.sent = 0
        self.lost = 0

    def info(self, index: int) -> tuple[int, int]:
        """Return the flags and the count of an interrupt index."""
        if index >= len(COUNTS):
            raise RefusedError(errno.EINVAL, f"there is no interrupt index {index}")
        if not COUNTS[index]:
            return 0, 0
        return (_EVENTFD | _MASKABLE | _AUTOMASKED if index == INTX else _EVENTFD | _NORESIZE), COUNTS[index]

    def set(self, flags: int, index: int, start: int, count: int, *, data: bytes, fds: list[int]) -> None:
        """Do what VFIO_DEVICE_SET_IRQS asks for; file descriptors that are kept are taken out of *fds*.

        :raises RefusedError: EINVAL for what VFIO does not define, and for an fd that is not an eventfd.
        """
        kind, action = flags & _DATA_BITS, flags & _ACTION_BITS
        if index >= len(COUNTS) or start + count > COUNTS[index]:
            raise RefusedError(errno.EINVAL, f"there are no interrupts {start}+{count} of index {index}")
        if kind not in _DATA or action not in _ACTIONS or flags & ~(_DATA_BITS | _ACTION_BITS):
            raise RefusedError(errno.EINVAL, f"interrupt flags {flags:#x}")
        if len(data) != (count if kind == DATA_BOOL else 0) or len(fds) > (count if kind == DATA_EVENTFD else 0):
            raise RefusedError(errno.EINVAL, "interrupt data do not fit the flags")
        if action != ACTION_TRIGGER:
            self._mask(kind, action, index, chosen=kind != DATA_BOOL or any(data))
        elif kind == DATA_EVENTFD:
            self._connect(index, fds)
        elif not count:
            self._disconnect(index)
        elif kind == DATA_NONE or any(data):
            self._signal(index)

    def close(self) -> None:
        """Let go of all eventfds."""
        for index in list(self._fds):
            self._disconnect(index)

    def reset(self) -> None:
        """Forget what is pending; the client's eventfds stay, as they are not part of the function."""
        self._masked = self._pending = False

    def fire(self) -> None:
        """Send an interrupt, by MSI if the client has set one up."""
        if not self._fds:
            return
        if self._misbehaviour.lose_interrupt():
            self.lost += 1
        elif MSI in self._fds:
            self._signal(MSI)
        elif self._masked:
            self._pending = True
        else:
            self._masked = True  # until the client has seen it: AUTOMASKED
            self._signal(INTX)

    def _connect(self, index: int, fds: list[int]) -> None:
        if fds and not _is_eventfd(fds[0]):
            raise RefusedError(errno.EINVAL, "an interrupt's file descriptor is not an eventfd")
        self._disconnect(index)
        if fds:
            self._fds[index] = fds.pop(0)

    def _disconnect(self, index: int) -> None:
        fd = self._fds.pop(index, None)
        if fd is not None:
            os.close(fd)
        if index == INTX:
            self.reset()

    def _mask(self, kind: int, action: int, index: int, *, chosen: bool) -> None:
        if index != INTX or kind == DATA_EVENTFD:
            raise RefusedError(errno.EINVAL, "only INTx can be masked, and not by an eventfd")
        if not chosen:
            return
        self._masked = action == ACTION_MASK
        if not self._masked and self._pending:
            self._pending = False
            self._masked = True
            self._signal(INTX)

    def _signal(self, index: int) -> None:
        fd = self._fds.get(index)
        if fd is None:
            return
        # An eventfd at its limit would block us; whoever let it come to that knows that there are interrupts.
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        if any(events & select.POLLOUT for _, events in poller.poll(0)):
            with contextlib.suppress(OSError):
                os.write(fd, _ONE)
                self.sent += 1


def _is_eventfd(fd: int) -> bool:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"
    except OSError:  # no /proc: it cannot be told
        return False
