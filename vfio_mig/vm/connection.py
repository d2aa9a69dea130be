# SPDX-License-Identifier: MIT
"""libvirt, through its own Python binding, which is an extra: imported here, and only when somebody asks for it.

What its event loop has to do is done by a thread for as long as this process runs: a daemon ends a connection that does
not answer its pings. No call waits for ever: a daemon that hangs, or a QEMU behind it, is an error after a while.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from vfio_mig import interrupts, threads
from vfio_mig.errors import HostError, OpenError, UsageError, excerpt

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

CALL_SECONDS: Final = 60.0
"""A pause first waits for the disks."""
OPEN_SECONDS: Final = 120.0
"""A daemon that is started by the first connection asks each QEMU there is what it can do."""
MISSING: Final = (
    "apt install python3-libvirt for the system's Python; elsewhere pip install 'vfio_mig[libvirt]', which needs "
    "libvirt-dev, pkg-config and a C compiler"
)
_LOCAL_TRANSPORTS: Final = ("", "unix")
_DRIVERS: Final = "qemu:///system"


@functools.cache
def binding() -> Any:
    """Return libvirt's binding, with what is QEMU's alone in its ``qemu``.

    :raises HostError: it is not installed.
    """
    try:
        import libvirt
        import libvirt_qemu
    except ImportError as error:
        raise HostError("the Python package libvirt-python is missing", hint=MISSING) from error
    libvirt.registerErrorHandler(_be_quiet, None)
    libvirt.qemu = libvirt_qemu
    return libvirt


def _be_quiet(_context: object, _error: object) -> None:
    """Print nothing: each error is an exception besides."""


@functools.cache
def _run_events() -> None:
    libvirt = binding()
    libvirt.virEventRegisterDefaultImpl()
    threads.start(threading.Thread(target=_serve_events, args=(libvirt,), name="libvirt events", daemon=True))


def _serve_events(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def is_remote(uri: str) -> bool:
    """Tell whether the VMs behind a URI may be on another host.

    :raises UsageError: it is no URI.

    >>> is_remote("qemu:///system"), is_remote("qemu+ssh://root@host/system"), is_remote("qemu+unix:///system")
    (False, True, False)
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"--connect {excerpt(uri)}: {error}", hint=f"as in --connect {_DRIVERS}") from error
    if not parts.scheme or ":" not in uri:
        raise UsageError(f"--connect {excerpt(uri)} is not a URI of libvirt's", hint=f"as in --connect {_DRIVERS}")
    return bool(parts.netloc) or parts.scheme.partition("+")[2] not in _LOCAL_TRANSPORTS


def _to_connect() -> str:
    daemon = "see that libvirtd or virtqemud runs here"
    return f"{daemon}, and run as root or as a member of the group libvirt" if os.geteuid() else daemon


class Connection:
    """A connection to libvirt; a context manager.

    :raises OpenError: nobody answers there.
    :raises HostError: the binding is missing.
    """

    def __init__(self, uri: str) -> None:
        self.uri: Final = uri
        self.is_remote: Final = is_remote(uri)
        self._libvirt: Final = binding()
        _run_events()
        try:
            # To another host ssh may ask for a password, on the terminal, for as long as it takes
            self._open: Final = (
                self._libvirt.open(uri) if self.is_remote else self._within(OPEN_SECONDS, self._libvirt.open, uri)
            )
        except self._libvirt.libvirtError as error:
            raise OpenError(
                f"{uri}: cannot connect to libvirt: {said(error)}",
                hint=None if self.is_remote else _to_connect(),
            ) from error

    @property
    def is_qemu(self) -> bool:
        """Whether the VMs behind it are QEMU's."""
        kind: object = self.call(self._open.getType)
        return kind == "QEMU"

    def find(self, name: str) -> Any:
        """Return the domain of a name, or of a UUID.

        :raises OpenError: there is none.
        """
        for look in (self._open.lookupByName, self._open.lookupByUUIDString):
            try:
                return self._within(CALL_SECONDS, look, name)
            except self._libvirt.libvirtError:
                continue
        names = sorted(self.call(one.name) for one in self.domains())
        have = f"it has {', '.join(names)}" if names else "it has none at all"
        raise OpenError(f"{self.uri}: libvirt has no domain {excerpt(name)}", hint=have)

    def domains(self) -> list[Any]:
        """Return all domains, those that do not run, too."""
        found = self.call(self._open.listAllDomains, 0)
        return list(found)

    def watch(self, domain: Any, event: int, hear: Callable[..., None]) -> None:
        """Have *hear* called, in another thread, at an event of a domain's."""
        self.call(self._open.domainEventRegisterAny, domain, event, hear, None)

    def settle(self) -> None:
        """Return once each event that libvirt knew of before this call has been heard.

        A daemon sends them in front of the answer to what it is asked afterwards, and the thread hears them in front of
        a timeout that is made behind that answer.
        """
        self.call(self._open.getLibVersion)
        over = threading.Event()

        def end(timer: int, _opaque: object) -> None:
            self._libvirt.virEventRemoveTimeout(timer)
            over.set()

        self._libvirt.virEventAddTimeout(0, end, None)
        if not over.wait(CALL_SECONDS):
            raise HostError(f"{self.uri}: the thread that hears libvirt's events hangs")

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call the binding.

        :raises HostError: libvirt does not do it, or does not answer.
        """
        try:
            return self._within(CALL_SECONDS, function, *arguments)
        except self._libvirt.libvirtError as error:
            raise HostError(f"{self.uri}: libvirt: {said(error)}") from error

    def _within(self, seconds: float, function: Callable[..., T], *arguments: object) -> T:
        """Call what may hang; a thread that does is left behind."""
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((True, function(*arguments)))
            except BaseException as error:  # noqa: BLE001 -- it is raised again where it belongs
                answers.put((False, error))

        threads.start(threading.Thread(target=run, daemon=True))
        try:
            is_answer, found = answers.get(timeout=seconds)
        except queue.Empty:
            raise HostError(f"{self.uri}: no answer from libvirt within {seconds:.0f} s") from None
        if not is_answer:
            raise found
        return found  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    @interrupts.protected
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.call(self._open.close)
        except HostError:  # it has gone, which is what was wanted
            return


def said(error: Any) -> str:
    """Return what libvirt says of an error, as one line."""
    return " ".join(str(error).split())[:500]
