# SPDX-License-Identifier: MIT
import contextlib
import errno
import io
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfio_mig.errors import HostError, UsageError
from vfio_mig.image import files
from vfio_mig.image.files import committed
from vfio_mig.jobs.files.input import open_input

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to a new file: with O_TMPFILE, and where a file system has no such thing."""
    if request.param == "named":
        monkeypatch.setattr(files, "_open_unnamed", lambda _: None)
    return str(request.param)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(path: "Path | str", data: bytes = b"new", *, force: bool = False) -> None:
    with committed(path, force=force) as file:
        file.write(data)


def test_a_file_appears_only_when_the_block_ends_well(tmp_path: Path, way: str) -> None:
    path = tmp_path / "image"
    with committed(path) as file:
        file.write(b"new")
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == (way == "named")
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("force", [False, True])
def test_a_name_of_the_current_directory_and_a_long_one_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("image", "n" * 255, "ü" * 127):
        write(name, force=force)
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")

    def fail() -> None:
        with committed(path, force=True) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="image exists; use --force to replace it"):
        write(path)
    assert path.read_bytes() == b"old"
    write(path, force=True)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "image"

    def race() -> None:
        with committed(path) as file:
            file.write(b"new")
            path.write_bytes(b"of somebody else")

    with pytest.raises(UsageError, match="has appeared meanwhile"):
        race()
    assert path.read_bytes() == b"of somebody else"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_is_neither_followed_nor_replaced(tmp_path: Path, force: bool, dangling: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if not dangling:
        target.write_bytes(b"old")
    link.symlink_to(target)
    with pytest.raises(UsageError, match="is a symbolic link, which is never followed"):
        write(link, force=force)
    assert link.is_symlink()
    assert target.exists() != dangling
    assert len(list(tmp_path.iterdir())) == 2 - dangling


def test_a_link_that_appears_meanwhile_is_not_followed(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"

    def race() -> None:
        with committed(link, force=True) as file:
            file.write(b"new")
            link.symlink_to(target)

    with pytest.raises(UsageError, match="symbolic link"):
        race()
    assert list(tmp_path.iterdir()) == [link]


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("make", "word"), [(make_directory, "directory"), (make_fifo, "FIFO"), (make_socket, "socket")]
)
def test_what_is_no_regular_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None], word: str, force: bool
) -> None:
    path = tmp_path / "x"
    make(path)
    before = path.lstat()
    with pytest.raises(UsageError, match=word):
        write(path, force=force)
    assert path.lstat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]


def test_devices_and_empty_names_are_refused(tmp_path: Path) -> None:
    device = Path("/dev/null")
    if os.geteuid() == 0:  # a program that does not refuse would replace the host's
        device = tmp_path / "null"
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(UsageError, match=f"{device} is a character device; use - and a redirection"):
        write(device, force=True)
    for name in ("", f"{tmp_path}/"):
        with pytest.raises(UsageError, match="names no file"):
            write(name)


def test_a_missing_directory_is_the_hosts_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot create it: ENOENT \(No such file or directory\)"):
        write(tmp_path / "no" / "image")
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="ENOTDIR"):
        write(tmp_path / "file" / "image")


def test_missing_permission_is_the_hosts_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match=r"image: cannot create it: EACCES \(Permission denied\)"):
        write(tmp_path / "image")


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(HostError, match=r"image: cannot .*: ENOSPC .*; make room and try again"):
        write(path, force=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_linking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_space)
    with pytest.raises(HostError, match="ENOSPC"):
        write(tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_is_one_error_that_names_the_target(tmp_path: Path) -> None:
    # RLIMIT_FSIZE makes the kernel itself refuse: at a large write, and at the flush of a small one.
    script = (
        "import resource, signal, sys; from vfio_mig.image.files import committed\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with committed(sys.argv[1]) as file: file.write(bytes(int(sys.argv[2])))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    for size in ("10000", "10000000"):
        command = [sys.executable, "-c", script, str(tmp_path / "image"), size]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"HostError {tmp_path}/image: cannot write: EFBIG (File too large)\n"
        assert done.stderr == ""
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr(files, "_open_unnamed", lambda _: None)  # which file systems have only together with links

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "image"
    write(path)
    assert path.read_bytes() == b"new"
    with pytest.raises(UsageError, match="exists"):
        write(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("error", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_directory_that_cannot_be_synced_at_all_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, fails: bool
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, os.strerror(error))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(HostError, match="cannot sync the directory: EIO"):
            write(tmp_path / "image")
        assert list(tmp_path.iterdir()) == []  # the source goes on, so there must be no second whole image
    else:
        write(tmp_path / "image")
        assert (tmp_path / "image").read_bytes() == b"new"


@pytest.mark.parametrize("fails", ["directory", "close"])
def test_a_file_that_fails_at_its_last_step_is_taken_back_and_what_it_replaced_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    real_sync, real_close = os.fsync, io.FileIO.close

    def fsync(fd: int) -> None:
        if fails == "directory" and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_sync(fd)

    def close(self: io.FileIO) -> None:
        was_open = not self.closed
        real_close(self)
        if fails == "close" and was_open:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files._File, "close", close, raising=False)
    with pytest.raises(HostError, match="EIO" if fails == "directory" else "EDQUOT"):
        write(path, force=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_of_several_outputs_all_are_committed_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")
    outputs = [committed(old, force=True), committed(tmp_path / "new"), committed(tmp_path / "last")]
    real = os.link

    def link(source: str, target: str, **options: Any) -> None:
        if target == "last":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(source, target, **options)

    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output).write(b"new")
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(HostError, match="EDQUOT") as caught:
            files.commit_outputs(outputs)
        assert caught.value.undo_errors == []
        assert old.read_bytes() == b"old"
        assert sorted(one.name for one in tmp_path.iterdir() if not one.name.startswith(".")) == ["old"]
        stack.pop_all()
    monkeypatch.undo()
    for output in outputs:
        output.__exit__(HostError, caught.value, None)
    assert [one.name for one in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_taken_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    def unlink(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(HostError, match="image is there, and cannot be removed: do not use it"):
        write(tmp_path / "image")


def test_file_and_directory_are_synced_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, int, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        status = os.fstat(fd)
        is_directory = stat.S_ISDIR(status.st_mode)
        # All that was written is in the file by then: what still waits in a buffer is not made durable
        synced.append((is_directory, 0 if is_directory else status.st_size, (tmp_path / "image").exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "image", b"content")
    assert synced == [(False, 7, False), (True, 0, True)]


def test_a_hidden_name_that_is_taken_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*["taken"] * 2, *map(str, range(9))]
    (tmp_path / "taken").write_bytes(b"theirs")
    write(tmp_path / "image", b"old")
    monkeypatch.setattr(files._Place, "_temporary_names", lambda _: iter(names))
    with committed(tmp_path / "image", force=True) as file:
        file.write(b"new")
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"taken": b"theirs", "image": b"new"}
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(HostError, match="EIO"):
        write(tmp_path / "image", b"newer", force=True)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"taken": b"theirs", "image": b"new"}


def test_a_killed_process_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    script = (
        "import sys, time; from vfio_mig.image.files import committed\n"
        "with committed(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('now', flush=True); time.sleep(60)\n"
    )
    path = tmp_path / "image"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_TMPFILE, 0o600))
        expected = 0
    except OSError:  # a file system that gives every file a name, as overlayfs did before Linux 6.3
        expected = 1
    left = [found.name for found in tmp_path.iterdir()]
    assert len(left) == expected
    assert all(name.startswith(".image.") for name in left)
    for name in left:
        (tmp_path / name).unlink()
    write(path)
    assert path.read_bytes() == b"new"


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    write(tmp_path / "image")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(HostError):
        write(tmp_path / "other")
    for _ in range(2):
        with pytest.raises(UsageError):
            write(tmp_path / "image")  # it is there
    assert open_descriptors() == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("was_there", [False, True])
def test_what_was_committed_can_be_withdrawn(tmp_path: Path, *, force: bool, was_there: bool) -> None:
    path = tmp_path / "image"
    if was_there:
        path.write_bytes(b"old")
        if not force:
            return
    output = committed(path, force=force)
    with output as file:
        file.write(b"new")
        output.commit()
        assert path.read_bytes() == b"new"
        assert output.withdraw()
        assert output.withdraw()
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([b"old"] if was_there else [])


def test_a_program_without_standard_streams_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(HostError, match=r"^standard output is closed; name a file$"):
        files.standard_output("it is binary", "redirect it")
    with pytest.raises(HostError, match=r"^standard input is closed; name a file$"), open_input("-"):
        pass
