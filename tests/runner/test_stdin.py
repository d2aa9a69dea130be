# SPDX-License-Identifier: MIT
"""`scripts/vm --stdin` from outside: each test starts VMs, without the driver."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
SECONDS = 120
NOTHING = hashlib.sha256(b"").hexdigest()


def start(*command: str, stdin: int | IO[bytes], options: tuple[str, ...] = ("--stdin",)) -> subprocess.Popen[bytes]:
    words = [str(ROOT / "scripts/vm"), "--no-module", "--timeout", str(SECONDS), *options, "--", *command]
    return subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_20_mib_go_in_and_come_out_as_they_were() -> None:
    data = os.urandom(20 << 20)
    with start("sh", "-c", "tee /dev/shm/copy; sha256sum /dev/shm/copy >&2", stdin=subprocess.PIPE) as vm:
        out, err = vm.communicate(data)
    assert vm.returncode == 0, err
    assert out == data
    assert err.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_a_stdin_that_never_ends_keeps_nobody_and_without_the_option_there_is_none() -> None:
    read, write = os.pipe()
    with (
        Path("/dev/zero").open("rb") as zeros,
        start("sh", "-c", "head -c 5; exit 7", stdin=zeros) as full,
        start("sha256sum", stdin=read, options=()) as without,
    ):
        assert full.communicate(timeout=SECONDS)[0] == bytes(5)
        assert without.communicate(timeout=SECONDS)[0].split()[0].decode() == NOTHING
    os.close(read)
    os.close(write)
    assert (full.returncode, without.returncode) == (7, 0)
