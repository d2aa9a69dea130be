# SPDX-License-Identifier: MIT
"""Run the guest on a vGPU, in a QEMU with KVM: inside of ``scripts/vm --gvt --l2``.

The guest's memory is a memfd that others can map, so it can be saved. QEMU has two monitors: one for whoever has made
this object, and one that is left to the program under test. The console goes to a file and is read there, line by line.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from vfio_mig.errors import HostError
from vfio_mig.vm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tools.l2.image import Image

QEMU: Final = ("qemu-system-x86_64",)
CPU: Final = "host,-x2apic"
"""Without the x2APIC: nested under emulation, the KVM of Linux 7.3 lets a timer interrupt into a guest that has
interrupts off, about once in a thousand of the load's results, and the guest's only CPU waits for a lock that it holds
itself. Seen in 4 of 8 guests with it, in none of 8 without it."""
SLOT: Final = "2.0"
"""Where i915 expects the GPU."""
MEGABYTES: Final = 384
START_SECONDS: Final = 60.0
SIGNATURE: Final = 0x4C32_0000
"""Upper half of each value that the load has the GPU store (load.c)."""

LOOK_SECONDS: Final = 15.0
"""After which a guest that says nothing new is looked at, and again before it counts as lost."""
_END_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.05
_KEPT_LINES: Final = 40
_LOOKS: Final = 5
_INTERRUPT_FLAG: Final = 0x200
_COUNTS: Final = re.compile(r"load: right (\d+) wrong (\d+) late (\d+)")
_OPTIONS: Final = (
    # Each character on a serial console costs an exit from the guest
    "console=ttyS0", "quiet", "loglevel=1",
    # On a busy machine its CPU may stand still for long
    "nowatchdog", "no_timer_check",
    "mitigations=off", "nokaslr", "panic=-1", "rdinit=/init",
)  # fmt: skip


class GuestError(RuntimeError):
    """The guest, or its QEMU, has failed; has the last lines of what they said."""


class LostGuestError(GuestError):
    """Nested KVM has lost the guest's CPU (tools/kvmgt/README.md): that says nothing of the vGPU."""


class Counts(NamedTuple):
    """What the load has counted since it began.

    :param right: results that were as they should be.
    :param wrong: results that were not.
    :param late: how often a second passed before the GPU was done.
    """

    right: int = 0
    wrong: int = 0
    late: int = 0


class L2:
    """A running guest of a vGPU.

    :param directory: of its sockets and logs.
    """

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._stack: Final = contextlib.ExitStack()
        self.process: Final = process
        self.console: Final = directory / "console"
        self.log: Final = directory / "qemu.log"
        self.socket: Final = directory / "qmp"
        """The monitor for the program under test; it talks to one at a time."""
        self._own: Final = directory / "own.qmp"
        self._qmp: Qmp | None = None
        self._began = time.monotonic()
        self.up_after: float | None = None
        """Seconds from the start of QEMU until the load was ready, as :meth:`await_ready` has seen it."""

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self.process.pid

    @property
    def qmp(self) -> Qmp:
        """The monitor for the program that has started it."""
        if self._qmp is None:
            self._await(self._own.exists, "QEMU's monitor", START_SECONDS)
            self._qmp = self._stack.enter_context(Qmp(str(self._own)))
        return self._qmp

    def lines(self) -> list[str]:
        """Return what the guest has said up to now, whole lines only."""
        text = self.console.read_bytes().decode("utf-8", "replace") if self.console.exists() else ""
        return [line.rstrip("\r") for line in text.split("\n")[:-1]]

    def counts(self) -> Counts:
        """Return what the load has counted, as it last said."""
        return counted(self.lines())

    def await_ready(self, seconds: float = START_SECONDS) -> list[str]:
        """Wait until the guest is up and its driver has bound; returns the engines that the load uses.

        :raises GuestError: it failed, or took longer.
        """
        prefix = "load: ready "

        def ready() -> list[str]:
            return [line for line in self.lines() if line.startswith(prefix)]

        self._await(lambda: bool(ready()), "the load", seconds)
        self.up_after = time.monotonic() - self._began
        return ready()[0].removeprefix(prefix).split()

    def await_right(self, more: int, seconds: float = 60.0) -> Counts:
        """Wait until so many more results were right than now.

        :raises GuestError: it took longer, the load has failed, or a result was wrong.
        """
        before = self.counts()
        self._await(lambda: self.counts().right >= before.right + more, f"{more} more results", seconds)
        return self.counts()

    def pause(self) -> None:
        """Have QEMU stop the guest's CPUs."""
        self.qmp.execute("stop")

    def cont(self) -> None:
        """Let the guest go on."""
        self.qmp.execute("cont")

    def status(self) -> str:
        """Return the run state by QEMU's word."""
        return str(self.qmp.execute("query-status")["status"])

    def require_good(self) -> None:
        """Make sure that all is well up to now.

        :raises GuestError: the load has failed, a result was wrong, or QEMU has ended.
        """
        for line in self.lines():
            if line.startswith(("load: failed", "load: wrong")):
                raise self._error(line)
        if self.process.poll() is not None:
            raise self._error(f"QEMU has ended with {self.process.returncode}")

    def _await(self, is_so: Callable[[], bool], name: str, seconds: float) -> None:
        """Wait until it is so.

        :raises LostGuestError: the CPU does not move, its interrupts off, and did not so some time before either.
        :raises GuestError: as :meth:`require_good`, or it took longer.
        """
        began = looked = time.monotonic()
        before = None
        while not is_so():
            self.require_good()
            now = time.monotonic()
            if now > began + seconds:
                raise self._error(f"no {name} within {seconds:g} s")
            if now > looked + LOOK_SECONDS:
                where = self._standstill()
                if where is not None and where == before:
                    problem = f"no {name} in {now - began:.0f} s: its CPU stands at {where} with interrupts off"
                    raise LostGuestError(self._said(problem))
                looked, before = time.monotonic(), where
            time.sleep(_POLL_SECONDS)

    def _standstill(self) -> str | None:
        """Return where the CPU is if it does not move and has its interrupts off."""
        if not self._own.exists():
            return None
        try:
            seen = set()
            for _ in range(_LOOKS):
                seen.add(stuck_at(str(self.qmp.execute("human-monitor-command", **{"command-line": "info registers"}))))
                time.sleep(_POLL_SECONDS)
        except HostError:
            return None
        return seen.pop() if len(seen) == 1 else None

    def _error(self, problem: str) -> GuestError:
        return GuestError(self._said(problem))

    def _said(self, problem: str) -> str:
        said = "\n".join(self.lines()[-_KEPT_LINES:])
        return f"{problem}\n{said}\n{self.log.read_text(errors='replace')[-2000:]}"

    def end(self) -> None:
        """End QEMU, and close the monitor."""
        self._stack.close()
        self._qmp = None
        self.process.terminate()  # which QEMU takes as "quit"
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @classmethod
    @contextlib.contextmanager
    def started(
        cls,
        image: Image,
        vgpu: str,
        directory: Path,
        *,
        qemu: Sequence[str] = QEMU,
        device: str = "",
        more: Sequence[str] = (),
    ) -> Iterator[Self]:
        """Start a guest on the vGPU whose directory in sysfs *vgpu* is; QEMU has gone when the block is left.

        :param directory: of its sockets and logs; a short path, as a socket's may have 107 bytes.
        :param qemu: how QEMU is started.
        :param device: more properties of the vGPU, ``enable-migration=on`` for example.
        :param more: more arguments, ``-S`` or ``-incoming defer`` for example.
        """
        command = [*qemu, *arguments(image, vgpu, directory, device=device), *more]
        with (
            (directory / "qemu.log").open("wb") as log,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
        ):
            self = cls(process, directory)
            try:
                yield self
            finally:
                self.end()


def counted(lines: Sequence[str]) -> Counts:
    """Return what the load has counted, as it last said in these lines of the console."""
    for line in reversed(lines):
        if found := _COUNTS.fullmatch(line):
            return Counts(*map(int, found.groups()))
    return Counts()


def kernel_options() -> str:
    """Return the command line of the guest's kernel."""
    return " ".join(_OPTIONS)


def stuck_at(registers: str) -> str | None:
    """Read RIP out of what ``info registers`` says, if interrupts are off; else None."""
    found = re.search(r"^RIP=(\w+) RFL=(\w+)", registers, re.MULTILINE)
    return None if found is None or int(found[2], 16) & _INTERRUPT_FLAG else found[1]


def arguments(image: Image, vgpu: str, directory: Path, *, device: str = "") -> list[str]:
    """Return QEMU's arguments for a guest."""
    properties = ",".join(["vfio-pci", f"sysfsdev={vgpu}", f"addr={SLOT}", "id=vgpu", *([device] if device else [])])
    return [
        *("-accel", "kvm", "-cpu", CPU, "-M", "q35,memory-backend=ram", "-m", str(MEGABYTES)),
        *("-object", f"memory-backend-memfd,id=ram,size={MEGABYTES}M,share=on"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-serial", f"file:{directory / 'console'}"),
        *("-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"),
        *("-qmp", f"unix:{directory / 'own.qmp'},server=on,wait=off"),
        *("-device", properties),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", kernel_options()),
    ]
