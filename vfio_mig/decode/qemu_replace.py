# SPDX-License-Identifier: MIT
"""A QEMU migration stream in which one VFIO device has another state.

QEMU takes a device's state in pieces of any number and size, wherever they stand between the device's first section and
its last: each goes to the device as it comes (``hw/vfio/migration.c``, ``vfio_load_state()``). So the old pieces are
left out, and the new state stands where the last of them was. Everything else stays as it is, to the byte: QEMU's own
description of the stream lists no section that has pieces of a state.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfio_mig.decode.qemu import DATA_MARK
from vfio_mig.errors import ImageError, excerpt
from vfio_mig.image.bytesource import BufferSource, PartSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.decode.qemu_parts import QemuStream, VfioDevice
    from vfio_mig.image.bytesource import ByteSource

PIECE: Final = 1 << 20
"""Bytes of a piece, at most: QEMU's own have as many."""
_HEAD: Final = struct.Struct(">QQ")


def require_replaceable(stream: QemuStream, device: VfioDevice) -> None:
    """Refuse a stream in which a device's state cannot be replaced, or would take the place of something else.

    :raises ImageError: the message says why.
    """
    if device.problem is not None:
        raise ImageError(f"{excerpt(device.name)}: {device.problem}")
    if not stream.complete:
        reason = f": {stream.problems[0]}" if stream.problems else ""
        raise ImageError(f"the stream is not understood to its end{reason}", hint="see 'vfio-mig inspect'")
    if stream.package_end:
        raise ImageError("the stream has a package of sections, as postcopy makes it, whose length would be wrong")
    if device.frames[0][0] < stream.mapped_end:
        raise ImageError("the device's state stands before mapped memory, which cannot be moved in the file")


def with_state(source: ByteSource, device: VfioDevice, state: ByteSource) -> Iterator[ByteSource]:
    """Yield the parts of the new stream, one behind the other.

    :param source: the stream that *device* was found in, which is one for :func:`require_replaceable`.
    """
    at = 0
    for offset, size in device.frames:
        yield PartSource(source, at, offset - _HEAD.size - at)
        at = offset + size
    for start in range(0, state.size, PIECE):
        piece = PartSource(state, start, PIECE)
        yield BufferSource(_HEAD.pack(DATA_MARK, piece.size))
        yield piece
    yield PartSource(source, at, source.size - at)
