# SPDX-License-Identifier: MIT
"""What a saved device may be wrapped in: compression, and the header that libvirt puts in front of a QEMU stream.

Everything here is known by its first bytes. What is compressed is unpacked to an unnamed temporary file, which is
bounded: a few KiB can become as many GiB.

libvirt's header: ``src/qemu/qemu_saveimage.h``; in the byte order of the host that wrote it.
"""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, Protocol, cast

from vfio_mig.errors import HostError, ImageError
from vfio_mig.image.files import host_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.image.bytesource import ByteSource

FIRST: Final = 16
"""Bytes that tell what something is."""
UNPACKED_MAX: Final = 4 << 30
"""Bytes that compressed input is unpacked to, at most; and never more than half of what the file system has free."""
_STEP: Final = 1 << 14
"""Bytes that are read in one go; small, as what is behind the end of a member is read again for the next one."""
_OUT: Final = 1 << 20
_XZ_MEMORY: Final = 128 << 20

GZIP, BZIP2, XZ, ZSTD, LZOP, LZ4 = "gzip", "bzip2", "xz", "zstd", "lzop", "lz4"
_MAGIC: Final = {
    b"\x1f\x8b\x08": GZIP,
    b"BZh": BZIP2,
    b"\xfd7zXZ\0": XZ,
    b"\x28\xb5\x2f\xfd": ZSTD,
    b"\x89LZO\0\r\n\x1a\n": LZOP,
    b"\x04\x22\x4d\x18": LZ4,
}

LIBVIRT: Final = b"LibvirtQemudSave"
LIBVIRT_PARTIAL: Final = b"LibvirtQemudPart"
_LIBVIRT: Final = "16s5I56x"
_LIBVIRT_VERSION_MAX: Final = 3
_FORMATS: Final = ("raw", GZIP, BZIP2, XZ, LZOP, ZSTD, "sparse")
_XML_MAX: Final = 16 << 20
_NAME: Final = re.compile(rb"<name>([^<]{1,200})</name>")
_QEMU: Final = b"QEVM\0\0\0\3"
_HOLE_MAX: Final = 1 << 20


def compression(first: bytes) -> str | None:
    """Return the name of what something is compressed with, by its first bytes; None for anything else."""
    for magic, name in _MAGIC.items():
        if first.startswith(magic):
            return name
    return None


class _Decompressor(Protocol):
    """What the decompressors of Python's library have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Gzip:
    """zlib's as the others are: it keeps by itself what it has not yet read."""

    def __init__(self) -> None:
        import zlib

        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        piece = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = len(piece) < max_length and not self._inner.unconsumed_tail
        return piece


def _readers() -> tuple[dict[str, Callable[[], _Decompressor]], tuple[type[Exception], ...]]:
    """Return what unpacks each compression here, and what such a thing raises."""
    import bz2
    import lzma
    import zlib

    found: dict[str, Callable[[], _Decompressor]] = {
        GZIP: _Gzip,
        BZIP2: bz2.BZ2Decompressor,
        XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY),
    }
    errors: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError)
    return found, errors


def how_to_unpack(name: str, offset: int = 0) -> str:
    """Say how the user unpacks something that begins at an offset in a file."""
    if offset:
        return f"unpack it first: tail -c +{offset + 1} FILE | {name} -dc > OTHER"
    return f"unpack it first: {name} -dc FILE > OTHER"


class _Unpacker:
    """Unpacks a source to a file, member by member, within bounds."""

    def __init__(self, source: ByteSource, name: str, target: BinaryIO, limit: int, offset: int) -> None:
        self._source = source
        self._name = name
        self._how = how_to_unpack(name, offset)
        self._target = target
        self._limit = limit
        self._at = 0
        self._written = 0
        self._readers, self._errors = _readers()

    def run(self) -> None:
        make = self._readers.get(self._name)
        if make is None:
            raise ImageError(f"compressed with {self._name}, which is not read here", hint=self._how)
        inner, data = make(), self._next()
        while True:
            self._write(self._decompress(inner, data))
            if inner.eof:
                self._at -= len(inner.unused_data)
                data = self._next().lstrip(b"\0")  # zeros fill a last block
                while not data and self._at < self._source.size:
                    data = self._next().lstrip(b"\0")
                if not data:
                    return
                inner = make()
            elif not inner.needs_input:
                data = b""
            elif not (data := self._next()):
                raise ImageError(f"compressed with {self._name}: cut off", hint="save it again")

    def _next(self) -> bytes:
        data = self._source.read(self._at, _STEP)
        self._at += len(data)
        return data

    def _decompress(self, inner: _Decompressor, data: bytes) -> bytes:
        try:
            return inner.decompress(data, _OUT)
        except self._errors as error:
            raise ImageError(f"compressed with {self._name}: damaged: {error}") from None

    def _write(self, piece: bytes) -> None:
        self._written += len(piece)
        if self._written > self._limit:
            raise HostError(
                f"compressed with {self._name}: more than {self._limit} bytes when unpacked",
                hint=self._how,
            )
        try:
            self._target.write(piece)
        except OSError as error:
            raise host_error("cannot unpack the input to it", "temporary file", error) from error


def unpacked(source: ByteSource, name: str, offset: int = 0) -> BinaryIO:
    """Return an unnamed temporary file with what a source holds in a compressed form; the caller closes it.

    :param name: of the compression.
    :param offset: of the source in the user's file, for the hint.
    :raises ImageError: it is damaged, or no program of that kind is here; the hint says how to unpack it.
    :raises HostError: it is too large, or there is no room.
    """
    import tempfile

    target = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 -- the caller closes it
    try:
        free = os.fstatvfs(target.fileno())
        _Unpacker(source, name, target, min(UNPACKED_MAX, free.f_bavail * free.f_frsize // 2), offset).run()
        target.flush()
    except BaseException:
        target.close()
        raise
    return target


class LibvirtHeader(NamedTuple):
    """What libvirt puts in front of a stream that ``virsh save`` writes.

    :param stream_at: offset of the stream, bytes.
    :param was_running: whether the VM is to run when it is restored.
    :param form: how the stream is stored: ``raw``, ``sparse`` (QEMU's mapped-ram), or a compression.
    :param domain: the VM's name; None where its description has none.
    :param xml_size: bytes of the description, which begins behind the header.
    """

    version: int
    stream_at: int
    was_running: bool
    form: str
    domain: str | None
    xml_size: int

    def values(self) -> dict[str, Any]:
        """Return it as a report has it."""
        return self._asdict()


HEADER_SIZE: Final = struct.calcsize("<" + _LIBVIRT)


def libvirt_header(source: ByteSource) -> LibvirtHeader | None:
    """Take libvirt's header apart; None where there is none.

    :raises ImageError: the save was not finished, or it is of a kind that is not known.
    """
    first = source.read(0, HEADER_SIZE)
    if first.startswith(LIBVIRT_PARTIAL):
        raise ImageError("libvirt has not finished this save", hint="save it again")
    if not first.startswith(LIBVIRT):
        return None
    if len(first) < HEADER_SIZE:
        raise ImageError(f"libvirt's header is cut off at byte {len(first)}")
    for order in "<>":
        _, version, size, was_running, form, cookie = struct.unpack(order + _LIBVIRT, first)
        if version <= _LIBVIRT_VERSION_MAX:
            break
    else:
        raise ImageError(f"libvirt's header has version {struct.unpack_from('<I', first, 16)[0]}, which is not known")
    if form >= len(_FORMATS):
        raise ImageError(f"libvirt has stored the stream in form {form}, which is not known")
    if size > min(_XML_MAX, source.size - HEADER_SIZE):
        raise ImageError(f"libvirt's header promises {size} bytes of XML, {source.size - HEADER_SIZE} are there")
    xml = source.read(HEADER_SIZE, min(size, cookie) if cookie else size)
    xml = xml.partition(b"\0")[0]
    name = _NAME.search(xml)
    domain = None if name is None else name[1].decode("utf-8", "backslashreplace")
    return LibvirtHeader(version, HEADER_SIZE + size, bool(was_running), _FORMATS[form], domain, len(xml))


def hole_before_stream(source: ByteSource) -> int:
    """Return how many zero bytes are in front of a QEMU stream that was written at an offset; 0 for anything else."""
    first = source.read(0, _HOLE_MAX + len(_QEMU))
    at = first.find(_QEMU)
    return at if at > 0 and not first[:at].strip(b"\0") else 0
