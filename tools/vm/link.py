# SPDX-License-Identifier: MIT
"""``--link NAME/END``: a network cable between two VMs of this host, and nothing else.

Each QEMU sends the frames of its guest to a socket file of the other's. No port of the host's is opened, no user but
this one can reach the sockets, and neither VM has to be started first: a frame that nobody takes is lost, as on a cable
that is not plugged in yet.
"""

import argparse
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tools.vm.errors import RunnerError

ENDS: Final = (1, 2)
_NETWORK: Final = "10.9.0"
_SOCKET_PATH_MAX: Final = 107  # bytes: struct sockaddr_un
_FORM: Final = re.compile(r"([A-Za-z0-9][\w-]{0,31})/([12])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Link:
    """One end of a cable; *directory* has the sockets of both."""

    directory: Path
    end: int

    @property
    def other(self) -> int:
        """The end that the other VM has."""
        return ENDS[0] + ENDS[1] - self.end

    @property
    def address(self) -> str:
        """The guest's IPv4 address."""
        return f"{_NETWORK}.{self.end}"

    @property
    def peer(self) -> str:
        """The other guest's."""
        return f"{_NETWORK}.{self.other}"

    def qemu_arguments(self) -> list[str]:
        """Return what QEMU needs to have it."""
        here, there = (str(self.directory / str(end)).replace(",", ",,") for end in (self.end, self.other))
        return [
            "-netdev", f"dgram,id=vm_link,local.type=unix,local.path={here},remote.type=unix,remote.path={there}",
            "-device", f"virtio-net-pci,netdev=vm_link,mac=52:54:00:09:00:{self.end:02x},romfile=",
        ]  # fmt: skip


def parse(text: str) -> tuple[str, int]:
    """Take NAME/END apart.

    >>> parse("pair/2")
    ('pair', 2)

    :raises ArgumentTypeError: it is of another form.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME/1 or NAME/2, NAME of letters, digits, _ and -")
    return found[1], int(found[2])


def _lock(link: Link) -> IO[bytes]:
    """Take this end, until the file is closed; RunnerError while another VM has it."""
    path = link.directory / f"{link.end}.lock"
    while True:
        link.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunnerError(f"--link: another VM has end {link.end} of {link.directory.name}") from None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # whoever had it has removed it meanwhile


@contextmanager
def plugged(link: Link | None) -> Iterator[list[str]]:
    """Have this end of a cable, and what QEMU needs for it; nothing for no cable.

    :raises RunnerError: another VM has it.
    """
    if link is None:
        yield []
        return
    if len(os.fsencode(link.directory / "1")) > _SOCKET_PATH_MAX:
        raise RunnerError(f"{link.directory} is too long a path for a socket; VFIO_MIG_CACHE chooses a shorter one")
    with _lock(link):
        try:
            yield link.qemu_arguments()
        finally:
            for name in (f"{link.end}", f"{link.end}.lock"):
                (link.directory / name).unlink(missing_ok=True)
            with suppress(OSError):  # the other end is in use
                link.directory.rmdir()
