# SPDX-License-Identifier: MIT
"""The installed `vfio-mig` command, as users and scripts run it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

PROGRAM: Final = "vfio-mig"
NOBODY: Final = 65534
SECONDS: Final = 60


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
) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end and demand the exit code *rc*, None for any; as *user* without any other group.

    :param env: variables beside those of this process.
    """
    done = subprocess.run(
        [_program(), *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        timeout=SECONDS,
        env={**os.environ, **(env or {})},
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    if rc is not None and done.returncode != rc:
        raise AssertionError(
            f"{PROGRAM} {' '.join(map(str, args))}: exit code {done.returncode}, not {rc}\n"
            f"{done.stdout[-2000:].decode(errors='replace')}{done.stderr[-4000:].decode(errors='replace')}"
        )
    return done


def refused(
    *args: str | Path,
    code: int,
    words: tuple[str, ...] = (),
    user: int | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> str:
    """Demand a refusal: this exit code, nothing on stdout, one line on stderr with each of *words* in it."""
    done = run(*args, rc=code, user=user, env=env, stdin=stdin)
    text = done.stderr.decode()
    assert done.stdout == b"", done.stdout[:1000]
    assert "Traceback" not in text, text
    assert text.endswith("\n"), text
    assert len(text.splitlines()) == 1, text
    assert text.startswith(f"{PROGRAM}: "), text
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text!r}"
    return text


@contextlib.contextmanager
def held(uuid: str, memory: Path | str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Have `vfio-mig hold` keep a device open until the block ends, with *memory*, FILE or FILE@GPA, mapped."""
    command = [_program(), "hold", uuid]
    if memory is not None:
        command += ["--memory", f"{memory}" if "@" in str(memory) else f"{memory}@0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == f"{uuid}: held open by PID {process.pid}\n", line
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)
