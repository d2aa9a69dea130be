# SPDX-License-Identifier: MIT
"""Output files that are whole or not there."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from vfio_mig.errors import HostError, UsageError, VfioMigError, errno_text
from vfio_mig.image.places import identity, open_parent
from vfio_mig.interrupts import protected, waiting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from _typeshed import ReadableBuffer

_KINDS: Final = {
    stat.S_IFDIR: "is a directory; name a file in it",
    stat.S_IFLNK: "is a symbolic link, which is never followed; name the file itself",
    stat.S_IFIFO: "is a FIFO, which cannot be replaced in one step; use - and a redirection",
    stat.S_IFSOCK: "is a socket; use - and a pipe",
    stat.S_IFCHR: "is a character device; use - and a redirection",
    stat.S_IFBLK: "is a block device; use - and a redirection",
}
_BUFFER: Final = 1 << 16
"""Bytes; larger pieces than this are not copied first."""
_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class _File(io.FileIO):
    """A file whose failed writes are HostErrors that name the target, not the temporary file."""

    def __init__(self, fd: int, target: str) -> None:
        super().__init__(fd, "wb")
        self.target = target

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise host_error("cannot write", self.target, error) from error


class _Pipe(_File):
    """One whose reader may let us wait for any time, and a signal ends that: nothing in a pipe has to be undone."""

    @waiting
    def write(self, data: ReadableBuffer, /) -> int:
        return super().write(data)


def host_error(what: str, path: str, error: OSError) -> HostError:
    """Say which operation on which file failed, with the errno's name."""
    hint = {errno.ENOSPC: "make room and try again", errno.EDQUOT: "the user's quota is used up"}.get(error.errno or 0)
    return HostError(f"{path}: {what}: {errno_text(error.errno or 0)}", hint=hint)


def committed(path: str | os.PathLike[str], *, force: bool = False) -> NewFile:
    """Give a file that becomes *path* only when the ``with`` block ends without an error.

    It is made with mode 0600 in the same directory, without a name where the file system can, synced to disk and then
    named; the directory is synced too. After an error, Ctrl-C included, nothing of it is left and *path* is what it
    was. So it is after a kill, except that a file system without O_TMPFILE keeps a hidden file beside it.

    :param force: replace an existing file. Links, directories, devices and FIFOs are refused even then.
    :raises UsageError: *path* exists and *force* is not given, or it is not a regular file.
    :raises HostError: the disk is full, permission is missing, or any other failure of the file system.
    """
    return NewFile(os.fspath(path), force=force)


class Output(Protocol):
    """Where an image goes: a context manager that gives a stream."""

    @property
    def can_reread(self) -> bool:
        """Whether what has been written can be read again through the stream's fd."""
        ...

    def __enter__(self) -> BinaryIO: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def prepare(self) -> None:
        """Do what may take long or fail before :meth:`commit`."""

    def commit(self) -> None:
        """Make sure of it that everything has arrived; what fails from now on undoes nothing of it."""

    def withdraw(self) -> bool:
        """Take back what has been committed: another part of the same job has failed.

        :returns: whether nothing of it is left.
        """
        ...

    def settle(self) -> None:
        """Give up what :meth:`withdraw` would need: the job is done."""


@protected
def commit_outputs(outputs: Sequence[Output]) -> None:
    """Commit all, or after a failure none of them: what was committed is withdrawn.

    :raises HostError: the first failure. What could not be withdrawn is named, as it is whole, and must not be used.
    """
    for number, output in enumerate(outputs):
        try:
            output.commit()
        except VfioMigError as error:
            for done in reversed(outputs[:number]):
                if not done.withdraw():
                    error.undo_errors.append(HostError(f"{done} is there, and cannot be removed: do not use it"))
            raise


class NewFile:
    """A file in the making; see :func:`committed`. Use it once."""

    can_reread: Final = True

    def __init__(self, target: str, *, force: bool) -> None:
        self._target = target
        self._force = force
        self._place: _Place | None = None
        self._temporary: str | None = None
        self._file: BinaryIO | None = None
        self._fd = -1
        self._named: tuple[int, int, int] | None = None
        """What has the target's name since the commit."""
        self._replaced: str | None = None

    @protected
    def __enter__(self) -> BinaryIO:
        if not os.path.basename(self._target):
            raise UsageError(f"{self._target!r} names no file")
        self._place = _Place(self._target)
        try:
            self._place.check(force=self._force)
            fd = _open_unnamed(self._place)
            if fd is None:
                self._temporary, fd = self._place.open_temporary()
        except BaseException:
            self._place.close()
            raise
        self._file = io.BufferedWriter(_File(fd, self._target), _BUFFER)
        return self._file

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and (self._file is not None or self._fd >= 0):
                self.commit()
            if self._named is not None:
                self.settle()
        finally:
            self._discard()

    def __str__(self) -> str:
        return self._target

    @protected
    def prepare(self) -> None:
        """Make it durable; it has no name yet.

        :raises HostError: the disk is full, as a rule.
        """
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())  # ENOSPC may come as late as here
            # Network file systems say at the close what they could not write. What has a name by then cannot be undone
            # so easily, so it is closed before, and only an fd to name it by is kept.
            self._fd = os.dup(self._file.fileno())
            file, self._file = self._file, None
            file.close()
        except OSError as error:
            raise host_error("cannot commit it", self._target, error) from error

    @protected
    def commit(self) -> None:
        """Make it durable and give it its name, before the end of the block.

        :raises HostError: nothing of it is left at the end of the block; what it was to replace is there.
        """
        if self._named is not None or self._place is None:
            return
        self.prepare()
        try:
            self._name(self._place, self._fd)
            self._named = identity(os.fstat(self._fd))
            self._place.sync()
        except OSError as error:
            problem: VfioMigError = host_error("cannot commit it", self._target, error)
        except VfioMigError as error:
            problem = error
        else:
            return
        if not self.withdraw():
            problem.undo_errors.append(HostError(f"{self._target} is there, and cannot be removed: do not use it"))
        raise problem

    @protected
    def withdraw(self) -> bool:
        """Remove the file again, and bring back what it has replaced."""
        if self._named is None or self._place is None:
            return True
        try:
            if self._replaced is not None:
                self._place.replace(self._replaced)
                self._replaced = None
            else:
                self._place.remove(self._named)
        except OSError:
            return False
        self._named = None
        fd, self._fd = self._fd, -1  # else the end of the block would commit it once more
        os.close(fd)
        return True

    @protected
    def settle(self) -> None:
        """Remove what it has replaced for good."""
        replaced, self._replaced = self._replaced, None
        if replaced is not None and self._place is not None:
            with suppress(OSError):  # a hidden file more; the new one is there
                os.unlink(replaced, dir_fd=self._place.fd)

    def _name(self, place: _Place, fd: int) -> None:
        if self._temporary is None:
            if not self._force:
                place.link_unnamed(fd)
                return
            self._temporary = place.link_temporary(fd)
        if self._force:
            place.check(force=True)
            self._replaced = place.keep()
            place.replace(self._temporary)
        else:
            place.rename_new(self._temporary)
        self._temporary = None

    def _discard(self) -> None:
        """Leave nothing behind; what has been committed is not touched."""
        file, self._file = self._file, None
        temporary, self._temporary = self._temporary, None
        place, self._place = self._place, None
        fd, self._fd = self._fd, -1
        if file is not None:
            with suppress(OSError, HostError):  # what cannot be flushed is not wanted any more
                file.close()
        if fd >= 0:
            with suppress(OSError):  # nothing was written through it
                os.close(fd)
        if place is not None:
            replaced = None if self._named is not None else self._replaced
            for hidden in (temporary, replaced):
                if hidden is not None:
                    with suppress(OSError):  # the file system is at its end; the first error is the one to be told
                        os.unlink(hidden, dir_fd=place.fd)
            place.close()


class _Place:
    """Where a file gets its name: its directory, opened once, so that nothing on the way to it can be swapped.

    :raises HostError: the directory cannot be opened.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        try:
            self.fd, self.name = open_parent(target)
        except OSError as error:
            raise host_error("cannot create it", target, error) from error

    def close(self) -> None:
        """Close the directory."""
        os.close(self.fd)

    def check(self, *, force: bool) -> None:
        """Refuse to replace what may not be replaced, as :func:`check_target` does."""
        _check(self.target, self.name, self.fd, force=force)

    def _temporary_names(self) -> Iterator[str]:
        for _ in range(100):
            # A name has at most 255 bytes, so a long one is not repeated in full.
            yield f".{self.name[:50]}.{os.urandom(6).hex()}"
        raise HostError(f"{self.target}: no free temporary name beside it")

    def open_temporary(self) -> tuple[str, int]:
        """Make a file with a name of its own."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        for temporary in self._temporary_names():
            try:
                return temporary, os.open(temporary, flags, 0o600, dir_fd=self.fd)
            except FileExistsError:
                continue
            except OSError as error:
                raise host_error("cannot create it", self.target, error) from error
        raise AssertionError  # the names end with an error

    def link_temporary(self, fd: int) -> str:
        """Name an unnamed file for a moment, as only a named one can replace another in one step."""
        for temporary in self._temporary_names():
            try:
                self._link(fd, temporary)
            except FileExistsError:
                continue
            return temporary
        raise AssertionError  # the names end with an error

    def _link(self, fd: int, name: str) -> None:
        # Python calls linkat(), which can follow the link in /proc, only when it is given some directory's fd
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, dst_dir_fd=self.fd, follow_symlinks=True)

    def link_unnamed(self, fd: int) -> None:
        """Give an unnamed file its name."""
        try:
            self._link(fd, self.name)
        except FileExistsError:
            raise _appeared(self.target) from None

    def keep(self) -> str | None:
        """Give a file that is about to be replaced a second, hidden name; None where there can be no two."""
        for temporary in self._temporary_names():
            try:
                os.link(self.name, temporary, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            except FileExistsError:
                continue
            except OSError:
                return None
            return temporary
        raise AssertionError  # the names end with an error

    def replace(self, temporary: str) -> None:
        """Give a file its name, which another may have."""
        os.replace(temporary, self.name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def rename_new(self, temporary: str) -> None:
        """Rename without replacing a file that has appeared meanwhile: link() refuses, rename() would not."""
        try:
            os.link(temporary, self.name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        except FileExistsError:
            raise _appeared(self.target) from None
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            self.check(force=False)
            self.replace(temporary)
        else:
            with suppress(OSError):  # it has its name; what is left is a hidden file more
                os.unlink(temporary, dir_fd=self.fd)

    def remove(self, ours: tuple[int, int, int]) -> None:
        """Remove a file, unless another has its name by now."""
        with suppress(FileNotFoundError):
            if identity(os.stat(self.name, dir_fd=self.fd, follow_symlinks=False)) == ours:
                os.unlink(self.name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make names in the directory durable."""
        directory = os.path.dirname(self.target) or "."
        try:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        except PermissionError:  # a directory that may be written but not read
            return
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems
                raise host_error("cannot sync the directory", directory, error) from error
        finally:
            os.close(fd)


class Stream:
    """A stream to an open fd, which is closed with the block; its failed writes are HostErrors on *name*."""

    can_reread: Final = False

    def __init__(self, fd: int, name: str) -> None:
        self._name = name
        self._pipe = _Pipe(fd, name)
        self._file = io.BufferedWriter(self._pipe, _BUFFER)

    def __enter__(self) -> BinaryIO:
        """Give the stream.

        :raises HostError: the fd is open for reading only; said now, before a device is stopped for it.
        """
        try:
            os.write(self._file.fileno(), b"")
        except OSError as error:
            if error.errno == errno.EBADF:
                raise host_error("cannot write", self._name, error) from error
        return self._file

    def prepare(self) -> None:
        """Write what is still in the buffer."""
        self._file.flush()

    def commit(self) -> None:
        """Write what is still in the buffer."""
        self._file.flush()

    def withdraw(self) -> bool:
        """Nothing that has been written to a stream comes back; its reader sees that the job failed."""
        return True

    def settle(self) -> None:
        """Nothing was replaced."""

    def close(self) -> None:
        """Write what is still in the buffer and close it: its reader comes to the end. A second call does nothing."""
        self._file.close()

    @protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._file.closed:
                self.commit()
        finally:
            with suppress(OSError, HostError):
                if error is not None:  # what is in the buffer is worth nothing, and whoever reads might not take it
                    self._pipe.close()
                self._file.close()


def standard_output(what: str, hint: str) -> Stream:
    """Return a stream to standard output, for an image.

    :param what: it is that must not go to a terminal; *hint*: what to do instead.
    :raises UsageError: it is a terminal.
    :raises HostError: this process has none.
    """
    if sys.stdout is None:  # closed when the process started, in a program of somebody else's
        raise HostError("standard output is closed", hint="name a file")
    if sys.stdout.isatty():
        raise UsageError(f"{what} and will not be written to a terminal", hint=hint)
    return Stream(os.dup(sys.stdout.fileno()), "standard output")


def check_target(target: str, *, force: bool) -> None:
    """Refuse a target that may not be replaced; to be asked before a device is touched.

    :raises UsageError: as :func:`committed`.
    """
    if not os.path.basename(target):
        raise UsageError(f"{target!r} names no file")
    _check(target, target, None, force=force)


def _check(target: str, name: str, directory: int | None, *, force: bool) -> None:
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise host_error("cannot look at it", target, error) from error
    if problem := _KINDS.get(stat.S_IFMT(mode)):
        raise UsageError(f"{target} {problem}")
    if not force:
        raise UsageError(f"{target} exists", hint="use --force to replace it")


def _open_unnamed(place: _Place) -> int | None:
    """Open a file without a name, which a kill takes away; None where the file system has no such thing."""
    try:
        return os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=place.fd)
    except OSError:  # whatever is wrong: the attempt with a name says it in the user's words
        return None


def _appeared(target: str) -> UsageError:
    return UsageError(f"{target} has appeared meanwhile", hint="use --force to replace it")
