# SPDX-License-Identifier: MIT
"""Let another process stand still for an instant: ptrace(2), as a debugger does it.

No signal is sent, so neither the process nor its parent takes notice, and a shell does not take the terminal back, as
SIGSTOP would have it. Whoever traces is a thread of its own: when that ends, for whatever reason, the kernel lets all
that it traces go on. So does the end of this process, a kill too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from vfio_mig import threads
from vfio_mig.errors import DeviceBusyError, errno_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.device import Holder

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_STOP_EVENT: Final = 128
_WALL: Final = 0x4000_0000
_POLL_SECONDS: Final = 0.0005
SECONDS: Final = 2.0
"""For how long a process may take to stand still: one that is in the kernel comes to its end there first."""


def _ptrace(request: int, thread: int, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(thread), ctypes.c_void_p(0), ctypes.c_void_p(data)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Tracer:
    """What the tracing thread does.

    :param pid: of a process; all of its threads are stopped.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped: dict[int, int] = {}
        """By thread: the signal that it is to get when it goes on, 0 for none."""
        self._end = time.monotonic() + SECONDS

    def stop(self) -> None:
        """Stop all threads; those that begin meanwhile, too.

        :raises OSError: we may not (EPERM), it has gone (ESRCH), or one does not come out of the kernel (ETIMEDOUT).
        """
        while new := [thread for thread in self._threads() if thread not in self._stopped]:
            seized = [thread for thread in new if self._seize(thread)]
            if not seized:
                return  # they have ended
            for thread in seized:
                self._await(thread)

    def _threads(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(f"/proc/{self._pid}/task")]
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error

    def _seize(self, thread: int) -> bool:
        """Begin to stop a thread; returns whether it is there."""
        try:
            _ptrace(_SEIZE, thread)
            _ptrace(_INTERRUPT, thread)
        except ProcessLookupError:
            return False
        return True

    def _await(self, thread: int) -> None:
        while True:
            found, status = os.waitpid(thread, os.WNOHANG | _WALL)
            if found and os.WIFSTOPPED(status):
                # Else it was about to get a signal, which is given to it when it goes on
                self._stopped[thread] = 0 if status >> 16 else os.WSTOPSIG(status)
                return
            if found:  # it has ended
                return
            if time.monotonic() > self._end:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            time.sleep(_POLL_SECONDS)

    def go_on(self) -> None:
        """Let all that stand still go on; the kernel does it for the rest when this thread ends."""
        for thread, signal in self._stopped.items():
            try:
                _ptrace(_DETACH, thread, signal)
            except OSError:  # it was killed meanwhile
                continue


def while_still(name: str, holder: Holder, do: Callable[[], None]) -> None:
    """Have something done while no thread of a device's holder runs.

    :param name: the device's, for errors.
    :param do: is to be short; runs in another thread.
    :raises DeviceBusyError: the holder cannot be stopped, or has gone. Nothing was done.
    """
    if holder.pid == os.getpid():
        do()
        return
    failures: list[BaseException] = []

    def trace() -> None:
        tracer = _Tracer(holder.pid)
        try:
            _stop(tracer, name, holder)
            do()
        except BaseException as error:  # noqa: BLE001 -- it is raised again in the other thread
            failures.append(error)
        finally:
            tracer.go_on()

    thread = threading.Thread(target=trace, name="tracer", daemon=True)
    threads.start(thread)
    thread.join()
    if failures:
        raise failures[0]


def _stop(tracer: _Tracer, name: str, holder: Holder) -> None:
    try:
        tracer.stop()
    except OSError as error:
        raise DeviceBusyError(
            f"{holder} cannot be made to stand still: {errno_text(error.errno or 0)}",
            device=name,
            hint="it takes CAP_SYS_PTRACE, and a process that no debugger has",
        ) from error
