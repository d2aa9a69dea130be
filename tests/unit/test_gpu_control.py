# SPDX-License-Identifier: MIT
"""The control protocol: what it tells and changes, that no request upsets it, and its client over any stream."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import tty
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.unit.gpu_rig import BASE, BATCH, DATA, FIRST, GMA, Rig, rigged
from tools.gpu import control, protocol
from tools.gpu.control import Control, ControlError
from tools.gpu.control_server import MAX_CLIENTS, ControlServer, Handler, _Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STORE: Final = 0x20 << 23 | 2


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as made:
        yield made


def ask(rig: Rig, request: object) -> dict[str, Any]:
    line = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = Handler(rig.gpu).answer(line)
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    found = json.loads(answer)
    assert isinstance(found, dict)
    return found


def test_the_state_is_told(rig: Rig) -> None:
    rig.run(0x1C << 23 | 1 << 12 | 2, 1, DATA, 0)
    found = ask(rig, {"do": "state", "id": 7})
    assert (found["id"], found["ok"], found["model"], found["dma_maps"]) == (7, True, "skl", 1)
    assert found["engines"]["bcs0"] == {
        "state": "blocked", "why": "", "contexts": [GMA + FIRST.lrca], "executed": 0,
    }  # fmt: skip
    assert found["interrupts"] == {"sent": 1, "lost": 0}
    assert found["record"] == {"first": 1, "last": rig.gpu.record.last}
    assert found["misbehaviour"] == {"hang": [], "delay": {}, "fault": [], "lose_interrupts": 0}


def test_the_record_tells_commands_with_their_addresses(rig: Rig) -> None:
    rig.batch(STORE, DATA, 0, 0xCAFE)
    found = ask(rig, {"do": "record"})
    assert (found["missed"], found["next"], found["last"]) == (0, rig.gpu.record.last, rig.gpu.record.last)
    (entry,) = [each for each in found["entries"] if each["name"] == "MI_STORE_DATA_IMM"]
    assert entry == {
        "number": entry["number"], "engine": "bcs0", "lrca": GMA + FIRST.lrca, "name": "MI_STORE_DATA_IMM",
        "header": STORE, "at": BATCH, "batch": True, "reads": [], "writes": [[BASE + DATA, 0xCAFE]], "accesses": 1,
    }  # fmt: skip


def test_the_record_is_read_piece_by_piece_and_by_engine(rig: Rig) -> None:
    for engine in ("bcs0", "rcs0", "bcs0"):
        rig.run(*(STORE, DATA, 0, 1) * 100, engine=engine)
    since, seen = 0, []
    while since < rig.gpu.record.last:
        found = ask(rig, {"do": "record", "since": since, "limit": 50, "engine": "bcs0"})
        assert len(found["entries"]) <= 50
        assert found["next"] > since
        seen += found["entries"]
        since = found["next"]
    assert {each["engine"] for each in seen} == {"bcs0"}
    assert sum(each["name"] == "MI_STORE_DATA_IMM" for each in seen) == 200
    assert ask(rig, {"do": "record", "since": since})["entries"] == []


def test_what_is_not_kept_any_more_is_said_to_be_missed(rig: Rig) -> None:
    rig.gpu.record.__init__(kept=4)  # type: ignore[misc]
    rig.run(*(STORE, DATA, 0, 1) * 10)
    found = ask(rig, {"do": "record", "since": 2})
    assert (len(found["entries"]), found["missed"]) == (4, rig.gpu.record.last - 4 - 2)


def test_an_answer_is_never_longer_than_the_protocol_says(rig: Rig) -> None:
    fill = (2 << 29 | 0x50 << 22 | 5, 0xF0 << 16 | 64, 0, 8 << 16 | 8, DATA, 0, 0xFFFF_FFFF)
    rig.run(*fill * 130)
    answer = Handler(rig.gpu).answer(b'{"do": "record"}')
    assert len(json.loads(answer)["entries"]) > 100
    assert len(answer) * protocol.MAX_ENTRIES / len(json.loads(answer)["entries"]) < protocol.MAX_ANSWER


def test_misbehaviour_is_added_told_and_ended(rig: Rig) -> None:
    wanted = {
        "hang": ["bcs0"],
        "delay": {"rcs0": 0.5, "vcs0": 1},
        "fault": [{"space": "dma", "start": 1, "end": 2}],
        "lose_interrupts": 3,
    }
    assert ask(rig, {"do": "misbehave", **wanted}) == {"ok": True}
    assert ask(rig, {"do": "state"})["misbehaviour"] == wanted
    ask(rig, {"do": "misbehave", "lose_interrupts": 1})
    assert ask(rig, {"do": "state"})["misbehaviour"] == {**wanted, "lose_interrupts": 4}
    assert ask(rig, {"do": "behave"}) == {"ok": True}
    assert ask(rig, {"do": "state"})["misbehaviour"] == {"hang": [], "delay": {}, "fault": [], "lose_interrupts": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"hang": "bcs0"},
        {"hang": ["vcs1"]},
        {"hang": [1]},
        {"hang": [["bcs0"]]},
        {"hang": [None]},
        {"delay": ["bcs0"]},
        {"delay": {"none": 1}},
        {"delay": {"bcs0": -1}},
        {"delay": {"bcs0": 61}},
        {"delay": {"bcs0": "1"}},
        {"delay": {"bcs0": True}},
        {"delay": {"bcs0": float("nan")}},
        {"delay": {"bcs0": float("inf")}},
        {"fault": {}},
        {"fault": [{}]},
        {"fault": [{"space": "dma", "start": 1, "end": 1}]},
        {"fault": [{"space": "dma", "start": 1, "end": 2, "more": 3}]},
        {"fault": [{"space": ["dma"], "start": 1, "end": 2}]},
        {"fault": [{"space": "io", "start": 1, "end": 2}]},
        {"fault": [{"space": "dma", "start": 1, "end": 2**65}]},
        {"fault": [{"space": "dma", "start": 0, "end": 1}] * 65},
        {"lose_interrupts": -1},
        {"lose_interrupts": 1.5},
        {"lose_interrupts": 2**30},
        {"loose": 1},
    ],
)
def test_a_wrong_part_of_a_request_changes_nothing(rig: Rig, wrong: dict[str, object]) -> None:
    request = {"do": "misbehave", "hang": ["bcs0"], "delay": {"bcs0": 1}, "lose_interrupts": 1, **wrong}
    found = ask(rig, request)
    assert (found["ok"], found["errno"] in {"EINVAL", "ENOSPC"}) == (False, True)
    assert ask(rig, {"do": "state"})["misbehaviour"] == {"hang": [], "delay": {}, "fault": [], "lose_interrupts": 0}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"\xff\xfe",
        b"1",
        b"null",
        b"[]",
        b'"state"',
        b"{}",
        b'{"do": 1}',
        b'{"do": ["state"]}',
        b'{"do": "nothing"}',
        b'{"do": "state", "more": 1}',
        b'{"do": "behave", "more": 1}',
        b'{"do": "state", "id": []}',
        b'{"do": "record", "since": -1}',
        b'{"do": "record", "since": true}',
        b'{"do": "record", "limit": 0}',
        b'{"do": "record", "limit": 100000}',
        b'{"do": "record", "engine": "vcs1"}',
        b'{"do": "register"}',
        b'{"do": "register", "offset": 2097152}',
        b'{"do": "translate", "address": -1}',
        b'{"do": "translate", "address": 4096, "lrca": "x"}',
        b"[" * 16000,
        b'{"a":' * 3000,
        b"1" * 16000,
        b'{"do": "record", "since": 1e400}',
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(rig: Rig, line: bytes) -> None:
    found = ask(rig, line)
    assert found["ok"] is False
    assert found["errno"] in {"EINVAL", "ENOTSUP"}
    assert found["error"]
    assert len(json.dumps(found)) < 1000


def test_a_request_with_one_argument_too_many_is_refused_before_it_does_anything(rig: Rig) -> None:
    ask(rig, {"do": "misbehave", "hang": ["bcs0"]})
    assert not ask(rig, {"do": "behave", "now": 1})["ok"]
    assert ask(rig, {"do": "state"})["misbehaviour"]["hang"] == ["bcs0"]


def test_a_register_is_told_without_being_read(rig: Rig) -> None:
    rig.time.seconds = 1.0
    assert ask(rig, {"do": "register", "offset": 0x22358})["value"] == 0
    assert ask(rig, {"do": "register", "offset": 0x9120})["value"] == 1 << 25


def test_addresses_are_translated(rig: Rig) -> None:
    rig.lay_out(FIRST)
    assert ask(rig, {"do": "translate", "address": GMA + 0x123}) == {"ok": True, "dma": BASE + 0x123}
    ppgtt = {"do": "translate", "address": DATA + 8, "lrca": GMA + FIRST.lrca}
    assert ask(rig, ppgtt) == {"ok": True, "dma": BASE + DATA + 8}
    for lost in (
        {"address": 0x7000_0000},
        {"address": 0x7000_0000, "lrca": GMA + FIRST.lrca},
        {"address": 0, "lrca": 0},
    ):
        assert ask(rig, {"do": "translate", **lost})["errno"] == "EFAULT"


class Served:
    """A control server that is served by a thread."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self.path: Final = path
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(8)
        self.server: Final = ControlServer(rig.gpu, listener)
        self._ended = threading.Event()
        self._thread: Final = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            poller = select.poll()
            for fd, events in self.server.watched().items():
                poller.register(fd, events)
            for fd, _ in poller.poll(5):
                self.server.handle(fd)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.server.close()

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect(str(self.path))
        return sock


@pytest.fixture
def served(rig: Rig, tmp_path: Path) -> Iterator[Served]:
    made = Served(rig, tmp_path / "control")
    yield made
    made.close()


def test_the_client_asks_over_a_socket(rig: Rig, served: Served) -> None:
    with control.connect(served.path) as client:
        assert client.state()["model"] == "skl"
        before = client.last()
        rig.lay_out(FIRST, *(STORE, DATA, 0, 5) * 200)
        rig.submit(FIRST)
        entries = list(client.record(before, engine="bcs0"))
        assert sum(entry["name"] == "MI_STORE_DATA_IMM" for entry in entries) == 200
        client.misbehave(
            hang=["bcs0"], delay={"rcs0": 1}, fault=[{"space": "dma", "start": 0, "end": 1}], lose_interrupts=1
        )
        assert rig.gpu.misbehaviour.hang == {"bcs0"}
        client.behave()
        assert rig.gpu.misbehaviour.hang == set()
        assert client.register(0x9120) == 1 << 25
        assert client.translate(GMA) == BASE
        assert client.translate(DATA, GMA + FIRST.lrca) == BASE + DATA
        with pytest.raises(ControlError, match="no such engine") as refused:
            client.misbehave(hang=["vcs1"])
        assert refused.value.name == "EINVAL"


def test_the_client_says_that_entries_are_gone(rig: Rig, served: Served) -> None:
    rig.gpu.record.__init__(kept=4)  # type: ignore[misc]
    rig.run(*(STORE, DATA, 0, 1) * 10)
    with control.connect(served.path) as client, pytest.raises(ControlError) as gone:
        list(client.record())
    assert gone.value.name == "ENODATA"


def test_the_client_passes_over_what_is_not_its_answer(served: Served) -> None:
    """A serial port keeps what an earlier user left: half a request, half an answer, answers to other questions."""
    sock = served.raw()
    sock.sendall(b'{"do": "state", "id": 1}\n{"do": "beh')
    assert sock.recv(4)
    with Control(sock.detach()) as client:
        assert client.register(0x9120) == 1 << 25


def test_the_client_asks_over_a_serial_line(rig: Rig) -> None:
    """A terminal's two ends are not sockets; the far one is served as QEMU's port would."""
    ours, theirs = os.openpty()
    tty.setraw(ours)
    tty.setraw(theirs)
    handler = Handler(rig.gpu)

    def serve() -> None:
        line = b""
        while line.count(b"\n") < 2:
            line += os.read(theirs, 100)
        os.write(theirs, handler.answer(line.strip()))

    thread = threading.Thread(target=serve)
    thread.start()
    with control.connect(os.ttyname(ours)) as second:
        second.close()
    with Control(ours) as client:
        assert client.register(0x9120) == 1 << 25
    thread.join()
    os.close(theirs)


def test_the_client_does_not_wait_for_ever(served: Served) -> None:
    one, other = socket.socketpair()
    with Control(one.detach(), timeout=0.05) as client, pytest.raises(ControlError, match="does not answer"):
        client.state()
    other.close()
    one, other = socket.socketpair()
    other.close()
    with Control(one.detach()) as client, pytest.raises((ControlError, OSError)):
        client.state()
    assert served.path.exists()


def test_requests_in_pieces_and_several_at_once(served: Served) -> None:
    sock = served.raw()
    for byte in b'{"do": "register", "offset": 0}\r\n':
        sock.send(bytes([byte]))
    with sock.makefile("rb") as stream:
        assert json.loads(stream.readline()) == {"ok": True, "value": 0}
        sock.sendall(b'\n\n{"do": "behave", "id": 1}\n{"do": "behave", "id": "two"}\n')
        assert [json.loads(stream.readline())["id"] for _ in range(2)] == [1, "two"]
    sock.close()


def test_a_line_that_never_ends_takes_no_memory(served: Served) -> None:
    sock = served.raw()
    for _ in range(64):
        sock.sendall(b"x" * (1 << 16))
    sock.sendall(b'\n{"do": "behave"}\n')
    with sock.makefile("rb") as stream:
        assert json.loads(stream.readline())["ok"] is False
        assert json.loads(stream.readline())["ok"] is True
    assert all(len(each.line) <= protocol.MAX_REQUEST for each in served.server._clients.values())
    sock.close()


def test_more_clients_than_allowed_wait_for_their_turn(served: Served) -> None:
    first = [served.raw() for _ in range(MAX_CLIENTS)]
    for each in first:
        each.sendall(b'{"do": "behave"}\n')
        assert each.recv(100)
    late = served.raw()
    late.sendall(b'{"do": "behave"}\n')
    late.settimeout(0.05)
    with pytest.raises(TimeoutError):
        late.recv(100)
    first[0].close()
    late.settimeout(5)
    assert late.recv(100) == b'{"ok": true}\n'
    for each in (*first, late):
        each.close()


def test_a_client_that_reads_nothing_is_not_answered_any_more(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server = ControlServer(rig.gpu, listener)
    server._clients[theirs.fileno()] = _Client(theirs)
    ours.setblocking(False)
    rig.run(*(STORE, DATA, 0, 1) * 200)
    request = b'{"do": "record"}\n'
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            ours.send(request * 50)
        server.handle(theirs.fileno())
    client = server._clients[theirs.fileno()]
    assert client.out
    assert server.watched()[theirs.fileno()] == select.POLLOUT
    ours.close()
    server.handle(theirs.fileno())
    assert theirs.fileno() == -1
    server.close()
