# SPDX-License-Identifier: MIT
"""A saved device of any form, opened to look into: an image, a bare state, or a QEMU migration stream."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

from vfio_mig.jobs.source import open_input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.archive import Archive
    from vfio_mig.image.decode.qemu import QemuStream
    from vfio_mig.image.window import Window

IMAGE: Final = "image"
STATE: Final = "state"
QEMU: Final = "qemu-stream"
_FIRST_MEMBER: Final = b"header.json\0"


class Saved(NamedTuple):
    """What a file holds, as long as it is open.

    :param kind: ``image``, ``state`` (bare), or ``qemu-stream``.
    :param size: bytes of the file.
    :param window: the device's state; of a QEMU stream, the file.
    """

    kind: str
    size: int
    window: Window
    archive: Archive | None = None
    stream: QemuStream | None = None

    @property
    def driver(self) -> str:
        """The driver that an image's header names, empty where none does."""
        device = None if self.archive is None else self.archive.header.get("device")
        driver = device.get("driver") if isinstance(device, dict) else None
        return driver if isinstance(driver, str) else ""


@contextmanager
def _seekable(file: str) -> Iterator[BinaryIO]:
    """Open a file; a pipe is copied to a temporary one, as all of it is needed more than once."""
    from vfio_mig.image.files import host_error

    with open_input(file) as stream:
        if stream.seekable():
            yield stream
            return
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(stream, copy, 1 << 20)
                copy.seek(0)
            except OSError as error:
                raise host_error("cannot copy the input to it", "temporary file", error) from error
            yield cast("BinaryIO", copy)


@contextmanager
def open_saved(file: str) -> Iterator[Saved]:
    """Open a file, ``-`` for standard input, whatever form it has.

    :raises ImageError: it begins like an image or a QEMU stream and is no whole one.
    :raises UsageError, HostError: as :func:`vfio_mig.jobs.source.open_input`.
    """
    from vfio_mig.image.archive import read_archive
    from vfio_mig.image.decode import qemu
    from vfio_mig.image.window import FileWindow, StateWindow

    with _seekable(file) as stream:
        window = FileWindow(stream)
        first = window.read(0, len(_FIRST_MEMBER))
        if first == _FIRST_MEMBER:
            stream.seek(0)
            with read_archive(stream) as archive:
                yield Saved(IMAGE, window.size, StateWindow(archive), archive=archive)
        elif first.startswith(qemu.MAGIC):
            yield Saved(QEMU, window.size, window, stream=qemu.read_stream(window))
        else:
            yield Saved(STATE, window.size, window)
