# SPDX-License-Identifier: MIT
"""Counting, runs and fetching of dirty bitmaps, against sets of page numbers."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.dirty import bitmap as module
from vfio_mig.dirty import popcount
from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.fetch import MIN_PAGES, fetch
from vfio_mig.dirty.ranges import PageRange
from vfio_mig.errors import DeviceError

ROOT = Path(__file__).parents[2]


def pages(bitmap: bytes, nr_pages: int, start: int = 0) -> set[int]:
    """The slow reference: one bit at a time, as the header's comment says it."""
    return {start + page for page in range(nr_pages) if bitmap[page // 8] >> page % 8 & 1}


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[int, bytes]:
    """A number of pages and a bitmap of it, with room behind and rubbish in it, as a kernel may leave."""
    nr_pages = draw(st.integers(0, 300))
    length = module.size(nr_pages)
    biased = st.sampled_from([b"\0", b"\xff"]).flatmap(lambda byte: st.just(byte * length))
    return nr_pages, draw(st.one_of(st.binary(min_size=length, max_size=length + 9), biased))


@given(bitmaps())
def test_count_and_trim_agree_with_the_reference(case: tuple[int, bytes]) -> None:
    nr_pages, bitmap = case
    trimmed = module.trim(bitmap, nr_pages)
    assert len(trimmed) == module.size(nr_pages)
    assert pages(trimmed, nr_pages) == pages(bitmap, nr_pages)
    assert int.from_bytes(trimmed, "little") >> nr_pages == 0
    assert module.count(bitmap, nr_pages) == len(pages(bitmap, nr_pages))
    assert module.count(memoryview(bitmap), nr_pages) == module.count(bytearray(bitmap), nr_pages)


def test_a_bitmap_that_is_too_short_is_a_value_error() -> None:
    for call in (module.trim, module.count):
        with pytest.raises(ValueError, match="1 bytes are not a bitmap of 9 pages"):
            call(b"\xff", 9)


def test_bits_are_counted_by_gmp_where_it_is_and_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 5 + b"\x01\x80\xff"
    expected = sum(byte.bit_count() for byte in data)
    by_gmp = popcount._gmp()
    assert by_gmp is not None, "every Debian has libgmp10"
    assert by_gmp(data[:16], 2) == sum(byte.bit_count() for byte in data[:16])
    assert popcount.popcount(data) == popcount.popcount(memoryview(data)) == expected
    monkeypatch.setattr(popcount, "_gmp", lambda: None)
    assert popcount.popcount(data) == expected


@pytest.mark.parametrize("name", ["libgmp-of-nobody.so.10", "libc.so.6"])  # not there; there, but without the function
def test_a_host_without_gmp_counts_by_python(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(popcount, "_LIBRARY", name)
    assert popcount._gmp.__wrapped__() is None


def test_counting_and_fetching_load_no_numpy() -> None:
    script = (
        "import sys; from vfio_mig.dirty.fetch import fetch; from vfio_mig.dirty.ranges import PageRange\n"
        "import vfio_mig.image.archive, vfio_mig.image.files, vfio_mig.decode.gvt_image, vfio_mig.dirty.memory\n"
        "print(sum(d.total() for d in fetch(lambda s, n: b'\\xff' * n, [PageRange(0, 9)])))\n"
        "print([m for m in ('numpy', 'rich', 'tempfile', 'tarfile', 'pathlib', 'dataclasses') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "9\n[]\n"


class Kernel:
    """A dirty bitmap source that refuses requests above a limit and keeps a diary."""

    def __init__(self, limit: int, error: int = errno.EINVAL) -> None:
        self.limit = limit
        self.error = error
        self.calls: list[tuple[int, int]] = []

    def get(self, start: int, nr_pages: int) -> bytes:
        self.calls.append((start, nr_pages))
        if nr_pages > self.limit:
            raise DeviceError("too large", errno=self.error)
        # Every third page is dirty; the kernel answers with a word more than needed.
        bits = sum(1 << i for i in range(nr_pages) if (start + i) % 3 == 0)
        return bits.to_bytes((nr_pages + 63) // 64 * 8, "little") + b"\xff" * 8


@given(
    st.lists(st.builds(PageRange, st.integers(0, 5000), st.integers(0, 700)), max_size=4),
    st.integers(MIN_PAGES, 600),
    st.integers(1, 800),
    st.sampled_from([errno.EINVAL, errno.ENOMEM, errno.E2BIG]),
)
def test_chunks_cover_the_ranges_in_order(ranges: list[PageRange], limit: int, max_pages: int, error: int) -> None:
    kernel = Kernel(limit, error)
    chunks = list(fetch(kernel.get, ranges, max_pages))
    assert [p for c in chunks for p in range(c.start_page, c.start_page + c.nr_pages)] == [
        p for r in ranges for p in range(r.start, r.end)
    ]
    assert all(c.nr_pages <= min(limit, max_pages) for c in chunks)
    assert [p for c in chunks for p in sorted(pages(c.bitmap, c.nr_pages, c.start_page))] == [
        p for r in ranges for p in range(r.start, r.end) if p % 3 == 0
    ]
    assert all(len(c.bitmap) == module.size(c.nr_pages) for c in chunks)


def test_a_refused_size_is_halved_once_and_not_tried_again() -> None:
    kernel = Kernel(1 << 8)
    list(fetch(kernel.get, [PageRange(0, 1 << 10), PageRange(1 << 11, 1 << 9)]))
    assert [nr for _, nr in kernel.calls] == [1 << 10, 1 << 9, *[1 << 8] * 6]


@pytest.mark.parametrize(("limit", "error", "calls"), [(1 << 30, 0, 1), (0, errno.EINVAL, 5), (0, errno.EFAULT, 1)])
def test_the_smallest_request_and_other_errors_are_final(limit: int, error: int, calls: int) -> None:
    kernel = Kernel(limit, error)
    if error:
        with pytest.raises(DeviceError) as caught:
            list(fetch(kernel.get, [PageRange(0, 1024)]))
        assert caught.value.errno == error
    else:
        list(fetch(kernel.get, [PageRange(0, 1024)]))
    assert len(kernel.calls) == calls


def test_an_answer_that_is_too_short_is_the_devices_error() -> None:
    with pytest.raises(DeviceError, match="64 pages has only 7 bytes"):
        list(fetch(lambda _, __: bytes(7), [PageRange(0, 64)]))


def test_a_chunk_knows_its_pages() -> None:
    chunk = Dirty(100, 10, b"\x05\x02")
    assert chunk.total() == 3
