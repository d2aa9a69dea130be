# SPDX-License-Identifier: MIT
"""Guest memory in huge pages, given in the pieces that QEMU's has: real hugetlbfs, and memfds of huge pages."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.sample import gpu, host
from tools.lab.sample.held import guest_of, guest_view, run_some_work
from tools.lab.vfio.raw import Memory
from vfio_mig.dirty.memory import MemoryMap
from vfio_mig.errors import HostError
from vfio_mig.image.writer import ArchiveWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30
MFD_HUGE_SHIFT: Final = 26
HEADER: Final = {
    "protocol": "mainline-v2",
    "device": {"name": "one", "kind": "mdev", "type": "x", "driver": "y"},
    "time": 1,
    "kernel": "k",
    "machine": "x86_64",
    "program": "t",
}
MEMORY: Final = int(Path("/proc/meminfo").read_text().split()[1]) << 10
# 1 GiB in a VM that has room for it: scripts/vm --memory 9G
SIZES: Final = [2 * MIB, *([GIB] if MEMORY > 8 * GIB else [])]


class Pool:
    """The kernel's huge pages of one size."""

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self.directory: Final = Path(f"/sys/kernel/mm/hugepages/hugepages-{size >> 10}kB")

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return int((self.directory / "free_hugepages").read_text())

    @property
    def reserved(self) -> int:
        """Pages of these that are somebody's as soon as they are touched."""
        return int((self.directory / "resv_hugepages").read_text())

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Have so many pages in the block."""
        count = self.directory / "nr_hugepages"
        before = count.read_text()
        count.write_text(str(number))
        try:
            assert int(count.read_text()) == number
            yield
        finally:
            count.write_text(before)


@contextlib.contextmanager
def mounted(directory: Path, size: int) -> Iterator[Path]:
    """Mount hugetlbfs there."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", f"pagesize={size}", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@contextlib.contextmanager
def huge_file(kind: str, directory: Path, size: int, pages: int) -> Iterator[tuple[int, str]]:
    """Make a file of huge pages, none of which is there yet."""
    with contextlib.ExitStack() as stack:
        if kind == "memfd":
            fd = os.memfd_create("ram", os.MFD_HUGETLB | (size.bit_length() - 1) << MFD_HUGE_SHIFT)
            path = f"/proc/{os.getpid()}/fd/{fd}"
        else:
            mount = stack.enter_context(mounted(directory / "huge", size))
            path = str(mount / "ram")
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, pages * size)
            yield fd, path
        finally:
            os.close(fd)


def write_image(file: Path, pages: dict[int, int], zeros: list[tuple[int, int]]) -> None:
    """Write an image with pages full of one byte each, and ranges of zeros."""
    with file.open("wb") as stream:
        writer = ArchiveWriter(stream, HEADER)
        writer.add_zero(zeros)
        writer.add_pages((gpa, bytes([byte]) * PAGE) for gpa, byte in pages.items())
        writer.add_state(b"abcd")
        writer.finish({})


def as_qemu_has_it(path: str, size: int) -> list[str]:
    """Return the options for RAM at guest-physical address 0: beside the hole for video."""
    pieces = [(0, 0xA0000), (0xC0000, 0x40000), (MIB, size - MIB)]
    return [word for at, length in pieces for word in ("--memory", f"{path}@{at:#x}:{length:#x}+{at:#x}")]


@pytest.mark.parametrize("kind", ["hugetlbfs", "memfd"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_go_into_huge_pages_in_pieces_that_begin_between_them(tmp_path: Path, kind: str, size: int) -> None:
    pool = Pool(size)
    with pool.of(3), huge_file(kind, tmp_path, size, 3) as (fd, path):
        with mmap.mmap(fd, size) as memory:
            memory[0x101000 : 0x101000 + 2 * PAGE] = bytes([5]) * 2 * PAGE
        assert pool.free == 2
        image = tmp_path / "image.vfm"
        far = 2 * size + 0x123000
        # the whole second huge page is zero, and not there: nothing may be set aside for it
        write_image(image, {0x1000: 7, 0xC0000: 8, 0xFF000: 9, far: 10}, [(0x101000, PAGE), (size, size)])
        cli.run("pages", image, *as_qemu_has_it(path, 3 * size), warm=True)
        read = [os.pread(fd, 1, at)[0] for at in (0x1000, 0xC0000, 0xFF000, far, 0x101000, 0x102000, 0x2000, size)]
        assert read == [7, 8, 9, 10, 0, 5, 0, 0]
        assert os.pread(fd, PAGE, far) == bytes([10]) * PAGE
        assert pool.free == 1


@pytest.mark.parametrize("kind", ["hugetlbfs", "memfd"])
def test_too_few_huge_pages_are_told_before_the_first_page_is_written(tmp_path: Path, kind: str) -> None:
    pool = Pool(2 * MIB)
    with pool.of(2), huge_file(kind, tmp_path, 2 * MIB, 4) as (fd, path):
        image = tmp_path / "image.vfm"
        write_image(image, {at * 2 * MIB + PAGE: 7 for at in range(4)}, [])
        text = cli.refused("pages", image, *as_qemu_has_it(path, 8 * MIB), code=7, warm=True)
        assert "ENOMEM" in text or "ENOSPC" in text
        assert not any(os.pread(fd, 1, at * 2 * MIB + PAGE)[0] for at in range(4))
        # what is there is enough for who wants no more
        write_image(image, {PAGE: 7}, [(2 * MIB, 6 * MIB)])
        cli.run("pages", image, "--memory", f"{path}@0:4M", "--memory", f"{path}@4M:4M+4M", warm=True, rc=None)
    assert pool.reserved == 0


def test_a_file_that_is_shortened_while_it_is_written_kills_nobody(tmp_path: Path) -> None:
    with Pool(2 * MIB).of(2), huge_file("hugetlbfs", tmp_path, 2 * MIB, 2) as (fd, path):
        child = os.fork()
        if not child:  # a SIGBUS would end the tests as well
            code = 1
            try:
                with MemoryMap(path, 0).open(writable=True) as memory:
                    memory.reserve(0, 4 * MIB)
                    memory.write(2 * MIB - PAGE, memoryview(bytes([1]) * 2 * PAGE))
                    os.ftruncate(fd, 2 * MIB)
                    try:
                        memory.write(2 * MIB - PAGE, memoryview(bytes([2]) * 2 * PAGE))
                    except HostError as error:
                        code = 0 if "EFAULT" in str(error) and "become shorter" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0, signal.Signals
        assert os.pread(fd, 1, 2 * MIB - 1) == bytes([2])


def js(*args: str | Path) -> Any:
    return json.loads(cli.run("--json", *args, warm=True).stdout)


@contextlib.contextmanager
def held_side(mount: Path, name: str) -> Iterator[tuple[host.Instance, Memory, list[str]]]:
    """Hold a vGPU whose guest's memory is a file of huge pages, in pieces."""
    file = mount / name
    memory = Memory(0, 4 * MIB // PAGE, file)
    options = as_qemu_has_it(str(file), 4 * MIB)
    with host.instance() as vgpu, cli.hold_started(vgpu.uuid, *options):
        yield vgpu, memory, options


def test_a_vgpu_whose_memory_is_huge_pages_is_held_saved_synced_and_restored(tmp_path: Path) -> None:
    with (
        Pool(2 * MIB).of(4),
        mounted(tmp_path / "huge", 2 * MIB) as mount,
        held_side(mount, "one") as (source, source_memory, source_options),
        held_side(mount, "two") as (target, target_memory, target_options),
        guest_of(source, source_memory) as guest,
        guest_of(target, target_memory) as other,
    ):
        guest._next_page = 0xC0000 // PAGE  # the second piece
        work = run_some_work(guest, gpu.Engine(guest), 8)
        assert work.done_in(source_memory) == len(work)
        image, copy = tmp_path / "gpu.vfm", tmp_path / "copy"
        refusal = cli.refused("sync", source.uuid, mount / "copy", *source_options, code=2, warm=True)
        assert "is on hugetlbfs, which has no write(2)" in refusal
        assert source.run_state() == "running"
        js("sync", source.uuid, copy, *source_options)
        saved = js("save", source.uuid, image, *source_options)
        pinned = source.pinned()
        assert saved["pages_dirty"] == len(pinned) > len(work)
        loaded = js("restore", target.uuid, image, *target_options)
        assert loaded["pages_written"] == len(pinned)
        assert guest_view(other.device) == guest_view(guest.device)
        content = copy.read_bytes()
        for at in pinned:
            assert target_memory.read(at, PAGE) == source_memory.read(at, PAGE) == content[at : at + PAGE]
        assert work.done_in(target_memory) == len(work)
