# SPDX-License-Identifier: MIT
"""Guest memory in files, and copying its dirty pages."""

import errno
import fcntl
import io
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig import threads
from vfio_mig.dirty import memory as dirty_memory
from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.memory import CHUNK, Buffers, Memory, MemoryMap
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.dirty.runs import Runs
from vfio_mig.dirty.sync import Copy, LiveCopy, Round, Sink, SparseFile, zero_runs
from vfio_mig.errors import HostError, UsageError
from vfio_mig.image.archive import read_archive
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.engine.live import Live, copy_live

PAGE = 4096


def runs(*ranges: tuple[int, int]) -> Runs:
    """Runs of so many pages each from a page number on."""
    starts, sizes = np.array(ranges, np.int64).reshape(-1, 2).T
    return Runs(starts, starts + sizes)


def pieces(memory: Memory, *ranges: tuple[int, int]) -> Iterator[tuple[int, memoryview]]:
    """What is read of such runs."""
    for listed in memory.read([runs(*ranges)], Buffers(1)):
        yield from listed


def sync(
    memory: Memory,
    fetch: Callable[[], list[Dirty]],
    sink: Sink,
    stop: Callable[[], object],
    *,
    rounds: int = 3,
    max_downtime: float | None = None,
    progress: Callable[[Round], object] = lambda _: None,
) -> list[Round]:
    """Copy in rounds, stop, and copy once more, as the jobs do."""
    copy = LiveCopy(memory, fetch, sink, remember=rounds > 0)
    done = copy_live(Live(rounds, max_downtime, on_round=progress), copy, [])
    stop()
    done.append(copy.last_round())
    progress(done[-1])
    return done


@contextmanager
def memfd(content: bytes) -> Iterator[tuple[int, str]]:
    fd = os.memfd_create("guest")
    try:
        os.pwrite(fd, content, 0)
        yield fd, f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def page(byte: int) -> bytes:
    return bytes([byte]) * PAGE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ram@0", ("ram", 0, 0, 0)),
        ("/dev/shm/ram@0x100000000:1G", ("/dev/shm/ram", 1 << 32, 1 << 30, 0)),
        ("ram@4G:1G+3G", ("ram", 4 << 30, 1 << 30, 3 << 30)),
        ("a@b:c@1M:4K", ("a@b:c", 1 << 20, 4096, 0)),
        ("user@host@0", ("user@host", 0, 0, 0)),
    ],
)
def test_memory_is_read_as_users_write_it(text: str, expected: tuple[str, int, int, int]) -> None:
    parsed = MemoryMap.parse(text)
    assert (parsed.path, parsed.gpa, parsed.size, parsed.offset) == expected
    if parsed.size:
        again = MemoryMap.parse(str(parsed))
        assert (again.path, again.gpa, again.size, again.offset) == expected


@pytest.mark.parametrize(
    "text",
    [
        *["", "ram", "@0", "ram@", "ram@x", "ram@0:", "ram@0:0", "ram@1", "ram@0:1", "ram@0:4K+", "ram@0:4K+1"],
        *["ram@0+4K", "ram@-4K", "ram@0:4K:4K", "ram@0xfffffffffffff000:8K", "ram@0x10000000000000000"],
        "r\0m@0",
    ],
)
def test_bad_memory_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        MemoryMap.parse(text)


@given(st.text(alphabet="ram/@:+0x1K ", max_size=14))
def test_any_text_is_memory_or_a_usage_error(text: str) -> None:
    try:
        parsed = MemoryMap.parse(text)
    except UsageError:
        return
    assert parsed.path
    assert parsed.gpa % PAGE == parsed.size % PAGE == parsed.offset % PAGE == 0
    assert parsed.gpa + parsed.size <= 1 << 64


def test_the_size_is_the_rest_of_the_file() -> None:
    with memfd(bytes(5 * PAGE)) as (_, path):
        with MemoryMap(path, 0x100000).open() as whole:
            assert (whole.size, whole.pages) == (5 * PAGE, PageRange(0x100, 5))
        with MemoryMap(path, 0, 0, 2 * PAGE).open() as rest:
            assert rest.size == 3 * PAGE


@pytest.mark.parametrize(
    ("length", "size", "offset"),
    [(0, 0, 0), (PAGE, 2 * PAGE, 0), (PAGE, 0, PAGE), (PAGE + 1, 0, 0), (2 * PAGE, 8192, 4096)],
)
def test_a_file_that_is_too_short_or_crooked_is_refused(length: int, size: int, offset: int) -> None:
    with memfd(bytes(length)) as (_, path), pytest.raises(UsageError):
        MemoryMap(path, 0, size, offset).open()


def test_memory_must_be_a_regular_file_that_is_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(UsageError, match="is not a regular file; guest memory must be one"):
            MemoryMap(str(path), 0).open()
    with pytest.raises(HostError, match="cannot open guest memory: ENOENT"):
        MemoryMap(str(tmp_path / "no"), 0).open()
    with pytest.raises(HostError, match="EISDIR"):
        MemoryMap(str(tmp_path), 0).open(writable=True)


def test_memory_that_overlaps_is_refused_and_closed() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with memfd(bytes(4 * PAGE)) as (_, path):
        with pytest.raises(UsageError, match="overlap"):
            Memory([MemoryMap(path, 0x3000), MemoryMap(path, 0)])
        with pytest.raises(HostError):
            Memory([MemoryMap(path, 0), MemoryMap("/no/such/file", 0x4000)])
        with Memory([MemoryMap(path, 0x4000), MemoryMap(path, 0)]) as memory:
            assert [map_.gpa for map_ in memory.maps] == [0, 0x4000]
            assert memory.ranges == [PageRange(0, 8)]
            assert memory.end == 0x8000
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_mapping_is_shared_with_the_file_and_writable_only_where_asked() -> None:
    with memfd(page(1) + page(2)) as (fd, path):
        with MemoryMap(path, 0, PAGE, PAGE).open(writable=True) as writable:
            mapping = writable.map()
            assert mapping is writable.map()
            assert len(mapping) == PAGE
            mapping[0] = 9
        with pytest.raises(ValueError, match="released"):  # the mapping went with its owner
            mapping[0] = 1
        assert os.pread(fd, 2, PAGE) == b"\x09\x02"
        with MemoryMap(path, 0).open() as readable, pytest.raises(TypeError):
            readable.map()[0] = 1
        kept = MemoryMap(path, 0).open()
        view = memoryview(kept.map())
        kept.close()
        kept.close()
        assert view[0] == 1
        view.release()


def test_reading_gives_the_pages_asked_for_across_maps_and_gaps() -> None:
    with memfd(page(1) + page(2)) as (_, one), memfd(page(3) + page(4)) as (_, two):
        maps = [MemoryMap(two, 0x4000), MemoryMap(one, 0x1000)]
        with Memory(maps) as memory:
            got = [(gpa, bytes(view)) for gpa, view in pieces(memory, (0, 5), (5, 90))]
    assert got == [(0x1000, page(1) + page(2)), (0x4000, page(3)), (0x5000, page(4))]


def test_long_reads_are_cut_into_chunks() -> None:
    with memfd(page(7) * 2000) as (_, path), Memory([MemoryMap(path, 0)]) as memory:
        sizes = [len(view) for _, view in pieces(memory, (0, 2000))]
    whole = 2000 * PAGE // CHUNK
    assert sizes == [*[CHUNK] * whole, 2000 * PAGE - whole * CHUNK]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 90)), max_size=40))
def test_reading_gives_each_run_its_own_pages_whatever_is_read_with_it(steps: list[tuple[int, int]]) -> None:
    with memfd(b"".join(number.to_bytes(8, "little") * (PAGE // 8) for number in range(1100))) as (_, path):
        maps = [MemoryMap(path, 0, 500 * PAGE), MemoryMap(path, 500 * PAGE, 600 * PAGE, 500 * PAGE)]
        asked, at = [], 0
        for gap, nr_pages in steps:
            asked.append(PageRange(at + gap, nr_pages))
            at += gap + nr_pages
        asked = [run for run in asked if run.end <= 1100]
        got: list[int] = []
        with Memory(maps) as memory:
            for gpa, view in pieces(memory, *asked):
                pages = [int.from_bytes(view[at : at + 8], "little") for at in range(0, len(view), PAGE)]
                assert pages == list(range(gpa // PAGE, gpa // PAGE + len(pages)))
                got += pages
    assert got == [number for run in asked for number in range(run.start, run.end)]


def test_near_runs_are_read_at_once_and_far_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def read(_: MemoryMap, gpa: int, view: memoryview) -> None:
        asked.append((gpa // PAGE, len(view) // PAGE))

    monkeypatch.setattr(MemoryMap, "read", read)
    with memfd(page(7) * 2000) as (_, path), Memory([MemoryMap(path, 0)]) as memory:
        near = (0, 1), (5, 2), (12, 1), (60, 2), (63, 2), (66, 3), (70, 1)
        assert [gpa // PAGE for gpa, _ in pieces(memory, *near)] == [0, 5, 12, 60, 63, 66, 70]
    # 63 lies in another block of 64 pages than the end of its run, 66 in the same as 70
    assert asked == [(0, 7), (12, 1), (60, 2), (63, 2), (66, 5)]


def test_a_page_that_nobody_asked_for_may_be_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if offset <= 2 * PAGE < offset + len(views[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with memfd(page(1) + page(2) + page(3) + page(4)) as (_, path), Memory([MemoryMap(path, 0)]) as memory:
        got = [(gpa, bytes(view)) for gpa, view in pieces(memory, (0, 2), (3, 1))]
        assert got == [(0, page(1) + page(2)), (3 * PAGE, page(4))]
        with pytest.raises(HostError, match="cannot read guest memory: EIO"):
            list(pieces(memory, (1, 2)))


def test_writing_stores_what_is_memory_and_leaves_the_rest_out() -> None:
    with memfd(bytes(2 * PAGE)) as (one, one_path), memfd(bytes(2 * PAGE)) as (two, two_path):
        with Memory([MemoryMap(one_path, 0x1000), MemoryMap(two_path, 0x3000)], writable=True) as memory:
            assert memory.write(0x2000, memoryview(page(1) + page(2))) == 2
            assert memory.write(0x4000, memoryview(page(3) + page(4))) == 1
            assert memory.write(0x9000, memoryview(page(5))) == 0
            for gpa, size in ((0, PAGE), (0x2000, 2 * PAGE), (0x3000, PAGE)):  # what is in front, and behind
                for access in (memory.maps[0].read, memory.maps[0].write):
                    with pytest.raises(ValueError, match=f"{size} bytes at {gpa:#x} are not in"):
                        access(gpa, memoryview(bytearray(size)))
        assert os.pread(one, 2 * PAGE, 0) == page(0) + page(1)
        assert os.pread(two, 3 * PAGE, 0) == page(2) + page(3)


def test_clearing_touches_its_pages_alone_wherever_the_memory_lies_in_its_file() -> None:
    with memfd(b"".join(map(page, range(1, 7)))) as (fd, path):
        with Memory([MemoryMap(path, 0x1000, 3 * PAGE, 2 * PAGE)], writable=True) as memory:
            assert memory.clear(0x2000, PAGE) == 1
            assert os.pread(fd, 6 * PAGE, 0) == page(1) + page(2) + page(3) + page(0) + page(5) + page(6)
            assert memory.clear(0x3000, 4 * PAGE) == 1
        assert os.pread(fd, 6 * PAGE, 0) == page(1) + page(2) + page(3) + page(0) * 2 + page(6)


def test_hugetlbfs_without_write_is_written_through_the_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with memfd(bytes(3 * PAGE)) as (fd, path):
        with MemoryMap(path, 0x1000, 2 * PAGE, PAGE).open(writable=True) as memory:
            monkeypatch.setattr(os, "pwrite", pwrite)
            memory.write(0x2000, memoryview(page(1)))
        assert os.pread(fd, 3 * PAGE, 0) == page(0) * 2 + page(1)
        with MemoryMap(path, 0).open() as memory, pytest.raises(HostError, match="cannot write guest memory: EINVAL"):
            memory.write(0, memoryview(page(1)))


class PageFile:
    """Plays the mmap(2) of a file of larger pages: an offset or, to unmap, a length between them is EINVAL."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, alignment: int) -> None:
        self.alignment = alignment
        self.mapped: list[tuple[int, int]] = []
        self._mmap = mmap.mmap
        monkeypatch.setattr(mmap, "mmap", self.map)

    def map(self, fd: int, length: int, flags: int, prot: int, *, offset: int) -> mmap.mmap:
        if offset % self.alignment:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.mapped.append((offset, length))
        return self._mmap(fd, length, flags, prot, offset=offset)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("alignment", [64 << 10, 2 << 20, 4096])
@pytest.mark.parametrize(("offset", "size"), [(0xC0000, 0x40000), (0x100000, 0x2000), (0x1F3000, 0x10D000)])
def test_a_piece_between_the_file_s_pages_is_mapped(
    monkeypatch: pytest.MonkeyPatch, tells: bool, alignment: int, offset: int, size: int
) -> None:
    with memfd(b"") as (fd, path):
        os.ftruncate(fd, 4 << 20)
        os.pwrite(fd, page(7) + page(8), offset)
        file = PageFile(monkeypatch, alignment)
        with MemoryMap(path, 0x1000, size, offset).open(writable=True) as memory:
            if tells:  # as hugetlbfs does; what lies in the mapping must not be unmapped in part
                monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_blksize=alignment, st_size=4 << 20))
            assert memory.map()[: 2 * PAGE] == page(7) + page(8)
            assert len(memory.map()) == size
            memory.map()[PAGE : 2 * PAGE] = page(9)
        assert os.pread(fd, 2 * PAGE, offset) == page(7) + page(9)
    ((start, length),) = file.mapped
    assert start % alignment == 0
    assert start <= offset < offset + size <= start + length <= 4 << 20
    if tells:
        assert length % alignment == 0


def test_a_memfd_that_is_shortened_or_sealed_is_an_error_before_or_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with memfd(bytes(8 * PAGE)) as (fd, path), MemoryMap(path, 0).open(writable=True) as memory:
        memory.reserve(0, 8 * PAGE)
        monkeypatch.setattr(os, "pwrite", pwrite)
        os.ftruncate(fd, 2 * PAGE)
        # a store of our own would be a SIGBUS
        with pytest.raises(HostError, match=r"cannot write guest memory: EFAULT .*; it has become shorter"):
            memory.write(PAGE, memoryview(page(1) * 3))
        monkeypatch.undo()
        assert os.pread(fd, PAGE, PAGE) == page(1)
        with MemoryMap(path, 0).open(writable=True) as late:
            os.ftruncate(fd, PAGE)
            with pytest.raises(HostError, match="cannot map guest memory: the file has become shorter"):
                late.map()
    sealed = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(sealed, PAGE)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with (
            MemoryMap(f"/proc/self/fd/{sealed}", 0).open(writable=True) as memory,
            pytest.raises(HostError, match=r"EPERM .*; it is sealed against writing"),
        ):
            memory.reserve(0, PAGE)
    finally:
        os.close(sealed)


def test_room_is_set_aside_in_each_file_that_a_range_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _fd, offset, size: asked.append((offset, size)))
    with memfd(bytes(4 * PAGE)) as (_, one), memfd(bytes(4 * PAGE)) as (_, two):
        maps = [MemoryMap(one, 0x1000, 2 * PAGE, 2 * PAGE), MemoryMap(two, 0x4000, 4 * PAGE)]
        with Memory(maps, writable=True) as memory:
            memory.reserve(0x2000, 3 * PAGE)
    assert asked == [(3 * PAGE, PAGE), (0, PAGE)]


@pytest.mark.parametrize("has_write", [True, False])
def test_memory_that_can_only_be_mapped_must_be_mapped_before_the_job(
    monkeypatch: pytest.MonkeyPatch, *, has_write: bool
) -> None:
    """Huge pages are set aside at the mapping; of a file with a write(2) the mapping is not needed."""

    def pwrite(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def no_pages(*_: Any, **__: Any) -> mmap.mmap:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with memfd(bytes(PAGE)) as (_, path), MemoryMap(path, 0).open(writable=True) as memory:
        monkeypatch.setattr(mmap, "mmap", no_pages)
        if has_write:
            memory.reserve(0, PAGE)
            return
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(HostError, match=r"ENOMEM .*; there are too few free huge pages"):
            memory.reserve(0, PAGE)


def test_zeros_fill_no_hole_of_a_file_system_that_knows_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with memfd(b"") as (fd, path):
        os.ftruncate(fd, 64 * PAGE)
        for at in (3, 4, 5, 60):
            os.pwrite(fd, page(at), at * PAGE)
        filled = os.fstat(fd).st_blocks
        with MemoryMap(path, 0).open(writable=True) as memory:
            monkeypatch.setattr(os, "lseek", lambda _fd, at, how: at if how == os.SEEK_DATA else 64 * PAGE)
            memory.clear(0x4000, 60 * PAGE)
        assert os.pread(fd, 64 * PAGE, 0) == page(0) * 3 + page(3) + page(0) * 60
        assert os.fstat(fd).st_blocks == filled


def test_pages_are_not_synced_to_hugetlbfs(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with memfd(b"") as (fd, _):
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(UsageError, match=r"there is on hugetlbfs.*vfio-mig pages"):
            SparseFile(fd, "there")


def test_a_file_that_becomes_shorter_is_an_error_and_not_a_crash() -> None:
    with memfd(page(1) * 4) as (fd, path), Memory([MemoryMap(path, 0)]) as memory:
        os.ftruncate(fd, PAGE)
        with pytest.raises(HostError, match="guest memory ends at 0x1000: the file has become shorter"):
            list(pieces(memory, (0, 4)))


def test_reading_a_hole_does_not_fill_it() -> None:
    with memfd(b"") as (fd, path):
        os.ftruncate(fd, 64 * PAGE)
        with Memory([MemoryMap(path, 0)]) as memory:
            assert all(not any(view) for _, view in pieces(memory, (0, 64)))
        assert os.fstat(fd).st_blocks == 0


@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=12), st.integers(0, PAGE - 1))
def test_zero_runs_agree_with_the_reference(kinds: list[int], at: int) -> None:
    data = bytearray(len(kinds) * PAGE)
    for number, kind in enumerate(kinds):
        data[number * PAGE + at] = kind
    runs = list(zero_runs(memoryview(data)))
    assert [is_zero for _, count, is_zero in runs for _ in range(count)] == [not kind for kind in kinds]
    assert [start for start, _, _ in runs] == [sum(c for _, c, _ in runs[:i]) for i in range(len(runs))]
    assert all(one[2] != other[2] for one, other in pairwise(runs))
    assert list(zero_runs(memoryview(b""))) == []


def copied(memory: Memory, dirty: Dirty, sink: SparseFile) -> tuple[int, int, int]:
    """Pages dirty, written, outside."""
    copy = Copy(memory, sink, Buffers(1))
    copy.run([dirty])
    return copy.dirty, copy.written, copy.dirty - copy.inside


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=16, max_size=16), st.integers(0, 0xFFFF)), max_size=4),
    st.lists(st.integers(0, 2), max_size=20),
)
def test_after_each_round_the_file_equals_memory_where_it_was_dirty(
    rounds: list[tuple[list[int], int]], old: list[int]
) -> None:
    """The reference is a bytearray; *old* is what an earlier run left in the file."""
    base = 4
    expected = bytearray(b"".join(map(page, old)).ljust((base + 16) * PAGE, b"\0"))
    with memfd(b"".join(map(page, old))) as (out, _), memfd(bytes(16 * PAGE)) as (guest, path):
        sink = SparseFile(out, "out")
        with Memory([MemoryMap(path, base * PAGE)]) as memory:
            for content, bits in rounds:
                os.pwrite(guest, b"".join(map(page, content)), 0)
                dirty, written, outside = copied(memory, Dirty(base, 16, bits.to_bytes(2, "little")), sink)
                for i in range(16):
                    if bits >> i & 1:
                        expected[(base + i) * PAGE : (base + i + 1) * PAGE] = page(content[i])
                assert dirty == bits.bit_count()
                assert written == sum(1 for i in range(16) if bits >> i & 1 and content[i])
                assert outside == 0
            sink.finish((base + 16) * PAGE)
        assert os.pread(out, len(expected) + 1, 0) == expected


def test_zero_pages_become_holes() -> None:
    with memfd(bytes(CHUNK) + page(1) + bytes(CHUNK)) as (_, path), memfd(b"") as (out, _):
        pages = (2 * CHUNK + PAGE) // PAGE
        with Memory([MemoryMap(path, 1 << 30)]) as memory:
            sink = SparseFile(out, "out")
            every = ((1 << pages) - 1).to_bytes((pages + 7) // 8, "little")
            assert copied(memory, Dirty(1 << 18, pages, every), sink) == (pages, 1, 0)
            sink.finish(memory.end)
            assert os.fstat(out).st_size == memory.end
            assert os.fstat(out).st_blocks * 512 == PAGE


def test_a_page_that_has_become_zero_is_cleared_on_a_real_file_system(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b") as file:
        sink = SparseFile(file.fileno(), "out")
        for content in (page(1) * 4, page(1) + page(0) * 2 + page(1), page(0) * 4):
            sink.write(PAGE, memoryview(content))
            sink.finish(8 * PAGE)
            assert (tmp_path / "out").read_bytes() == page(0) + content + page(0) * 3


def test_finishing_never_shortens_a_file() -> None:
    with memfd(page(1) * 3) as (out, _):
        SparseFile(out, "out").finish(PAGE)
        assert os.fstat(out).st_size == 3 * PAGE


def test_the_rate_of_a_round_is_of_the_pages_that_it_had_to_look_at() -> None:
    done = Round(False, 100, 10, 5, 65, 20, 10 * PAGE, 0.25, 0.5)
    assert (done.pages_changed, done.rate, done.estimated_downtime) == (15, 160 * PAGE, 0.75)
    assert done._replace(copy_time=0.0).rate == 0.0


def test_pages_outside_the_memory_are_counted() -> None:
    with memfd(page(1) * 2) as (_, path), memfd(b"") as (out, _), Memory([MemoryMap(path, PAGE)]) as memory:
        assert copied(memory, Dirty(0, 8, b"\xff"), SparseFile(out, "out")) == (8, 2, 6)


def write_and_finish(sink: SparseFile) -> None:
    sink.write(0, memoryview(page(1) + page(0)))
    sink.finish(2 * PAGE)


@pytest.mark.parametrize(
    ("call", "number", "match"),
    [
        ("pwrite", errno.ENOSPC, r"^out: cannot write: ENOSPC \(No space left on device\)$"),
        ("pwrite", errno.EFBIG, "EFBIG .*; this file system has no files so large"),
        ("lseek", errno.EIO, "EIO"),
        ("fsync", errno.ENOSPC, "ENOSPC"),
    ],
)
def test_a_failing_destination_is_the_hosts_error(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, match: str
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    with memfd(b"") as (out, _):
        sink = SparseFile(out, "out")
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(HostError, match=match):
            write_and_finish(sink)


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_pages_are_the_same_however_many_threads_hash_them(monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    monkeypatch.setattr(threads, "spare_cpus", lambda: spare)
    monkeypatch.setattr(dirty_memory, "CHUNK", 32 * PAGE)
    monkeypatch.setattr(dirty_memory, "_CHUNK_PAGES", 32)
    total = 500
    content = bytearray(b"".join((number + 1).to_bytes(8, "little") * (PAGE // 8) for number in range(total)))
    every = [Dirty(0, total, b"\xff" * (total // 8) + b"\x0f")]
    with (
        memfd(bytes(content)) as (fd, path),
        memfd(b"") as (copied, _),
        Memory([MemoryMap(path, 0)]) as memory,
        LiveCopy(memory, lambda: every, SparseFile(copied, "it")) as copy,
    ):
        assert copy.round().pages_written == total
        for changed in ([], [0], [31, 32, 33, 499], list(range(100, 300))):
            for number in changed:
                content[number * PAGE] ^= 0x80
            os.pwrite(fd, content, 0)
            done = copy.last_round()
            assert (done.pages_changed, done.pages_unchanged) == (len(changed), total - len(changed))
            assert os.pread(copied, len(content), 0) == content


def test_dirty_pages_go_into_the_image_too() -> None:
    file = io.BytesIO()
    with memfd(page(1) + page(2) + page(3)) as (_, path), Memory([MemoryMap(path, 0x10000)]) as memory:
        writer = ArchiveWriter(file, {})
        assert writer.add_pages(pieces(memory, (0x10, 1), (0x12, 1))) == 2 * PAGE
        writer.finish()
    file.seek(0)
    assert [(gpa, bytes(view)) for gpa, view in read_archive(file).pages()] == [
        (0x10000, page(1)),
        (0x12000, page(3)),
    ]


class Guest:
    """A guest that changes some of its pages before each fetch; every page stays dirty, as the RFC's do."""

    def __init__(self, memory: int, changes: list[int]) -> None:
        self.memory = memory
        self.changes = iter(changes)
        self.log: list[str] = []
        self.turn = 0

    def fetch(self) -> list[Dirty]:
        count = next(self.changes)
        self.turn += 1
        os.pwrite(self.memory, bytes([self.turn]) * (count * PAGE), 0)
        self.log.append(str(count))
        return [Dirty(0, 8, b"\xff")]

    def stop(self) -> None:
        self.log.append("stop")


@pytest.mark.parametrize(
    ("changes", "rounds", "log"),
    [
        ([5, 5, 5, 5], 9, "5 5 5 stop 5"),
        ([8, 4, 2, 2, 1], 9, "8 4 2 2 stop 1"),
        ([8, 4, 2, 1], 3, "8 4 2 stop 1"),
        ([8, 3, 0, 0], 9, "8 3 0 stop 0"),
        ([6, 6], 1, "6 stop 6"),
        ([6], 0, "stop 6"),
    ],
)
def test_rounds_end_when_they_bring_nothing_and_one_follows_the_stop(changes: list[int], rounds: int, log: str) -> None:
    seen: list[Round] = []
    with memfd(bytes(8 * PAGE)) as (memory, path), memfd(b"") as (out, _), Memory([MemoryMap(path, 0)]) as known:
        os.pwrite(memory, b"\xff" * (8 * PAGE), 0)
        guest = Guest(memory, changes)
        done = sync(known, guest.fetch, SparseFile(out, "out"), guest.stop, rounds=rounds, progress=seen.append)
        assert os.pread(out, 9 * PAGE, 0) == os.pread(memory, 9 * PAGE, 0)
    assert " ".join(guest.log) == log
    assert seen == done
    assert [r.stopped for r in done] == [False] * (len(done) - 1) + [True]
    # the first round writes all that is dirty, later ones what has changed
    assert [r.pages_written for r in done] == [8, *changes[1 : len(done)]]
    for r in done:
        assert r.pages_dirty == 8
        assert r.pages_written + r.pages_zero + r.pages_unchanged + r.pages_outside == r.pages_dirty
        assert r.bytes_written == r.pages_written * PAGE
        assert r.estimated_downtime == r.bitmap_time + r.copy_time >= 0
        assert r.as_dict()["rate"] == r.rate >= 0


def test_rounds_end_as_soon_as_the_rest_fits_into_the_downtime() -> None:
    for limit, rounds in ((1000.0, 1), (0.0, 4)):
        with memfd(b"\xff" * (8 * PAGE)) as (memory, path), memfd(b"") as (out, _):
            guest = Guest(memory, [8, 6, 4, 2, 1])
            with Memory([MemoryMap(path, 0)]) as known:
                done = sync(known, guest.fetch, SparseFile(out, "out"), guest.stop, rounds=4, max_downtime=limit)
        assert len(done) == rounds + 1


def test_a_page_that_has_become_zero_counts_as_changed() -> None:
    with memfd(page(1) * 2) as (memory, path), memfd(b"") as (out, _), Memory([MemoryMap(path, 0)]) as known:

        def stop() -> None:
            os.pwrite(memory, bytes(PAGE), 0)

        done = sync(known, lambda: [Dirty(0, 2, b"\x03")], SparseFile(out, "out"), stop)
        assert os.pread(out, 3 * PAGE, 0) == bytes(PAGE) + page(1)
    assert (done[-1].pages_written, done[-1].pages_zero, done[-1].pages_unchanged) == (0, 1, 1)


def test_what_the_guest_wrote_last_is_in_the_destination() -> None:
    with memfd(page(1)) as (guest, path), memfd(b"") as (out, _), Memory([MemoryMap(path, 0)]) as memory:

        def stop() -> None:
            os.pwrite(guest, page(9), 0)

        sync(memory, lambda: [Dirty(0, 1, b"\x01")], SparseFile(out, "out"), stop)
        assert os.pread(out, PAGE, 0) == page(9)
