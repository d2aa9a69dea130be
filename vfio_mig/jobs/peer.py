# SPDX-License-Identifier: MIT
"""The other end of a migration: a vfio-mig on this host, or through ssh on another."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any, Final

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
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

SSH: Final = "ssh://"
_REPORT_MAX: Final = 1 << 20
_ERRORS: Final[dict[int, type[VfioMigError]]] = {
    kind.exit_code: kind
    for kind in (UsageError, OpenError, UnsupportedError, DeviceError, ImageError, HostError, InterruptedJobError)
}


class Peer:
    """Runs vfio-mig where the target device is.

    :param target: name of a device on this host, or ``ssh://[USER@]HOST/NAME``.
    :param rsh: what reaches another host, called with HOST and one command line; ssh by default.
    :raises UsageError: it is neither.
    """

    def __init__(self, target: str, rsh: Sequence[str] = ("ssh",)) -> None:
        self.target: Final = target
        self.host = ""
        self.name = target
        self._prefix: list[str] = []
        if target.startswith(SSH):
            self.host, _, self.name = target.removeprefix(SSH).partition("/")
            # A host that begins with a dash would be an option of ssh's
            if not self.host or not self.name or self.host.startswith("-") or not rsh:
                raise UsageError(f"{target!r} is not ssh://[USER@]HOST/NAME")
            self._prefix = [*rsh, self.host]

    def _command(self, words: Sequence[str]) -> list[str]:
        if not self._prefix:
            return [sys.executable, "-P", "-m", "vfio_mig", *words]
        import shlex

        return [*self._prefix, shlex.join(["vfio-mig", *words])]

    def start(self, *words: str, stdin: int = subprocess.DEVNULL) -> Run:
        """Start a command there; its steps come with its report."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115 -- Run closes it
        try:
            process = subprocess.Popen(
                self._command(["--json", "--status-fd", "1", *words]),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as error:
            errors.close()
            raise HostError(f"cannot reach {self.target}: {errno_text(error.errno or 0)}") from error
        return Run(self, words[0], process, errors)

    def call(self, *words: str) -> dict[str, Any]:
        """Run a command there to its end, and return its report.

        :raises VfioMigError: of the class that belongs to its exit code.
        """
        with self.start(*words) as run:
            return run.finish()


class Run:
    """A command at the other end; a context manager that ends it."""

    def __init__(self, peer: Peer, what: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._peer = peer
        self._what = what
        self._process = process
        self._errors = errors

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
        self._process.wait()
        self._errors.close()

    @property
    def stdin(self) -> int:
        """The fd that it reads; stays this object's."""
        assert self._process.stdin is not None  # noqa: S101 -- asked for with stdin=PIPE
        return self._process.stdin.fileno()

    def wait_for(self, step: str) -> None:
        """Wait until it has come to a step.

        :raises VfioMigError: it has ended before, with its own words.
        """
        for line in self._lines():
            if _step_of(line) == step:
                return
        raise self.error()

    def say(self, word: str) -> None:
        """Write a line to it and close its input; that it has gone is seen later."""
        assert self._process.stdin is not None  # noqa: S101 -- asked for with stdin=PIPE
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.close()

    def _lines(self) -> Iterator[bytes]:
        assert self._process.stdout is not None  # noqa: S101 -- it was asked for
        while line := self._process.stdout.readline(_REPORT_MAX):
            yield line

    def finish(self) -> dict[str, Any]:
        """Wait for its end and return its report.

        :raises VfioMigError: of the class that belongs to its exit code.
        """
        if self._process.stdin is not None:
            self._process.stdin.close()
        text = b"".join(line for line in self._lines() if not _step_of(line))
        if self._process.wait():
            raise self.error()
        try:
            report = json.loads(text)
        except (ValueError, RecursionError):
            report = None
        if not isinstance(report, dict):
            raise HostError(f"{self._peer.target}: what came back of '{self._what}' is no report")
        return report

    def error(self) -> VfioMigError:
        """Wait for its end and say why it failed, in its own words."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read(_REPORT_MAX).decode("utf-8", "replace").strip().splitlines()
        words = lines[-1].removeprefix("vfio-mig: ") if lines else f"ended with status {code}"
        return _ERRORS.get(code, HostError)(f"{self._peer.target}: '{self._what}' failed there: {words}")


def _step_of(line: bytes) -> str:
    """Return the step that a line tells of, empty for a line of the report."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, str) else ""
