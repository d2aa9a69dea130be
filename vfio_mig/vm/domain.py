# SPDX-License-Identifier: MIT
"""A libvirt domain as the jobs see a VM: libvirt keeps its monitor, so libvirt pauses it, lets it go on, and asks it.

The devices are those of the domain's XML. Which process it is, QEMU tells by the threads of its CPUs; whether that one
has the devices open, and the RAM, is the kernel's word.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from vfio_mig import interrupts, proc
from vfio_mig.errors import HostError, OpenError, UnsupportedError, excerpt, printable
from vfio_mig.vm import domainxml
from vfio_mig.vm.connection import Connection, binding, is_remote
from vfio_mig.vm.monitor import GoneError, RefusedError, Words, entries_of, printed, unknown_answer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

ANSWER_MAX: Final = 10 << 20
"""Characters of an answer, as of one that comes over a socket."""
_CPUS: Final = "query-cpus-fast"
_TGID: Final = re.compile(rb"^Tgid:\s*([0-9]{1,10})$", re.MULTILINE)


def words_of(name: str) -> Words:
    """Return what the user types for a domain."""
    name = printable(name)
    return Words(
        cont=f"'virsh resume {name}'",
        stop=f"'virsh suspend {name}'",
        reset=f"'virsh reset {name}'",
        wakeup=f"'virsh dompmwakeup {name}'",
        cancel=f"'virsh domjobabort {name}'",
        start_paused=f"'virsh start --paused {name}'",
        share=domainxml.SHARE,
        proof="'vfio-mig list' tells who has it open",
    )


class Domain:
    """A running libvirt domain of QEMU's on this host; a context manager.

    :param uri: of libvirt, ``qemu:///system``.
    :param name: its name, or its UUID.
    :raises UnsupportedError: it may be on another host, or is not QEMU's.
    :raises OpenError: there is none of this name, or it does not run.
    """

    def __init__(self, uri: str, name: str) -> None:
        if is_remote(uri):
            raise UnsupportedError(
                f"{uri}: what saves and restores a device must run on the host that has it",
                hint=f"there, use --connect {local_uri(uri)}; 'vfio-mig vm list' works from here",
            )
        self.words: Words = words_of(name)
        self.news: list[str] = []
        self.ignores_signals = False
        self._pid = 0
        self._connection = Connection(uri)
        try:
            self._open(name)
        except BaseException:
            self._connection.__exit__(None, None, None)
            raise

    def _open(self, name: str) -> None:
        call = self._connection.call
        if not self._connection.is_qemu:
            raise UnsupportedError(
                f"{self._connection.uri}: its VMs are not QEMU's", hint="use --connect qemu:///system"
            )
        self._domain = self._connection.find(name)
        self.name: str = printable(call(self._domain.name))
        self.words = words_of(self.name)
        if not call(self._domain.isActive):
            raise OpenError(f"the domain {self.name} does not run", hint=self.words.start_paused + " starts it")
        self.listed: list[str] | None = domainxml.parse(call(self._domain.XMLDesc, 0)).devices
        self._pid = self._find_pid()
        libvirt = binding()
        for event, hear in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._hear_lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, lambda *_: self._note("RESET")),
            (libvirt.VIR_DOMAIN_EVENT_ID_PMWAKEUP, lambda *_: self._note("WAKEUP")),
        ):
            self._connection.watch(self._domain, event, hear)

    def _hear_lifecycle(self, _connection: object, _domain: object, event: int, *_: object) -> None:
        libvirt = binding()
        news = {
            libvirt.VIR_DOMAIN_EVENT_RESUMED: "RESUME",
            libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "SHUTDOWN",
            libvirt.VIR_DOMAIN_EVENT_CRASHED: "GUEST_PANICKED",
        }.get(event)
        if news is not None:
            self._note(news)

    def _note(self, name: str) -> None:
        if name not in self.news:
            self.news.append(name)

    def _find_pid(self) -> int:
        """Return the process that runs the CPUs; 0 when it is in a PID namespace that is not seen from here."""
        threads = [one.get("thread-id") for one in entries_of(self.execute(_CPUS), _CPUS)]
        if not threads or not all(isinstance(one, int) and one > 0 for one in threads):
            raise unknown_answer(_CPUS, f"its threads are {excerpt(threads)}")
        found = set()
        for thread in threads:
            match = _TGID.search(proc.read_small(f"/proc/{thread}/status"))
            found.add(0 if match is None else int(match[1]))
        return found.pop() if len(found) == 1 else 0

    @property
    def pid(self) -> int:
        """QEMU's process; 0 when it is in a PID namespace that is not seen from here."""
        return self._pid

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer, of which nothing is known; a signal waits for it.

        To pause the VM and to let it go on is libvirt's business, which would not know of it otherwise.

        :raises RefusedError: QEMU does not do it.
        :raises GoneError: the domain has ended.
        :raises HostError: libvirt is gone or silent, or QEMU says what no QEMU says.
        """
        answer = self._execute(command, arguments)
        if not self.ignores_signals:
            interrupts.check()
        return answer

    @interrupts.protected
    def _execute(self, command: str, arguments: dict[str, object]) -> Any:
        call = self._connection.call
        try:
            if command in {"stop", "cont"}:
                call(self._domain.suspend if command == "stop" else self._domain.resume)
                return {}
            asked = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
            text = call(binding().qemu.qemuMonitorCommand, self._domain, asked, 0)
            if command == "query-status":  # what came before it is known once this returns, as from a socket
                self._connection.settle()
        except HostError as error:
            if self._has_ended():
                raise GoneError(f"the domain {self.name} has ended while it was asked for {command!r}") from error
            raise
        return self._result(command, text)

    def _result(self, command: str, text: object) -> Any:
        """Take the result out of QEMU's answer."""
        if not isinstance(text, str) or len(text) > ANSWER_MAX:
            raise unknown_answer(command, "it is endless")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict) and "return" in answer:
            return answer["return"]
        if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
            raise unknown_answer(command, f"it is {excerpt(text)}")
        reason = excerpt(answer["error"].get("desc"))
        raise RefusedError(f"the domain {self.name}: QEMU refuses {command!r}: {reason}")

    def _has_ended(self) -> bool:
        try:
            return not self._connection.call(self._domain.isActive)
        except HostError:  # of a transient domain nothing is left; or libvirt itself does not answer
            return not self._pid or not proc.read_small(f"/proc/{self._pid}/status")

    def monitor(self, line: str) -> str:
        """Run a command of the human monitor and return what it prints."""
        return printed(self.execute("human-monitor-command", **{"command-line": line}), line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.__exit__(kind, error, traceback)


def local_uri(uri: str) -> str:
    """Return the URI by which the same libvirt is reached on its own host.

    >>> local_uri("qemu+ssh://root@host/system?no_tty=1")
    'qemu:///system'
    """
    scheme, _, rest = uri.partition(":")
    path = rest.partition("?")[0].removeprefix("//").partition("/")[2] or "system"
    return f"{scheme.partition('+')[0]}:///{path}"
