# SPDX-License-Identifier: MIT
"""The other end of a migration: a vfio-mig on this host, or through ssh on another.

It may be a hostile one, so what it says is bounded, and every field of a report is looked at before it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from vfio_mig.errors import (
    DeviceError,
    HostError,
    ImageError,
    InterruptedJobError,
    OpenError,
    UnsupportedError,
    UsageError,
    VfioMigError,
    errno_text,
    excerpt,
)
from vfio_mig.host.pipe import widen
from vfio_mig.interrupts import waiting
from vfio_mig.jobs.reach import Way, prefix
from vfio_mig.threads import need_pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

SSH: Final = "ssh://"
FORM: Final = "ssh://[USER@]HOST[:PORT]/NAME, an IPv6 address in brackets"
OUTPUT_MAX: Final = 1 << 20
"""Bytes of standard output that one command there may print; its report and its steps are a few KiB."""
LINES_MAX: Final = 10_000
"""Lines of them: a report of many rounds has some hundred."""
ERRORS_KEPT: Final = 16 << 10
"""Bytes of standard error that are kept, the last ones; any more is read and dropped."""
PATIENCE: Final = 60.0
"""Seconds that a command has to end after SIGTERM: a restore on this host undoes what it has done."""
SECONDS_MAX: Final = 1e9
"""No time in a report is longer: thirty years."""
_REST_MAX: Final = 64
"""Pieces of ERRORS_KEPT that are read of it after the command's end."""
_WORDS_MAX: Final = 400
"""Characters that are repeated of what the other end has said."""
_PORT_MAX: Final = 65535
_ADDRESS: Final = re.compile(
    r"(?:(?P<user>[^\s@/:\[\]]+)@)?"
    r"(?:\[(?P<v6>[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[\w.-]+))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_ERRORS: Final[dict[int, type[VfioMigError]]] = {
    kind.exit_code: kind
    for kind in (UsageError, OpenError, UnsupportedError, DeviceError, ImageError, HostError, InterruptedJobError)
}


class Address(NamedTuple):
    """Where a target is.

    :param destination: what ``ssh`` takes as such: ``[USER@]HOST``, or with a port the whole as an address of its own
        form, so that any COMMAND of --rsh is called with two arguments; empty for this host.
    :param name: the device's name there.
    """

    destination: str
    name: str


def parse_target(target: str) -> Address:
    """Take a target apart.

    >>> parse_target("ssh://root@node:2222/dev/vfio/1")
    Address(destination='ssh://root@node:2222', name='/dev/vfio/1')

    :raises UsageError: it begins like an address, and is none.
    """
    if not target.startswith(SSH):
        return Address("", target)
    authority, _, name = target.removeprefix(SSH).partition("/")
    match = _ADDRESS.fullmatch(authority)
    # A destination that begins with a dash would be an option of ssh's
    if match is None or authority.startswith("-") or (match["host"] or "").startswith("-") or not name.strip("/"):
        raise UsageError(f"{target!r} is not {FORM}")
    user, v6, host, port = match.groups()
    if port is not None and not 0 < int(port) <= _PORT_MAX:
        raise UsageError(f"{target!r}: {port} is not a port")
    who = "" if user is None else f"{user}@"
    # Of all names of a device only paths have a slash, and each of those begins with one
    name = name if "/" not in name else "/" + name.lstrip("/")
    if port is None:
        return Address(f"{who}{v6 or host}", name)
    return Address(f"{SSH}{who}{f'[{v6}]' if v6 else host}:{port}", name)


class TargetStatus(NamedTuple):
    """What is believed of the other end's ``status``: names as they came, for comparison and for messages.

    :param protocol: None where it is not known, as that of a device that the other end may not ask.
    :param migratable: whether it speaks a protocol, None where that is not known.
    """

    state: str
    type: str
    protocol: str | None
    migratable: bool | None = None


class Peer:
    """Runs vfio-mig where the target device is.

    :param target: name of a device on this host, or ``ssh://[USER@]HOST[:PORT]/NAME``.
    :param rsh: what reaches another host, called with a destination and one command line; ssh by default.
    :raises UsageError: it is neither.
    """

    def __init__(self, target: str, rsh: Sequence[str] = ("ssh",)) -> None:
        self.target: Final = target
        destination, self.name = parse_target(target)
        if destination and not rsh:
            raise UsageError("no command to reach another host with", hint="leave out --rsh, or name one")
        self.is_remote: Final = bool(destination)
        self._prefix: Final = prefix(rsh, destination) if destination else []
        self.way: Final = Way(rsh, destination) if destination else None

    def _command(self, words: Sequence[str]) -> list[str]:
        if not self._prefix:
            return [sys.executable, "-P", "-m", "vfio_mig", *words]
        import shlex

        return [*self._prefix, shlex.join(["vfio-mig", *words])]

    def start(self, command: str, *names: str, options: Sequence[str] = (), stdin: int = subprocess.DEVNULL) -> Run:
        """Start a command there; its steps come with its report.

        :param names: arguments, none of which is taken for an option whatever it begins with.
        """
        words = ["--json", "--status-fd", "1", command, *options, "--", *names]
        try:
            process = subprocess.Popen(
                self._command(words), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise HostError(f"cannot reach {self.target}: {errno_text(error.errno or 0)}") from error
        if process.stdin is not None:
            widen(process.stdin.fileno())
        return Run(self, command, process)

    def call(self, command: str, *names: str) -> dict[str, Any]:
        """Run a command there to its end, and return its report.

        :raises VfioMigError: of the class that belongs to its exit code.
        """
        with self.start(command, *names) as run:
            return run.finish()

    def status(self) -> TargetStatus:
        """Ask for the target's status.

        :raises VfioMigError: of the class that belongs to its exit code.
        :raises HostError: what came is not such a report.
        """
        report = self.call("status", self.name)
        state, kind, protocol = report.get("state"), report.get("type"), report.get("protocol")
        if not isinstance(state, str) or not isinstance(kind, str):
            raise HostError(
                f"{self.target}: the report of 'status' is none: state {excerpt(state)}, type {excerpt(kind)}"
            )
        known = protocol[:_WORDS_MAX] if isinstance(protocol, str) else None
        migratable = report.get("migratable")
        return TargetStatus(
            state[:_WORDS_MAX], kind[:_WORDS_MAX], known, migratable if isinstance(migratable, bool) else None
        )


class _Tail:
    """Reads a pipe beside the job, so that nobody waits for room in it, and keeps the last bytes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._kept = bytearray()
        self._pool = need_pool(1)
        self._ending = os.eventfd(0, os.EFD_CLOEXEC)
        self._done = self._pool.submit(self._read).result

    def _read(self) -> None:
        both = select.poll()
        for fd in (self._pipe.fileno(), self._ending):
            both.register(fd, select.POLLIN)
        while self._ending not in (fd for fd, _ in both.poll()):
            if not self._take():
                return
        # What the command wrote before it ended is in the pipe; others may have the pipe open for longer, as an ssh
        # does that stays for the next connection
        os.set_blocking(self._pipe.fileno(), False)
        for _ in range(_REST_MAX):
            if not self._take():
                return

    def _take(self) -> bool:
        try:
            piece = os.read(self._pipe.fileno(), ERRORS_KEPT)
        except OSError:
            return False
        self._kept += piece
        del self._kept[:-ERRORS_KEPT]
        return bool(piece)

    def close(self) -> bytes:
        """Return what was kept; the command has ended. May be repeated."""
        if self._ending >= 0:
            os.eventfd_write(self._ending, 1)
            self._done()
            self._pool.shutdown()
            os.close(self._ending)
            self._ending = -1
            self._pipe.close()
        return bytes(self._kept)


class Run:
    """A command at the other end; a context manager that ends it."""

    def __init__(self, peer: Peer, what: str, process: subprocess.Popen[bytes]) -> None:
        self._peer = peer
        self._what = what
        self._process = process
        self._bytes = self._lines_read = 0
        assert process.stderr is not None  # noqa: S101 -- it was asked for
        try:
            self._errors = _Tail(process.stderr)
        except OSError:
            with process:  # which closes its pipes
                process.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what is still in its buffer is not wanted any more
                    continue
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    @property
    def stdin(self) -> int:
        """The fd that it reads; stays this object's."""
        assert self._process.stdin is not None  # noqa: S101 -- asked for with stdin=PIPE
        return self._process.stdin.fileno()

    @waiting
    def wait_for(self, step: str) -> None:
        """Wait until it has come to a step.

        :raises VfioMigError: it has ended before, with its own words.
        :raises HostError: it says something else.
        """
        for line in self._lines():
            found = _step_of(line)
            if found == step:
                return
            if line.startswith(b"{") and not found:  # the document of an error
                break
            if not found:
                raise self._no_report(line)
        raise self.error()

    @waiting
    def say(self, word: str) -> None:
        """Write a line to it and close its input; that it has gone is seen later."""
        assert self._process.stdin is not None  # noqa: S101 -- asked for with stdin=PIPE
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.close()

    def _lines(self) -> Iterator[bytes]:
        """Yield what it prints, line by line.

        :raises HostError: it is more than any vfio-mig says.
        """
        assert self._process.stdout is not None  # noqa: S101 -- it was asked for
        while line := self._process.stdout.readline(OUTPUT_MAX + 1):
            self._bytes += len(line)
            self._lines_read += 1
            if self._bytes > OUTPUT_MAX or self._lines_read > LINES_MAX:
                self._process.kill()
                raise HostError(
                    f"{self._peer.target}: '{self._what}' there prints more than {OUTPUT_MAX} bytes or {LINES_MAX} "
                    "lines: it is not vfio-mig"
                )
            yield line

    def _no_report(self, text: bytes) -> HostError:
        """Say what came instead of a report: as a rule a greeting."""
        first = next((line for line in text.splitlines() if line.strip()), b"")
        if not first or first[:1] in b"{[":
            return HostError(f"{self._peer.target}: what came back of '{self._what}' is not a report")
        hint = "the login shell there prints it, as a rule: have its start-up files print on terminals only"
        return HostError(
            f"{self._peer.target}: '{_words(first)}' came where the report of '{self._what}' should begin",
            hint=hint if self._peer.is_remote else None,
        )

    @waiting
    def finish(self) -> dict[str, Any]:
        """Wait for its end and return its report.

        :raises VfioMigError: of the class that belongs to its exit code.
        :raises HostError: it has said something that is not a report.
        """
        if self._process.stdin is not None:
            self._process.stdin.close()
        text = b"".join(line for line in self._lines() if not _step_of(line))
        if self._process.wait():
            raise self.error()
        try:
            report = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError):
            report = None
        if not isinstance(report, dict):
            raise self._no_report(text)
        return report

    @waiting
    def error(self) -> VfioMigError:
        """Wait for its end and say why it failed, in its own words."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        code = self._process.wait()
        errors, way = self._errors.close(), self._peer.way
        lines = errors.strip().splitlines()
        words = _words(lines[-1]).removeprefix("vfio-mig: ") if lines else f"ended with status {code}"
        there = f"'{self._what}' failed there"
        failed = way.failure(code, self._what) if way else None
        return _ERRORS.get(code, HostError)(
            f"{self._peer.target}: {failed or there}: {words.removesuffix('.')}",
            hint=way.hint(code, errors) if way else None,
        )


def number(value: object) -> int:
    """Return a count of a report, 0 for what is none."""
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def seconds(value: object) -> float:
    """Return a time of a report, 0 for what is none: a report that comes after the commit fails no job."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return 0.0
    return float(value) if 0 <= value <= SECONDS_MAX else 0.0


def _words(line: bytes) -> str:
    return line[: _WORDS_MAX * 4].decode("utf-8", "replace").strip()[:_WORDS_MAX]


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")


def _step_of(line: bytes) -> str:
    """Return the step that a line tells of, empty for a line of the report."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, str) else ""
