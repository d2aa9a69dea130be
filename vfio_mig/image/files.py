# SPDX-License-Identifier: MIT

"""Output files that are whole or not there."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO, Final

from vfio_mig.errors import HostError, UsageError, errno_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_KINDS: Final = {
    stat.S_IFDIR: "is a directory; name a file in it",
    stat.S_IFLNK: "is a symbolic link, which is never followed; name the file itself",
    stat.S_IFIFO: "is a FIFO, which cannot be replaced in one step; use - and a redirection",
    stat.S_IFSOCK: "is a socket; use - and a pipe",
    stat.S_IFCHR: "is a character device; use - and a redirection",
    stat.S_IFBLK: "is a block device; use - and a redirection",
}
_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class _File(io.FileIO):
    """A file whose failed writes are HostErrors that name the target, not the temporary file."""

    def __init__(self, fd: int, target: str) -> None:
        super().__init__(fd, "wb")
        self.target = target

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise host_error("cannot write", self.target, error) from error


def host_error(what: str, path: str, error: OSError) -> HostError:
    """Say which operation on which file failed, with the errno's name."""
    hint = {errno.ENOSPC: "make room and try again", errno.EDQUOT: "the user's quota is used up"}.get(error.errno or 0)
    return HostError(f"{path}: {what}: {errno_text(error.errno or 0)}", hint=hint)


@contextmanager
def committed(path: "str | os.PathLike[str]", *, force: bool = False) -> Iterator[BinaryIO]:
    """Give a file that becomes *path* only when the block ends without an error.

    It is made with mode 0600 under a temporary name in the same directory, synced to disk and renamed, the
    directory is synced too. After an error, Ctrl-C included, the temporary file is gone and *path* is what it was;
    a kill leaves at most a hidden file beside it.

    :param force: replace an existing file. Links, directories, devices and FIFOs are refused even then.
    :raises UsageError: *path* exists and *force* is not given, or it is no regular file.
    :raises HostError: the disk is full, permission is missing, or any other failure of the file system.
    """
    target = os.fspath(path)
    check_target(target, force=force)
    directory = os.path.dirname(target) or "."
    temporary, fd = _make_temporary(directory, target)
    file = io.BufferedWriter(_File(fd, target), 1 << 20)
    try:
        yield file
        _commit(file, temporary, target, force=force)
    except BaseException:
        with suppress(OSError, HostError):  # what cannot be flushed is not wanted any more
            file.close()
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


@contextmanager
def writing(fd: int, name: str) -> Iterator[BinaryIO]:
    """Give a stream to an open fd, which is closed with the block; its failed writes are HostErrors on *name*."""
    file = io.BufferedWriter(_File(fd, name), 1 << 20)
    try:
        yield file
        file.flush()
    finally:
        with suppress(OSError, HostError):  # it has failed before, or else there is nothing left to write
            file.close()


def check_target(target: str, *, force: bool) -> None:
    """Refuse a target that may not be replaced; to be asked before a device is touched.

    :raises UsageError: as :func:`committed`.
    """
    if not os.path.basename(target):
        raise UsageError(f"{target!r} names no file")
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise host_error("cannot look at it", target, error) from error
    if problem := _KINDS.get(stat.S_IFMT(mode)):
        raise UsageError(f"{target} {problem}")
    if not force:
        raise UsageError(f"{target} exists", hint="use --force to replace it")


def _make_temporary(directory: str, target: str) -> tuple[str, int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(100):
        # A name has at most 255 bytes, so a long one is not repeated in full.
        name = f".{os.path.basename(target)[:50]}.{os.urandom(6).hex()}"
        temporary = os.path.join(directory, name)
        try:
            return temporary, os.open(temporary, flags, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise host_error("cannot create it", target, error) from error
    raise HostError(f"{target}: no free temporary name in {directory}")


def _commit(file: BinaryIO, temporary: str, target: str, *, force: bool) -> None:
    try:
        file.flush()
        os.fsync(file.fileno())  # ENOSPC may come as late as here
        file.close()
        if force:
            check_target(target, force=True)
            os.replace(temporary, target)
        else:
            _rename_new(temporary, target)
    except OSError as error:
        raise host_error("cannot commit it", target, error) from error


def _rename_new(temporary: str, target: str) -> None:
    """Rename without replacing a file that has appeared meanwhile: link() refuses, rename() would not."""
    try:
        os.link(temporary, target, follow_symlinks=False)
    except FileExistsError:
        raise UsageError(f"{target} has appeared meanwhile", hint="use --force to replace it") from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        check_target(target, force=False)
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def _sync_directory(directory: str) -> None:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a directory that may be written but not read
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems
            raise host_error("cannot sync the directory", directory, error) from error
    finally:
        os.close(fd)
