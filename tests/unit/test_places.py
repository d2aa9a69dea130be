# SPDX-License-Identifier: MIT
"""Root puts files where it was told to, whatever others do to names and links meanwhile."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.saved_images import run, write
from vfio_mig.errors import HostError, UsageError
from vfio_mig.image import files, places
from vfio_mig.image.directory import Directory, NewDirectory
from vfio_mig.image.files import committed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = 65534


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Make something another user's: by giving it away where that is possible, else by being somebody else."""

    def give(path: Path) -> Path:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
        return path

    return give


def everything(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


def test_a_directory_of_another_user_is_refused(tmp_path: Path, other: Callable[[Path], Path]) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    other(theirs)
    result = run("extract", write(tmp_path / "image", b"state"), theirs)
    assert isinstance(result.exception, UsageError)
    assert "belongs to another user, who could change what is put there" in str(result.exception)
    assert everything(theirs) == []


def test_a_link_of_another_user_on_the_way_is_not_followed(tmp_path: Path, other: Callable[[Path], Path]) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "theirs" / "link").symlink_to(tmp_path / "root")
    other(tmp_path / "theirs" / "link")
    link = tmp_path / "theirs/link"
    commands: list[list[str | Path]] = [
        ["extract", write(tmp_path / "image", b"state"), link / "parts"],
        ["pack", link, tmp_path / "x"],
    ]
    for words in commands:
        result = run(*words)
        assert isinstance(result.exception, UsageError), words
        assert "link is a symbolic link of another user, which is not followed" in str(result.exception)
    with pytest.raises(UsageError, match="symbolic link of another user"), committed(tmp_path / "theirs/link/file"):
        pass
    with pytest.raises(UsageError, match="symbolic link of another user"):
        places.open_file(str(tmp_path / "theirs/link/file"), os.O_RDWR | os.O_CREAT)
    assert everything(tmp_path / "root") == []


def test_links_of_one_s_own_on_the_way_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "real")
    (tmp_path / "relative").symlink_to("./absolute/deep/..")
    for way in ("absolute", "relative", "real/deep/..", "real/./", "real//deep//.."):
        with committed(f"{tmp_path}/{way}/file", force=True) as file:
            file.write(way.encode())
        assert (tmp_path / "real/file").read_bytes() == way.encode()
    monkeypatch.chdir(tmp_path / "real")
    with NewDirectory("../relative/parts") as into:
        into.write("dirty/0000", [b"x"])
    assert (tmp_path / "real/parts/dirty/0000").read_bytes() == b"x"
    with Directory(str(tmp_path / "relative/parts")) as source:
        assert source.read("dirty/0000", 9) == b"x"


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(HostError, match="ELOOP"), committed(tmp_path / "a/file"):
        pass
    with pytest.raises(HostError, match="ENOTDIR"), committed(f"{write(tmp_path / 'image')}/file"):
        pass


def swap(path: Path, target: Path) -> None:
    """Put a link where a directory is, as somebody who may write beside it can at any moment."""
    path.rename(path.with_name(f"{path.name}.was"))
    path.symlink_to(target)


def test_a_directory_that_is_swapped_while_it_is_filled_gets_the_rest_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()

    def parts() -> Iterator[bytes]:
        swap(tmp_path / "parts" / "dirty", tmp_path / "root")
        swap(tmp_path / "parts", tmp_path / "root")
        yield b"x"

    with NewDirectory(str(tmp_path / "parts")) as into:
        into.write("dirty/0000", [b"first"])
        into.write("state.bin", parts())
        into.write("dirty/0001", [b"second"])
        into.write("layout.json", [b"{}"])
    assert everything(tmp_path / "root") == []
    assert everything(tmp_path / "parts.was") == [
        "dirty",
        "dirty.was",
        "dirty.was/0000",
        "dirty.was/0001",
        "layout.json",
        "state.bin",
    ]


def test_cleaning_up_removes_nothing_that_others_put_there(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for name in ("state.bin", "0000"):
        (tmp_path / "root" / name).write_bytes(b"precious")

    def fail() -> Iterator[bytes]:
        yield b"x"
        (tmp_path / "parts" / "state.bin").unlink()
        (tmp_path / "parts" / "state.bin").write_bytes(b"theirs")
        swap(tmp_path / "parts" / "dirty", tmp_path / "root")
        swap(tmp_path / "parts", tmp_path / "root")
        raise HostError("no room")

    def fill() -> None:
        with NewDirectory(str(tmp_path / "parts")) as into:
            into.write("dirty/0000", [b"first"])
            into.write("state.bin", [b"second"])
            into.write("more", fail())

    with pytest.raises(HostError, match="no room"):
        fill()
    assert everything(tmp_path / "root") == ["0000", "state.bin"]
    assert (tmp_path / "parts.was" / "state.bin").read_bytes() == b"theirs"
    assert everything(tmp_path / "parts.was") == ["dirty", "dirty.was", "state.bin"]


def test_a_directory_inside_that_is_swapped_between_making_and_opening_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    real = os.mkdir

    def mkdir(name: Any, *arguments: Any, **more: Any) -> None:
        real(name, *arguments, **more)
        if name == "dirty":
            swap(tmp_path / "parts" / "dirty", tmp_path / "root")

    monkeypatch.setattr(os, "mkdir", mkdir)
    with (
        pytest.raises(HostError, match=r"dirty/0000: cannot write: (ENOTDIR|ELOOP)"),
        NewDirectory(str(tmp_path / "parts")) as into,
    ):
        into.write("dirty/0000", [b"x"])
    assert everything(tmp_path / "root") == []


def test_the_new_directory_itself_is_not_taken_if_a_link_is_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    real = os.mkdir

    def mkdir(name: Any, *arguments: Any, **more: Any) -> None:
        real(name, *arguments, **more)
        swap(tmp_path / "parts", tmp_path / "root")

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(UsageError, match="symbolic link"), NewDirectory(str(tmp_path / "parts")):
        pass
    assert everything(tmp_path / "root") == []


@pytest.mark.parametrize("way", ["unnamed", "named"])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_named_in_the_directory_that_it_was_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, *, force: bool
) -> None:
    if way == "named":
        monkeypatch.setattr(files, "_open_unnamed", lambda _: None)
    (tmp_path / "root").mkdir()
    (tmp_path / "place").mkdir()
    output = committed(tmp_path / "place/image", force=force)
    with output as file:
        file.write(b"new")
        swap(tmp_path / "place", tmp_path / "root")
    assert everything(tmp_path / "root") == []
    assert everything(tmp_path / "place.was") == ["image"]
    output.withdraw()  # where the name leads to now is another directory
    assert everything(tmp_path / "place.was") == ["image"]


def test_what_is_withdrawn_is_our_own_file(tmp_path: Path) -> None:
    output = committed(tmp_path / "image")
    with output as file:
        file.write(b"new")
    (tmp_path / "image").unlink()
    (tmp_path / "image").write_bytes(b"theirs")
    output.withdraw()
    assert (tmp_path / "image").read_bytes() == b"theirs"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path in ("new", "full", "loop", "loop/x", "none/x", "full/x"):
        with suppress(UsageError, HostError), NewDirectory(str(tmp_path / path)) as into:
            assert into.write("dirty/0000", [b"xy", b"", b"z"]) == 3
        with suppress(UsageError, HostError), committed(tmp_path / path / "file"):
            pass
    with Directory(str(tmp_path / "new")) as made, made.open("dirty/0000") as file:
        assert file.read() == b"xyz"
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
