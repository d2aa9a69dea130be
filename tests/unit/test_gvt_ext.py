# SPDX-License-Identifier: MIT
"""What our kvmgt adds to an image; the layout is written down here from ``tools/kvmgt/gvt/migrate_image.h``."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_image_gvt import CFG, GTT, REG_SIZE, ROOT, VREG, WORKLOAD, image
from vfio_mig.decode import gvt_ext
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.decode.differences import gvt_differences
from vfio_mig.decode.gvt import decode
from vfio_mig.errors import ImageError

HEADER = Path(__file__).parents[2] / "tools/kvmgt/gvt/migrate_image.h"
NONE = 0xFFFFFFFF
QUEUED = struct.pack("<8I", 0, 1, 0x1019, 7, 0x1019, 7, 0, 0)
HALF = struct.pack("<QQ", 0x480, 0x1234_5001)


def ext(queued: bytes = QUEUED, half: bytes = HALF, **changes: int) -> bytes:
    """Return a ``struct gvt_ext`` with what follows it; its checksum is 0."""
    is_on = struct.pack("<18I", 1, 0, NONE, 0, *range(10, 18), *range(20, 24), 2, 0)
    off = struct.pack("<18I", 0, NONE, NONE, NONE, *[0] * 14)
    display = b"\3" + bytes(95) + struct.pack("<8I", 60_000, 0, 2, 1, 0, 0, 0, 0)
    display += bytes(128 + 0x700) + struct.pack("<II", 1, 0) + bytes(160)
    size = changes.get("size", 56 + 5 * 72 + 2216 + len(queued) + len(half))
    head = struct.pack(
        "<8sIIIIQQIIII", b"GVT-EXT1", size, 0, 9, 0x40403, 1 << 32, 1 << 30, changes.get("flags", 9), 0,
        changes.get("queued", len(queued) // 32), changes.get("half", len(half) // 16),
    )  # fmt: skip
    return head + is_on + 4 * off + display + queued + half


def sealed(content: bytes) -> bytes:
    """Give an image the checksum that it should have."""
    at = content.index(b"GVT-EXT1") + 12
    assert content[at : at + 4] == bytes(4)
    return content[:at] + struct.pack("<I", zlib.crc32(content)) + content[at + 4 :]


def v2_image(payload: bytes) -> bytes:
    return image([(2, CFG), (0x100, payload), (3, VREG), (5, GTT), (6, ROOT), (7, WORKLOAD)])


def rfc_image(payload: bytes) -> bytes:
    return image([(2, CFG), (4, payload.ljust(REG_SIZE, b"\0")), (3, VREG), (5, GTT), (6, ROOT), (7, WORKLOAD)])


def values(content: bytes) -> dict[str, Any]:
    decoded = decode(content)
    assert decoded.problems == []
    (section,) = [one for one in decoded.sections if one.name == "ext"]
    assert content[section.offset : section.offset + 8] == b"GVT-EXT1"
    return section.values


def test_the_numbers_are_the_header_s() -> None:
    text = HEADER.read_text("utf-8")
    assert re.search(r"#define GVT_MIGRATION_EXT\s+0x100\n", text)
    assert gvt.EXT == 0x100
    (magic,) = re.findall(r"#define GVT_EXT_MAGIC\s+0x([0-9a-f]+)ULL", text)
    assert int(magic, 16).to_bytes(8, "little") == gvt_ext.MAGIC
    assert len(ext(b"", b"")) == gvt_ext.FIXED_SIZE


@pytest.mark.parametrize("make", [v2_image, rfc_image])
def test_it_is_shown_where_it_is(make: Any) -> None:
    found = values(sealed(make(ext())))
    assert (found["graphics_version"], found["engine_mask"]) == (9, 0x40403)
    assert found["flags"] == ["pv-notified", "vblank"]
    first, *others = found["execlists"]
    assert first == {
        "engine": "rcs", "enabled": True, "running": 0, "pending": None, "running_context": 0,
        "slots": [[10, 11, 12, 13], [14, 15, 16, 17]], "elsp": [20, 21, 22, 23], "elsp_index": 2,
    }  # fmt: skip
    assert not any(one["enabled"] for one in others)
    queued = {"engine": "rcs", "first_of_pair": True, "descriptor": [0x1019, 7], "elsp": [0x1019, 7, 0, 0]}
    assert found["queued"] == {"count": 1, "listed": [queued]}
    assert found["half_entries"] == {"count": 1, "listed": [{"offset": 0x480, "value": 0x1234_5001}]}
    assert (found["display"]["flips_done"], found["display"]["refresh_millihertz"]) == (2, 60_000)


def test_an_image_without_it_has_none() -> None:
    plain = image()
    assert gvt.parse(memoryview(plain)).ext is None
    assert "ext" not in [one.name for one in decode(plain).sections]


@pytest.mark.parametrize("make", [v2_image, rfc_image])
def test_a_byte_that_was_changed_anywhere_is_noticed(make: Any) -> None:
    good = sealed(make(ext()))
    gvt.parse(memoryview(good))
    for at in (good.index(b"GVT-EXT1") + 20, 0x240, len(good) - 1000, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(ImageError, match=r"CRC-32|impossible"):
            gvt.parse(memoryview(bytes(bad)))


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"", "does not begin with GVT-EXT1"),
        (ext()[:100], "100 bytes are too few"),
        (ext(queued=b"")[:-1], "impossible"),
        (ext() + b"\0", "1 bytes too many"),
        (ext(size=1 << 31), "2147483648 bytes are impossible"),
    ],
)
def test_one_that_contradicts_itself_is_refused(payload: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        gvt.parse(memoryview(v2_image(payload)))


def test_counts_are_not_taken_on_trust() -> None:
    bad = bytearray(ext())
    struct.pack_into("<I", bad, 48, NONE)
    with pytest.raises(ImageError, match="impossible"):
        gvt.parse(memoryview(v2_image(bytes(bad))))


def test_it_is_not_taken_twice() -> None:
    both = [(2, CFG), (4, ext().ljust(REG_SIZE, b"\0")), (0x100, ext()), (3, VREG), (5, GTT), (6, ROOT), (7, WORKLOAD)]
    with pytest.raises(ImageError, match="SREG has the same"):
        gvt.parse(memoryview(image(both)))


def test_two_images_are_compared_by_it() -> None:
    first, second = (gvt.parse(memoryview(sealed(v2_image(content)))) for content in (ext(), ext(queued=b"", flags=1)))
    (found,) = [one for one in gvt_differences(first, second) if one.section == "ext"]
    assert {"flags", "queued.count"} <= {one.name for one in found.listed}
    assert not list(gvt_differences(first, first))
