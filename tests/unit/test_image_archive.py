# SPDX-License-Identifier: MIT
import errno
import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.errors import HostError, ImageError
from vfio_mig.image import archive as reader
from vfio_mig.image import kept, layout, tar
from vfio_mig.image.archive import read_archive
from vfio_mig.image.digests import Digests
from vfio_mig.image.layout import CHUNK, HEADER_MAX, MEMBER_MAX, DirtyBitmap
from vfio_mig.image.writer import AWAITED, ArchiveWriter, _following

HEADER = {"protocol": "gvt-rfc", "device": "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "time": 1.5}
STATISTICS = {"stop_time": 0.25, "pages_dirty": 3}
PAGE = 4096


def written(write: Callable[[ArchiveWriter], object]) -> bytes:
    file = io.BytesIO()
    writer = ArchiveWriter(file, HEADER)
    write(writer)
    writer.finish(STATISTICS)
    return file.getvalue()


def fill_small(writer: ArchiveWriter) -> None:
    writer.add_dirty(16, 11, b"\x05\x04")
    writer.add_pages([(0x10000, b"\x11" * PAGE)])
    writer.add_state(b"state of a device")


SMALL = written(fill_small)


class Pipe(io.RawIOBase):
    """A stream that cannot seek and gives what it likes, at most 1,000 bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.data.read(min(len(buffer), 1000))
        buffer[: len(part)] = part
        return len(part)


def as_file(data: bytes) -> BinaryIO:
    return io.BytesIO(data)


def as_pipe(data: bytes) -> BinaryIO:
    return cast("BinaryIO", Pipe(data))


either_way = pytest.mark.parametrize("opened", [as_file, as_pipe])


def rebuilt(members: list[tuple[str, bytes]], end: bytes = tar.END) -> bytes:
    """Members as given, right or wrong, with good tar headers."""
    return (
        b"".join(tar.header(name, len(data), 7) + data + bytes(tar.padding(len(data))) for name, data in members) + end
    )


def manifest_for(members: list[tuple[str, bytes]], changes: dict[str, Any] | None = None) -> tuple[str, bytes]:
    entries: list[dict[str, Any]] = [
        {"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in members
    ]
    body: dict[str, Any] = {"format": "vfio-mig", "version": 1, "members": entries, "statistics": {}, **(changes or {})}
    body["sha256"] = hashlib.sha256(layout.canonical(body)).hexdigest()
    return "manifest.json", layout.canonical(body)


GOOD_HEADER = ("header.json", b'{"format":"vfio-mig","version":1}')


@either_way
def test_what_was_written_is_read(opened: Callable[[bytes], BinaryIO]) -> None:
    with read_archive(opened(SMALL)) as archive:
        assert archive.header == {**HEADER, "format": "vfio-mig", "version": 1}
        assert archive.state() == b"state of a device"
        assert archive.state_size == 17
        assert list(archive.dirty()) == [DirtyBitmap(16, 11, b"\x05\x04")]
        assert [(gpa, bytes(view)) for gpa, view in archive.pages()] == [(0x10000, b"\x11" * PAGE)]
        assert archive.statistics == STATISTICS
        names = [member["name"] for member in archive.manifest["members"]]
    assert names == ["header.json", "dirty/0000", "pages/0000", "state/0000"]


@either_way
def test_an_archive_may_be_empty_of_state_and_pages(opened: Callable[[bytes], BinaryIO]) -> None:
    with read_archive(opened(written(lambda _: None))) as archive:
        assert (archive.state(), list(archive.dirty()), list(archive.pages())) == (b"", [], [])


@given(
    st.lists(st.binary(max_size=300), max_size=6),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=8),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.binary(max_size=8)), max_size=3),
    st.booleans(),
)
def test_any_content_comes_back(
    state: list[bytes], pages: list[tuple[int, int]], dirty: list[tuple[int, bytes]], streamed: bool
) -> None:
    def fill(writer: ArchiveWriter) -> None:
        assert writer.add_state(iter(state)) == sum(map(len, state))
        for start, bitmap in dirty:
            writer.add_dirty(start, len(bitmap) * 8, bitmap)
        assert writer.add_pages((gpa * PAGE, bytes([gpa]) * PAGE * nr) for gpa, nr in pages) == sum(
            nr * PAGE for _, nr in pages
        )

    with read_archive((as_pipe if streamed else as_file)(written(fill))) as archive:
        assert archive.state() == b"".join(state)
        assert list(archive.dirty()) == [(start, len(bitmap) * 8, bitmap) for start, bitmap in dirty]
        got = [(g // PAGE + i, v[i * PAGE]) for g, v in archive.pages() for i in range(len(v) // PAGE)]
    assert got == [(gpa + i, gpa) for gpa, nr in pages for i in range(nr)]


@given(st.integers(0, len(SMALL) - 1), st.booleans())
def test_an_archive_cut_anywhere_is_refused(cut: int, streamed: bool) -> None:
    with pytest.raises(ImageError):
        read_archive((as_pipe if streamed else as_file)(SMALL[:cut]))


def test_an_archive_cut_at_any_block_is_refused() -> None:
    for cut in range(0, len(SMALL), 512):
        with pytest.raises(ImageError):
            read_archive(as_file(SMALL[:cut]))


def test_a_flip_of_any_byte_is_refused() -> None:
    for at in range(len(SMALL)):
        if 0x1000 < at < 0x1F00:  # the inside of a page of equal bytes: one place stands for all
            continue
        bad = bytearray(SMALL)
        bad[at] ^= 1 << at % 8
        with pytest.raises(ImageError):
            read_archive(as_file(bytes(bad)))


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (1, 4096),
        (0, 4095),
        (0, 0),
        (0, -4096),
        (-4096, 4096),
        (layout.ADDRESS_END, 4096),
        (layout.ADDRESS_END - 4096, 8192),
    ],
)
def test_pages_that_cannot_be_are_not_written(gpa: int, size: int) -> None:
    writer = ArchiveWriter(io.BytesIO(), HEADER)
    with pytest.raises(ValueError, match="no whole pages"):
        writer.add_zero([(gpa, size)])
    writer.add_zero([(layout.ADDRESS_END - 4096, 4096)])  # the last one that can be


def test_an_index_has_at_least_its_count() -> None:
    for size in (8, 7):
        members = [GOOD_HEADER, ("zero/0000", bytes(size))]
        whole = rebuilt([*members, manifest_for(members)])
        if size == 8:
            assert list(read_archive(as_file(whole)).memory()) == []
        else:
            with pytest.raises(ImageError, match="zero/0000: too short"):
                read_archive(as_file(whole))


def test_a_header_may_have_a_mebibyte_and_no_more() -> None:
    for size in (HEADER_MAX, HEADER_MAX + 1):
        header = ("header.json", GOOD_HEADER[1].ljust(size))
        whole = rebuilt([header, manifest_for([header])])
        if size == HEADER_MAX:
            assert read_archive(as_file(whole)).header == json.loads(GOOD_HEADER[1])
        else:
            with pytest.raises(ImageError, match="1048577 bytes are too many, at most 1048576 are allowed"):
                read_archive(as_file(whole))


def test_flips_and_cuts_of_a_large_archive_are_refused() -> None:
    """Sampled: the ends of every member and places between them."""
    rng = random.Random(6)  # noqa: S311

    def fill(writer: ArchiveWriter) -> None:
        writer.add_state(rng.randbytes(CHUNK + 4096))
        fill_small(writer)

    large = written(fill)
    places = [0, len(large) - 1, *(rng.randrange(len(large)) for _ in range(25))]
    for name in (b"header.json", b"state/0000", b"state/0001", b"dirty/0000", b"pages/0000", b"manifest.json"):
        at = large.index(name + b"\0")
        places += [at, at + 512, at - 1 if at else 0]
    for place in places:
        damaged = bytearray(large)
        damaged[place] ^= 1 << rng.randrange(8)
        with pytest.raises(ImageError):
            read_archive(io.BytesIO(damaged))
        with pytest.raises(ImageError):
            read_archive(io.BytesIO(large[:place]))


@given(st.binary(max_size=3000))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        read_archive(as_file(data))


@either_way
@pytest.mark.parametrize("garbage", [b"\0", b"x", bytes(10240)])
def test_anything_behind_the_end_is_refused(opened: Callable[[bytes], BinaryIO], garbage: bytes) -> None:
    with pytest.raises(ImageError, match="behind the end"):
        read_archive(opened(SMALL + garbage))


def test_an_unfinished_archive_is_refused_and_the_message_says_what_to_do() -> None:
    with pytest.raises(ImageError, match=r"without manifest\.json; the save was not finished; save it again"):
        read_archive(as_file(rebuilt([GOOD_HEADER, ("state/0000", b"x")])))


def test_a_rebuilt_archive_is_good() -> None:
    members = [GOOD_HEADER, ("state/0000", b"x")]
    assert read_archive(as_file(rebuilt([*members, manifest_for(members)]))).state() == b"x"


@pytest.mark.parametrize(
    "names",
    [
        ["state/0001"],
        ["state/0000", "state/0002"],
        ["state/0000", "state/0000"],
        ["state/00000"],
        ["state/000"],
        ["state"],
        ["/etc/passwd"],
        ["../state/0000"],
        ["other/0000"],
        ["header.json"],
    ],
)
def test_names_out_of_order_are_refused(names: list[str]) -> None:
    members = [GOOD_HEADER, *((name, b"x") for name in names)]
    with pytest.raises(ImageError):
        read_archive(as_file(rebuilt([*members, manifest_for(members)])))


@pytest.mark.parametrize(
    "header",
    [
        b'{"format":"vfio-mig","version":2}',
        b'{"format":"other","version":1}',
        b'{"version":1}',
        b"[]",
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_header_of_another_kind_is_refused(header: bytes) -> None:
    members = [("header.json", header)]
    with pytest.raises(ImageError, match=r"header\.json"):
        read_archive(as_file(rebuilt([*members, manifest_for(members)])))


@pytest.mark.parametrize(
    "changes",
    [
        {"members": []},
        {"members": {}},
        {"members": [1]},
        {"members": [None, None]},
        {"members": [GOOD_HEADER[0]]},
        {"statistics": []},
        {"version": 2},
        {"format": "other"},
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match=r"manifest\.json"):
        read_archive(as_file(rebuilt([GOOD_HEADER, manifest_for([GOOD_HEADER], changes)])))


@pytest.mark.parametrize(
    ("start", "nr_pages", "bitmap"),
    [
        (0, 9, b"\x01"),
        (0, 8, b"\x01\x00"),
        (0, 7, b"\x80"),
        (-1, 8, b"\x01"),
        (1 << 52, 8, b"\x01"),
        (True, 8, b"\x01"),
        (0, 8.0, b"\x01"),
        (0, None, b""),
    ],
)
def test_a_bitmap_that_does_not_fit_its_range_is_refused(start: Any, nr_pages: Any, bitmap: bytes) -> None:
    members = [GOOD_HEADER, ("dirty/0000", bitmap)]
    entries: list[dict[str, Any]] = [
        {"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in members
    ]
    entries[1].update(start_page=start, nr_pages=nr_pages)
    with pytest.raises(ImageError):
        read_archive(as_file(rebuilt([*members, manifest_for(members, {"members": entries})])))


def pages_member(*ranges: tuple[int, int], count: int | None = None, content: bytes | None = None) -> bytes:
    index = b"".join(layout.PAIR.pack(*pair) for pair in ranges)
    body = bytes(sum(size for _, size in ranges) % (1 << 20)) if content is None else content
    return layout.COUNT.pack(len(ranges) if count is None else count) + index + body


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"1234567",
        pages_member((0, PAGE), count=(1 << 64) - 1),
        pages_member((0, PAGE), count=2),
        pages_member((1, PAGE)),
        pages_member((0, PAGE + 1)),
        pages_member((0, 0)),
        pages_member((0, PAGE), content=b""),
        pages_member((0, PAGE), content=bytes(2 * PAGE)),
        pages_member(((1 << 64) - PAGE, 2 * PAGE)),
        pages_member((0, (1 << 64) - PAGE), content=b""),
    ],
)
def test_a_pages_member_with_impossible_ranges_is_refused(member: bytes) -> None:
    members = [GOOD_HEADER, ("pages/0000", member)]
    with pytest.raises(ImageError, match="pages/0000"):
        read_archive(as_file(rebuilt([*members, manifest_for(members)])))


def test_a_size_is_refused_before_memory_is_taken_for_it() -> None:
    class Counting(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            Counting.largest = max(Counting.largest, size or 0)
            return super().read(size)

    good_header = rebuilt([GOOD_HEADER], b"")
    with pytest.raises(ImageError, match="8589934591 bytes are too many"):
        read_archive(Counting(good_header + tar.header("state/0000", tar.SIZE_MAX, 7)))
    assert Counting.largest <= 512


@pytest.mark.parametrize("name", ["header.json", "manifest.json", "state/0000"])
def test_no_more_memory_is_taken_than_one_member_needs_however_large_it_says_it_is(tmp_path: Path, name: str) -> None:
    before = [] if name == "header.json" else [GOOD_HEADER]
    for size in (MEMBER_MAX, 64 << 20, tar.SIZE_MAX):
        (tmp_path / "short").write_bytes(rebuilt(before, b"") + tar.header(name, size, 7))
        tracemalloc.start()
        try:
            with (tmp_path / "short").open("rb") as file, pytest.raises(ImageError, match=r"cut off|too many"):
                read_archive(file)
            assert tracemalloc.get_traced_memory()[1] < MEMBER_MAX + (1 << 20)
        finally:
            tracemalloc.stop()


def test_a_small_file_of_hostile_json_does_not_fill_the_memory() -> None:
    hostile = manifest_for([GOOD_HEADER], {"statistics": {"x": [[[[]]]] * (1 << 20)}})
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="too many"):
            read_archive(as_file(rebuilt([GOOD_HEADER, hostile])))
        assert tracemalloc.get_traced_memory()[1] < MEMBER_MAX
    finally:
        tracemalloc.stop()


def test_a_manifest_may_be_long_when_it_lists_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MANIFEST_MAX", 1024)
    members = [GOOD_HEADER, *((f"state/{number:04d}", b"") for number in range(10_001))]
    manifest = manifest_for(members)
    assert len(manifest[1]) > 1 << 20
    with read_archive(as_file(rebuilt([*members, manifest]))) as archive:
        assert len(archive.members) == 10_002


def test_an_entry_of_a_manifest_is_never_longer_than_the_reader_allows() -> None:
    member = layout.Member("dirty/" + "9" * 20, MEMBER_MAX, "f" * 64, 0, {"start_page": 1 << 64, "nr_pages": 1 << 64})
    assert len(layout.canonical(member.entry())) < layout.ENTRY_MAX


@pytest.mark.parametrize("value", ["x" * 100_000, [[[[[[[[[0]]]]]]]]] * 1000, 10**4000], ids=type)
@pytest.mark.parametrize("key", ["format", "version"])
def test_a_message_does_not_repeat_all_of_a_header(key: str, value: object) -> None:
    header = json.dumps({"format": "vfio-mig", "version": 1, key: value}).encode()
    members = [("header.json", header)]
    with pytest.raises(ImageError, match=key) as caught:
        read_archive(as_file(rebuilt([*members, manifest_for(members)])))
    assert len(str(caught.value)) < 1000


def test_large_state_and_pages_are_cut_into_members_of_bounded_size() -> None:
    blob = os.urandom(4096) * (CHUNK // 4096 * 2 + 3)
    data = written(lambda w: (w.add_state(memoryview(blob)), w.add_pages([(1 << 32, blob)])))
    archive = read_archive(as_file(data))
    assert archive.state() == blob
    assert b"".join(view for _, view in archive.pages()) == blob
    assert [m.name for m in archive.members] == [
        "header.json",
        *(f"{k}/{i:04d}" for k in ("state", "pages") for i in range(3)),
    ]
    assert max(m.size for m in archive.members) <= MEMBER_MAX


def test_tar_programs_read_it(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(SMALL)) as tared:
        assert tared.getnames() == ["header.json", "dirty/0000", "pages/0000", "state/0000", "manifest.json"]
        member = tared.extractfile("manifest.json")
        assert member is not None
        assert json.load(member)["statistics"] == STATISTICS
        assert {(m.mode, m.isreg(), m.uname) for m in tared} == {(0o600, True, "root")}
    done = subprocess.run(["tar", "-xf", "-", "-C", tmp_path], input=SMALL, capture_output=True, check=True)
    assert done.stderr == b""
    assert (tmp_path / "state" / "0000").read_bytes() == b"state of a device"


def test_the_same_bytes_stream_through_a_real_pipe() -> None:
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb", buffering=0) as file:  # noqa: PTH123 -- it is a descriptor
            out = ArchiveWriter(cast("BinaryIO", file), HEADER)
            fill_small(out)
            out.add_state(bytes(300_000))
            out.finish(STATISTICS)

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reader, "rb") as file, read_archive(file) as archive:  # noqa: PTH123 -- it is a descriptor
        assert archive.state() == b"state of a device" + bytes(300_000)
    thread.join()


def test_an_archive_is_read_from_where_the_file_stands() -> None:
    file = io.BytesIO(b"before" + SMALL)
    file.seek(6)
    assert read_archive(file).state() == b"state of a device"


def test_a_file_that_changes_after_the_check_is_noticed() -> None:
    file = io.BytesIO(SMALL)
    archive = read_archive(file)
    at = SMALL.index(b"state of a device")
    file.getbuffer()[at] ^= 1
    with pytest.raises(ImageError, match="state/0000: the file has changed"):
        archive.state()


class Full(io.RawIOBase):
    name = "/some/where"

    def writable(self) -> bool:
        return True

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Broken(io.RawIOBase):
    name = "/some/where"

    def readable(self) -> bool:
        return True

    def readinto(self, _: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_and_a_broken_one_are_the_hosts_errors() -> None:
    with pytest.raises(HostError, match="/some/where: cannot write: ENOSPC"):
        ArchiveWriter(cast("BinaryIO", Full()), HEADER)
    with pytest.raises(HostError, match="/some/where: cannot read: EIO"):
        read_archive(cast("BinaryIO", Broken()))


def test_no_room_for_the_copy_of_a_pipe_is_the_hosts_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(kept, "IN_MEMORY", PAGE)
    full = Full()
    full.seek = lambda *_: 0  # type: ignore[method-assign]
    full.seekable = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: io.BufferedWriter(full, 1 << 20))  # which takes it at first
    with pytest.raises(HostError, match="ENOSPC"):
        read_archive(as_pipe(written(lambda writer: writer.add_state(bytes(PAGE)))))


@pytest.mark.parametrize("alone", [True, False])
def test_what_comes_through_a_pipe_and_fits_into_memory_is_not_copied_again(alone: bool) -> None:
    parts = [bytes([number]) * PAGE for number in range(3)]
    data = written(lambda writer: [writer.add_state(part) for part in parts])
    with read_archive(as_pipe(data), alone=alone) as archive:
        assert archive.is_at_hand
        state = archive.state()
        assert isinstance(state, memoryview)
        assert state == b"".join(parts)
        assert all(isinstance(chunk, memoryview) for chunk in archive.state_chunks())
    with read_archive(as_file(data)) as archive:
        assert not archive.is_at_hand


def test_a_pipe_s_state_with_memory_between_its_pieces_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(writer: ArchiveWriter) -> None:
        writer.add_state(b"one")
        writer.add_pages([(0, b"\x11" * PAGE)])
        writer.add_state(b"two")

    with read_archive(as_pipe(written(fill))) as archive:
        assert archive.state() == b"onetwo"
    monkeypatch.setattr(kept, "IN_MEMORY", PAGE)  # the page is in a file, and all else in memory
    with read_archive(as_pipe(written(fill))) as archive:
        assert archive.state() == b"onetwo"
        assert [(gpa, bytes(view)) for gpa, view in archive.pages()] == [(0, b"\x11" * PAGE)]


def test_memory_for_a_pipe_has_its_pages_before_somebody_waits_for_it() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    for touched, least, most in ((False, 0, kept.IN_MEMORY // 2), (True, kept.IN_MEMORY, 2 * kept.IN_MEMORY)):
        before = resident()
        with kept.Kept(touched=touched):
            assert least <= resident() - before + 64 * PAGE, touched
            assert resident() - before <= most, touched


def sizes(data: bytes) -> list[int]:
    with read_archive(as_pipe(data)) as archive:
        return [member.size for member in archive.members if member.kind == "state"]


@pytest.mark.parametrize("streamed", [True, False])
def test_members_of_a_state_that_somebody_waits_for_grow_and_none_is_long_in_coming(streamed: bool) -> None:
    """What is left to do behind the last byte is to take the digest of the last member."""
    kib = 1 << 10
    file = io.BytesIO()
    state = bytes(range(256)) * (12 * kib)
    with Digests(None) as digests:
        writer = ArchiveWriter(file, HEADER, digests, first=256 * kib)
        writer.add_state(iter([state[: 1 << 20], state[1 << 20 :]]) if streamed else state)
        writer.finish()
    assert sizes(file.getvalue()) == [256 * kib, 512 * kib, 1024 * kib, 1024 * kib, 256 * kib]
    assert _following(AWAITED, 32 << 20) == 2 << 20
    assert _following(AWAITED, 1 << 40) == _following(CHUNK, 0) == CHUNK


def test_states_in_several_goes_share_buffers_and_each_keeps_its_digest() -> None:
    """A live save reads a state in rounds; the digest of one round's last piece may be taken in the next one."""
    file = io.BytesIO()
    with Digests(None) as digests:
        writer = ArchiveWriter(file, HEADER, digests, first=128 << 10)
        for number in range(8):
            writer.add_state(iter([bytes([number]) * (100 << 10)]))
            writer.add_pages([(number * PAGE, b"\x11" * PAGE)])
            writer.add_zero([(0, PAGE)])
        writer.finish()
    with read_archive(as_pipe(file.getvalue())) as archive:
        assert archive.state() == b"".join(bytes([number]) * (100 << 10) for number in range(8))


def test_wrong_use_is_a_value_error_and_writes_nothing() -> None:
    file = io.BytesIO()
    writer = ArchiveWriter(file, HEADER)
    before = file.getvalue()
    for call in (
        lambda: writer.add_dirty(0, 9, b"\xff"),
        lambda: writer.add_dirty(0, 7, b"\xff"),
        lambda: writer.add_pages([(1, bytes(PAGE))]),
        lambda: writer.add_pages([(0, bytes(1))]),
        lambda: writer.add_pages([((1 << 64) - PAGE, bytes(2 * PAGE))]),
        lambda: writer.finish({"x": float("nan")}),
    ):
        with pytest.raises(ValueError):
            call()
        assert file.getvalue() == before
    writer.finish()
    with pytest.raises(ValueError, match="finished"):
        writer.add_state(b"late")


def test_a_buffer_may_be_used_again_for_the_next_pages() -> None:
    buffer = bytearray(PAGE)

    def pages() -> Any:
        for i in range(4):
            buffer[:] = bytes([i]) * PAGE
            yield i * PAGE, memoryview(buffer)

    got = list(read_archive(as_file(written(lambda w: w.add_pages(pages())))).pages())
    assert [(gpa, len(view)) for gpa, view in got] == [(0, 4 * PAGE)]
    assert bytes(got[0][1][::PAGE]) == b"\0\1\2\3"


@given(st.integers(1, 400), st.data())
def test_a_valid_manifest_with_hostile_members_never_escapes_as_another_error(count: int, data: st.DataObject) -> None:
    member = data.draw(st.binary(max_size=count))
    members = [GOOD_HEADER, (data.draw(st.sampled_from(["state/0000", "pages/0000", "dirty/0000"])), member)]
    with suppress(ImageError):
        read_archive(as_file(rebuilt([*members, manifest_for(members)])))
