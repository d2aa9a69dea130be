# SPDX-License-Identifier: MIT
"""A lease says whether a file can have been changed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.saved_images import write
from vfio_mig.host import lease
from vfio_mig.host.lease import Lease
from vfio_mig.jobs.files.input import read_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give one on a file system that has leases, whatever the others are on."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def path(directory: Path) -> Path:
    path = directory / "file"
    path.write_bytes(b"x" * 100)
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_lease_holds_until_somebody_opens_the_file_for_writing(path: Path, fd: int) -> None:
    ours = Lease(fd)
    assert ours.holds()
    path.read_bytes()
    assert ours.holds()
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert not ours.holds()


def test_a_lease_is_not_left_on_an_open_file_that_others_have_too(path: Path, fd: int) -> None:
    """Standard input is the shell's as well: who writes the file afterwards would wait for the lease to be broken."""
    theirs = os.dup(fd)
    with Lease(fd) as ours:
        assert ours.holds()
        assert fcntl.fcntl(theirs, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    os.close(theirs)


def test_who_waits_for_a_lease_waits_no_longer_than_until_it_is_looked_at(path: Path, fd: int) -> None:
    ours = Lease(fd)
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert not ours.holds()
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_reading_an_image_leaves_no_lease(directory: Path) -> None:
    path = write(directory / "image", b"state")
    with path.open("rb") as stream:
        for _ in range(2):
            with read_image(stream, None) as image:
                assert image.archive is not None
            stream.seek(0)
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_there_is_none_on_a_file_that_somebody_writes(path: Path, fd: int) -> None:
    with path.open("ab"):
        assert not Lease(fd).holds()


def test_there_is_none_where_a_file_may_change_elsewhere(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_file_system", lambda _: "9p")
    assert not Lease(fd).holds()


def test_there_is_none_on_a_pipe() -> None:
    reader, writer = os.pipe()
    assert not Lease(reader).holds()
    os.close(reader)
    os.close(writer)


def test_an_image_is_verified_again_only_if_it_can_have_changed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def sha256(content: bytes) -> NoReturn:
        asked.append(len(content))
        raise OSError("verified again")

    path = write(directory / "image", b"state")
    with path.open("rb") as stream, read_image(stream, None) as image:
        monkeypatch.setattr("vfio_mig.image.archive.hashlib.sha256", sha256)
        assert list(image.chunks()) == [b"state"]
        assert asked == []
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        with pytest.raises(OSError, match="verified again"):
            list(image.chunks())
        assert asked == [5]
