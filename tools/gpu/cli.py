# SPDX-License-Identifier: MIT
"""The command line: listens, says so, serves one client, and ends with it or with the parent process."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from tools.gpu.control_server import ControlServer
from tools.gpu.errors import EXIT_HOST, GpuError
from tools.gpu.gpu import APERTURES, MAX_COMMANDS, MODELS, Gpu
from tools.gpu.server import Server
from tools.gpu.wire import ClosedError, Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PR_SET_PDEATHSIG: Final = 1
_MESSAGES_AT_A_TIME: Final = 64
_FILES: Final = 4096
"""File descriptors that we would like to have: each DMA map takes one."""
_EPILOG: Final = """\
Prints "ready" when it listens. Ends when the client disconnects, when the process that started it ends, and on SIGTERM.
Exit status: 0, or 2 for wrong usage, or 7 where it cannot listen."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description="An Intel gen9 GPU in software, which serves one vfio-user client such as QEMU's vfio-user-pci.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    result.add_argument("--socket", required=True, type=Path, metavar="PATH", help="where to listen for the client")
    result.add_argument("--gpu", choices=sorted(MODELS), default="skl", help="default: %(default)s")
    result.add_argument("--control", type=Path, metavar="PATH", help="where to listen for tests; see README.md")
    result.add_argument(
        "--aperture", type=int, choices=APERTURES, default=APERTURES[-1], metavar="MIB",
        help=f"one of {', '.join(map(str, APERTURES))}; default: %(default)s",
    )  # fmt: skip
    result.add_argument(
        "--max-commands", type=_positive, default=MAX_COMMANDS, metavar="N",
        help="an engine that has executed N commands of one submission hangs; default: %(default)s",
    )  # fmt: skip
    result.add_argument(
        "--conventional", action="store_true", help="be conventional PCI, with 256 bytes of configuration"
    )
    result.add_argument("--trace", action="store_true", help="trap all registers and tell each access; slow")
    result.add_argument("-v", "--verbose", action="store_true", help="tell about the client on standard error")
    return result


_wakes: Final[list[int]] = []
"""An fd that each signal makes readable, in a program that has called :func:`end_on_signals`."""


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end the program as its parent's end does."""
    # A handler runs between two steps of the interpreter, and not in a poll(2) that a signal came just before
    end, begin = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _wakes.append(end)
    signal.set_wakeup_fd(begin)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit status."""
    options = parser().parse_args(arguments)
    _allow_files()
    log: Callable[[str], None] = _say if options.verbose else _quiet
    try:
        _end_with_parent()
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listening(options.socket))
            trace = _say if options.trace else None
            try:
                gpu = Gpu(
                    options.gpu, aperture=options.aperture, max_commands=options.max_commands, trace=trace,
                    conventional=options.conventional,
                )  # fmt: skip
            except OSError as error:
                raise GpuError(f"cannot have memory for the registers: {error.strerror or error}") from None
            stack.callback(gpu.close)
            control = None
            if options.control is not None:
                control = ControlServer(gpu, stack.enter_context(_listening(options.control)))
                stack.callback(control.close)
            _ready()
            _run(gpu, listener, control, log)
    except GpuError as error:
        _say(str(error))
        return EXIT_HOST
    except (KeyboardInterrupt, _StoppedError):
        pass
    return 0


def _run(gpu: Gpu, listener: socket.socket, control: ControlServer | None, log: Callable[[str], None]) -> None:
    """Wait for the client, then serve it until it goes."""
    connection = _accept(listener, control)
    listener.close()  # nobody else shall wait for an answer
    log("the client is there")
    server = Server(gpu, connection, log)
    try:
        while True:
            _turn(gpu, connection, server, control)
    except ClosedError:
        log("the client has gone")
    finally:
        connection.close()


def _turn(gpu: Gpu, connection: Connection, server: Server, control: ControlServer | None) -> None:
    """Wait for something to do, and do it."""
    events = select.POLLOUT if connection.sending else select.POLLIN
    watched = {connection.fileno(): events, **(control.watched() if control else {})}
    for fd in _poll(watched, gpu.wait()):
        if fd == connection.fileno():
            server.serve(_MESSAGES_AT_A_TIME)
        elif control is not None:
            control.handle(fd)
    gpu.advance()


def _poll(watched: dict[int, int], seconds: float | None) -> list[int]:
    poller = select.poll()
    for fd, events in [*watched.items(), *((wake, select.POLLIN) for wake in _wakes)]:
        poller.register(fd, events)
    # Rounded up: a wait that ends too early finds nothing to do.
    return [fd for fd, _ in poller.poll(None if seconds is None else -int(-seconds * 1000 // 1)) if fd in watched]


def _accept(listener: socket.socket, control: ControlServer | None) -> Connection:
    while True:
        watched = {listener.fileno(): select.POLLIN, **(control.watched() if control else {})}
        for fd in _poll(watched, None):
            if fd != listener.fileno():
                if control is not None:
                    control.handle(fd)
                continue
            with contextlib.suppress(OSError):
                return Connection(listener.accept()[0])


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a socket that goes away with the block. One that a killed program has left there is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(sock):
        try:
            _remove_stale(path)
            mask = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(mask)
            ours = path.lstat()
            sock.listen(1)
        except OSError as error:
            raise GpuError(f"cannot listen on {path}: {error.strerror or error}") from None
        try:
            yield sock
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(ours, path.lstat()):
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on.

    :raises GpuError: somebody does, or it is something else.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise GpuError(f"cannot listen on {path}: there is a file; name another path")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise GpuError(f"cannot listen on {path}: another program listens there; end it or name another path")


class _StoppedError(BaseException):
    """SIGTERM or SIGHUP came; not an Exception, so that nothing on the way takes it for an error of its own."""


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise _StoppedError


def _end_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked to be told
        raise _StoppedError


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _ready() -> None:
    with contextlib.suppress(BrokenPipeError):
        print("ready", flush=True)


def _say(message: str) -> None:
    print(f"gpu: {message}", file=sys.stderr, flush=True)


def _quiet(_message: str) -> None:
    pass


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than zero")
    return value
