# SPDX-License-Identifier: MIT
"""Builders of inputs, good and bad, and the seeds of each target."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any, Final

from vfio_mig.image import tar
from vfio_mig.image.writer import ArchiveWriter

PAGE: Final = 4096
_CDEFS: Final = Path(__file__).parents[2] / "cdefs"

Members = list[tuple[str, bytes]]


class Choices:
    """Makes decisions out of an input's bytes, from the front on; all are 0 when none are left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def number(self, size: int = 1) -> int:
        """Return the next *size* bytes as a little-endian number."""
        return int.from_bytes(self.take(size), "little")

    def text(self) -> bytes:
        """Return some bytes with their length in front."""
        return self.take(self.number())


# Archives ------------------------------------------------------------------------------------------------------------

GOOD_HEADER: Final = b'{"device":{"type":"GVTg_V5_8"},"format":"vfio-mig","protocol":"other","time":1,"version":1}'
GOOD_PAGES: Final = struct.pack("<QQQ", 1, 0x10000, PAGE) + b"\x11" * PAGE
GOOD_MEMBERS: Final[Members] = [
    ("header.json", GOOD_HEADER),
    ("dirty/0000", b"\x05\x04"),
    ("pages/0000", GOOD_PAGES),
    ("state/0000", b"state of a device"),
]


def tar_of(members: Members, manifest: bytes) -> bytes:
    """Return an archive of these members, right or wrong, with good tar headers and a good end."""
    parts = []
    for name, content in [*members, ("manifest.json", manifest)]:
        parts += [tar.header(name, len(content), 7), content, bytes(tar.padding(len(content)))]
    return b"".join([*parts, tar.END])


def canonical(value: Any) -> bytes:
    """Return JSON as manifests have it.

    :raises ValueError: it has a number or character that JSON has not.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def entries_for(members: Members) -> list[dict[str, Any]]:
    """Return what a manifest says of members; the first dirty bitmap has the 11 pages of GOOD_MEMBERS."""
    entries = []
    for name, content in members:
        entry: dict[str, Any] = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if name.startswith("dirty/"):
            entry |= {"start_page": 16, "nr_pages": 11}
        entries.append(entry)
    return entries


def manifest_of(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an unsigned manifest."""
    return {"format": "vfio-mig", "version": 1, "members": entries, "statistics": {"stop_time": 0.25}}


def signed(manifest: dict[str, Any]) -> bytes:
    """Return a manifest with its own SHA-256, as bytes.

    :raises ValueError: as :func:`canonical`.
    """
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


def good_archive() -> bytes:
    """Return a small archive with everything in it, as our writer makes it."""
    file = io.BytesIO()
    writer = ArchiveWriter(file, {"protocol": "other", "device": {"type": "x"}})
    writer.add_dirty(16, 11, b"\x05\x04")
    writer.add_pages([(0x10000, b"\x11" * PAGE)])
    writer.add_zero([(0x11000, 1 << 20)])
    writer.add_state(b"state of a device")
    writer.finish({"stop_time": 0.25})
    return file.getvalue()


def archive_seeds() -> list[bytes]:
    """Return whole archives and broken ones."""
    good = good_archive()
    rebuilt = tar_of(GOOD_MEMBERS, signed(manifest_of(entries_for(GOOD_MEMBERS))))
    huge = [tar.header(name, size, 7) for name in ("manifest.json", "state/0000") for size in (16 << 20, 64 << 20)]
    first = tar.header("header.json", len(GOOD_HEADER), 7) + GOOD_HEADER.ljust(tar.BLOCK, b"\0")
    return [
        good,
        rebuilt,
        b"",
        good[:-1],
        good[:1536] + tar.END,
        good + b"\0",
        good.replace(b"state of", b"State of"),
        tar.header("header.json", tar.SIZE_MAX, 7),
        tar.header("state/0000", 5, 7) + b"state".ljust(512, b"\0"),
        *(first + block for block in huge),
    ]


def odd_headers() -> list[bytes]:
    """Return headers with what looks like a part of a report of ours, and with names that no terminal should get."""
    good = b'{"format":"vfio-mig","version":1,"protocol":"other",'
    return [
        good + b'"x":{"count":"z","listed":[{"a":1}]}}',
        good + b'"x":{"count":5,"listed":7}}',
        good + b'"x":{"count":-1,"listed":[[[1],{"b":[{}]}]]}}',
        good + b'"kernel":{"ranges":5},"machine":{"ranges":[1,[2],"x"]}}',
        good + b'"\\u001b]0;x\\u0007\\u001b[2J\\n":{"\\u009b":"\\u202e"},"\\ud800":1}',
        good + b'"x":{' + b",".join(b'"%d":[]' % number for number in range(1500)) + b"}}",
        good + b'"registers":{"vendor":-1,"at":true,"x":[1,[2,[3]]]}}',
    ]


def manifest_seeds() -> list[bytes]:
    """Return inputs for each way in which the target `manifest` builds an archive."""
    manifest = manifest_of(entries_for(GOOD_MEMBERS))
    text = canonical(manifest)
    deep = b"[" * 900 + b"]" * 900
    header = [
        GOOD_HEADER,
        b'{"format":"vfio-mig","version":1}',
        b'{"device":[],"format":"vfio-mig","protocol":"gvt-rfc","time":true,"version":1}',
        b'{"format":"vfio-mig","version":1,"device":{"type":"\\u001b[2J"},"protocol":{"a":NaN}}',
        b'{"device":{"type":"\\ud800"},"format":"vfio-mig","version":1}',
        b'{"format":"vfio-mig","protocol":"a\\nb","version":1}',
        b'{"format":"vfio-mig","version":1.0,"time":1e999,"protocol":' + deep + b"}",
        b'{"format":' + deep + b"}",
        b'{"device":{"type":' + deep + b'},"format":"vfio-mig","kernel":"' + b"k" * 5000 + b'","version":1}',
        b'{"format":"' + b"x" * 5000 + b'","version":1' + b"0" * 4400 + b"}",
        b"\xff\xfe{\0}\0",
        *odd_headers(),
    ]
    patches = [
        b'{"statistics":' + canonical({str(number): number for number in range(1001)}) + b"}",
        b'{"statistics":{"a":[1e999,"\\ud800"]}}',
        b'{"version":true,"members":{}}',
        b'{"statistics":' + deep + b"}",
        b'[{},{"nr_pages":-1,"start_page":16}]',
        b'[{},{"nr_pages":11,"start_page":4503599627370496}]',
        b'[{},{"nr_pages":11.0,"start_page":true}]',
        b'[{"size":91.0},[],null,{"sha256":null,"name":1}]',
    ]
    pages = [
        GOOD_PAGES,
        struct.pack("<Q", (1 << 64) - 1),
        struct.pack("<QQQ", 1, (1 << 64) - PAGE, 0),
        struct.pack("<5Q", 2, 0, 2 * PAGE, 0, (1 << 64) - PAGE) + bytes(PAGE),
        b"\0" * 7,
    ]

    def member(kind: int, content: bytes, extra: bytes = b"") -> bytes:
        return bytes([kind]) + len(content).to_bytes(2, "little") + content + extra

    bitmap = struct.pack("<QQ", 16, 11)
    return [
        *(b"\0" + one for one in header),
        *(b"\1" + one for one in (text, signed(manifest), b"", b"[]", b"{")),
        *(b"\2" + one for one in (text, b"{}", b'{"members":[NaN]}', b'{"members":[],"statistics":{}}')),
        *(b"\3" + one for one in patches),
        *(b"\4" + member(2, one) for one in pages),
        b"\4" + member(3, struct.pack("<5Q", 2, PAGE, 2 * PAGE, 0, 2 * PAGE)),
        b"\4" + member(1, b"\5\4", bitmap) + member(0, b"state") + member(0, b"more") + member(2, GOOD_PAGES),
        b"\4" + member(1, b"", struct.pack("<QQ", 0, 0)) + member(1, b"\xff", struct.pack("<QQ", (1 << 52) - 8, 8)),
        b"\4" + member(2, GOOD_PAGES) + member(3, struct.pack("<5Q", 2, 0, 1 << 63, 0x11000, PAGE)),
        b"\4" + member(3, struct.pack("<QQQ", 1, 0x10000, 1 << 40)) + member(2, GOOD_PAGES),
        b"\4" + member(3, struct.pack("<QQQ", 1, 0x10000, 0)),
        b"\4" + member(3, struct.pack("<QQQB", 1, 0x10000, PAGE, 0)),
        b"\4" + member(4, b"x", b"\x0astate/0001") + member(0, b"y"),
    ]


# GVT-g images --------------------------------------------------------------------------------------------------------

REG_SIZE: Final = 0x200000
PVINFO_AT: Final = 0x78000
PVINFO_MAGIC: Final = 0x4776544776544776
HEAD_SIZE: Final = 536


def pvinfo_of(low: tuple[int, int], high: tuple[int, int]) -> bytes:
    """Return PVINFO of a vGPU with two windows of graphics memory: base and size in bytes."""
    info = struct.pack("<QHHII", PVINFO_MAGIC, 1, 0, 2, 0x1C).ljust(0x40, b"\0")
    return info + struct.pack("<5I", *low, *high, 4)


def record(kind: int, payload: bytes, size: int | None = None) -> bytes:
    """Return a record, whose header may lie about its size."""
    return struct.pack("<II", kind, len(payload) if size is None else size) + payload


def head(data_size: int, version: int = 0, crc: int = 0) -> bytes:
    """Return the HEAD record."""
    return record(1, struct.pack("<iiQ", version, data_size, crc) + bytes(512))


PAYLOADS: Final[dict[int, bytes]] = {
    2: struct.pack("<HH", 0x8086, 0x1912).ljust(256, b"\0"),
    4: bytes(REG_SIZE),
    3: pvinfo_of((0, PAGE), (PAGE, PAGE)).rjust(PVINFO_AT + 84, b"\0").ljust(REG_SIZE, b"\0"),
    5: bytes(16),
    6: struct.pack("<i4x4Q", 4, 0x1000, 0, 0, 0),
    7: struct.pack("<i4II", 1, 10, 11, 12, 13, 3),
}
"""A good payload for each type, for a vGPU of two pages of graphics memory, in the order of an image."""


def good_image() -> bytes:
    """Return a whole image."""
    body = b"".join(record(kind, payload) for kind, payload in PAYLOADS.items())
    return head(HEAD_SIZE + len(body)) + body


def image_seeds() -> list[bytes]:
    """Return beginnings of images; a whole one is 4 MiB, which the target `gvt-records` makes up."""
    config = record(2, PAYLOADS[2])
    return [
        b"",
        head(HEAD_SIZE),
        head(0x8FFFFF),
        head(-1),
        head(HEAD_SIZE, version=1),
        head(HEAD_SIZE + len(config)) + config,
        head(HEAD_SIZE + 2 * len(config)) + config * 2,
        head(HEAD_SIZE + 8) + record(6, b""),
        head(HEAD_SIZE + 16) + record(7, b"") + record(6, b""),
        head(HEAD_SIZE + 8) + record(5, b"", 0xFFFFFFFF),
        head(HEAD_SIZE + 4) + record(5, b""),
        head(HEAD_SIZE + 8) + record(0, b""),
    ]


def record_seeds() -> list[bytes]:
    """Return inputs for the target `gvt-records`: whole images, patched or put together otherwise."""

    def patch(place: int, offset: int, value: bytes) -> bytes:
        return struct.pack("<BB", place, offset) + bytes([len(value)]) + value

    def part(kind: int, prefix: bytes = b"", fill: int = 0, claim: int = 0) -> bytes:
        return bytes([kind, len(prefix)]) + prefix + bytes([fill]) + (claim.to_bytes(4, "little") if fill & 4 else b"")

    order = [part(kind) for kind in PAYLOADS]
    window = struct.pack("<4I", 0, 64 << 20, 64 << 20, 384 << 20)
    return [
        b"\0",
        *(b"\0" + patch(place, 0, b"\xff" * 4) for place in range(10)),
        b"\0" + patch(9, 0, window),
        b"\0" + patch(9, 0, struct.pack("<4I", 0xFFFFF000, 0x1000, 0, 0x1000)),
        b"\0" + patch(7, 0, struct.pack("<i", -5)) + patch(0, 16, b"\1"),
        b"\1" + b"".join(order),
        b"\1" + b"".join(order[:5]),
        b"\1" + b"".join(reversed(order)),
        b"\1" + b"".join(order[:-1]) + part(7, fill=2),
        b"\1" + b"".join(order[:4]) + part(6, struct.pack("<i4II", 5, 0, 0, 0, 0, 9)),
        b"\1" + part(2, fill=4, claim=4096),
    ]


# uapi headers --------------------------------------------------------------------------------------------------------


def rfc_header() -> bytes:
    """Return a header that makes a profile."""
    return b"""\
#define VFIO_TYPE (';')
#define VFIO_BASE 100
#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << 6) /* as some tree has it */
#define VFIO_DEVICE_PCI_STATUS_SET _IO(VFIO_TYPE, VFIO_BASE + 14)
#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP _IO(VFIO_TYPE, VFIO_BASE + 15)
#define VFIO_DEVICE_PCI_STOP 1U // stop
#define VFIO_DEVICE_PCI_START (1U << 1)
#define MIGRATION_IMG_MAX_SIZE 0x900000
#if 0
#define VFIO_PCI_NUM_REGIONS 077
#endif
enum {
\tVFIO_PCI_BAR0_REGION_INDEX,
#define VFIO_PCI_BAR0 VFIO_PCI_BAR0_REGION_INDEX
\tVFIO_PCI_DEVICE_STATE_REGION_INDEX = 9,
\tVFIO_PCI_NUM_REGIONS
};
"""


def header_seeds() -> list[bytes]:
    """Return a good header, ours, and what a parser may stumble over."""
    good = rfc_header()
    return [
        good,
        *((_CDEFS / name).read_bytes()[:4096] for name in ("gvt_rfc.h", "vfio_mainline.h")),
        good.replace(b"\n", b"\r\n"),
        good.replace(b"(1 << 6)", b"1 << 99"),
        good.replace(b"VFIO_BASE 100", b"VFIO_BASE 0xffffffffffffffff"),
        good.replace(b"+ 14", b"+ 999"),
        good.replace(b"0x900000", b"0"),
        b"#define A " + b"(" * 5000 + b"1" + b")" * 5000,
        b"#define A \\\n" * 500 + b"1\n",
        b"enum { " * 500,
        b"/*" * 500 + b"//",
        b"#if 0\n" * 500 + b"#else\n#define A 1\n",
        "enum { Ä = 08, \u0661 = \u0662, B = 1 << 63, C, }".encode(),
        b"#define A 9999999999999999999ULL\nenum { X = A, Y, Z = Q, W };\0\xff",
    ]


HEADER_WORDS: Final = (
    b"#define ",
    b"#if 0\n",
    b"#else\n",
    b"#endif\n",
    b"enum {",
    b"};",
    b"_IO(VFIO_TYPE, VFIO_BASE + ",
    b"VFIO_BASE",
    b"0x",
    b"1 << ",
    b"/*",
    b"*/",
    b"//",
    b"\\\n",
    b"VFIO_DEVICE_FLAGS_MIGRATABLE ",
    b"VFIO_PCI_NUM_REGIONS ",
    b"MIGRATION_IMG_MAX_SIZE ",
)

# sysfs ---------------------------------------------------------------------------------------------------------------

UUID: Final = b"83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def sysfs_seeds() -> list[bytes]:
    """Return inputs for the target `sysfs`: see there how they are read."""

    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    mdev = b"\0" + text(UUID) + b"\0"
    pci = b"\1" + text(b"0000:00:02.0") + b"\0"
    links = b"\x0f" + text(b"../../kernel/iommu_groups/7") + text(b"../drivers/vfio_mdev") + text(b"x/i915-GVTg_V5_8")
    functions = text(b"0x8086\n") + text(b"0x1912\n") + text(b"vfio0")
    return [
        b"",
        mdev + links,
        mdev + links + pci + b"\x7f" + links[1:] + functions + b"\xff" + text(b"/dev/vfio/7"),
        pci + b"\x77" + text(b"7") + text(b"") + functions,
        pci + b"\x70" + text(b"\xff\xfe") + text(b"\0") + text(b"\xff"),
        b"\0" + text(b"\xff\n\x1b") + b"\1" + links,
        b"\0" + text(UUID) + b"\2" + text(UUID),
        b"\1" + text(b"0000:00:02.0") + b"\2" + text(b"../../.."),
        b"\0" + text(UUID) + b"\3",
        mdev + b"\1" + text(b"9" * 250) + b"\xff" + text(b"/dev/vfio/" + b"9" * 9),
        mdev + b"\1" + text("\u0663".encode()) + b"\xff" + text(b"/dev/vfio/devices/.."),
        b"\xff" + text(UUID.upper()) + b"\xff" + text(b"02:00.0") + b"\xff" + text(b"//") + b"\xff" + text(b"a\0b"),
        b"\xff" + text(b"/dev/vfio/devices/\xff") + b"\xff" + text(b"/dev/vfio/0") + b"\xff" + text(b"."),
    ]


# Syntax --------------------------------------------------------------------------------------------------------------


def syntax_seeds() -> list[bytes]:
    """Return what users write for memory and ranges, and notes in a lock."""
    note = {"job": "save", "pid": 1, "left": ["save", 1, "stopped"], "holder": [1, 2]}
    return [
        b"/dev/shm/guest@0:4G+0x1000",
        b"a:b@c@0x100000000",
        b"@0",
        b"x\0y@0:4K",
        b"x@0xfffffffffffff000:4096",
        b"\xff@\xd9\xa3",
        b"0x1000+64M",
        b"0-18446744073709551616",
        b"1_000",
        b"-",
        b"+",
        b"0x",
        b"K",
        b"9" * 4000,
        b"0x" + b"f" * 4000 + b"T",
        canonical(note),
        canonical({**note, "left": ["restore", 1, []]}),
        canonical({**note, "left": [1, "2", {}], "pid": 10**4000}),
        canonical({**note, "job": "\u00e4", "left": ["\u00e4", True, "loading"]}),
        b'{"job":"x","pid":1,"left":' + b"[" * 2000,
        b'{"job":"\\ud800","pid":1}',
        b"null",
    ]
