# SPDX-License-Identifier: MIT
"""A client of the control protocol: asks an emulated GPU what it has executed, and lets it misbehave.

>>> with connect("/dev/virtio-ports/gpu.control") as control:  # doctest: +SKIP
...     control.misbehave(hang=["bcs0"])
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import time
from typing import TYPE_CHECKING, Any, Final, Self

from tools.gpu.protocol import MAX_ANSWER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_CHUNK: Final = 1 << 16
_TIMEOUT: Final = 30.0


class ControlError(Exception):
    """A request was refused, or not answered.

    :ivar name: the errno's name that the GPU gave, empty where it said nothing.
    """

    def __init__(self, problem: str, name: str = "") -> None:
        super().__init__(problem)
        self.name: Final = name


class Control:
    """A conversation with a GPU. Owns the file descriptor. Not thread-safe."""

    def __init__(self, fd: int, timeout: float = _TIMEOUT) -> None:
        """Speak over an open stream.

        :param fd: a socket or a serial port.
        :param timeout: seconds to wait for an answer.
        """
        self._fd = fd
        self._timeout: Final = timeout
        self._received = bytearray()
        # Whoever had the port before may have left answers in it: they have other numbers.
        self._ident = time.monotonic_ns()
        os.set_blocking(fd, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the stream; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Make a request and return the answer.

        :raises ControlError: it was refused, or there is no answer in time.
        """
        self._ident += 1
        request = json.dumps({"id": self._ident, "do": do, **arguments})
        # The newline in front ends what somebody may have left unfinished.
        self._send(f"\n{request}\n".encode())
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._parse(self._line(deadline))
            if answer.pop("id", None) != self._ident:
                continue
            if not answer.pop("ok", False):
                raise ControlError(f"{do}: {answer.get('error')}", str(answer.get("errno", "")))
            return answer

    def state(self) -> dict[str, Any]:
        """Return what the GPU is and does now."""
        return self.ask("state")

    def last(self) -> int:
        """Return the number of the record's last entry, to begin after."""
        return int(self.state()["record"]["last"])

    def record(self, since: int = 0, engine: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the entries of the record after a number, up to what is the last one now.

        :raises ControlError: some of them are not kept any more (ENODATA).
        """
        end = self.last()
        while since < end:
            answer = self.ask("record", since=since, engine=engine)
            if answer["missed"]:
                raise ControlError(f"record: {answer['missed']} entries are not kept any more", "ENODATA")
            yield from (entry for entry in answer["entries"] if entry["number"] <= end)
            since = answer["next"]

    def misbehave(
        self,
        *,
        hang: Sequence[str] = (),
        delay: Mapping[str, float] | None = None,
        fault: Sequence[Mapping[str, object]] = (),
        lose_interrupts: int = 0,
    ) -> None:
        """Add misbehaviour; README.md says what each does."""
        self.ask(
            "misbehave", hang=list(hang), delay=dict(delay or {}), fault=[dict(each) for each in fault],
            lose_interrupts=lose_interrupts,
        )  # fmt: skip

    def behave(self) -> None:
        """End all misbehaviour."""
        self.ask("behave")

    def register(self, offset: int) -> int:
        """Return a register's value, without what reading it does."""
        return int(self.ask("register", offset=offset)["value"])

    def translate(self, address: int, lrca: int | None = None) -> int:
        """Return the DMA address of a graphics address: through the GGTT, or a context's page tables."""
        arguments = {} if lrca is None else {"lrca": lrca}
        return int(self.ask("translate", address=address, **arguments)["dma"])

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        deadline = time.monotonic() + self._timeout
        while view:
            self._wait(select.POLLOUT, deadline)
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                continue

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            if len(self._received) > MAX_ANSWER:
                raise ControlError("the answer is longer than any answer is")
            self._wait(select.POLLIN, deadline)
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                continue
            if not data:
                raise ControlError("the GPU has closed the connection")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return bytes(line)

    def _wait(self, events: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._fd, events)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise ControlError(f"the GPU does not answer within {self._timeout:g} s")

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any]:
        """Return an answer; the rest of one that was only partly read before is none, and has no number."""
        try:
            answer = json.loads(line)
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}


def connect(path: str | Path, timeout: float = _TIMEOUT) -> Control:
    """Connect to a GPU through a Unix socket or a serial port.

    :raises OSError: it cannot be opened.
    """
    if stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 -- a path may come as a string
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(str(path))
            return Control(sock.detach(), timeout)
    return Control(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC), timeout)
