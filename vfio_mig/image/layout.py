# SPDX-License-Identifier: MIT
"""The archive: one file, or one stream, that holds a saved device. Format version 1.

It is a POSIX tar, so ``tar tvf`` lists it and ``tar xf`` unpacks it. Members, in this order:

``header.json``
    A JSON object: ``format`` ("vfio-mig"), ``version`` (1), and what the saving job knows of the device.
``state/0000``, ``state/0001``, …
    The device state, cut into members of at most 8 MiB; joined in this order it is the state.
``dirty/0000``, …
    A dirty bitmap each: bit *i* of byte *j* is page 8*j* + *i* (4096 bytes each) counted from the member's
    ``start_page``; bits past its ``nr_pages`` are zero. Both numbers are in the manifest.
``pages/0000``, …
    Guest memory. A little-endian u64 count *n*, then *n* pairs of u64 (guest-physical address, bytes), multiples of
    4096, then the contents in the same order. The ranges of one index do not overlap.
``zero/0000``, …
    Guest memory that is all zero: the same index, no contents.
``manifest.json``
    The commit record: ``format``, ``version``, ``members`` (``name``, ``size``, ``sha256`` of each member before it,
    in order, with what belongs to its kind), ``statistics``, and ``sha256`` of the manifest itself as it is without
    this key. It is written as ``json.dumps(…, sort_keys=True, separators=(",", ":"))``.

``state``, ``dirty``, ``pages`` and ``zero`` members may be mixed; each kind is numbered from 0000 without gaps. Where a
page comes again in a later member, ``pages`` or ``zero``, the later one counts. After the
manifest come tar's two zero blocks and nothing else. An archive without a manifest is incomplete and is refused.
``header.json`` has at most 1 MiB, ``manifest.json`` 1 MiB and 256 bytes for each member before it, any other 16 MiB.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vfio_mig.ranges import PAGE

Buffer = bytes | bytearray | memoryview

FORMAT: Final = "vfio-mig"
VERSION: Final = 1
CHUNK: Final = 8 << 20
"""Content of one state or pages member, bytes at most."""
MEMBER_MAX: Final = 16 << 20
"""What the reader takes for one member, bytes; nothing larger is ever allocated for a size it has read."""
HEADER_MAX: Final = 1 << 20
MANIFEST_MAX: Final = 1 << 20
ENTRY_MAX: Final = 256
"""What the reader takes for a manifest is MANIFEST_MAX and this for each member it lists: parsed JSON is up to 40 times
as large, and so nobody makes us fill the memory with a small file."""
ADDRESS_END: Final = 1 << 64
COUNT: Final = struct.Struct("<Q")
PAIR: Final = struct.Struct("<QQ")
KINDS: Final = ("state", "dirty", "pages", "zero")
ZERO_RANGES: Final = CHUNK // PAIR.size
"""Ranges in one zero member, at most."""


class Member(NamedTuple):
    """A member as the manifest lists it, and where its content is in the file or spool it can be read again from."""

    name: str
    size: int
    sha256: str
    offset: int
    extra: dict[str, int]

    def entry(self) -> dict[str, Any]:
        """Return the manifest's words."""
        return {"name": self.name, "size": self.size, "sha256": self.sha256, **self.extra}

    @property
    def kind(self) -> str:
        """``state``, ``dirty``, ``pages``, ``zero``, or the name of the header."""
        return self.name.partition("/")[0]


class DirtyBitmap(NamedTuple):
    """A bitmap from an archive: first page, number of pages, ceil(nr_pages / 8) bytes."""

    start_page: int
    nr_pages: int
    bitmap: bytes


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return JSON as a manifest has it.

    :raises ValueError: it has a number or a character that JSON has not.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def dirty_problem(start_page: int, nr_pages: int, bitmap: Buffer) -> str | None:
    """Say what is wrong with a bitmap, if anything."""
    if start_page < 0 or nr_pages < 0 or start_page + nr_pages > ADDRESS_END // PAGE:
        return f"impossible range: {nr_pages} pages from page {start_page} on"
    if len(bitmap) != (nr_pages + 7) // 8:
        return f"{len(bitmap)} bytes for {nr_pages} pages"
    if len(bitmap) > MEMBER_MAX:
        return f"{nr_pages} pages are too many for one member"
    if nr_pages % 8 and bitmap[-1] >> nr_pages % 8:
        return f"bits set past {nr_pages} pages"
    return None


def index(ranges: list[list[int]]) -> bytes:
    """Return what stands in front of guest memory: how many ranges there are, and each one."""
    return COUNT.pack(len(ranges)) + b"".join(PAIR.pack(*pair) for pair in ranges)
