# SPDX-License-Identifier: MIT
"""Where files are made: directories as fds, so that nobody can put a link in the way between two steps.

A path is resolved once, name by name, and used as an fd from then on. Links on the way are followed if they are root's
or this user's own, in a directory of root's or this user's: nobody else could have put them there.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from vfio_mig.errors import UsageError

_LINKS_MAX: Final = 40  # as in the kernel: path_resolution(7)
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def is_ours(status: os.stat_result) -> bool:
    """Tell whether something is root's or this user's: nobody else can change it."""
    return status.st_uid in {0, os.geteuid()}


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """Return what tells a file from another that has its name later: the number alone may be used again at once."""
    return status.st_dev, status.st_ino, status.st_ctime_ns


class _Walk:
    """The way along a path, from an fd to the next one."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._links = 0
        self._names = path.split("/")[::-1]
        self.fd = os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def to_parent(self) -> str:
        """Go to the directory that the last name is in, and return that name."""
        while len(self._names) > 1:
            self._step(self._names.pop())
        return self._names[0]

    def to_end(self) -> None:
        """Go to what the path names, a directory."""
        while self._names:
            self._step(self._names.pop())

    def _step(self, name: str) -> None:
        if name in {"", "."}:
            return
        fd = os.open(name, _LOOK, dir_fd=self.fd)
        try:
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode):
                self._follow(fd, name, status)
            elif stat.S_ISDIR(status.st_mode):
                self.fd, fd = fd, self.fd
            else:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self._path)
        finally:
            os.close(fd)

    def _follow(self, fd: int, name: str, status: os.stat_result) -> None:
        if not (is_ours(status) and is_ours(os.fstat(self.fd))):
            raise UsageError(
                f"{self._path}: {name} is a symbolic link of another user, which is not followed",
                hint="name the directory itself",
            )
        self._links += 1
        if self._links > _LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self._path)
        target = os.readlink("", dir_fd=fd)
        self._names += target.split("/")[::-1]
        if target.startswith("/"):
            root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            os.close(self.fd)
            self.fd = root


def open_parent(path: str) -> tuple[int, str]:
    """Open the directory that a file is in or will be; returns it, an O_PATH fd that the caller closes, and the name.

    :raises UsageError: a link of somebody else's is on the way.
    :raises OSError: as open(2).
    """
    walk = _Walk(path)
    try:
        name = walk.to_parent()
    except BaseException:
        os.close(walk.fd)
        raise
    return walk.fd, name


def open_directory(path: str) -> int:
    """Open a directory as :func:`open_parent` does, for reading; the caller closes it.

    :raises UsageError, OSError: as there.
    """
    walk = _Walk(path)
    try:
        walk.to_end()
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=walk.fd)
    finally:
        os.close(walk.fd)


def open_file(path: str, flags: int, mode: int = 0o600) -> int:
    """Open a file in a directory that is found as :func:`open_parent` does; a link of that name is not followed.

    :raises UsageError, OSError: as there.
    """
    directory, name = open_parent(path)
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
    finally:
        os.close(directory)
