# SPDX-License-Identifier: MIT
"""Standard input's way into the VM: through a socket that QEMU reads only as far as COMMAND does."""

import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Final

from tools.vm import guest

_CHUNK: Final = 1 << 16


class Feeder:
    """Passes a file descriptor on, and never waits for it longer than it is told to.

    Reading stops where COMMAND stops: what is on its way is bounded by this chunk, the socket and the guest's buffers.

    :param closed: a file that is there as soon as nobody in the guest reads any more.
    """

    def __init__(self, closed: Path, fd: int = 0) -> None:
        self._closed: Final = closed
        self._fd: Final = fd
        self._ours, self.guests = socket.socketpair()
        self._ours.setblocking(False)
        self._pending = memoryview(guest.STDIN_GREETING)
        # Closed by whoever started us; the number may be another file's by now.
        self._ended = fd == 0 and sys.stdin is None
        self._finished = False

    def pump(self, seconds: float) -> None:
        """Pass on what there is, for *seconds*."""
        end = time.monotonic() + seconds
        if not self._finished and self._closed.exists():
            self._let_go()
        while (left := end - time.monotonic()) > 0:
            if self._finished:
                time.sleep(left)
            elif self._pending:
                if select.select([], [self._ours], [], left)[1]:
                    self._send()
            elif self._ended:
                self._finish()
            elif select.select([self._fd], [], [], left)[0]:
                self._receive()

    def close(self) -> None:
        """Close the socket's ends; a second call does nothing."""
        self._ours.close()
        self.guests.close()

    def _receive(self) -> None:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:  # somebody else has taken it
            return
        except OSError:  # a terminal that is not ours any more
            data = b""
        self._pending = memoryview(data)
        self._ended = not data

    def _send(self) -> None:
        try:
            self._pending = self._pending[self._ours.send(self._pending) :]
        except BlockingIOError:
            pass
        except OSError:  # QEMU has ended
            self._let_go()

    def _finish(self) -> None:
        # Not closed: QEMU may take that for the end before it has read the rest.
        self._ours.shutdown(socket.SHUT_WR)
        self._finished = True

    def _let_go(self) -> None:
        """Read no more: whoever writes to us is to find out, as if COMMAND itself had been the reader."""
        self._pending = memoryview(b"")
        self._finished = True
        if self._ended:
            return
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, self._fd)
        os.close(null)
