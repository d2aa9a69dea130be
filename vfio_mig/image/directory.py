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
from vfio_mig.interrupts import protected

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

_BUFFER: Final = 1 << 20


class NewDirectory:
    """A directory in the making: a context manager that removes what it has made unless the block ends well.

    :param path: does not exist, or is an empty directory.
    :raises UsageError: there is something in it, or it is no directory.
    :raises HostError: anything the file system refuses.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._is_new = False
        self._made: list[str] = []

    @protected
    def __enter__(self) -> Self:
        try:
            try:
                os.mkdir(self._path, 0o700)
                self._is_new = True
            except FileExistsError:
                pass
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            is_empty = not os.listdir(self._fd)
        except NotADirectoryError:
            raise UsageError(f"{self._path} is no directory, or is a symbolic link") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UsageError(f"{self._path} is a symbolic link, which is not followed") from None
            raise host_error("cannot make the directory", self._path, error) from error
        if not is_empty:
            self._close()
            raise UsageError(f"{self._path} is not empty", hint="name a new directory")
        return self

    def write(self, name: str, parts: Iterable[bytes]) -> int:
        """Write a new file; *name* may have one directory in front, which is made. Returns its bytes."""
        directory, _, _ = name.rpartition("/")
        size = 0
        try:
            if directory and directory not in self._made:
                os.mkdir(directory, 0o700, dir_fd=self._fd)
                self._made.append(directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=self._fd)
            self._made.append(name)
            with os.fdopen(fd, "wb", _BUFFER) as file:
                for part in parts:
                    file.write(part)
                    size += len(part)
                file.flush()
                os.fsync(fd)
        except OSError as error:
            raise host_error("cannot write", os.path.join(self._path, name), error) from error
        return size

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fd < 0:
            return
        if error is not None:
            for name in reversed(self._made):
                with suppress(OSError):
                    is_directory = stat.S_ISDIR(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode)
                    (os.rmdir if is_directory else os.unlink)(name, dir_fd=self._fd)
            if self._is_new:
                with suppress(OSError):
                    os.rmdir(self._path)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


class Directory:
    """A directory that is read: regular files only, never through a link."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise ImageError(f"{path} is no directory of what 'vfio-mig extract' has written") from None
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
            raise ImageError(f"{self._path}: {name} is no regular file")
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
