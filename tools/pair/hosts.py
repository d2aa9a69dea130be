# SPDX-License-Identifier: MIT
"""Two hosts that reach each other by ssh: the way from one, and what the other one's administrator and network do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.pair import sshd

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = "VFIO_MIG_LINK"
PEER: Final = "VFIO_MIG_LINK_PEER"
BANNER: Final = "*** Authorized use only ***\nvfio-mig: this is no error\n"
HOST_FAILED: Final = 7
PATIENCE: Final = 90.0
"""Seconds that a command has which must not hang: without an answer it would for ever."""
COMMAND: Final = Path("/usr/local/bin/vfio-mig")


class Way:
    """The other host as this host's root knows it: ``~/.ssh`` is what the cases change.

    :param name: a device there.
    """

    def __init__(self, name: str) -> None:
        self._ssh: Final = sshd.own_home() / ".ssh"
        self.host: Final = f"root@{os.environ[PEER]}"
        self.device: Final = f"ssh://{self.host}/{name}"

    def know(self, key: str) -> None:
        """Know a key of the other host's, and no other."""
        (self._ssh / "known_hosts").write_text(f"{os.environ[PEER]} {key}\n")

    def have(self, key: str) -> None:
        """Have this user's own key."""
        path = self._ssh / "id_ed25519"
        path.touch(mode=0o600)
        path.write_text(key)


def vfio_mig(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, who has a terminal; it must not wait for what is typed there."""
    return subprocess.run(
        ["vfio-mig", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def is_restoring() -> bool:
    """Say whether a ``vfio-mig restore`` is at work in this VM."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"\0restore\0" in path.read_bytes():
                return True
    return False


class Target:
    """The host that a device comes to, with a server of its own."""

    def __init__(self) -> None:
        sshd.install()
        self._home: Final = sshd.own_home()
        (self._home / ".bashrc").write_text("")  # the host's may take its time
        keys = {f"{name}_key": sshd.make_key(f"{name}_key") for name in ("host", "other", "user")}
        self.told: Final = {**keys, "user_key": (sshd.OWN / "user_key").read_text()}
        self._server: Final = sshd.Server(os.environ[HERE], BANNER)

    def close(self) -> None:
        """End the server."""
        self._server.close()

    def device_state(self) -> dict[str, Any]:
        """Say how the device is, for comparison."""
        raise NotImplementedError

    def judge(self, facts: dict[str, Any]) -> int:
        """Compare the device with the source, start it, and see what it does; how many checks fail."""
        raise NotImplementedError

    def state(self, _: object) -> dict[str, Any]:
        """Say how the device is, once no restore is at work on it."""
        end = time.monotonic() + PATIENCE
        while is_restoring():
            if time.monotonic() > end:
                raise TimeoutError("a restore whose connection is broken does not end")
            time.sleep(0.2)
        return self.device_state()

    def install(self, _: object = None) -> None:
        """Put the command where a shell by ssh finds it."""
        COMMAND.symlink_to(Path(os.environ["VIRTUAL_ENV"]) / "bin/vfio-mig")

    def greeting(self, words: str) -> None:
        """Have root's shell print something at its start."""
        (self._home / ".bashrc").write_text(f"echo {words}\n" if words else "")

    def cut(self, _: object) -> int:
        """Kill what serves a connection."""
        return self._server.signal_sessions(signal.SIGKILL)

    def freeze(self, _: object) -> int:
        """Have it neither answer nor end."""
        return self._server.signal_sessions(signal.SIGSTOP)

    def thaw(self, _: object) -> int:
        """Have it go on, which finds that its client has gone."""
        return self._server.signal_sessions(signal.SIGCONT)

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        """Return what the source may ask for."""
        return {
            one.__name__: one
            for one in (self.state, self.install, self.greeting, self.cut, self.freeze, self.thaw, self.judge)
        }
