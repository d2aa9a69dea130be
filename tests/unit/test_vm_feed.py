# SPDX-License-Identifier: MIT
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.vm import guest
from tools.vm.feed import Feeder
from tools.vm.kernels import Kernel
from tools.vm.machine import Options, virtme_command
from tools.vm_cli import parse

DATA = os.urandom(3 << 20)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:  # the test has
            continue


@pytest.fixture
def feeder(pipe: tuple[int, int], tmp_path: Path) -> Iterator[Feeder]:
    made = Feeder(tmp_path / guest.STDIN_CLOSED, pipe[0])
    yield made
    made.close()


def write_and_close(fd: int, data: bytes) -> threading.Thread:
    def write() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.close(fd)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def read_all(end: socket.socket, into: bytearray) -> threading.Thread:
    def read() -> None:
        while data := end.recv(4096):
            into.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_all_of_it_arrives_behind_the_greeting_and_then_the_end(feeder: Feeder, pipe: tuple[int, int]) -> None:
    arrived = bytearray()
    writer, reader = write_and_close(pipe[1], DATA), read_all(feeder.guests, arrived)
    end = time.monotonic() + 20
    while reader.is_alive() and time.monotonic() < end:
        feeder.pump(0.01)
    writer.join(1)
    reader.join(1)
    assert arrived == guest.STDIN_GREETING + DATA


def test_no_more_is_read_than_fits_in_between(feeder: Feeder, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    taken = 0
    for _ in range(200):
        try:
            taken += os.write(pipe[1], bytes(1 << 16))
        except BlockingIOError:
            feeder.pump(0.001)
    assert taken < 1 << 20


def test_a_quiet_stdin_and_a_full_guest_cost_time_but_no_work(feeder: Feeder, pipe: tuple[int, int]) -> None:
    for fill in (False, True):
        if fill:
            os.set_blocking(pipe[1], False)
            for _ in range(100):
                feeder.pump(0.001)
                try:
                    os.write(pipe[1], bytes(1 << 16))
                except BlockingIOError:
                    break
        began, worked = time.monotonic(), time.process_time()
        feeder.pump(0.3)
        assert 0.29 < time.monotonic() - began < 5
        assert time.process_time() - worked < 0.1


def test_whoever_writes_finds_out_that_nobody_in_the_guest_reads(
    feeder: Feeder, pipe: tuple[int, int], tmp_path: Path
) -> None:
    feeder.pump(0.01)
    (tmp_path / guest.STDIN_CLOSED).touch()
    feeder.pump(0.01)
    with pytest.raises(BrokenPipeError):
        os.write(pipe[1], b"x")
    feeder.pump(0.01)


def test_the_end_of_the_vm_is_no_error(feeder: Feeder, pipe: tuple[int, int]) -> None:
    feeder.guests.close()
    os.write(pipe[1], b"x")
    for _ in range(3):
        feeder.pump(0.01)
    with pytest.raises(BrokenPipeError):
        os.write(pipe[1], b"x")


@pytest.mark.parametrize("path", [os.devnull, __file__])
def test_files_and_devices_end_too(tmp_path: Path, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    feeder = Feeder(tmp_path / guest.STDIN_CLOSED, fd)
    arrived = bytearray()
    reader = read_all(feeder.guests, arrived)
    end = time.monotonic() + 20
    while reader.is_alive() and time.monotonic() < end:
        feeder.pump(0.01)
    reader.join(1)
    feeder.close()
    os.close(fd)
    assert arrived == guest.STDIN_GREETING + Path(path).read_bytes()


def test_only_a_command_can_have_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--stdin", "--", "cat"]).stdin
    assert not parse(["cat", "--stdin"]).stdin
    with pytest.raises(SystemExit) as caught:
        parse(["--stdin"])
    assert caught.value.code == 2
    assert "--stdin needs a COMMAND" in capsys.readouterr().err


def test_there_is_a_port_for_input_only_if_it_is_asked_for(tmp_path: Path) -> None:
    options = Options(kernel=Kernel(tmp_path, "6.12-test"), kvm=False, memory="1G", cpus=2, timeout=900)

    def ports(**kwargs: bool | int) -> list[str]:
        command = virtme_command(options, tmp_path, tmp_path, **kwargs)  # type: ignore[arg-type]
        return [word.split(",")[2] for word in command if word.startswith("virtserialport,")]

    assert ports(interactive=True) == []
    assert ports(interactive=False) == ["name=vm.stdout", "name=vm.stderr"]
    assert ports(interactive=False, stdin=5) == ["name=vm.stdout", "name=vm.stderr", "name=vm.stdin"]
