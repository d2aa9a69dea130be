# SPDX-License-Identifier: MIT
"""The installed `vfio-mig` command, as users and scripts run it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import os
import pkgutil
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn

import vfio_mig
from tools.lab.faults import injection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


PROGRAM: Final = "vfio-mig"
NOBODY: Final = 65534
SECONDS: Final = 300 if os.uname().release.endswith("-custom") else 60  # its checks make all of it slower

_PR_SET_MM: Final = 35
_ARG_START: Final = 8
_ARG_END: Final = 9
_ARGUMENTS: Final[list[object]] = []

Done = subprocess.CompletedProcess[bytes]


def _program() -> str:
    found = shutil.which(PROGRAM)
    assert found is not None, f"{PROGRAM} is not installed"
    return found


def run(
    *args: str | Path,
    rc: int | None = 0,
    user: int | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    stdout: str | None = None,
    warm: bool = False,
) -> Done:
    """Run it to its end and demand the exit code *rc*, None for any; as *user* without any other group.

    :param env: variables beside those of this process.
    :param stdout: path to write to, instead of into the result.
    :param warm: in a fork of this process. Most of a command's seconds in the VM are the start of an interpreter;
        for the tenth variant of one refusal that is not what is tested.
    """
    words = [_program(), *map(str, args)]
    if warm:
        assert stdin is None
        done = _forked(words, user, env, stdout)
    elif injection.VARIABLE in {**os.environ, **(env or {})}:
        done = _started([sys.executable, "-m", "tools.lab.faults.faulty", *words[1:]], user, env, stdin, stdout)
    else:
        done = _started(words, user, env, stdin, stdout)
    if rc is not None and done.returncode != rc:
        raise AssertionError(
            f"{PROGRAM} {' '.join(words[1:])}: exit code {done.returncode}, not {rc}\n"
            f"{(done.stdout or b'')[-2000:].decode(errors='replace')}{done.stderr[-4000:].decode(errors='replace')}"
        )
    return done


def _started(
    words: list[str], user: int | None, env: Mapping[str, str] | None, stdin: bytes | None, stdout: str | None
) -> Done:
    with contextlib.ExitStack() as stack:
        if user is not None:
            stack.enter_context(_interpreter_for_everybody())
        return subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE if stdout is None else stack.enter_context(Path(stdout).open("wb")),
            stderr=subprocess.PIPE,
            check=False,
            timeout=SECONDS,
            env={**os.environ, **(env or {})},
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )


@contextlib.contextmanager
def _interpreter_for_everybody() -> Iterator[None]:
    """Let others reach an interpreter in a home directory: in the VM, whose root is an overlay, and nowhere else."""
    assert "VFIO_MIG_KMOD_DIR" in os.environ
    changed: list[tuple[Path, int]] = []
    try:
        for directory in Path(sys.executable).resolve().parents:
            mode = directory.stat().st_mode & 0o7777
            if not mode & 0o001:
                changed.append((directory, mode))
                directory.chmod(mode | 0o001)
        yield
    finally:
        for directory, mode in changed:
            directory.chmod(mode)


@functools.cache
def _warm_up() -> None:
    """Import all of the program once, for every fork."""
    importlib.import_module("numpy")
    for module in pkgutil.walk_packages(vfio_mig.__path__, "vfio_mig."):
        if not module.name.endswith(".__main__"):  # which would run
            importlib.import_module(module.name)


def _forked(words: list[str], user: int | None, env: Mapping[str, str] | None, stdout: str | None) -> Done:
    _warm_up()
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        pid = os.fork()
        if not pid:
            os.environ.update(env or {})
            _be_the_program(words, user, stdout or out.fileno(), err.fileno())
        status = os.waitpid(pid, 0)[1]
        return Done(words, os.waitstatus_to_exitcode(status), _all_of(out), _all_of(err))


class Forked:
    """The program between pipes, in a fork of this process; its stdout, if it has no *stdout*, goes to the result.

    :param seconds: it is ended after so many; 0: never.
    """

    def __init__(
        self, *args: str | Path, stdin: int | None = None, stdout: int | None = None, seconds: int = SECONDS
    ) -> None:
        _warm_up()
        self._words: Final = [_program(), *map(str, args)]
        self._out: Final = tempfile.TemporaryFile()  # noqa: SIM115  # wait() closes it
        self._err: Final = tempfile.TemporaryFile()  # noqa: SIM115
        self.pid: Final = os.fork()
        if not self.pid:
            out = self._out.fileno() if stdout is None else stdout
            err = self._err.fileno()
            _be_the_program(self._words, None, out, err, stdin=stdin, alone=True, seconds=seconds)

    def runs(self) -> bool:
        """Tell whether it has not come to its end."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> Done:
        """Wait for its end."""
        status = os.waitpid(self.pid, 0)[1]
        with self._out, self._err:
            return Done(self._words, os.waitstatus_to_exitcode(status), _all_of(self._out), _all_of(self._err))


def _all_of(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _take_arguments(words: list[str]) -> None:
    """Have /proc show these as the process's arguments, by which a holder is known."""
    text = b"\0".join(word.encode() for word in [sys.executable, *words]) + b"\0"
    buffer = ctypes.create_string_buffer(text, len(text))
    _ARGUMENTS.append(buffer)
    libc, begin = ctypes.CDLL(None, use_errno=True), ctypes.addressof(buffer)
    for what, address in ((_ARG_START, begin), (_ARG_END, begin + len(text))):
        if libc.prctl(_PR_SET_MM, what, ctypes.c_ulong(address), 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_MM)")


def _be_the_program(
    words: list[str],
    user: int | None,
    out: str | int,
    err: int,
    *,
    stdin: int | None = None,
    alone: bool = False,
    seconds: int = SECONDS,
) -> NoReturn:
    """End this fork as the program; *alone*: without any other fd, as an end of a pipe would keep it open."""
    code = 70
    try:
        gc.freeze()  # else what the tests have left may be collected, and close an fd of the program's
        signal.alarm(seconds)
        _take_arguments(words)
        warnings.simplefilter("ignore")  # pytest has made them errors
        from_ = os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin
        into = out if isinstance(out, int) else os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number, fd in enumerate((from_, into, err)):
            os.dup2(fd, number)
        if alone:
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        sys.argv = words
        if os.environ.get(injection.VARIABLE):  # the program itself knows nothing of it
            injection.install()
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 71
        except BaseException:  # noqa: BLE001  # as the interpreter shows it
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def refused(
    *args: str | Path,
    code: int,
    words: tuple[str, ...] = (),
    user: int | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    stdout: str | None = None,
    warm: bool = False,
) -> str:
    """Demand a refusal: this exit code, nothing on stdout, one line on stderr with each of *words* in it."""
    done = run(*args, rc=code, user=user, env=env, stdin=stdin, stdout=stdout, warm=warm)
    text = done.stderr.decode()
    assert not done.stdout, done.stdout[:1000]
    assert "Traceback" not in text, text
    assert text.endswith("\n"), text
    assert len(text.splitlines()) == 1, text
    assert text.startswith(f"{PROGRAM}: "), text
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text!r}"
    return text


@contextlib.contextmanager
def held(uuid: str, memory: Path | str | None = None, *, via: str = "auto") -> Iterator[int]:
    """Have `vfio-mig hold`, in a fork, keep a device open in the block, with *memory*, FILE or FILE@GPA, mapped.

    :returns: its PID.
    """
    options = [] if memory is None else ["--memory", f"{memory}" if "@" in str(memory) else f"{memory}@0"]
    reader, writer = os.pipe()
    process = Forked("--via", via, "hold", uuid, *options, stdout=writer, seconds=0)
    os.close(writer)
    try:
        with os.fdopen(reader) as said:
            line = said.readline()
            if line != f"{uuid}: held open by PID {process.pid}\n":
                raise AssertionError(line + process.wait().stderr.decode(errors="replace"))
            yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if process.runs():
                os.kill(process.pid, signal.SIGTERM)
            process.wait()


@contextlib.contextmanager
def hold_started(uuid: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start `vfio-mig hold` as users do; it is ended behind the block."""
    with subprocess.Popen([_program(), "hold", uuid, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == f"{uuid}: held open by PID {process.pid}\n", line
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)
