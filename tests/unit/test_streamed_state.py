# SPDX-License-Identifier: MIT
"""A state that comes in pieces: written as it comes, its digests taken beside the job, read ahead for a restore."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vfio_mig import threads
from vfio_mig.errors import HostError
from vfio_mig.image.archive import read_archive
from vfio_mig.image.digests import Digests
from vfio_mig.image.files import committed
from vfio_mig.image.layout import CHUNK
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.files.input import Image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = [0, 1, 511, 512, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 700]
ONE_CPU, TWO_CPUS = 0, 1


def pieces(state: bytes, size: int) -> Iterator[memoryview]:
    """Yield a state from one buffer, which every piece overwrites."""
    buffer = bytearray(size)
    for at in range(0, len(state), size):
        part = state[at : at + size]
        buffer[: len(part)] = part
        yield memoryview(buffer)[: len(part)]


def made(size: int) -> bytes:
    return (b"0123456789abcde" * (size // 15 + 1))[:size]


@pytest.fixture(params=[ONE_CPU, TWO_CPUS], ids=["one CPU", "two CPUs"])
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vfio_mig.threads", "vfio_mig.image.digests"):
        monkeypatch.setattr(f"{module}.spare_cpus", lambda: request.param)


def saved(path: Path, state: bytes, *, way: str) -> bytes:
    """Save a state with something before and behind it; returns the image."""
    with committed(path) as file, Digests(file.fileno() if way == "file" else None) as digests:
        writer = ArchiveWriter(file, {}, None if way == "plain" else digests)
        writer.add_state(state[:100])
        assert writer.add_state(pieces(state[100:], 300_000)) == len(state[100:])
        writer.add_zero([(0, 4096)])
        writer.finish({"a": 1})
    return path.read_bytes()


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize("size", SIZES)
def test_every_way_of_writing_makes_the_same_image(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_mig.image.writer.time.time", lambda: 1)
    state = made(size)
    images = {saved(tmp_path / way, state, way=way) for way in ("plain", "pipe", "file")}
    assert len(images) == 1
    with read_archive(io.BytesIO(images.pop())) as archive:
        assert archive.state() == state
        assert all(member.size == CHUNK for member in archive.members[2:-2])


@pytest.mark.usefixtures("cpus")
def test_a_digest_is_of_what_is_in_the_file_behind_the_write(tmp_path: Path) -> None:
    """Not of a piece's buffer, which is used again."""
    path = tmp_path / "image"
    with committed(path) as file, Digests(file.fileno()) as digests:
        writer = ArchiveWriter(file, {}, digests)
        writer.add_state(iter([b"x" * 1000]))
        os.ftruncate(file.fileno(), 600)
        with pytest.raises(HostError, match="ends at 600, before what was written"):
            digests.of_file(0, 1000)()


def test_no_thread_is_left_and_none_gets_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_mig.image.digests.spare_cpus", lambda: TWO_CPUS)
    monkeypatch.setattr("vfio_mig.threads.spare_cpus", lambda: TWO_CPUS)
    before = threading.active_count()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    blocked = threads.ahead(signal.pthread_sigmask(signal.SIG_BLOCK, ()) for _ in range(1))
    assert next(blocked) >= {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    with committed(tmp_path / "image") as file, Digests(file.fileno()) as digests:
        ArchiveWriter(file, {}, digests).add_state(iter([bytes(2 * CHUNK)]))
        assert threading.active_count() > before
    blocked.close()  # type: ignore[attr-defined]  # it is a generator
    assert threading.active_count() == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


@pytest.mark.usefixtures("cpus")
def test_a_bare_state_of_any_size_says_how_large_it_is() -> None:
    content = bytes(range(200))
    image = Image(b"", None, io.BytesIO(content))
    assert image.state_size == 200
    assert b"".join(image.chunks()) == content


def test_reading_ahead_changes_neither_order_nor_errors() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise HostError("no more")

    seen: list[int] = []
    with pytest.raises(HostError, match="no more"):
        seen.extend(threads.ahead(source()))
    assert list(threads.ahead(iter(range(7)))) == list(range(7))
    assert list(threads.ahead(iter(()))) == []


class Interrupted(io.BytesIO):
    """A file in which another thread gets its turn between seek() and read()."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        at = super().seek(offset, whence)
        time.sleep(0.001)
        return at


def test_state_is_read_ahead_while_pages_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_mig.threads.spare_cpus", lambda: TWO_CPUS)
    out = io.BytesIO()
    writer = ArchiveWriter(out, {})
    for number in range(20):
        writer.add_pages([(number * 4096, bytes([number]) * 4096)])
        writer.add_state(bytes([number]) * 100)
    writer.finish({})
    with read_archive(Interrupted(out.getvalue())) as archive:
        state = threads.ahead(archive.state_chunks())
        pages = [bytes(content) for _, content in archive.pages()]
        assert pages == [bytes([number]) * 4096 for number in range(20)]
        assert list(state) == [bytes([number]) * 100 for number in range(20)]


def test_the_next_one_is_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_mig.threads.spare_cpus", lambda: TWO_CPUS)
    made_now = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        made_now.set()
        yield 2

    items = threads.ahead(source())
    assert next(items) == 1
    assert made_now.wait(10)
    assert list(items) == [2]


def test_the_first_one_is_made_at_once_and_may_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_mig.threads.spare_cpus", lambda: TWO_CPUS)
    made_now = threading.Event()
    before = threading.active_count()

    def source() -> Iterator[int]:
        made_now.set()
        yield 1

    items = threads.ahead(source())
    assert made_now.wait(10)
    del items
    for _ in range(1000):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before
