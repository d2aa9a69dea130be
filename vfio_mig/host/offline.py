# SPDX-License-Identifier: MIT
"""Can a device be migrated, and what is its state? As far as that is known without opening it.

To open a device is not harmless: a PCI function is reset, a vGPU with the RFC starts again.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.host.drivers import migrates
from vfio_mig.uapi.v2 import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vfio_mig.host.devices import HostDevice
    from vfio_mig.host.discover import Host

DEBUGFS: Final = "sys/kernel/debug/vfio"
"""One directory per device, for root, since Linux 6.8 with CONFIG_VFIO_DEBUGFS (drivers/vfio/debugfs.c)."""
SECONDS: Final = 2.0
"""How long a driver may take to say its state; it has a lock to wait for."""
NO_ANSWER: Final = "?"
_STATE_MAX: Final = 64
_STATES: Final = {name.upper().replace("-", "_"): name for name in NAMES.values()}


class OfflineStatus(NamedTuple):
    """What is known of a device that was not opened.

    :param migratable: whether it has the migration protocol v2; None when that is not known before it is opened, as of
        every mdev without it: it may have the RFC.
    :param source: where that is from: ``debugfs`` or ``driver``, its name; None when it is not known.
    :param state: the migration state by QEMU's name, None when it is not known, ``?`` when the driver does not answer.
    """

    migratable: bool | None
    source: str | None
    state: str | None


def look(devices: Sequence[HostDevice], host: Host, seconds: float = SECONDS) -> list[OfflineStatus]:
    """Tell what is known of each device, in the same order.

    :param seconds: for which all drivers together are waited for.
    """
    files = {device.name: host.path(DEBUGFS, device.name, "migration", "state") for device in devices}
    there = [files[device.name] for device in devices if os.path.exists(files[device.name])]
    texts = read_within(there, seconds) if there else {}
    return [_known(device, host, files[device.name] in texts, texts.get(files[device.name])) for device in devices]


def _known(device: HostDevice, host: Host, has_state: bool, text: str | None) -> OfflineStatus:
    if has_state:
        state = NO_ANSWER if text is None else _STATES.get(text.strip())
        return OfflineStatus(True, "debugfs", state)
    if os.path.isdir(host.path(DEBUGFS, device.name)):
        # The driver has registered the device without migration
        return OfflineStatus(None, None, None) if device.kind == "mdev" else OfflineStatus(False, "debugfs", None)
    migratable = migrates(device.driver)
    return OfflineStatus(migratable, None if migratable is None else "driver", None)


def read_within(paths: Iterable[str], seconds: float) -> dict[str, str | None]:
    """Read small files of which any may block for ever, all at once.

    A kernel file that waits for a lock which is never given free cannot be interrupted, and a thread that waits there
    keeps its process from ending. So each is read by a process of its own, which is left behind if need be.

    :returns: each file's text, empty for one that cannot be read, None for one that has not answered in time.
    """
    readers = [_Reader(path) for path in paths]
    end = time.monotonic() + seconds
    return {reader.path: reader.finish(end) for reader in readers}


class _Reader:
    """A process that copies one file into a pipe."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._fd, there = os.pipe()
        # Opened by cat: posix_spawn would wait for a file that blocks in open()
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, there, 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        try:
            self._pid = os.posix_spawnp("cat", ["cat", "--", path], os.environ, file_actions=actions)
        except OSError:
            self._pid = 0
        finally:
            os.close(there)

    def finish(self, end: float) -> str | None:
        """Return what came until *end*, None when it did not come to its end by then."""
        import select

        text = b""
        try:
            while len(text) < _STATE_MAX:
                if not select.select([self._fd], [], [], max(end - time.monotonic(), 0))[0]:
                    self._leave()
                    return None
                chunk = os.read(self._fd, _STATE_MAX)
                if not chunk:
                    break
                text += chunk
        finally:
            os.close(self._fd)
        if self._pid:
            os.waitpid(self._pid, 0)
        return text.decode("ascii", "replace")

    def _leave(self) -> None:
        """End the process if it can be; who waits for a lock in the kernel cannot, and becomes init's."""
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            for _ in range(20):
                if os.waitpid(self._pid, os.WNOHANG)[0]:
                    break
                time.sleep(0.005)
