# SPDX-License-Identifier: MIT
"""The other end of a migration, played by small programs: what it may say, and what is made of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from vfio_mig.errors import HostError, OpenError, UsageError, VfioMigError
from vfio_mig.jobs import peer as peer_module
from vfio_mig.jobs.migrate import _require_target
from vfio_mig.jobs.peer import ERRORS_KEPT, Address, Peer, TargetStatus, parse_target, seconds

if TYPE_CHECKING:
    from pathlib import Path

    from vfio_mig.jobs.engine.session import Session

STATUS: Final = json.dumps({"state": "running", "type": "t"}, indent=2)


def remote(directory: Path, source: str) -> Peer:
    """Make a peer whose connection runs *source*, Python."""
    path = directory / "rsh.py"
    path.write_text(source)
    return Peer("ssh://node7/the-name", [sys.executable, "-I", "-S", str(path)])


def answers(directory: Path, text: str, *, code: int = 0, errors: str = "") -> Peer:
    return remote(
        directory, f"import sys\nsys.stdout.write({text!r})\nsys.stderr.write({errors!r})\nsys.exit({code})\n"
    )


@pytest.mark.parametrize(
    ("target", "destination", "name"),
    [
        ("ssh://other/0000:3b:00.1", "other", "0000:3b:00.1"),
        ("ssh://root@other/x", "root@other", "x"),
        ("ssh://root@host:2222/x", "ssh://root@host:2222", "x"),
        ("ssh://host:2222/x", "ssh://host:2222", "x"),
        ("ssh://[2001:db8::1]/x", "2001:db8::1", "x"),
        ("ssh://root@[fe80::1%eth0]/x", "root@fe80::1%eth0", "x"),
        ("ssh://root@[2001:db8::1]:2222/x", "ssh://root@[2001:db8::1]:2222", "x"),
        ("ssh://host/dev/vfio/1", "host", "/dev/vfio/1"),
        ("ssh://host//dev/vfio/devices/vfio3", "host", "/dev/vfio/devices/vfio3"),
        ("ssh://host/sys/bus/mdev/devices/x", "host", "/sys/bus/mdev/devices/x"),
        ("ssh://host/--help", "host", "--help"),
        ("/dev/vfio/1", "", "/dev/vfio/1"),
        ("--help", "", "--help"),
    ],
)
def test_a_target_is_understood(target: str, destination: str, name: str) -> None:
    assert parse_target(target) == Address(destination, name)


@pytest.mark.parametrize(
    "target",
    [
        "ssh://",
        "ssh://host",
        "ssh://host/",
        "ssh://host//",
        "ssh:///x",
        "ssh://-oProxyCommand=x/y",
        "ssh://root@-oProxyCommand=x/y",
        "ssh://-root@host/y",
        "ssh://2001:db8::1/x",
        "ssh://[2001:db8::1/x",
        "ssh://[host]/x",
        "ssh://host:0/x",
        "ssh://host:65536/x",
        "ssh://host:/x",
        "ssh://host:2222:1/x",
        "ssh://a b/x",
        "ssh://h$(id)/x",
        "ssh://@host/x",
    ],
)
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises(UsageError, match=r"ssh://|not a port"):
        parse_target(target)


@pytest.mark.parametrize("name", ["--help", "-h", "--json", "x"])
def test_a_name_is_never_an_option_of_the_other_side(tmp_path: Path, name: str) -> None:
    peer = remote(tmp_path, "import sys, json, shlex\nprint(json.dumps({'words': sys.argv[1:]}))\n")
    there = Peer(f"ssh://host/{name}", peer._prefix[:-1])
    destination, line = there.call("status", there.name)["words"]
    assert destination == "host"
    assert line == f"vfio-mig --json --status-fd 1 status -- {name}"
    assert Peer(name)._command(["status", "--", name])[-2:] == ["--", name]


def test_the_program_here_takes_it_as_a_name() -> None:
    with pytest.raises(UsageError, match="'--help' is not a device name"):
        Peer("--help").status()


def test_the_status_is_what_the_report_says(tmp_path: Path) -> None:
    assert answers(tmp_path, STATUS).status() == TargetStatus("running", "t", None)
    for protocol, known in ('"gvt-rfc"', "gvt-rfc"), ("null", None), ("[1]", None), ("1e400", None):
        text = f'{{"state": "running", "type": "t", "protocol": {protocol}}}'
        assert answers(tmp_path, text).status().protocol == known


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "closed"}, "nobody has it open"),
        ({"type": "other"}, "the target is a 'other', the source a 't'"),
        (
            {"protocol": None, "migratable": False},
            "the-name: it speaks no migration protocol; 'vfio-mig info the-name'",
        ),
        ({"protocol": "mainline-v2"}, "the target speaks 'mainline-v2', the source 'gvt-rfc'"),
    ],
)
def test_a_target_that_cannot_take_it_is_refused_before_the_image_is_begun(
    tmp_path: Path, status: dict[str, object], words: str
) -> None:
    text = json.dumps({"state": "running", "type": "t", "protocol": "gvt-rfc", **status})
    found = SimpleNamespace(found=SimpleNamespace(type="t"), device=SimpleNamespace(name="x"))
    found.protocol = SimpleNamespace(name="gvt-rfc")
    with pytest.raises(VfioMigError, match=words):
        _require_target(cast("Session", found), answers(tmp_path, text))
    fits = json.dumps({"state": "running", "type": "t", "protocol": "gvt-rfc"})
    _require_target(cast("Session", found), answers(tmp_path, fits))


@pytest.mark.parametrize("banner", ["Welcome to node7\n", "\nLast login: today\n\n", "\x1b[1mhello\x1b[0m\n"])
def test_a_greeting_is_shown_and_the_login_shell_named(tmp_path: Path, banner: str) -> None:
    with pytest.raises(HostError) as caught:
        answers(tmp_path, banner + STATUS).status()
    text = str(caught.value)
    assert banner.strip().replace("\x1b", "\\x1b") in text
    assert "login shell" in text
    assert text.isprintable()


def test_a_greeting_before_the_first_step_is_told_at_once(tmp_path: Path) -> None:
    peer = remote(tmp_path, "import sys\nprint('Welcome', flush=True)\nsys.stdin.read()\n")
    began = time.monotonic()
    with peer.start("restore", "x", "-", stdin=subprocess.PIPE) as run, pytest.raises(HostError, match="'Welcome'"):
        run.wait_for("waiting")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("step", ['{"step": "opened"}\n', '{"step": "failed"}\n', ""])
def test_a_command_that_ends_before_a_step_is_heard_in_its_own_words(tmp_path: Path, step: str) -> None:
    document = json.dumps({"class": "OpenError", "code": 3}, indent=2) + "\n"
    peer = answers(tmp_path, step + document, code=3, errors="noise\nvfio-mig: x: in use\n")
    with peer.start("restore", "x") as run, pytest.raises(OpenError) as caught:
        run.wait_for("waiting")
    assert str(caught.value) == "ssh://node7/the-name: 'restore' failed there: x: in use"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"state": 1, "type": "t"}',
        '{"state": "running", "type": null}',
        '{"state": ["running"], "type": "t"}',
        '{"state": "running", "type": "t", "x": NaN}',
        '{"state": "running", "type": "t", "x": -Infinity}',
        '{"state": "running", "type": "t", "x": ' + "9" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(HostError, match=r"report of 'status'|is not a report"):
        answers(tmp_path, text).status()


def test_words_of_any_length_become_one_line_of_some_hundred_characters(tmp_path: Path) -> None:
    for peer in (
        answers(tmp_path, "x" * 500_000 + "\n"),
        answers(tmp_path, "", code=5, errors="a\n" + "x\u202e" * 100_000),
        answers(tmp_path, json.dumps({"state": "x" * 200_000, "type": ["y" * 200_000]})),
    ):
        with pytest.raises(VfioMigError) as caught:
            peer.status()
        assert len(str(caught.value)) < 3000
        assert str(caught.value).isprintable()


ENDLESS: Final = {
    "bytes": "while True: w(b'x' * 65536)",
    "lines": "while True: w(b'\\n' * 100)",
    "steps": 'while True: w(b\'{"step": "opened"}\\n\' * 100)',
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("waits", [True, False])
def test_endless_output_is_ended(tmp_path: Path, kind: str, *, waits: bool) -> None:
    peer = remote(tmp_path, f"import os\nw = lambda piece: os.write(1, piece)\n{ENDLESS[kind]}\n")
    with peer.start("restore", "x") as run, pytest.raises(HostError, match=r"not vfio-mig|should begin|not a report"):
        run.wait_for("waiting") if waits else run.finish()
    assert run._process.poll() is not None


@pytest.mark.parametrize(
    ("piece", "times", "is_refused"),
    [
        ('{"step": "opened"}\\n', 9_000, False),
        ('{"step": "opened"}\\n', 10_001, True),
        ('{"step": "opened"}' + " " * 200 + "\\n", 6_000, True),
    ],
    ids=["much", "lines", "bytes"],
)
def test_lines_and_bytes_have_a_limit_each(tmp_path: Path, piece: str, times: int, *, is_refused: bool) -> None:
    peer = remote(tmp_path, f"import sys\nsys.stdout.write('{piece}' * {times})\nprint('{{\"state\": 1}}')\n")
    with peer.start("restore", "x") as run:
        if is_refused:
            with pytest.raises(HostError, match="it is not vfio-mig"):
                run.finish()
        else:
            assert run.finish() == {"state": 1}


def test_endless_errors_are_read_and_dropped(tmp_path: Path) -> None:
    source = """
import os, sys
for _ in range(1000):
    os.write(2, b"x" * 65536)
os.write(2, b"\\nvfio-mig: the last words\\n")
sys.exit(7)
"""
    with remote(tmp_path, source).start("status", "x") as run:
        with pytest.raises(HostError, match="failed there: the last words"):
            run.finish()
        assert len(run._errors.close()) <= ERRORS_KEPT


def test_whoever_keeps_the_pipe_of_errors_is_not_waited_for(tmp_path: Path) -> None:
    """An ssh that stays for the next connection (ControlPersist) has our pipe as its stderr."""
    source = """
import os, sys, time
os.write(2, b"vfio-mig: gone\\n")
if os.fork() == 0:
    os.close(1)
    time.sleep(20)
os._exit(7)
"""
    began = time.monotonic()
    with pytest.raises(HostError, match="failed there: gone"):
        remote(tmp_path, source).status()
    assert time.monotonic() - began < 10


def test_a_command_does_not_outlive_a_host_that_gives_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def begin(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(*arguments, **more))
        return begun[-1]

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    there = answers(tmp_path, STATUS)
    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="temporarily unavailable: 'a new thread'"):
        there.status()
    assert [one.returncode for one in begun] == [-signal.SIGKILL]


def test_a_command_that_does_not_want_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "PATIENCE", 0.5)
    source = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(60)\n"
    )
    began = time.monotonic()
    with remote(tmp_path, source).start("restore", "x") as run, pytest.raises(HostError, match="'1' came where"):
        run.wait_for("waiting")
    assert run._process.returncode == -9
    assert time.monotonic() - began < 30


def test_nothing_of_a_peer_is_left(tmp_path: Path) -> None:
    threads = threading.active_count()
    for text in (STATUS, "nonsense"):
        with answers(tmp_path, text).start("status", "x"):
            pass
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (0, 0.0),
        (-1, 0.0),
        (True, 0.0),
        (float("nan"), 0.0),
        (float("inf"), 0.0),
        (10**400, 0.0),
        (1e308, 0.0),
        ("1", 0.0),
        (None, 0.0),
        ([1], 0.0),
        ({"a": 1}, 0.0),
    ],
)
def test_a_time_that_is_none_is_zero(value: object, expected: float) -> None:
    assert seconds(value) == expected
