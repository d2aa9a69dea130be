# SPDX-License-Identifier: MIT
"""Directories of new files: 0600, never over anything that is there, nothing left after a failure."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from vfio_mig.errors import ImageError, UsageError
from vfio_mig.image.files import host_error
from vfio_mig.image.places import identity, is_ours, open_directory, open_parent
from vfio_mig.interrupts import protected

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

_BUFFER: Final = 1 << 20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _write(fd: int, part: bytes | memoryview) -> None:
    """Write all of it at once, without a buffer that would still change the file when it is closed."""
    view = memoryview(part)
    while view:
        view = view[os.write(fd, view) :]


class NewDirectory:
    """A directory in the making: a context manager that removes what it has made unless the block ends well.

    Whatever is done is done to fds: of its parent, of itself, of the directories in it. So nobody who may write beside
    it or in it can have this put a file elsewhere, or remove one there.

    :param path: does not exist, or is an empty directory of root's or this user's.
    :raises UsageError: there is something in it, it is another user's, or it is not a directory.
    :raises HostError: anything the file system refuses.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._parent = -1
        self._name = ""
        self._fd = -1
        self._is_new = False
        self._directories: dict[str, int] = {}
        self._files: list[tuple[int, str, tuple[int, int, int]]] = []

    @protected
    def __enter__(self) -> Self:
        try:
            self._parent, self._name = open_parent(self._path.rstrip("/") or self._path)
            self._name = self._name or "."  # of /
            self._fd, self._is_new = self._make()
            is_empty = not os.listdir(self._fd)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise host_error("cannot make the directory", self._path, error) from error
            raise
        if not is_empty:
            self._close()
            raise UsageError(f"{self._path} is not empty", hint="name a new directory")
        return self

    def _make(self) -> tuple[int, bool]:
        """Make the directory, or take one that is there; returns it and whether it is new."""
        try:
            os.mkdir(self._name, 0o700, dir_fd=self._parent)
            is_new = True
        except FileExistsError:
            is_new = False
        try:
            fd = os.open(self._name, _DIRECTORY, dir_fd=self._parent)
        except NotADirectoryError:
            raise UsageError(f"{self._path} is not a directory, or is a symbolic link") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UsageError(f"{self._path} is a symbolic link, which is not followed") from None
            raise
        if not is_ours(os.fstat(fd)):
            os.close(fd)
            raise UsageError(
                f"{self._path} belongs to another user, who could change what is put there",
                hint="name a new directory, or one of your own",
            )
        return fd, is_new

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> int:
        """Write a new file; *name* may have one directory in front, which is made. Returns its bytes."""
        directory, _, base = name.rpartition("/")
        size = 0
        try:
            within = self._within(directory) if directory else self._fd
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(base, flags, 0o600, dir_fd=within)
            try:
                for part in parts:
                    _write(fd, part)
                    size += len(part)
                os.fsync(fd)
            finally:
                self._files.append((within, base, identity(os.fstat(fd))))
                os.close(fd)
        except OSError as error:
            raise host_error("cannot write", os.path.join(self._path, name), error) from error
        return size

    def _within(self, name: str) -> int:
        """Return a directory in this one, which is made at the first time."""
        if name not in self._directories:
            os.mkdir(name, 0o700, dir_fd=self._fd)
            fd = os.open(name, _DIRECTORY, dir_fd=self._fd)
            if not is_ours(os.fstat(fd)):  # another one has been put in its place
                os.close(fd)
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name)
            self._directories[name] = fd
        return self._directories[name]

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fd >= 0 and error is not None:
            self._remove()
        self._close()

    def _remove(self) -> None:
        """Remove what was made, unless another thing has its name by now."""
        for within, name, ours in reversed(self._files):
            with suppress(OSError):
                if identity(os.stat(name, dir_fd=within, follow_symlinks=False)) == ours:
                    os.unlink(name, dir_fd=within)
        made = [(self._fd, name, fd) for name, fd in self._directories.items()]
        for within, name, fd in [*made, *([(self._parent, self._name, self._fd)] if self._is_new else [])]:
            with suppress(OSError):
                # The fd keeps its number from being used again
                if os.path.samestat(os.stat(name, dir_fd=within, follow_symlinks=False), os.fstat(fd)):
                    os.rmdir(name, dir_fd=within)

    def _close(self) -> None:
        fds = [self._parent, self._fd, *self._directories.values()]
        self._parent = self._fd = -1
        self._directories.clear()
        for fd in fds:
            if fd >= 0:
                os.close(fd)


class Directory:
    """A directory that is read: regular files only, never through a link."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = open_directory(path)
        except NotADirectoryError:
            raise ImageError(f"{path} is not a directory of what 'vfio-mig extract' has written") from None
        except OSError as error:
            raise host_error("cannot open the directory", path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file in it.

        :raises ImageError: it is missing, or something else than a file.
        """
        directory, _, base = name.rpartition("/")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        within = self._fd
        try:
            if directory:
                within = os.open(directory, flags | os.O_DIRECTORY, dir_fd=self._fd)
            try:
                fd = os.open(base, flags, dir_fd=within)
            finally:
                if directory:
                    os.close(within)
        except FileNotFoundError:
            raise ImageError(f"{self._path}: {name} is missing") from None
        except OSError as error:
            raise host_error("cannot open", os.path.join(self._path, name), error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageError(f"{self._path}: {name} is not a regular file")
        with os.fdopen(fd, "rb", _BUFFER) as file:
            yield file

    def read(self, name: str, limit: int) -> bytes:
        """Read a whole file.

        :raises ImageError: it has more than *limit* bytes, or as :meth:`open`.
        """
        with self.open(name) as file:
            try:
                content = file.read(limit + 1)
            except OSError as error:
                raise host_error("cannot read", os.path.join(self._path, name), error) from error
        if len(content) > limit:
            raise ImageError(f"{self._path}: {name} has more than {limit} bytes")
        return content
