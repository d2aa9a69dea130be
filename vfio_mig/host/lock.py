# SPDX-License-Identifier: MIT
"""One job at a time per device, and a note on what a killed one has left behind.

A lock is flock(2) on a file of the device's name, so the kernel drops it with its process; beside it an fcntl(2) lock
of the same open file, about which others can ask without taking it for a moment themselves. In the file stands which
process works on the device and what it has done to it. A job that ends well, or undoes what it has done, empties it;
so what a later job finds there is what an earlier one, as a rule a killed one, could not undo.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.closing import Closing
from vfio_mig.errors import DeviceBusyError, HostError, errno_text

if TYPE_CHECKING:
    from vfio_mig.device import Holder
    from vfio_mig.host.devices import HostDevice
    from vfio_mig.words import Effect, Job, Step

DIRECTORY: Final = "/run/vfio-mig"
VARIABLE: Final = "VFIO_MIG_LOCK_DIR"
STOPPED: Final = "stopped"
LOADING: Final = "loading"
LIVE: Final = "live"
MOVED: Final = "moved"
_EFFECTS: Final = (STOPPED, LIVE, LOADING, MOVED)
_NOTE_MAX: Final = 4096
_FLOCK: Final = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid
_TIME_MAX: Final = 1e11
_STEP: Final = re.compile(r"[a-z0-9-]{1,64}")
_LOOKS: Final = 16
"""How often a note is read that is just being written."""
HINT: Final = f"run as root, or set {VARIABLE} to a directory of your own"


class Work(NamedTuple):
    """A job that is at work on a device.

    :param job: empty when it has not said so yet.
    :param pid: as the job's own PID namespace has it.
    :param since: seconds since 1970 at which it began, None when it has not said.
    :param step: at which it is, None when it has not said.
    """

    job: str
    pid: int
    since: float | None
    step: str | None


class Leftover(NamedTuple):
    """What a job has left behind that could not undo it.

    :param effect: ``stopped``, ``live`` when its state was being read while it ran, ``loading`` when a part of an
        image may be in the device or in guest memory, or ``moved`` when another device has its state now, so that this
        one must not go on.
    """

    job: str
    pid: int
    effect: Effect

    @property
    def is_loading(self) -> bool:
        """Whether the device, or its guest's memory, may hold a part of an image."""
        return self.effect == LOADING

    @property
    def is_moved(self) -> bool:
        """Whether another device has its state now."""
        return self.effect == MOVED

    def repair(self, name: str) -> str:
        """Say what to do about it."""
        if self.is_loading:
            return f"restore it again, or make it defined with 'vfio-mig reset {name}'"
        if self.is_moved:
            return f"'vfio-mig reset {name}' makes it a fresh device; to go on with the old state here use --force"
        return f"'vfio-mig start {name}' lets it go on"

    def __str__(self) -> str:
        if self.is_moved:
            return f"its state was moved to another device by 'vfio-mig {self.job}' (PID {self.pid})"
        what = {
            LOADING: "and its guest's memory may hold a part of an image",
            LIVE: "runs, and was left in the middle of a live save",
        }.get(self.effect, "was left stopped")
        return f"an earlier 'vfio-mig {self.job}' (PID {self.pid}) did not come to its end; the device {what}"


def lock_directory() -> str:
    """Return where locks are: ``$VFIO_MIG_LOCK_DIR``, else /run/vfio-mig, else, where we may not, the user's own."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return chosen
    if os.geteuid() == 0 or os.access(DIRECTORY, os.W_OK):
        return DIRECTORY
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}", "vfio-mig")


def _open_directory(path: str, *, make: bool) -> int:
    """Open the directory of the locks, which nobody else may write to: what stands there is taken for our own word.

    :param make: also make it.
    :raises FileNotFoundError: it is not there.
    :raises HostError: it cannot be used.
    """
    try:
        if make:
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if not make:
            raise
        raise HostError(
            f"{path}: cannot make the directory for locks: ENOENT (its parent is missing)", hint=HINT
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise HostError(f"{path}: not a directory of root's or of this user's", hint=HINT) from error
        raise HostError(
            f"{path}: cannot make the directory for locks: {errno_text(error.errno or 0)}", hint=HINT
        ) from error
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()):
        os.close(fd)
        raise HostError(f"{path}: not a directory of root's or of this user's", hint=HINT)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise HostError(f"{path}: others may write to the directory for locks", hint=f"chmod go-w {path}, or {HINT}")
    return fd


def directory_problem() -> str:
    """Say why the directory for locks cannot be used, empty when nothing is wrong with it, or it is not there yet."""
    try:
        os.close(_open_directory(lock_directory(), make=False))
    except FileNotFoundError:
        return ""
    except HostError as error:
        return str(error)
    return ""


def _started(pid: int) -> int:
    """Return when a process was started, in the kernel's ticks, so that a recycled PID is not taken for it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read(_NOTE_MAX).rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _identity(holder: Holder | None) -> list[int] | None:
    """Return what a note says of a holder: its PID, and when it was started."""
    return None if holder is None else [holder.pid, _started(holder.pid)]


class DeviceLock(Closing):
    """The right to work on a device; a context manager.

    :param job: name of the command, for those that wait.
    :raises DeviceBusyError: another process has it; says which.
    :raises HostError: there is no place for locks.
    """

    def __init__(self, found: HostDevice, job: Job) -> None:
        self._job = job
        self._holder: list[int] | None = None
        path = os.path.join(lock_directory(), f"{found.name}.lock")
        directory = _open_directory(os.path.dirname(path), make=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(os.path.basename(path), flags, 0o600, dir_fd=directory)
        except OSError as error:
            raise HostError(f"{path}: cannot open the lock: {errno_text(error.errno or 0)}", hint=HINT) from error
        finally:
            os.close(directory)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except BlockingIOError:
            note = _read_note(self._fd)
            os.close(self._fd)
            who = f"PID {note['pid']} ('vfio-mig {note['job']}')" if note else "another vfio-mig"
            raise DeviceBusyError(
                f"{who} is at work on it", device=found.name, hint="wait until it has ended"
            ) from None
        except OSError as error:  # a file system without locks
            os.close(self._fd)
            raise HostError(f"{path}: cannot lock: {errno_text(error.errno or 0)}", hint=HINT) from error
        self._before = _read_note(self._fd)
        self._effect: Leftover | None = None
        self._since = time.time()
        self._step = ""
        self._is_taken = False
        self._begin = ""
        self._length = min(os.fstat(self._fd).st_size, _NOTE_MAX)

    def take_over(self, holder: Holder | None) -> Leftover | None:
        """Write down whose job this is, and tell what an earlier one has left; nothing if it was closed since.

        :param holder: who has the device open now; it is what keeps a device as it was left.
        """
        # When the holder was started is asked once: notes are written while its device stands still
        self._holder = _identity(holder)
        self._effect = _left(self._before, self._holder)
        self._before = {}
        self._is_taken = True
        self._write_anew()
        return self._effect

    def step(self, name: Step) -> None:
        """Write down how far the job has come, for commands that look at the device meanwhile."""
        self._step = name
        if self._is_taken:  # before, the file has what an earlier job has left
            self._write()

    def journal(self, effect: Effect) -> None:
        """Write down what is about to be done to the device, by :class:`Leftover`'s words; empty: all is well again."""
        kept = effect and self._holder is not None
        self._effect = Leftover(self._job, os.getpid(), effect) if kept else None
        self._write_anew()

    def close(self) -> None:
        """Give the device free; a second call does nothing. The note stays if not all is well, or nobody has looked."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._effect is None and not self._before:
                os.ftruncate(fd, 0)
            os.close(fd)

    def _write_anew(self) -> None:
        note = {
            "job": self._job,
            "pid": os.getpid(),
            "since": self._since,
            "left": self._effect,
            "holder": self._holder,
        }
        self._begin = json.dumps(note)[:-1]
        self._write()

    def _write(self) -> None:
        # Steps follow each other while a device stands still, and only the step, a plain word, is another one then.
        # In one write and never shorter than before, so that a reader finds a whole note meanwhile
        text = f'{self._begin}, "step": "{self._step}"}}'.encode().ljust(self._length)
        self._length = len(text)
        try:
            os.pwrite(self._fd, text, 0)
        except OSError as error:
            raise HostError(f"cannot write the lock: {errno_text(error.errno or 0)}") from error


def _read_note(fd: int) -> dict[str, Any]:
    """Read a note; empty for none and for what is not a note of ours."""
    try:
        value = json.loads(os.pread(fd, _NOTE_MAX, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    good = isinstance(value, dict) and _is_job(value.get("job"), value.get("pid"))
    return value if good else {}


def _is_job(job: object, pid: object) -> bool:
    return isinstance(job, str) and job.isalpha() and type(pid) is int


def _left(note: dict[str, Any], holder: list[int] | None) -> Leftover | None:
    """Take from a note what was left in a device, if the same process has had it open since."""
    left = note.get("left")
    if holder is None or note.get("holder") != holder:
        return None
    if not isinstance(left, list) or len(left) != len(Leftover._fields):
        return None
    job, pid, effect = left
    return Leftover(job, pid, effect) if _is_job(job, pid) and effect in _EFFECTS else None


def _is_locked(fd: int) -> bool:
    """Ask whether the process that has the lock lives, without taking it: that would keep a job from starting."""
    asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return bool(answer[0] != fcntl.F_UNLCK)


def _open_to_read(found: HostDevice) -> int:
    """Open the file of a device's lock for reading, -1 when there is none or we may not.

    :raises HostError: the directory is one that others may write to.
    """
    try:
        directory = _open_directory(lock_directory(), make=False)
    except FileNotFoundError:
        return -1
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(f"{found.name}.lock", flags, dir_fd=directory)
    except OSError:
        return -1
    finally:
        os.close(directory)


def left_behind(found: HostDevice, holder: Holder | None) -> Leftover | None:
    """Look, without taking the lock, whether a killed job has left something in the device."""
    fd = _open_to_read(found)
    if fd < 0:
        return None
    try:
        return None if _is_locked(fd) else _left(_read_note(fd), _identity(holder))
    finally:
        os.close(fd)


def at_work(found: HostDevice) -> Work | None:
    """Tell which job is at work on a device, None when none is; no job is kept from anything by that."""
    fd = _open_to_read(found)
    if fd < 0:
        return None
    try:
        for _ in range(_LOOKS):
            if not _is_locked(fd):
                return None
            if note := _read_note(fd):
                since, step = note.get("since"), note.get("step")
                return Work(
                    note["job"],
                    note["pid"],
                    float(since) if isinstance(since, int | float) and 0 <= since < _TIME_MAX else None,
                    step if isinstance(step, str) and _STEP.fullmatch(step) else None,
                )
        return Work("", 0, None, None)
    finally:
        os.close(fd)
