# SPDX-License-Identifier: MIT
"""What ssh is told, and what is made of its failures: OpenSSH's own words, as 9.2 prints them."""

from __future__ import annotations

import shlex
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from vfio_mig.errors import HostError
from vfio_mig.jobs.peer import Peer
from vfio_mig.jobs.reach import SSH_OPTIONS, prefix

if TYPE_CHECKING:
    from pathlib import Path

CHANGED: Final = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
Host key verification failed.\r
"""


def peer(directory: Path, code: int, errors: str, name: str = "ssh") -> Peer:
    """Reach another host by a program of that name, which says so much and ends."""
    program = directory / name
    program.write_text(f"#!/bin/bash\nprintf %s {shlex.quote(errors)} >&2\nexit {code}\n")
    program.chmod(0o700)
    return Peer("ssh://root@other/x", [str(program)])


def message(directory: Path, code: int, errors: str, name: str = "ssh") -> str:
    with pytest.raises(HostError) as caught:
        peer(directory, code, errors, name).status()
    text = str(caught.value)
    assert text.isprintable()
    return text.replace(f"{directory}/", "")  # of the line that the hint names


def test_ssh_asks_nothing_and_the_user_s_own_words_come_first() -> None:
    assert prefix(["/usr/bin/ssh", "-oBatchMode=no"], "other") == [
        "/usr/bin/ssh", "-oBatchMode=no", *SSH_OPTIONS, "other",
    ]  # fmt: skip
    assert prefix(["mosh-like", "-x"], "other") == ["mosh-like", "-x", "other"]


def test_openssh_takes_the_first_of_several_values() -> None:
    """By its own word, where there is an ssh."""
    for own, effective in (["-oBatchMode=no"], "no"), ([], "yes"):
        try:
            done = subprocess.run(
                [*prefix(["ssh", *own], "other"), "-G", "-F", "none"], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            pytest.skip("this host has no ssh")
        assert f"batchmode {effective}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("code", "errors", "words"),
    [
        (
            255,
            "Host key verification failed.\r\n",
            "Host key verification failed; run 'ssh root@other true' once by hand, as this user, and compare the key",
        ),
        (255, CHANGED, "another key than the one that is known here: find out why"),
        (255, "root@other: Permission denied (publickey).\r\n", "give this user a key that root@other takes"),
        (255, "ssh: connect to host other port 22: Connection refused\r\n", "see whether 'ssh root@other true' works"),
        (255, "", "ssh://root@other/x: ssh failed at 'status': ended with status 255; see"),
        (
            127,
            "bash: line 1: vfio-mig: command not found\n",
            "not found; install vfio-mig there so that 'ssh root@other vfio-mig --version' finds it",
        ),
        (126, "sh: 1: vfio-mig: Permission denied\n", "install vfio-mig there"),
    ],
)
def test_a_failure_says_what_to_do(tmp_path: Path, code: int, errors: str, words: str) -> None:
    assert words in message(tmp_path, code, errors)


def test_a_failure_of_another_program_and_of_the_command_there_is_told_as_it_is(tmp_path: Path) -> None:
    said = message(tmp_path, 255, "Permission denied\n", name="reach")
    assert said == "ssh://root@other/x: 'status' failed there: Permission denied"
    said = message(tmp_path, 7, "vfio-mig: x: Permission denied\n")
    assert said == "ssh://root@other/x: 'status' failed there: x: Permission denied"
