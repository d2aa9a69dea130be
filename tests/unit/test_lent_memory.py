# SPDX-License-Identifier: MIT
"""Guest memory that another process lends: as far as it may go itself, and no further."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pytest

from vfio_mig import proc
from vfio_mig.dirty import lent
from vfio_mig.dirty.memory import Memory, MemoryMap
from vfio_mig.errors import HostError, UsageError, VfioMigError

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = 4096


class Child:
    """A process that has opened and mapped what a program says; the program prints a line when it is ready."""

    def __init__(self, program: str, *arguments: str) -> None:
        command = [sys.executable, "-c", f"import mmap, os, sys\n{program}\nsys.stdin.read()", *arguments]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self.fd = int(self._child.stdout.readline())
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"

    def mapping_of(self, file: Path) -> str:
        one = next(one for one in proc.mappings(self.pid) if one.path == str(file))
        return f"/proc/{self.pid}/map_files/{one.start:x}-{one.end:x}"


OPEN: Final = "fd = os.open(sys.argv[1], os.{})\nprint(fd, flush=True)"
MAP: Final = "fd = os.open(sys.argv[1], os.{})\nkept = mmap.mmap(fd, 4096, mmap.{}, mmap.{})\nprint(fd, flush=True)"


def borrowing_is_forbidden() -> bool:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        try:
            os.close(proc.duplicate(child.pid, 0))
        except PermissionError:
            return True
    return False


@pytest.fixture
def file() -> Iterator[Path]:
    """Give a page of memory that root may open in any way."""
    path = Path(f"/dev/shm/vfio-mig-test-{os.getpid()}")
    path.write_bytes(b"a" * PAGE)
    yield path
    path.unlink()


@pytest.mark.skipif(borrowing_is_forbidden(), reason="pidfd_getfd is not permitted here")
@pytest.mark.parametrize(
    ("mode", "readable", "writable"),
    [("O_RDONLY", True, False), ("O_WRONLY", False, False), ("O_RDWR", True, True), ("O_PATH", False, False)],
)
def test_an_fd_is_used_as_far_as_its_owner_has_it_open(file: Path, mode: str, readable: bool, writable: bool) -> None:
    with Child(OPEN.format(mode), str(file)) as child:
        for wanted, allowed in ((False, readable), (True, writable)):
            if allowed:
                with MemoryMap(child.path, 0).open(writable=wanted) as memory:
                    assert memory.size == PAGE
            else:
                with pytest.raises(HostError, match=rf"PID {child.pid} (has it open for|does not have it open)"):
                    MemoryMap(child.path, 0).open(writable=wanted)
    assert file.read_bytes() == b"a" * PAGE


@pytest.mark.skipif(borrowing_is_forbidden(), reason="pidfd_getfd is not permitted here")
def test_what_is_lent_for_writing_is_written_and_its_owner_s_position_stays(file: Path) -> None:
    with Child(OPEN.format("O_RDWR"), str(file)) as child, Memory([MemoryMap(child.path, 0)], writable=True) as memory:
        memory.clear(0, PAGE)
        assert file.read_bytes() == bytes(PAGE)
        assert Path(f"/proc/{child.pid}/fdinfo/{child.fd}").read_text().split()[1] == "0"


@pytest.mark.parametrize(
    ("mode", "sharing", "protection", "readable", "writable"),
    [
        ("O_RDWR", "MAP_SHARED", "PROT_WRITE", True, True),
        ("O_RDWR", "MAP_SHARED", "PROT_READ", True, False),
        ("O_RDONLY", "MAP_SHARED", "PROT_READ", True, False),
        ("O_RDWR", "MAP_PRIVATE", "PROT_WRITE", False, False),
    ],
)
def test_a_mapping_is_used_as_far_as_its_owner_has_mapped_it(  # noqa: PLR0917 -- a table
    file: Path, mode: str, sharing: str, protection: str, readable: bool, writable: bool
) -> None:
    with Child(MAP.format(mode, sharing, protection), str(file)) as child:
        path = child.mapping_of(file)
        if not os.access(path, os.R_OK):
            pytest.skip("mappings of others cannot be opened here")
        for wanted, allowed in ((False, readable), (True, writable)):
            if allowed:
                MemoryMap(path, 0).open(writable=wanted).close()
            else:
                with pytest.raises(HostError, match="shared mapping there, and what it may not do itself"):
                    MemoryMap(path, 0).open(writable=wanted)


def test_a_mapping_that_becomes_another_file_s_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = proc.mappings
    with Child(MAP.format("O_RDWR", "MAP_SHARED", "PROT_WRITE"), str(file)) as child:
        path = child.mapping_of(file)
        if not os.access(path, os.R_OK):
            pytest.skip("mappings of others cannot be opened here")
        monkeypatch.setattr(proc, "mappings", lambda pid: (one._replace(inode=one.inode + 1) for one in real(pid)))
        with pytest.raises(HostError, match="it cannot be proved that this is the file"):
            MemoryMap(path, 0).open()


@pytest.mark.parametrize("name", ["root", "cwd"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_path_through_another_process_s_root_or_directory_is_refused(file: Path, name: str, writable: bool) -> None:
    """What it finds there is that process's choice, symbolic links included, which would be followed in our root."""
    path = f"/proc/{os.getppid()}/{name}/{file}" if name == "root" else f"/proc/{os.getpid()}/cwd/setup.cfg"
    if not os.access(f"/proc/{os.getppid()}/{name}", os.R_OK):
        pytest.skip("not ours to look into")
    with pytest.raises(UsageError, match="leads through a link of /proc"):
        MemoryMap(path, 0).open(writable=writable)


def test_a_link_to_such_a_path_is_no_way_around(file: Path, tmp_path: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        link = tmp_path / "link"
        link.symlink_to(f"/proc/self/fd/{fd}")
        with pytest.raises(UsageError, match="leads through a link of /proc"):
            MemoryMap(str(link), 0).open(writable=True)
        directory = tmp_path / "directory"
        directory.symlink_to("/proc/self/fd")
        with pytest.raises(HostError, match="for reading only"):
            MemoryMap(f"{directory}/{fd}", 0).open(writable=True)
        MemoryMap(f"{directory}/{fd}", 0).open().close()
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["fuse", "fuse.sshfs", "overlay", "nfs4", ""])
def test_a_file_that_may_never_answer_is_not_touched(file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(proc, "file_system", lambda *_, **__: name)
    monkeypatch.setattr(proc, "duplicate", lambda *_: pytest.fail("was taken"))
    with Child(MAP.format("O_RDWR", "MAP_SHARED", "PROT_WRITE"), str(file)) as child:
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("was opened"))
        for path in (child.path, child.mapping_of(file)):
            with pytest.raises(HostError, match=r"it lies on .*, which may never answer"):
                lent.open_memory(path, writable=False)


def test_where_a_file_lies_is_the_kernel_s_word(file: Path) -> None:
    memfd = os.memfd_create("x")
    shm = os.open(file, os.O_RDONLY)
    try:
        for fd in (memfd, shm):
            assert proc.file_system(os.getpid(), device=os.fstat(fd).st_dev) == "tmpfs"
            assert proc.mount_of("/proc/self/fd", fd) is not None
        mount = proc.mount_of("/proc/self/fd", shm)
        assert proc.file_system(os.getpid(), device=0, mount=mount) == "tmpfs"
        assert proc.file_system(os.getpid(), device=os.makedev(4095, 1)) == ""
    finally:
        os.close(memfd)
        os.close(shm)


def test_memory_becomes_writable_for_a_device_only(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    with MemoryMap(str(copy), 0).open() as memory:
        with pytest.raises(TypeError):
            memory.map()[0] = 1
        memory.make_writable()
        memory.map()[0] = 1
        memory.make_writable()
    assert copy.read_bytes()[0] == 1
    with MemoryMap(str(copy), 0).open() as memory:
        copy.unlink()
        copy.write_bytes(bytes(PAGE))
        with pytest.raises(UsageError, match="has become another file"):
            memory.make_writable()


@pytest.mark.parametrize("path", ["/proc/4194304/fd/3", "/proc/self/fd/1000", "/proc/4194304/map_files/1000-2000"])
def test_what_is_not_there_is_one_line(path: str) -> None:
    with pytest.raises(VfioMigError, match=r"ENOENT|ESRCH|ENOTDIR|any more"):
        MemoryMap(path, 0).open()
