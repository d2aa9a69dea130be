# SPDX-License-Identifier: MIT
"""A saved device of any form, opened to look into: an image, a bare state, or a QEMU migration stream."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

from vfio_mig.errors import ImageError
from vfio_mig.jobs.files.input import open_input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.decode.qemu_parts import QemuStream
    from vfio_mig.image.archive import Archive
    from vfio_mig.image.bytesource import ByteSource
    from vfio_mig.image.wrapped import LibvirtHeader

IMAGE: Final = "image"
STATE: Final = "state"
QEMU: Final = "qemu-stream"
LIBVIRT: Final = "libvirt-save"
OFFSET: Final = "offset"
_FIRST_MEMBER: Final = b"header.json\0"
_WRAPPINGS_MAX: Final = 3


class Saved(NamedTuple):
    """What a file holds, as long as it is open.

    :param kind: ``image``, ``state`` (bare), or ``qemu-stream``.
    :param size: bytes of the file.
    :param source: the device's state; of a QEMU stream, the stream.
    :param wrapping: what was taken away from it, from the outside: a compression, ``libvirt-save``, ``offset``.
    :param libvirt: the header that libvirt has put in front of a stream.
    :param before: what stands in front of the source in the file, if the source is a part of that file; else None.
    """

    kind: str
    size: int
    source: ByteSource
    wrapping: list[str]
    libvirt: LibvirtHeader | None = None
    archive: Archive | None = None
    stream: QemuStream | None = None
    before: ByteSource | None = None

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


class _Unwrapped(NamedTuple):
    """What was inside of something.

    :param names: of what was taken away, from the outside.
    :param file: what the source is of, if it is the whole of a file.
    """

    source: ByteSource
    names: list[str]
    file: BinaryIO | None
    header: LibvirtHeader | None


@contextmanager
def _unwrapped(file: BinaryIO) -> Iterator[_Unwrapped]:
    """Take away what a saved device is wrapped in: compression, libvirt's header, and compression inside of that."""
    from vfio_mig.image.bytesource import FileSource, PartSource
    from vfio_mig.image.wrapped import FIRST, compression, hole_before_stream, libvirt_header, unpacked

    one = _Unwrapped(FileSource(file), [], file, None)
    with ExitStack() as stack:
        while True:
            source, names, _, header = one
            first = source.read(0, FIRST)
            form = compression(first)
            if form is not None and len(names) < _WRAPPINGS_MAX:
                # A hint can tell of what is in the user's own file alone
                offset = header.stream_at if header is not None and len(names) == 1 else 0
                inner = stack.enter_context(unpacked(source, form, offset))
                one = _Unwrapped(FileSource(inner), [*names, form], inner, header)
            elif header is None and (header := libvirt_header(source)) is not None:
                part = PartSource(source, header.stream_at, source.size - header.stream_at)
                one = _Unwrapped(part, [*names, LIBVIRT], None, header)
            elif LIBVIRT not in names and first[:1] == b"\0" and (hole := hole_before_stream(source)):
                yield _Unwrapped(PartSource(source, hole, source.size - hole), [*names, OFFSET], None, header)
                return
            else:
                yield one
                return


@contextmanager
def open_saved(file: str) -> Iterator[Saved]:
    """Open a file, ``-`` for standard input, whatever form it has.

    :raises ImageError: it is empty, or begins like an image or a QEMU stream and is not a whole one.
    :raises UsageError, HostError: as :func:`vfio_mig.jobs.files.input.open_input`.
    """
    from vfio_mig.decode import qemu
    from vfio_mig.image.archive import StateSource, read_archive
    from vfio_mig.image.bytesource import FileSource, PartSource
    from vfio_mig.image.forms import EMPTY

    with _seekable(file) as stream, _unwrapped(stream) as inside:
        source, wrapping, inner, header = inside
        size = os.fstat(stream.fileno()).st_size
        first = source.read(0, len(_FIRST_MEMBER))
        if not first:
            raise ImageError(EMPTY)
        if first.startswith(qemu.MAGIC):
            is_part = not set(wrapping) - {LIBVIRT, OFFSET}
            before = PartSource(FileSource(stream), 0, size - source.size) if is_part else None
            yield Saved(QEMU, size, source, wrapping, header, stream=qemu.read_stream(source), before=before)
        elif header is not None:
            raise ImageError("what follows libvirt's header is not a QEMU stream")
        elif first == _FIRST_MEMBER and inner is not None:
            inner.seek(0)
            with read_archive(inner) as archive:
                yield Saved(IMAGE, size, StateSource(archive), wrapping, archive=archive)
        else:
            yield Saved(STATE, size, source, wrapping)
