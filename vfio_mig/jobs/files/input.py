# SPDX-License-Identifier: MIT
"""Where an image comes from: a file or standard input, verified whole before anything is made of it."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

from vfio_mig.errors import HostError, ImageError, UsageError, errno_text
from vfio_mig.image.forms import EMPTY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.archive import Archive

STDIN: Final = "-"
CHUNK: Final = 1 << 20
"""Bytes of a raw state that are in memory at a time, where it may be of any size."""
_SPOOL_IN_MEMORY: Final = 8 << 20


class Image(NamedTuple):
    """A whole image: the archive it came in, unless it was raw, and the state.

    :param state: empty where the state may be of any size; see :meth:`chunks`.
    :param bare: a raw state of any size.
    """

    state: bytes | memoryview
    archive: Archive | None
    bare: BinaryIO | None = None

    @property
    def state_size(self) -> int:
        """Bytes of the state."""
        if self.archive is not None:
            return self.archive.state_size
        return len(self.state) if self.bare is None else self.bare.seek(0, os.SEEK_END)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Return an iterator over the state, some MiB at a time; the first piece may be read from now on."""
        if self.state:
            return iter((self.state,))
        if self.archive is not None:
            from vfio_mig.image.layout import CHUNK as MEMBER
            from vfio_mig.threads import ahead

            # A member is read once more, and as a rule verified, which may take longer than to load it
            chunks = self.archive.state_chunks()
            is_long = self.archive.state_size > MEMBER and not self.archive.is_at_hand
            return ahead(chunks) if is_long else chunks
        return self._bare_chunks()

    def _bare_chunks(self) -> Iterator[bytes]:
        if self.bare is not None:
            self.bare.seek(0)
            while chunk := self.bare.read(CHUNK):
                yield chunk


@contextmanager
def _named(file: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        error.file = error.file or file
        raise


@contextmanager
def open_input(file: str) -> Iterator[BinaryIO]:
    """Open an image; ``-`` is standard input. An ImageError in the block is told to be of this file.

    :raises UsageError: a directory, FIFO or device, or a terminal as standard input.
    :raises HostError: it cannot be opened.
    """
    if file == STDIN:
        if sys.stdin is None:  # closed when the process started, in a program of somebody else's
            raise HostError("standard input is closed", hint="name a file")
        if sys.stdin.isatty():
            raise UsageError("the image is binary and cannot be typed", hint="redirect a file or name one")
        with _named("standard input"):
            yield sys.stdin.buffer
        return
    with open_regular(file, "use - to read from a pipe") as stream, _named(file):
        yield stream


def open_regular(file: str, hint: str | None = None, *, what: str = "") -> BinaryIO:
    """Open a file that must be a regular one: opening anything else may wait for ever, or do something.

    :param what: it is, for a message.
    :raises UsageError: it is none.
    :raises HostError: it cannot be opened.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        wanted = f"open {what}" if what else "open"
        raise HostError(f"{file}: cannot {wanted}: {errno_text(error.errno or 0)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # before fdopen(), which fails in its own way on a directory
        os.close(fd)
        raise UsageError(f"{file} is not a regular file", hint=hint)
    return os.fdopen(fd, "rb")


def look_at(stream: BinaryIO, *, raw: bool) -> None:
    """Refuse a file that is not an image by its first bytes, before anything else is done for it; a pipe is not asked.

    :param raw: whether a bare state is wanted.
    :raises ImageError: it is empty or none.
    """
    from vfio_mig.image.forms import FIRST, require_image

    if stream.seekable():
        try:
            first = os.pread(stream.fileno(), FIRST, stream.tell())
        except OSError as error:
            raise HostError(f"cannot read: {errno_text(error.errno or 0)}") from error
        require_image(first, raw=raw)


def _read_raw(stream: BinaryIO, limit: int) -> bytes:
    """Read a bare state; one byte more than the limit is enough to see that it is too long."""
    try:
        state = stream.read(limit + 1)
    except OSError as error:
        raise HostError(f"cannot read the state: {errno_text(error.errno or 0)}") from error
    if len(state) > limit:
        raise ImageError(f"more than {limit} bytes: too long for a device's state region")
    return state


def _spool_raw(stream: BinaryIO, spool: BinaryIO) -> None:
    """Copy a bare state of any size: without checksums all that can be seen to is that it comes to its end."""
    try:
        while chunk := stream.read(CHUNK):
            spool.write(chunk)
    except OSError as error:
        raise HostError(f"cannot read the state: {errno_text(error.errno or 0)}") from error
    if not spool.tell():
        raise ImageError(EMPTY)


@contextmanager
def read_image(stream: BinaryIO, limit: int | None, *, raw: bool = False, alone: bool = True) -> Iterator[Image]:
    """Read and verify an image.

    :param limit: bytes of the largest state that is taken into memory; a larger one is left empty. None: the state is
        a stream of any size and stays where it is, or, if it is raw, in an unnamed temporary file.
    :param alone: whether the stream must end behind the image.
    :raises ImageError: it is not whole, or a raw state is longer than *limit*.
    """
    from vfio_mig.host.lease import Lease
    from vfio_mig.image.archive import read_archive

    if raw and limit is None:
        import tempfile

        with cast("BinaryIO", tempfile.SpooledTemporaryFile(_SPOOL_IN_MEMORY)) as spool:
            _spool_raw(stream, spool)
            yield Image(b"", None, spool)
    elif raw:
        yield Image(_read_raw(stream, limit or 0), None)
    else:
        with ExitStack() as stack:
            lease = stack.enter_context(Lease(stream.fileno())) if stream.seekable() else None
            is_frozen = (lambda: False) if lease is None else lease.holds
            archive = stack.enter_context(read_archive(stream, alone=alone, is_frozen=is_frozen))
            if limit is None:
                import vfio_mig.threads  # noqa: F401 -- before the device is stopped
            is_small = limit is not None and archive.state_size <= limit
            yield Image(archive.state() if is_small else b"", archive)
