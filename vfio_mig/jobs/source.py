# SPDX-License-Identifier: MIT
"""Where an image comes from: a file or standard input, verified whole before anything is made of it."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from vfio_mig.errors import HostError, ImageError, UsageError, errno_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.archive import Archive

STDIN: Final = "-"


class Image(NamedTuple):
    """A whole image: the state, and the archive it came in unless it was raw."""

    state: bytes
    archive: Archive | None


@contextmanager
def open_input(file: str) -> Iterator[BinaryIO]:
    """Open an image; ``-`` is standard input.

    :raises UsageError: a directory, FIFO or device, or a terminal as standard input.
    :raises HostError: it cannot be opened.
    """
    if file == STDIN:
        if sys.stdin.isatty():
            raise UsageError("the image is binary and cannot be typed", hint="redirect a file or name one")
        yield sys.stdin.buffer
        return
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise HostError(f"{file}: cannot open: {errno_text(error.errno or 0)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # before fdopen(), which fails in its own way on a directory
        os.close(fd)
        raise UsageError(f"{file} is no regular file", hint="use - to read from a pipe")
    with os.fdopen(fd, "rb") as stream:
        yield stream


def _read_raw(stream: BinaryIO, limit: int) -> bytes:
    """Read a bare state; one byte more than the limit is enough to see that it is too long."""
    try:
        state = stream.read(limit + 1)
    except OSError as error:
        raise HostError(f"cannot read the state: {errno_text(error.errno or 0)}") from error
    if len(state) > limit:
        raise ImageError(f"more than {limit} bytes: too long for a device's state region")
    return state


@contextmanager
def read_image(stream: BinaryIO, limit: int, *, raw: bool = False, alone: bool = True) -> Iterator[Image]:
    """Read and verify an image.

    :param limit: bytes of the largest state that is taken into memory; a larger one is left empty.
    :param alone: whether the stream must end behind the image.
    :raises ImageError: it is not whole, or a raw state is longer than *limit*.
    """
    from vfio_mig.image.archive import read_archive

    if raw:
        yield Image(_read_raw(stream, limit), None)
        return
    with read_archive(stream, alone=alone) as archive:
        yield Image(archive.state() if archive.state_size <= limit else b"", archive)
