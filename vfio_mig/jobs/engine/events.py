# SPDX-License-Identifier: MIT
"""Tell orchestrators of each step of a job, and run their commands at it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.errors import HostError, UsageError, errno_text
from vfio_mig.image.places import open_file
from vfio_mig.interrupts import waiting
from vfio_mig.jobs.engine.steps import NAMES, OTHER_NAMES, STEPS, option_of, steps_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Events:
    """Writes one JSON object per line and step: ``time``, ``job``, ``step``, ``device``, and what belongs to it.

    :param target: path of a file to append to (made with mode 0600; a FIFO must have a reader), or an inherited fd.
    :raises UsageError: a link, a directory, or no such fd.
    :raises HostError: it cannot be opened.
    """

    def __init__(self, target: str | int) -> None:
        self._name = f"fd {target}" if isinstance(target, int) else target
        try:
            self._fd = os.dup(target) if isinstance(target, int) else self._open(target)
            self._try_writing()
        except OSError as error:
            raise HostError(f"{self._name}: cannot write events: {errno_text(error.errno or 0)}") from error

    def _try_writing(self) -> None:
        """See to it that an fd that is open for reading only is refused now, and not at the first step."""
        try:
            os.write(self._fd, b"")
        except OSError as error:
            if error.errno == errno.EBADF:
                os.close(self._fd)
                raise

    @staticmethod
    def _open(path: str) -> int:
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY)
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            os.close(fd)
            raise UsageError(f"{path} is neither a file nor a FIFO: events go to one of these")
        os.set_blocking(fd, True)
        return fd

    @waiting
    def emit(self, step: str, **more: Any) -> None:
        """Write one object; a failure to do so is the job's.

        :raises HostError: the disk is full, or the reader has gone.
        """
        line = json.dumps({"time": time.time(), "step": step, **more}) + "\n"
        try:
            os.write(self._fd, line.encode())
        except OSError as error:
            raise HostError(f"{self._name}: cannot write events: {errno_text(error.errno or 0)}") from error


class Hooks:
    """Commands to run at the steps of a job, given as ``STEP=COMMAND``.

    COMMAND is split as a shell would, and run without one. It gets VFIO_MIG_JOB, VFIO_MIG_STEP and VFIO_MIG_DEVICE in
    its environment, our stderr as its stdout, and nothing to read. The job waits for it: what it does between stop and
    start is downtime.

    :param job: that is to be done, as STEPS names it; None for any.
    :param asked: the options of its command, by their names.
    :raises UsageError: no such step, one that this job does not have, or no command.
    :raises HostError: there is no such program, or it may not be run.
    """

    def __init__(self, texts: Sequence[str], job: str | None = None, **asked: object) -> None:
        self._hooks = [self._parse(text) for text in texts]
        self.idle: Final = [step for step, _ in self._hooks]
        """Steps of hooks that have not run yet."""
        if job is not None:
            for step, _ in self._hooks:
                self._require(step, job, asked)

    @staticmethod
    def _require(step: str, job: str, asked: dict[str, object]) -> None:
        """Refuse a hook that would never run."""
        wanted, steps = OTHER_NAMES.get(step, step), steps_of(job, **asked)
        if wanted in steps:
            return
        if job not in STEPS:
            raise UsageError(f"hook {step}: '{job}' has no steps", hint="leave out --hook")
        option = option_of(job, wanted)
        hint = f"a {job} has {', '.join(steps)}" if option is None else f"it has that with {option}"
        raise UsageError(f"hook {step}: this {job} has no such step", hint=hint)

    @staticmethod
    def _parse(text: str) -> tuple[str, list[str]]:
        import shlex

        step, _, command = text.partition("=")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"hook {text!r}: {error}") from None
        if step not in NAMES or not words:
            raise UsageError(f"hook {text!r} is not STEP=COMMAND", hint=f"steps are {', '.join(sorted(NAMES))}")
        if shutil.which(words[0]) is None:  # told now, not while the device is stopped
            number = errno.EACCES if os.path.exists(words[0]) else errno.ENOENT
            raise HostError(f"hook {step}: cannot run {words[0]}: {errno_text(number)}")
        return step, words

    def run(self, job: str, step: str, device: str) -> None:
        """Run what belongs to a step.

        :raises HostError: a command cannot be started, or ends with another status than 0; the job rolls back.
        """
        for wanted, words in self._hooks:
            if step == OTHER_NAMES.get(wanted, wanted):
                if wanted in self.idle:
                    self.idle.remove(wanted)
                self._run(words, {"VFIO_MIG_JOB": job, "VFIO_MIG_STEP": wanted, "VFIO_MIG_DEVICE": device})

    @staticmethod
    def _run(words: list[str], environment: dict[str, str]) -> None:
        step = environment["VFIO_MIG_STEP"]
        try:
            process = subprocess.Popen(words, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=2)
        except OSError as error:
            raise HostError(f"hook {step}: cannot run {words[0]}: {errno_text(error.errno or 0)}") from error
        code = _end_of(process)
        if code:
            how = f"signal {-code}" if code < 0 else f"status {code}"
            raise HostError(f"hook {step}: {words[0]} ended with {how}")


@waiting
def _end_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a hook's end; a signal to us ends it."""
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
