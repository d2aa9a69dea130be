# SPDX-License-Identifier: MIT
"""What a QEMU migration stream may have of a guest's disks, passed over: content of the guest's, so never searched.

Layout: QEMU's ``migration/block.c`` (until 9.0) and ``migration/block-dirty-bitmap.c``; all big-endian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_mig.decode.cursor import CutError

if TYPE_CHECKING:
    from vfio_mig.decode.cursor import Cursor

_DEVICE, _EOS, _PROGRESS, _ZERO = 1, 2, 4, 8
_FLAGS: Final = 0x1FF
_BLOCK_SIZE: Final = 1 << 20

_END, _ZEROES, _NAME, _NODE, _START, _COMPLETE, _BITS = (1 << bit for bit in range(7))
_MORE: Final = 0x80


def pass_block(cursor: Cursor) -> None:
    """Pass over a part of the section `block`: pieces of disks, 1 MiB each.

    :raises CutError: it is not as it should be.
    """
    while (flags := cursor.number(8) & _FLAGS) != _EOS:
        if flags & ~_ZERO == _DEVICE:
            cursor.skip(cursor.number(1))
            cursor.skip(0 if flags & _ZERO else _BLOCK_SIZE)
        elif flags != _PROGRESS:
            raise CutError(f"a disk's content with flags {flags:#x}")


def _bitmap_flags(cursor: Cursor) -> int:
    """Take flags, of which the highest bit of the first two bytes says that there are more."""
    flags = cursor.number(1)
    if flags & _MORE:
        flags = flags << 8 | cursor.number(1)
        if flags & _MORE:
            flags = flags << 16 | cursor.number(2)
    return flags


def pass_bitmaps(cursor: Cursor) -> None:
    """Pass over a part of the section `dirty-bitmap`.

    :raises CutError: it is not as it should be.
    """
    while (flags := _bitmap_flags(cursor)) != _END:
        for bit in (_NODE, _NAME):
            if flags & bit:
                cursor.skip(cursor.number(1))
        what = flags & ~(_NODE | _NAME)
        if what == _START:
            cursor.skip(4 + 1)
        elif what & ~_ZEROES == _BITS:
            cursor.skip(8 + 4)
            cursor.skip(0 if flags & _ZEROES else cursor.number(8))
        elif what != _COMPLETE:
            raise CutError(f"a bitmap of a disk with flags {flags:#x}")
