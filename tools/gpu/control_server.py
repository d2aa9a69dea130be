# SPDX-License-Identifier: MIT
"""The GPU's side of the control protocol. Bounded: a request's size, an answer's, and the number of clients."""

from __future__ import annotations

import errno
import json
import select
from typing import TYPE_CHECKING, Any, Final

from tools.gpu.context import ppgtt_of
from tools.gpu.errors import RefusedError
from tools.gpu.misbehaviour import MAX_DELAY, MAX_LOST
from tools.gpu.mmio import REGISTERS_END
from tools.gpu.protocol import MAX_ENTRIES, MAX_REQUEST
from tools.gpu.translate import FaultError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tools.gpu.gpu import Gpu
    from tools.gpu.record import Entry

MAX_CLIENTS: Final = 4
_CHUNK: Final = 1 << 14

_Answer = dict[str, Any]


class Handler:
    """Answers requests about one GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu: Final = gpu
        self._requests: Final[dict[str, tuple[Callable[[_Answer], _Answer], frozenset[str]]]] = {
            "state": (self._state, frozenset()),
            "record": (self._record, frozenset({"since", "limit", "engine"})),
            "misbehave": (self._misbehave, frozenset({"hang", "delay", "fault", "lose_interrupts"})),
            "behave": (self._behave, frozenset()),
            "register": (self._register, frozenset({"offset"})),
            "translate": (self._translate, frozenset({"address", "lrca"})),
        }

    def answer(self, line: bytes) -> bytes:
        """Return the answer to a request, whatever that is, with its newline."""
        ident: object = None
        try:
            request = _parse(line)
            ident = _ident(request.pop("id", None))
            answer = self._execute(request)
        except RefusedError as refused:
            answer = {"ok": False, "errno": errno.errorcode.get(refused.errno, "EINVAL"), "error": str(refused)}
        except FaultError as fault:
            answer = {"ok": False, "errno": "EFAULT", "error": str(fault)}
        else:
            answer = {"ok": True, **answer}
        return json.dumps(answer if ident is None else {"id": ident, **answer}).encode() + b"\n"

    def _execute(self, request: _Answer) -> _Answer:
        name = request.pop("do", None)
        if not isinstance(name, str) or name not in self._requests:
            raise RefusedError(errno.EOPNOTSUPP, f"there is no such request; known are {', '.join(self._requests)}")
        handler, arguments = self._requests[name]
        if not arguments.issuperset(request):
            raise RefusedError(
                errno.EINVAL, f"{name} knows {', '.join(sorted(arguments)) or 'no arguments'}, no others"
            )
        return handler(request)

    def _state(self, _request: _Answer) -> _Answer:
        gpu = self._gpu
        engines = {
            name: {"state": each.state, "why": each.hung, "contexts": each.ports, "executed": each.executed}
            for name, each in gpu.engines.items()
        }
        return {
            "model": gpu.model,
            "engines": engines,
            "interrupts": {"sent": gpu.interrupts.sent, "lost": gpu.interrupts.lost},
            "dma_maps": len(gpu.memory),
            "record": {"first": gpu.record.first, "last": gpu.record.last},
            "misbehaviour": {
                "hang": sorted(gpu.misbehaviour.hang),
                "delay": gpu.misbehaviour.delay,
                "fault": [{"space": f.space, "start": f.start, "end": f.end} for f in gpu.misbehaviour.faults],
                "lose_interrupts": gpu.misbehaviour.lost_interrupts,
            },
        }

    def _record(self, request: _Answer) -> _Answer:
        since = _number(request.get("since", 0), 0, 1 << 62)
        limit = _number(request.get("limit", MAX_ENTRIES), 1, MAX_ENTRIES)
        engine = self._engine(request.get("engine"), optional=True)
        record = self._gpu.record
        missed = max(0, record.first - 1 - since)
        entries: list[_Answer] = []
        last = max(since, record.first - 1)
        for entry in record.since(since):
            if len(entries) == limit:
                break
            last = entry.number
            if engine is None or entry.engine == engine:
                entries.append(_plain(entry))
        return {"entries": entries, "next": last, "last": record.last, "missed": missed}

    def _misbehave(self, request: _Answer) -> _Answer:
        """Check everything first: a request that is refused has changed nothing."""
        hang = [self._engine(name) for name in _list(request.get("hang", []))]
        delay = {self._engine(name): _seconds(value) for name, value in _object(request.get("delay", {})).items()}
        faults = [_fault(each) for each in _list(request.get("fault", []))]
        lost = _number(request.get("lose_interrupts", 0), 0, MAX_LOST)
        misbehaviour = self._gpu.misbehaviour
        misbehaviour.add_faults(faults)
        misbehaviour.hang.update(name for name in hang if name)
        misbehaviour.delay.update({name: value for name, value in delay.items() if name})
        misbehaviour.lost_interrupts += lost
        return {}

    def _behave(self, _request: _Answer) -> _Answer:
        self._gpu.misbehaviour.clear()
        return {}

    def _register(self, request: _Answer) -> _Answer:
        offset = _number(request.get("offset"), 0, REGISTERS_END - 4)
        return {"value": self._gpu.mmio.get(offset & ~3)}

    def _translate(self, request: _Answer) -> _Answer:
        address = _number(request.get("address"), 0, (1 << 64) - 1)
        lrca = request.get("lrca")
        if lrca is None:
            return {"dma": self._gpu.ggtt.translate(address)}
        ppgtt = ppgtt_of(self._gpu.memory, self._gpu.ggtt, _number(lrca, 0, (1 << 32) - 1))
        return {"dma": ppgtt.translate(address)}

    def _engine(self, name: object, *, optional: bool = False) -> str | None:
        if optional and name is None:
            return None
        if not isinstance(name, str) or name not in self._gpu.engines:
            raise RefusedError(errno.EINVAL, f"there is no such engine; there are {', '.join(self._gpu.engines)}")
        return name


def _parse(line: bytes) -> _Answer:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RefusedError(errno.EINVAL, f"not JSON: {type(error).__name__}") from None
    return _object(request)


def _object(value: object) -> _Answer:
    if not isinstance(value, dict):
        raise RefusedError(errno.EINVAL, "an object belongs here")
    return value


def _ident(value: object) -> int | str | None:
    if not isinstance(value, int | str | None):
        raise RefusedError(errno.EINVAL, "an id is a number or a string")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise RefusedError(errno.EINVAL, "a list belongs here")
    return value


def _number(value: object, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RefusedError(errno.EINVAL, f"a whole number from {least} to {most} belongs here")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_DELAY:
        raise RefusedError(errno.EINVAL, f"seconds from 0 to {MAX_DELAY:g} belong here")
    return float(value)


def _fault(value: object) -> tuple[str, int, int]:
    parts = _object(value)
    space, start, end = parts.get("space"), parts.get("start"), parts.get("end")
    if set(parts) != {"space", "start", "end"} or not isinstance(space, str):
        raise RefusedError(errno.EINVAL, "a fault has space, start and end")
    return space, _number(start, 0, 1 << 64), _number(end, 0, 1 << 64)


def _plain(entry: Entry) -> _Answer:
    return {
        "number": entry.number, "engine": entry.engine, "lrca": entry.lrca, "name": entry.name,
        "header": entry.header, "at": entry.at, "batch": entry.batch,
        "reads": entry.reads, "writes": entry.writes, "accesses": entry.accesses,
    }  # fmt: skip


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket: Final = sock
        self.line = bytearray()
        self.too_long = False
        self.out = memoryview(b"")

    def receive(self, handler: Handler) -> bool:
        """Answer what has come, unless an answer still waits to be taken; False at the stream's end."""
        data = self.socket.recv(_CHUNK)
        if not data:
            return False
        *whole, rest = data.split(b"\n")
        answers = bytearray()
        for part in whole:
            answers += self._end_of_line(part, handler)
        self._more(rest)
        self.out = memoryview(bytes(answers))
        return True

    def _more(self, data: bytes) -> None:
        self.too_long = self.too_long or len(self.line) + len(data) >= MAX_REQUEST
        if self.too_long:
            self.line.clear()
        else:
            self.line += data

    def _end_of_line(self, data: bytes, handler: Handler) -> bytes:
        self._more(data)
        line, too_long = bytes(self.line).strip(), self.too_long
        self.line.clear()
        self.too_long = False
        if too_long:
            return handler.answer(b"")  # refused as no JSON, which it may be
        return handler.answer(line) if line else b""

    def send(self) -> None:
        """Send what the client takes."""
        if self.out:
            self.out = self.out[self.socket.send(self.out) :]


class ControlServer:
    """Serves the clients of a listening socket."""

    def __init__(self, gpu: Gpu, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._handler: Final = Handler(gpu)
        self._listener: Final = listener
        self._clients: dict[int, _Client] = {}

    def watched(self) -> dict[int, int]:
        """Return file descriptors, and the events of poll(2) to wait for."""
        found = {fd: select.POLLOUT if each.out else select.POLLIN for fd, each in self._clients.items()}
        if len(self._clients) < MAX_CLIENTS:
            found[self._listener.fileno()] = select.POLLIN
        return found

    def handle(self, fd: int) -> None:
        """Do what an event on one of these asks for."""
        if fd == self._listener.fileno():
            self._accept()
            return
        client = self._clients[fd]
        try:
            alive = bool(client.out) or client.receive(self._handler)
            client.send()
        except BlockingIOError:
            return
        except OSError:
            alive = False
        if not alive:
            del self._clients[fd]
            client.socket.close()

    def close(self) -> None:
        """Close all sockets."""
        for client in self._clients.values():
            client.socket.close()
        self._clients.clear()
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or there is no file descriptor left
            return
        self._clients[sock.fileno()] = _Client(sock)
