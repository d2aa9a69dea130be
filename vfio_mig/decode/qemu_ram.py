# SPDX-License-Identifier: MIT
"""Guest memory in a QEMU migration stream, passed over; what it looks like depends on what was said earlier.

Layout: QEMU's ``migration/ram.c``, ``ram_save_setup()`` and ``ram_load_precopy()``; all big-endian. Nothing in guest
memory is ever taken for a section: a part that is not exactly as it should be ends the walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from vfio_mig.decode.cursor import CutError
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from vfio_mig.decode.cursor import Cursor

VERSION: Final = 4
"""Of the section; the only one since QEMU 0.14."""
IGNORE_SHARED: Final = "x-ignore-shared"
MAPPED_RAM: Final = "mapped-ram"
KNOWN_CAPABILITIES: Final = frozenset({IGNORE_SHARED, MAPPED_RAM})
"""What changes this layout and is named in a stream's configuration: QEMU's ``should_validate_capability()``."""

_ZERO, _SIZE, _WHOLE, _EOS, _CONTINUE, _XBZRLE = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
_HOOK, _COMPRESSED, _FLUSH = 0x80, 0x100, 0x200
_CONTENT: Final = frozenset({_ZERO, _WHOLE, _XBZRLE, _COMPRESSED})
_BLOCKS_MAX: Final = 1 << 14
_MAPPED_VERSION: Final = 1
_MAPPED_HEAD: Final = 4 + 3 * 8
_MAPPED_ALIGNMENT: Final = 1 << 20


@dataclass
class Ram:
    """Guest memory as its first section has described it.

    :param capabilities: of the migration, as the configuration names them.
    :param page_size: of the guest, bytes.
    :param page_sizes: the sum of the sizes of the host's pages behind the blocks, which the source says where postcopy
        was possible; a block of larger pages than the host's own then has its page size behind its length.
    :param blocks: bytes of each block of memory by its name.
    :param through_channels: whether pages have gone through other channels than this stream.
    :param mapped_end: where the last block that has a place of its own in the file ends.
    """

    capabilities: frozenset[str] = frozenset()
    page_size: int = PAGE
    page_sizes: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    through_channels: bool = False
    mapped_end: int = 0
    _block: str | None = None

    def pass_part(self, cursor: Cursor) -> None:
        """Go to the end of a part of it, where its footer is.

        :raises CutError: it is cut off, or is not as it should be.
        """
        mask = self.page_size - 1
        while True:
            word = cursor.number(8)
            flags = word & mask
            what = flags & ~_CONTINUE
            if what in _CONTENT:
                self._pass_page(cursor, word - flags, what, goes_on=bool(flags & _CONTINUE))
            elif flags == _EOS:
                return
            elif flags == _SIZE:
                self._take_blocks(cursor, word - flags)
            elif flags == _FLUSH:
                self.through_channels = True
            elif flags != _HOOK:
                raise CutError(f"memory with flags {flags:#x}")

    def _pass_page(self, cursor: Cursor, at: int, what: int, *, goes_on: bool) -> None:
        if not goes_on:
            self._block = cursor.name()
        if self._block not in self.blocks:
            raise CutError(f"a page of the memory block {self._block!r}, which is not listed")
        if at >= self.blocks[self._block]:
            raise CutError(f"a page at {at:#x} of the memory block {self._block!r}, which is smaller")
        if what == _WHOLE:
            cursor.skip(self.page_size)
        elif what == _ZERO:
            cursor.skip(1)
        elif what == _XBZRLE:
            cursor.skip(1)
            cursor.skip(cursor.number(2))
        else:
            cursor.skip(cursor.number(4))

    def _take_blocks(self, cursor: Cursor, total: int) -> None:
        """Take the list of blocks: name and length of each, and what the migration's capabilities put behind."""
        left = total
        while left > 0:
            name = cursor.name()
            size = cursor.number(8)
            if not name or not 0 < size <= left or len(self.blocks) == _BLOCKS_MAX:
                raise CutError("memory blocks do not add up")
            left -= size
            self.blocks[name] = size
            if self._has_page_size(cursor, last=not left):
                cursor.skip(8)
            if IGNORE_SHARED in self.capabilities:
                cursor.skip(8)
            if MAPPED_RAM in self.capabilities:
                self._pass_mapped(cursor, size)

    def _has_page_size(self, cursor: Cursor, *, last: bool) -> bool:
        """Tell whether a block's page size stands here: QEMU writes it if it is not the page size of the host.

        A page size begins with a zero byte. What else may follow: the length of the next name, which is none; behind
        the last block the end of the list, whose flags hold no page size; or, of ignored memory, an address. If that
        could be a page size too, what stands behind it tells: a name or the end, or else that address.
        """
        size = int.from_bytes(cursor.look(cursor.at, 8), "big")
        if size <= self.page_size or size & (size - 1) or not size & self.page_sizes:
            return False
        if IGNORE_SHARED not in self.capabilities:
            return True
        behind = cursor.look(cursor.at + 8, 8)
        is_end = int.from_bytes(behind, "big") in {_EOS, _HOOK, _FLUSH}
        return not (is_end if last else behind[:1] > b"\0")

    def _pass_mapped(self, cursor: Cursor, size: int) -> None:
        """Pass over a block's header and the block: bitmap and pages have their place in the file.

        They are named by offsets in the file, in which this stream need not be at the beginning.
        """
        version, page_size = cursor.number(4), cursor.number(8)
        bitmap, pages = cursor.number(8), cursor.number(8)
        if version != _MAPPED_VERSION or page_size != self.page_size:
            raise CutError(f"a mapped memory block of version {version} with pages of {page_size} bytes")
        before = bitmap - cursor.at  # what is in front of this stream in its file
        bitmap_size = -(-(size // page_size) // 64) * 8
        aligned = -(-(bitmap + bitmap_size) // _MAPPED_ALIGNMENT) * _MAPPED_ALIGNMENT
        if before < 0 or pages != aligned:
            raise CutError(f"a mapped memory block with its bitmap at {bitmap:#x} and its pages at {pages:#x}")
        cursor.go(pages - before + size)
        self.mapped_end = cursor.at
