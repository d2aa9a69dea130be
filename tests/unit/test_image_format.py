# SPDX-License-Identifier: MIT
"""docs/image-format.md is enough for a second implementation: this one knows that page, and tarfile, json, hashlib."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.errors import ImageError
from vfio_mig.image.archive import read_archive
from vfio_mig.image.writer import ArchiveWriter

PAGE = 4096
DOCUMENT = (Path(__file__).parents[2] / "docs/image-format.md").read_text("utf-8")
STATES = st.lists(st.binary(max_size=5000), max_size=3)
RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3), st.booleans(), st.integers(1, 255)), max_size=4)


def header_of(name: str, size: int, mtime: int) -> bytes:
    block = bytearray(512)
    for at, text in (
        (0, name.encode("ascii")),
        (100, b"0000600\x000000000\x000000000\x00"),
        (124, f"{size:011o}\0".encode()),
        (136, f"{mtime:011o}\0".encode()),
        (148, b" " * 8),
        (156, b"0"),
        (257, b"ustar\x0000"),
        (265, b"root"),
        (297, b"root"),
    ):
        block[at : at + len(text)] = text
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def dumps(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def index_of(content: bytes) -> tuple[list[tuple[int, int]], bytes]:
    (count,) = struct.unpack_from("<Q", content)
    pairs = [struct.unpack_from("<QQ", content, 8 + 16 * number) for number in range(count)]
    assert all(gpa % PAGE == size % PAGE == 0 < size for gpa, size in pairs)
    ordered = sorted(pairs)
    assert all(sum(one) <= other[0] for one, other in itertools.pairwise(ordered))
    return [(gpa, size) for gpa, size in pairs], content[8 + 16 * count :]


def read(image: bytes) -> tuple[dict[str, Any], bytes, dict[int, bytes], list[tuple[int, int, bytes]]]:
    """Return header, state, memory by page address, and dirty bitmaps."""
    members: list[tuple[str, bytes]] = []
    at, counts = 0, {"state": 0, "dirty": 0, "pages": 0, "zero": 0}
    with tarfile.open(fileobj=io.BytesIO(image)) as tar:
        for one in tar:
            file = tar.extractfile(one)
            assert file is not None
            content = file.read()
            assert image[at : at + 512] == header_of(one.name, len(content), int(one.mtime))
            at += 512 + len(content) + -len(content) % 512
            members.append((one.name, content))
    assert image[at:] == bytes(1024)
    (first, header), *middle, (last, commit) = members
    assert (first, last) == ("header.json", "manifest.json")
    manifest = json.loads(commit)
    assert dumps(manifest) == commit
    assert hashlib.sha256(dumps({k: v for k, v in manifest.items() if k != "sha256"})).hexdigest() == manifest["sha256"]
    state, memory, bitmaps = b"", dict[int, bytes](), list[tuple[int, int, bytes]]()
    for (name, content), entry in zip(members[:-1], manifest["members"], strict=True):
        assert (entry["name"], entry["size"]) == (name, len(content))
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    for (name, content), entry in zip(middle, manifest["members"][1:], strict=True):
        kind = name.partition("/")[0]
        assert name == f"{kind}/{counts[kind]:04}"
        counts[kind] += 1
        if kind == "state":
            state += content
        elif kind == "dirty":
            bitmaps.append((entry["start_page"], entry["nr_pages"], content))
        else:
            ranges, rest = index_of(content)
            for gpa, size in ranges:
                piece, rest = (rest[:size], rest[size:]) if kind == "pages" else (bytes(size), rest)
                memory.update({gpa + offset: piece[offset : offset + PAGE] for offset in range(0, size, PAGE)})
            assert rest == b""
    return json.loads(header), state, memory, bitmaps


@given(STATES, RANGES)
def test_a_second_reader_gets_what_was_written(states: list[bytes], ranges: list[tuple[int, int, bool, int]]) -> None:
    file = io.BytesIO()
    writer = ArchiveWriter(file, {"protocol": "mainline-v2", "device": {"name": "ü"}})
    memory: dict[int, bytes] = {}
    for page, count, is_zero, byte in ranges:
        content = bytes(count * PAGE) if is_zero else bytes([byte]) * (count * PAGE)
        if is_zero:
            writer.add_zero([(page * PAGE, len(content))])
        else:
            writer.add_pages([(page * PAGE, content)])
        memory.update({(page + number) * PAGE: content[:PAGE] for number in range(count)})
    writer.add_dirty(16, 11, b"\x05\x04")
    for state in states:
        writer.add_state(state)
    writer.finish({"stop_time": 0.5})
    header, state, pages, bitmaps = read(file.getvalue())
    assert header == {"format": "vfio-mig", "version": 1, "protocol": "mainline-v2", "device": {"name": "ü"}}
    assert state == b"".join(states)
    assert pages == memory
    assert bitmaps == [(16, 11, b"\x05\x04")]


def image_with(kind: str, ranges: list[tuple[int, int]]) -> bytes:
    """Make an image whose index says anything, as the page has it: by no code of ours."""
    index = struct.pack("<Q", len(ranges)) + b"".join(struct.pack("<QQ", *one) for one in ranges)
    content = index + bytes(sum(size for _, size in ranges) if kind == "pages" else 0)
    members = [("header.json", dumps({"format": "vfio-mig", "version": 1})), (f"{kind}/0000", content)]
    entries = [{"name": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in members]
    manifest = {"format": "vfio-mig", "version": 1, "members": entries, "statistics": {}}
    manifest["sha256"] = hashlib.sha256(dumps(manifest)).hexdigest()
    members.append(("manifest.json", dumps(manifest)))
    return b"".join(header_of(n, len(c), 0) + c + bytes(-len(c) % 512) for n, c in members) + bytes(1024)


@pytest.mark.parametrize("kind", ["pages", "zero"])
@pytest.mark.parametrize(
    ("pages", "overlap"),
    [
        ([(0, 1), (1, 1), (3, 2)], False),
        ([(3, 2), (0, 1), (1, 2)], False),
        ([(0, 2), (1, 1)], True),
        ([(1, 1), (0, 2)], True),
        ([(5, 1), (0, 1), (5, 1)], True),
        ([(0, 9), (20, 1), (3, 1)], True),
    ],
)
def test_ranges_that_overlap_in_one_index_are_refused_by_both_readers(
    kind: str, pages: list[tuple[int, int]], *, overlap: bool
) -> None:
    image = image_with(kind, [(first * PAGE, count * PAGE) for first, count in pages])
    if not overlap:
        assert len(read(image)[2]) == sum(count for _, count in pages)
        read_archive(io.BytesIO(image)).close()
        return
    with pytest.raises(AssertionError):
        read(image)
    with pytest.raises(ImageError, match=f"{kind}/0000: ranges overlap at 0x"):
        read_archive(io.BytesIO(image))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.booleans()), max_size=12))
def test_what_is_written_in_any_order_and_again_is_a_good_image(pieces: list[tuple[int, int, bool]]) -> None:
    """As rounds of a live save do it: a page comes again while the one before waits for its member."""
    file = io.BytesIO()
    writer = ArchiveWriter(file, {})
    memory: dict[int, bytes] = {}
    for number, (page, count, is_content) in enumerate(pieces, 1):
        if is_content:
            writer.put_pages(page * PAGE, bytes([number]) * (count * PAGE))
            memory.update({(page + one) * PAGE: bytes([number]) * PAGE for one in range(count)})
    writer.flush_pages()
    zero = [(page * PAGE, count * PAGE) for page, count, is_content in pieces if not is_content]
    written = writer.add_zero(zero)
    writer.finish()
    empty = {gpa + at for gpa, size in zero for at in range(0, size, PAGE)}
    assert written == len(empty) * PAGE
    assert read(file.getvalue())[2] == {**memory, **dict.fromkeys(empty, bytes(PAGE))}
    read_archive(io.BytesIO(file.getvalue())).close()


@pytest.mark.parametrize(
    "words", ["header.json", "manifest.json", "state/NNNN", "dirty/NNNN", "pages/NNNN", "zero/NNNN"]
)
def test_the_page_names_every_member(words: str) -> None:
    assert f"`{words}`" in DOCUMENT
