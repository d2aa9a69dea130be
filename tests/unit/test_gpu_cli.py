# SPDX-License-Identifier: MIT
"""The program: when it is ready, when it ends, and what it leaves."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.gpu import cli, control, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]


def command(path: Path, *options: str) -> list[str]:
    return [sys.executable, "-S", "-m", "tools.gpu", "--socket", str(path), *options]


@contextlib.contextmanager
def running(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(path, *options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def ask(sock: socket.socket, command: int, payload: bytes) -> bytes:
    sock.sendall(wire.HEADER.pack(1, command, 16 + len(payload), 0, 0) + payload)
    return sock.recv(1 << 16)


def test_it_serves_one_client_and_ends_with_it(tmp_path: Path) -> None:
    path, asked = tmp_path / "gpu", tmp_path / "control"
    with running(path, "--gpu", "kbl", "--aperture", "256", "--control", str(asked), "-v") as process:
        wait_until_ready(process)
        assert (path.stat().st_mode & 0o777, asked.stat().st_mode & 0o777) == (0o600, 0o600)
        sock = connect(path)
        read = wire.REGION_ACCESS.pack(0, 7, 4)
        assert ask(sock, wire.Command.REGION_READ, read)[-4:] == b"\x86\x80\x12\x59"
        with control.connect(asked) as client:
            assert client.state()["model"] == "kbl"
        with pytest.raises(ConnectionRefusedError):
            connect(path)
        sock.close()
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "")
    assert "the client has gone" in err
    assert list(tmp_path.iterdir()) == []


def test_the_control_socket_answers_before_the_client_comes_and_while_it_is_silent(tmp_path: Path) -> None:
    path, asked = tmp_path / "gpu", tmp_path / "control"
    with running(path, "--control", str(asked)) as process:
        wait_until_ready(process)
        with control.connect(asked) as client:
            assert client.state()["dma_maps"] == 0
            sock = connect(path)
            sock.sendall(b"half a header")
            assert client.state()["dma_maps"] == 0
        with control.connect(asked) as client:
            assert client.state()["dma_maps"] == 0
        sock.close()
        assert process.wait(10) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_its_sockets(tmp_path: Path, sent: signal.Signals) -> None:
    with running(tmp_path / "gpu", "--control", str(tmp_path / "control")) as process:
        wait_until_ready(process)
        process.send_signal(sent)
        assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_comes_just_before_a_wait_ends_it() -> None:
    """Its handler has run by then, or is to run behind the wait: either way the wait ends at once."""
    program = """
import os, select, signal
from tools.gpu import cli
cli.end_on_signals()
signal.signal(signal.SIGTERM, lambda *_: None)  # as if it had run before the wait
signal.raise_signal(signal.SIGTERM)
ends = os.pipe()
print(cli._poll({ends[0]: select.POLLIN}, 60))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "gpu"
    parent = subprocess.Popen(
        ["/bin/sh", "-c", '"$@" & wait', "sh", *command(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not path.exists()
    parent.stdout.close()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gpu"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(path))
    stale.listen()
    stale.close()
    with cli._listening(path) as listener:
        connect(path).close()
        assert listener.fileno() >= 0
    assert not path.exists()


def test_a_socket_that_is_listened_on_or_a_file_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu"
    with cli._listening(path):
        assert cli.main(["--socket", str(path)]) == 7
        assert "another program listens there" in capsys.readouterr().err
    path.write_text("mine")
    assert cli.main(["--socket", str(path)]) == 7
    assert "there is a file" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.parametrize("path", ["no/such/directory/gpu", "x" * 200])
def test_where_it_cannot_listen_it_says_so_in_one_line(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--socket", str(tmp_path / path)]) == 7
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("gpu: cannot listen on ")


def test_a_socket_that_somebody_else_has_put_in_its_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "gpu"
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with cli._listening(path):
        path.unlink()
        other.bind(str(path))
    assert path.exists()
    other.close()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--socket"], ["--socket", "x", "--gpu", "bdw"], ["--socket", "x", "--aperture", "128"],
     ["--socket", "x", "--max-commands", "0"], ["--socket", "x", "--max-commands", "many"], ["--sock", "x"]],
)  # fmt: skip
def test_wrong_usage_is_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import tools.gpu.cli, tools.gpu.control; "
        "print([m for m in sys.modules if m.partition('.')[0] not in sys.stdlib_module_names "
        "and not m.startswith(('tools', '__'))])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
