# SPDX-License-Identifier: MIT
"""One job at a time per device, and what a killed one tells the next."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from vfio_mig.device import Holder
from vfio_mig.errors import DeviceBusyError, HostError
from vfio_mig.host import lock as module
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.lock import (
    LOADING,
    STOPPED,
    VARIABLE,
    DeviceLock,
    Leftover,
    Work,
    at_work,
    left_behind,
    lock_directory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.words import Effect

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
FOUND: Final = HostDevice(NAME, "", "mdev", "i915-GVTg_V4_8", "0000:00:02.0", "vfio_mdev", 7)
NOBODY: Final = 65534
HINT: Final = "run as root, or set VFIO_MIG_LOCK_DIR to a directory of your own"
ME: Final = Holder(os.getpid(), "pytest", is_hold=True, fd=3)
CHILD: Final = """
import sys
from vfio_mig.host.discover import HostDevice
from vfio_mig.host.holders import Holder
from vfio_mig.host.lock import DeviceLock
name, job, effect, holder = sys.argv[1:]
lock = DeviceLock(HostDevice(name, "", "mdev", "", "", "", 7), job)
lock.take_over(Holder(int(holder), "", True, 3))
lock.journal(effect)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "locks"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@contextmanager
def process(job: str, effect: str = "", holder: int = ME.pid) -> Iterator[subprocess.Popen[str]]:
    """Have a process at work on the device; it is killed at the end."""
    command = [sys.executable, "-c", CHILD, NAME, job, effect, str(holder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


def killed(job: str, effect: str, holder: int = ME.pid) -> int:
    """Have a process note something and kill it; returns its PID."""
    with process(job, effect, holder) as child:
        return child.pid


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def note(**changes: object) -> dict[str, Any]:
    """What a killed save that had a device of ours stopped leaves in the file."""
    holder = [ME.pid, started(ME.pid)]
    return {"job": "save", "pid": 4711, "left": ["save", 4711, "stopped"], "holder": holder, **changes}


def write_note(directory: Path, content: bytes | dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{NAME}.lock"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- one at a time


def test_a_second_process_is_told_whose_job_it_is() -> None:
    with process("restore") as child:
        with pytest.raises(DeviceBusyError) as caught:
            DeviceLock(FOUND, "save")
        assert str(caught.value) == (
            f"{NAME}: PID {child.pid} ('vfio-mig restore') is at work on it; wait until it has ended"
        )
        assert caught.value.exit_code == 3


def test_a_lock_ends_with_its_process() -> None:
    killed("save", "")
    with DeviceLock(FOUND, "stop") as lock:
        assert lock.take_over(ME) is None


def test_a_lock_ends_with_its_block_whatever_ended_that() -> None:
    with pytest.raises(KeyError), DeviceLock(FOUND, "save") as lock:
        raise KeyError
    lock.close()
    with DeviceLock(FOUND, "save"), pytest.raises(DeviceBusyError):
        DeviceLock(FOUND, "save")


def test_another_device_is_another_lock() -> None:
    with DeviceLock(FOUND, "save"), DeviceLock(FOUND._replace(name="0000:00:02.0"), "save"):
        pass


def test_a_refused_process_leaves_the_lock_and_no_open_file() -> None:
    fds = open_files()
    with DeviceLock(FOUND, "save") as lock:
        lock.take_over(ME)
        for _ in range(3):
            with pytest.raises(DeviceBusyError, match=rf"PID {ME.pid} \('vfio-mig save'\)"):
                DeviceLock(FOUND, "stop")
    assert open_files() == fds


# --- what is left


@pytest.mark.parametrize(
    ("effect", "what", "repair"),
    [
        (STOPPED, "was left stopped", f"'vfio-mig start {NAME}' lets it go on"),
        (
            LOADING,
            "and its guest's memory may hold a part of an image",
            f"restore it again, or make it defined with 'vfio-mig reset {NAME}'",
        ),
    ],
)
def test_the_next_one_is_told_what_a_killed_one_had_done(effect: Effect, what: str, repair: str) -> None:
    pid = killed("restore", effect)
    left = left_behind(FOUND, ME)
    assert left == Leftover("restore", pid, effect)
    assert str(left) == f"an earlier 'vfio-mig restore' (PID {pid}) did not come to its end; the device {what}"
    assert left.repair(NAME) == repair
    with DeviceLock(FOUND, "save") as lock:
        assert lock.take_over(ME) == left


def test_nothing_is_left_while_its_process_lives() -> None:
    with process("save", STOPPED) as child:
        assert left_behind(FOUND, ME) is None
    assert left_behind(FOUND, ME) == Leftover("save", child.pid, STOPPED)


def test_nothing_is_left_once_the_holder_is_another(directory: Path) -> None:
    path = write_note(directory, note())
    assert left_behind(FOUND, ME) == Leftover("save", 4711, STOPPED)
    for holder in (None, ME._replace(pid=os.getppid())):
        assert left_behind(FOUND, holder) is None
    with DeviceLock(FOUND, "save") as lock:
        assert lock.take_over(ME._replace(pid=os.getppid())) is None
    assert path.read_bytes() == b""


def test_a_recycled_pid_is_not_taken_for_the_holder(directory: Path) -> None:
    write_note(directory, note(holder=[ME.pid, started(ME.pid) - 1]))
    assert left_behind(FOUND, ME) is None
    with DeviceLock(FOUND, "save") as lock:
        assert lock.take_over(ME) is None


def test_what_is_done_to_a_device_that_nobody_keeps_open_is_not_noted(directory: Path) -> None:
    with DeviceLock(FOUND, "save") as lock:
        lock.take_over(None)
        lock.journal(STOPPED)
        assert json.loads((directory / f"{NAME}.lock").read_bytes())["left"] is None
    assert (directory / f"{NAME}.lock").read_bytes() == b""


def test_a_job_that_ends_well_empties_the_note(directory: Path) -> None:
    killed("save", STOPPED)
    with DeviceLock(FOUND, "save") as lock:
        lock.take_over(ME)
        lock.journal(LOADING)
        lock.journal("")
        assert json.loads((directory / f"{NAME}.lock").read_bytes())["left"] is None
    assert (directory / f"{NAME}.lock").read_bytes() == b""
    assert left_behind(FOUND, ME) is None


def test_a_job_that_could_not_undo_it_leaves_the_note() -> None:
    with DeviceLock(FOUND, "restore") as lock:
        lock.take_over(ME)
        lock.journal(STOPPED)
        lock.journal(LOADING)
    assert left_behind(FOUND, ME) == Leftover("restore", os.getpid(), LOADING)


def test_the_first_culprit_is_named_however_many_are_refused_after_it() -> None:
    pid = killed("restore", LOADING)
    for job in ("save", "sync", "start"):
        with DeviceLock(FOUND, job) as lock:
            assert lock.take_over(ME) == Leftover("restore", pid, LOADING)
            with pytest.raises(DeviceBusyError, match=rf"PID {os.getpid()} \('vfio-mig {job}'\)"):
                DeviceLock(FOUND, "stop")
    assert left_behind(FOUND, ME) == Leftover("restore", pid, LOADING)


def test_a_job_that_never_got_to_the_device_leaves_the_note() -> None:
    pid = killed("restore", LOADING)
    with DeviceLock(FOUND, "save"):
        pass
    assert left_behind(FOUND, ME) == Leftover("restore", pid, LOADING)


def test_looking_makes_nothing(directory: Path) -> None:
    assert left_behind(FOUND, ME) is None
    assert not directory.exists()


# --- notes that are none


NO_NOTES: Final[dict[str, bytes | dict[str, Any]]] = {
    "half of one": json.dumps(note()).encode()[:-5],
    "bytes": b"\xff\xfe\0",
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"1" * 4096,
    "deep": b"[" * 4096,
    "deep in a note": b'{"job":"save","pid":1,"left":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "huge": b" " * 4096 + json.dumps(note()).encode(),
    "huge in a note": note(more="x" * 5000),
    "no job": {key: value for key, value in note().items() if key != "job"},
    "no PID": {key: value for key, value in note().items() if key != "pid"},
    "a job that is a number": note(job=5),
    "a job that is a list": note(job=["save"]),
    "an empty job": note(job=""),
    "a job with a line end": note(job="save\n"),
    "a job with a command": note(job="save; echo"),
    "a PID that is a text": note(pid="4711"),
    "a PID that is true": note(pid=True),
    "a PID that is not a whole number": note(pid=1.5),
}
NOTHING_LEFT: Final[dict[str, dict[str, Any]]] = {
    "nothing": note(left=None),
    "a text": note(left="stopped"),
    "a table": note(left={"job": "save", "pid": 4711, "effect": "stopped"}),
    "too little": note(left=["save", 4711]),
    "too much": note(left=["save", 4711, "stopped", 1]),
    "another effect": note(left=["save", 4711, "on fire"]),
    "an effect that is a list": note(left=["save", 4711, ["stopped"]]),
    "a job that is none": note(left=["save me", 4711, "stopped"]),
    "a PID that is none": note(left=["save", "4711", "stopped"]),
    "no holder": note(holder=None),
    "a holder that is a number": note(holder=ME.pid),
    "a holder without a time": note(holder=[ME.pid]),
    "a holder with more": note(holder=[*note()["holder"], 1]),
}


@pytest.mark.parametrize("content", [*NO_NOTES.values(), *NOTHING_LEFT.values()], ids=[*NO_NOTES, *NOTHING_LEFT])
def test_a_note_that_makes_no_sense_says_nothing(directory: Path, content: bytes | dict[str, Any]) -> None:
    path = write_note(directory, content)
    assert left_behind(FOUND, ME) is None
    with DeviceLock(FOUND, "save") as lock:
        assert lock.take_over(ME) is None
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", NO_NOTES.values(), ids=NO_NOTES)
def test_whose_note_makes_no_sense_is_another_vfio_mig(directory: Path, content: bytes | dict[str, Any]) -> None:
    path = write_note(directory, content)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DeviceBusyError) as caught:
            DeviceLock(FOUND, "save")
    assert str(caught.value) == f"{NAME}: another vfio-mig is at work on it; wait until it has ended"


def test_a_good_note_is_one() -> None:
    """So that the bad ones above are refused for what is bad about them."""
    assert module._left(note(), module._identity(ME)) == Leftover("save", 4711, STOPPED)


# --- where locks are


def test_directory_and_file_are_the_user_s_own_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        with DeviceLock(FOUND, "save"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / f"{NAME}.lock").stat().st_mode) == 0o600


def no_directory(problem: str) -> None:
    with pytest.raises(HostError) as caught:
        DeviceLock(FOUND, "save")
    assert problem in caught.value.problem
    assert caught.value.hint == HINT
    assert caught.value.exit_code == 7


def test_a_directory_that_is_a_symbolic_link_is_refused(directory: Path) -> None:
    (directory.parent / "elsewhere").mkdir()
    directory.symlink_to("elsewhere")
    no_directory(f"{directory}: not a directory of root's or of this user's")
    assert list((directory.parent / "elsewhere").iterdir()) == []


def test_a_directory_that_is_a_file_is_refused(directory: Path) -> None:
    directory.write_text("mine")
    no_directory(f"{directory}: not a directory of root's or of this user's")
    assert directory.read_text() == "mine"


def test_somebody_else_s_directory_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    no_directory(f"{directory}: not a directory of root's or of this user's")
    assert list(directory.iterdir()) == []


def test_a_directory_without_a_parent_is_not_made(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(directory / "below"))
    no_directory(f"{directory}/below: cannot make the directory for locks: ENOENT")
    assert not directory.exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("", "cannot open the lock: EACCES"), ("below", "cannot make the directory for locks: EACCES")],
)
def test_a_directory_that_may_not_be_written_is_no_place(
    monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    with tempfile.TemporaryDirectory() as path:  # tmp_path is closed to others
        Path(path).chmod(0o555)
        monkeypatch.setenv(VARIABLE, str(Path(path, name)))
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)
        try:
            no_directory(problem)
        finally:
            os.seteuid(user)
        assert list(Path(path).iterdir()) == []


def test_a_lock_that_is_a_symbolic_link_is_not_followed(directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(json.dumps(note()))
    directory.mkdir()
    (directory / f"{NAME}.lock").symlink_to(victim)
    no_directory(f"{directory}/{NAME}.lock: cannot open the lock: ELOOP")
    assert left_behind(FOUND, ME) is None
    assert victim.read_text() == json.dumps(note())


def test_a_file_system_without_locks_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    fds = open_files()
    no_directory("cannot lock: ENOLCK")
    assert open_files() == fds


def test_a_note_that_cannot_be_written_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "")

    with DeviceLock(FOUND, "save") as lock:
        lock.take_over(ME)
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(HostError, match="cannot write the lock: ENOSPC"):
            lock.journal(STOPPED)


@pytest.mark.parametrize(
    ("variables", "user", "writable", "chosen"),
    [
        ({VARIABLE: "/mine"}, 0, True, "/mine"),
        ({VARIABLE: "/mine", "XDG_RUNTIME_DIR": "/run/user/7"}, 7, True, "/mine"),
        ({}, 0, False, "/run/vfio-mig"),
        ({VARIABLE: ""}, 0, True, "/run/vfio-mig"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, True, "/run/vfio-mig"),
        ({"XDG_RUNTIME_DIR": "/elsewhere"}, 7, False, "/elsewhere/vfio-mig"),
        ({"XDG_RUNTIME_DIR": ""}, 7, False, "/run/user/7/vfio-mig"),
        ({}, 7, False, "/run/user/7/vfio-mig"),
    ],
)
def test_locks_are_where_root_and_all_who_may_share_them_else_with_the_user(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], user: int, chosen: str, *, writable: bool
) -> None:
    for name in (VARIABLE, "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "access", lambda path, mode: writable and (path, mode) == ("/run/vfio-mig", os.W_OK))
    assert lock_directory() == chosen


# --- asking


def test_who_asks_keeps_no_job_from_starting() -> None:
    """A shared flock would, for the moment that it is held."""
    with DeviceLock(FOUND, "save"):
        pass
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            left_behind(FOUND, ME)
            at_work(FOUND)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(500):
            with DeviceLock(FOUND, "save") as lock:
                lock.take_over(ME)
    finally:
        over.set()
        for asker in askers:
            asker.join()


def test_a_job_at_work_is_told(directory: Path) -> None:
    assert at_work(FOUND) is None
    with process("save", STOPPED) as child:
        work = at_work(FOUND)
        assert work is not None
        assert work == Work("save", child.pid, work.since, None)
        assert work.since is not None
        assert 0 <= time.time() - work.since < 60
        assert left_behind(FOUND, ME) is None
        path = directory / f"{NAME}.lock"
        path.write_text(json.dumps(note(since=1764400000.5, step="after-stop")))
        assert at_work(FOUND) == Work("save", 4711, 1764400000.5, "after-stop")
        for strange in (
            {"since": "x", "step": 7},
            {"since": -1, "step": "\x1b[2J"},
            {"since": 1e300, "step": "a" * 99},
        ):
            path.write_text(json.dumps(note(**strange)))
            assert at_work(FOUND) == Work("save", 4711, None, None)
        path.write_bytes(b"")
        assert at_work(FOUND) == Work("", 0, None, None)
    assert at_work(FOUND) is None


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(directory: Path, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    words = f"{directory}: others may write to the directory for locks; chmod go-w {directory}, or {HINT}"
    for use in (lambda: DeviceLock(FOUND, "save"), lambda: left_behind(FOUND, ME), lambda: at_work(FOUND)):
        with pytest.raises(HostError) as caught:
            use()
        assert str(caught.value) == words
    assert list(directory.iterdir()) == []
    directory.chmod(0o755)
    DeviceLock(FOUND, "save").close()
