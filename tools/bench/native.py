# SPDX-License-Identifier: MIT
"""What needs no kernel: own time while stopped, dirty bitmaps, copying pages; against C, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.bench.table import Row, alternate, ratio, show
from tools.bench.window import move_rows, window_rows
from vfio_mig.dirty.memory import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE: Final = Path(__file__).with_name("c") / "reference.c"
PAGE: Final = 4096
GIB: Final = 1 << 30
SIZES: Final = ((1, "1 GiB"), (64, "64 GiB"), (1024, "1 TiB"))
DENSITIES: Final = (0.001, 0.1, 0.9)
COPY_PAGES: Final = 1 << 16
FIRST_BYTES: Final = 1 << 30
FIRST_IN: Final = "/dev/shm"  # noqa: S108 -- a name of our own in it: as guest memory, and faster than any disk
COPIES: Final = ((0.5, "in scattered pages"), (0.999, "nearly all dirty"))


def build(directory: Path) -> Path:
    """Compile the reference program."""
    program = directory / "reference"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, SOURCE], check=True)
    return program


def said(program: Path, *words: str | Path) -> dict[str, float]:
    """Run the reference program and return what it prints."""
    done = subprocess.run([program, *words], stdout=subprocess.PIPE, text=True, check=True)
    fields = done.stdout.split()
    return {name: float(value) for name, value in zip(fields[::2], fields[1::2], strict=True)}


def _bitmap(pages: int, density: float) -> bytes:
    import numpy as np

    rng = np.random.default_rng(1)
    parts = [
        np.packbits(rng.random(min(1 << 22, pages - at)) < density, bitorder="little").tobytes()
        for at in range(0, pages, 1 << 22)
    ]
    return b"".join(parts)


def _decode(bitmap: bytes, pages: int) -> tuple[float, float, int]:
    """Return the seconds of counting, and of finding runs, and how many pages are dirty."""
    from vfio_mig.dirty.fetch import fetch
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.runs import find

    view = memoryview(bitmap)
    chunks = list(fetch(lambda start, count: view[start // 8 : (start + count + 7) // 8], [PageRange(0, pages)]))
    began = time.perf_counter()
    total = sum(chunk.total() for chunk in chunks)
    counted = time.perf_counter()
    runs = sum(len(batch) for batch in find(chunks))
    assert runs  # noqa: S101 -- it is the work
    return counted - began, time.perf_counter() - counted, total


_PLAIN: Final = """
import sys, time
from vfio_mig.dirty.bitmap import Dirty
data = open(sys.argv[1], "rb").read()
chunks = [Dirty(at * 8, len(data[at:at + 131072]) * 8, data[at:at + 131072]) for at in range(0, len(data), 131072)]
began = time.perf_counter()
total = sum(chunk.total() for chunk in chunks)
print(time.perf_counter() - began)
assert total and "numpy" not in sys.modules
"""


def _count_plainly(file: Path) -> float:
    """Return the seconds of counting in a process of its own, without numpy: as a save without --memory does it."""
    done = subprocess.run([sys.executable, "-c", _PLAIN, file], stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout)


def decode_rows(program: Path, directory: Path) -> list[Row]:
    """Count and take apart bitmaps of up to 1 TiB."""
    rows = []
    for gib, size in SIZES:
        for density in DENSITIES:
            pages = gib * GIB // PAGE
            bitmap = _bitmap(pages, density)
            file = directory / "bitmap"
            file.write_bytes(bitmap)
            is_large = gib == SIZES[-1][0]
            pairs = alternate(
                lambda bitmap=bitmap, pages=pages: _decode(bitmap, pages)[0] * 1e3,  # type: ignore[misc]
                lambda file=file: said(program, "decode", file)["count"] * 1e3,  # type: ignore[misc]
            )
            rows.append(ratio(f"count, {size}, {density:.1%} dirty", "ms", pairs, 1.5 if is_large else None))
            if is_large:
                pairs = alternate(
                    lambda file=file: _count_plainly(file) * 1e3,  # type: ignore[misc]
                    lambda file=file: said(program, "decode", file)["count"] * 1e3,  # type: ignore[misc]
                )
                rows.append(ratio(f"count without numpy, {size}, {density:.1%} dirty", "ms", pairs, 1.5))
            if density == DENSITIES[0]:
                pairs = alternate(
                    lambda bitmap=bitmap, pages=pages: _decode(bitmap, pages)[1] * 1e3,  # type: ignore[misc]
                    lambda file=file: said(program, "decode", file)["runs"] * 1e3,  # type: ignore[misc]
                )
                rows.append(ratio(f"find runs, {size}, {density:.1%} dirty", "ms", pairs, 2 if is_large else None))
    return rows


def copy_rows(program: Path, directory: Path) -> Iterator[Row]:
    """Copy dirty pages of 256 MiB into a sparse file: in very short runs, and in long ones."""
    import numpy as np

    rng = np.random.default_rng(2)
    memory = directory / "memory"
    memory.write_bytes(rng.bytes(COPY_PAGES * PAGE))
    file = directory / "bits"
    for density, name in COPIES:
        bits = rng.random(COPY_PAGES) < density
        file.write_bytes(np.packbits(bits, bitorder="little").tobytes())
        reference = lambda: said(program, "copy", memory, directory / "target", file)["total"]  # noqa: E731
        pairs = alternate(_copier(memory, file.read_bytes(), directory / "copy"), reference)
        size = int(bits.sum()) * PAGE / 1e6
        row = ratio(f"sync {size / 1.048576:.0f} MiB {name}", "s", pairs, 1 / 0.8)
        yield row._replace(note=f"{size / row.ours:.0f} and {size / row.reference:.0f} MB/s")


def first_copy_rows(directory: Path) -> Iterator[Row]:
    """Copy all of a guest's memory: to a file, changed pages being told from others later, and to an image; with dd."""
    memory, target = directory / "memory", directory / "copy"
    with memory.open("wb") as file:
        for _ in range(FIRST_BYTES // CHUNK):
            file.write(os.urandom(CHUNK))
    pages = FIRST_BYTES // PAGE
    bitmap = b"\xff" * (pages // 8)
    for name, ours, most in (
        ("a hash for each page", _copier(memory, bitmap, target, pages, remember=True), 1 / 0.8),
        ("an image, SHA-256", _saver(memory, bitmap, target, pages), None),
    ):
        row = ratio(
            f"copy all of {FIRST_BYTES // GIB} GiB, {name}", "s", alternate(ours, lambda: _dd(memory, target)), most
        )
        speeds = f"{FIRST_BYTES / row.ours / 1e9:.2f} and dd's {FIRST_BYTES / row.reference / 1e9:.2f} GB/s"
        yield row._replace(note=speeds)


def _saver(memory: Path, bitmap: bytes, target: Path, pages: int) -> Callable[[], float]:
    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.sync import LiveCopy
    from vfio_mig.image.digests import Digests
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.engine.memory import ImageSink

    def run() -> float:
        target.unlink(missing_ok=True)
        began = time.perf_counter()
        with (
            target.open("xb", buffering=0) as file,
            Digests(None) as digests,
            Memory([MemoryMap(str(memory), 0)]) as guest,
        ):
            writer = ArchiveWriter(file, {}, digests)
            with LiveCopy(guest, lambda: [Dirty(0, pages, bitmap)], ImageSink(writer), remember=False) as copy:
                copy.round()
            writer.finish()
            os.fsync(file.fileno())
        return time.perf_counter() - began

    return run


def _dd(source: Path, target: Path) -> float:
    """Return the seconds that dd takes: the same calls, and no look at what it copies."""
    target.unlink(missing_ok=True)
    began = time.perf_counter()
    subprocess.run(["dd", f"if={source}", f"of={target}", f"bs={CHUNK}", "conv=fsync", "status=none"], check=True)
    return time.perf_counter() - began


def _copier(
    memory: Path, bitmap: bytes, target: Path, pages: int = COPY_PAGES, *, remember: bool = False
) -> Callable[[], float]:
    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory, MemoryMap
    from vfio_mig.dirty.sync import LiveCopy, SparseFile

    def run() -> float:
        target.unlink(missing_ok=True)
        fd = os.open(target, os.O_RDWR | os.O_CREAT, 0o600)
        began = time.perf_counter()
        try:
            sink = SparseFile(fd, str(target))
            with (
                Memory([MemoryMap(str(memory), 0)]) as guest,
                LiveCopy(guest, lambda: [Dirty(0, pages, bitmap)], sink, remember=remember) as copy,
            ):
                copy.round()
                sink.finish(pages * PAGE)
        finally:
            os.close(fd)
        return time.perf_counter() - began

    return run


def measure() -> list[Row]:
    """Measure everything that needs no kernel, and print it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = build(directory)
        rows = [
            *window_rows(lambda region: said(program, "window", region)["stopped"], directory),
            *move_rows(lambda kind, file: said(program, "window-move", kind, file)["stopped"], directory),
            *decode_rows(program, directory),
            *copy_rows(program, directory),
        ]
    with tempfile.TemporaryDirectory(dir=FIRST_IN) as name:
        rows += first_copy_rows(Path(name))
    show(rows, "On this machine, no VM")
    return rows
