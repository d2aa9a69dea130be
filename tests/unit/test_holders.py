# SPDX-License-Identifier: MIT
"""One look at /proc for all devices: what counts as open, what is not touched, and what is said of what is not seen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pytest

from vfio_mig import proc
from vfio_mig.device import Device, Holder
from vfio_mig.errors import DeviceBusyError
from vfio_mig.host import holders as module
from vfio_mig.host import opening
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.discover import Host, Snapshot
from vfio_mig.host.holders import Unseen, View, find_holder, find_holders, look
from vfio_mig.host.opening import open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
CLONE_FILES: Final = 0x400
ALL: Final = proc.Standing(True, True, True, True, False)


def device_of(node: str, name: str = NAME, group: int = 7) -> HostDevice:
    return HostDevice(name, "/nowhere", "mdev", "", "", "", group, Path(node).stat().st_rdev)


@pytest.fixture
def node() -> Iterator[str]:
    """Give a character device that nobody else on this machine has open."""
    master, terminal = os.openpty()
    path = os.ttyname(terminal)
    os.close(terminal)
    yield path
    os.close(master)


class Child:
    """A process that runs a program until it is closed; the program prints a line when it is ready."""

    def __init__(self, program: str, *arguments: str) -> None:
        command = [sys.executable, "-c", f"import os, sys\n{program}\nsys.stdin.read()", *arguments]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self.said = self._child.stdout.readline().strip()
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()


OPEN: Final = "print(os.open(sys.argv[1], {} | os.O_NOCTTY), flush=True)"


def test_a_node_is_known_by_its_number_and_not_by_its_path(node: str, tmp_path: Path) -> None:
    file = tmp_path / "vfio"
    file.write_text("no device")
    device = device_of(node)
    with Child(OPEN.format("os.O_RDWR"), str(file)):
        assert find_holder(device) is None
    with Child(OPEN.format("os.O_RDWR"), node) as child:
        assert find_holder(device) == Holder(child.pid, proc.command(child.pid), False, int(child.said), "/dev/vfio/7")


def test_a_node_that_is_only_named_is_not_open(node: str) -> None:
    """Anybody may have an O_PATH fd of a node that he may not open."""
    with Child(OPEN.format("os.O_PATH"), node):
        assert find_holder(device_of(node)) is None


def test_all_devices_are_looked_for_in_one_pass(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    real = proc.links

    def links(directory: str) -> Iterator[tuple[int, str]]:
        listed.append(directory)
        return real(directory)

    monkeypatch.setattr(proc, "links", links)
    devices = [device_of(node, f"device-{number}") for number in range(64)]
    with Child(OPEN.format("os.O_RDWR"), node) as child:
        view = look(devices)
        assert {holder.pid for device in devices for holder in view.of(device)} == {child.pid}
    assert len(view.holders) == 64
    assert len(listed) == len(set(listed))


def test_a_thread_with_fds_of_its_own_is_a_holder(node: str) -> None:
    """It has left the process's table; where the first thread has ended, another one has it as well."""
    program = f"""
import ctypes, threading
def apart():
    ctypes.CDLL(None).unshare({CLONE_FILES})
    print(threading.get_native_id(), os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY), flush=True)
    threading.Event().wait()
threading.Thread(target=apart, daemon=True).start()
"""
    with Child(program, node) as child:
        thread, fd = map(int, child.said.split())
        found = find_holder(device_of(node))
        assert found is not None
        assert (found.pid, found.thread, found.fd) == (child.pid, thread, fd)
        try:
            os.close(module.duplicate_fd(device_of(node), found))
        except DeviceBusyError as error:  # before Linux 6.9, or where nothing can be borrowed
            assert "only one of its threads has it" in str(error) or "EPERM" in str(error)  # noqa: PT017


def test_threads_that_share_their_fds_count_once(node: str) -> None:
    program = f"import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n{OPEN}"
    with Child(program.format("os.O_RDWR"), node):
        assert len(list(find_holders(device_of(node)))) == 1


def test_a_process_that_begins_during_the_look_is_seen(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that had it may end, and another one that it has started go on with it."""
    began: list[Child] = []
    real = proc.pids

    def pids() -> list[int]:
        found = real()
        if not began:
            began.append(Child(OPEN.format("os.O_RDWR"), node))
        return found

    monkeypatch.setattr(proc, "pids", pids)
    try:
        holder = find_holder(device_of(node))
        assert holder is not None
        assert holder.pid == began[0].pid
    finally:
        began[0].__exit__()


def test_where_processes_never_stop_beginning_nothing_is_certain(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(2**22, 2**22 + 100))
    monkeypatch.setattr(proc, "pids", lambda: [next(numbers)])
    monkeypatch.setattr(proc, "standing", lambda: ALL)
    assert look([device_of(node)]) == View({}, module.UNSETTLED)


@pytest.mark.parametrize(
    ("standing", "refused", "root", "words"),
    [
        (ALL, 0, True, None),
        (ALL._replace(may_trace=False), 0, False, None),
        (ALL._replace(has_proc=False), 0, True, "/proc is not there"),
        (ALL._replace(in_first_pid_namespace=False), 0, True, "outside this PID namespace"),
        (ALL._replace(may_trace=False, hides=True), 0, False, r"hidepid.*run as root or with CAP_SYS_PTRACE"),
        (ALL._replace(may_trace=False, hides=True), 0, True, r"hidepid.*; it takes CAP_SYS_PTRACE"),
        (ALL._replace(hides=True), 0, True, None),
        (ALL, 1, False, "1 process cannot be looked into; run as root or with"),
        (ALL, 2, True, "2 processes cannot be looked into; it takes CAP_SYS_PTRACE"),
        (ALL._replace(in_first_user_namespace=False), 3, True, "outside this user namespace"),
        (ALL._replace(in_first_user_namespace=False), 0, True, None),
    ],
)
def test_what_cannot_be_seen_is_said(  # noqa: PLR0917 -- a table
    node: str,
    monkeypatch: pytest.MonkeyPatch,
    standing: proc.Standing,
    refused: int,
    root: bool,
    words: str | None,
) -> None:
    def refuse(_directory: str) -> Iterator[tuple[int, str]]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(proc, "standing", lambda: standing)
    monkeypatch.setattr(proc, "pids", lambda: list(range(1, refused + 1)))
    monkeypatch.setattr(proc, "threads_with_fds", lambda _: [0])
    monkeypatch.setattr(proc, "links", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    unseen = look([device_of(node)]).unseen
    if words is None:
        assert unseen is None
        return
    assert unseen is not None
    text = f"{unseen.reason}; {unseen.hint}"
    assert not (root and "run as root" in text)
    assert re.search(words, text)


def test_a_host_without_proc_is_told(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[int]:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(proc, "pids", refuse)
    assert look([device_of(node)]) == View({}, module.NO_PROC)


def test_a_device_without_a_node_is_open_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "pids", lambda: pytest.fail("looked"))
    assert look([HostDevice(NAME, "/nowhere", "mdev", "", "", "", None)]) == View({}, None)


def test_a_device_open_without_its_group_makes_the_rest_uncertain(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "standing", lambda: ALL)
    monkeypatch.setattr(proc, "pids", lambda: [4711])
    monkeypatch.setattr(proc, "threads_with_fds", lambda _: [0])
    monkeypatch.setattr(proc, "links", lambda _: [(3, "anon_inode:[vfio-device]")])
    assert look([device_of(node)]) == View({}, module.NO_GROUP)


def busy(*_: object) -> int:
    raise OSError(16, "Device or resource busy")


@pytest.mark.parametrize(
    ("unseen", "words"),
    [
        (module.NAMESPACE, "processes outside this PID namespace cannot be seen; run it in the host's PID namespace"),
        (None, "its fd is on its way in a socket, or only io_uring has it"),
    ],
)
def test_a_busy_device_that_nobody_shows_says_where_to_look(
    node: str, monkeypatch: pytest.MonkeyPatch, unseen: Unseen | None, words: str
) -> None:
    device = device_of(node)
    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(DeviceBusyError, match=words) as caught:
        open_device(device, view=View({}, unseen))
    assert "run as root" not in str(caught.value)


@pytest.mark.parametrize(("pid", "words"), [(0, "PID 0 is what a process of another PID namespace"), (2**22, "is no")])
def test_a_process_that_is_not_here_lends_nothing(node: str, pid: int, words: str) -> None:
    with pytest.raises(DeviceBusyError, match=words if pid == 0 else f"there is no PID {pid} here"):
        open_device(device_of(node), pid=pid)


def test_of_a_process_that_is_not_here_it_is_said_where_it_might_be(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "look", lambda *_: View({}, module.NAMESPACE))
    with pytest.raises(DeviceBusyError, match=r"there is no PID \d+ here; run it in the host's PID namespace"):
        open_device(device_of(node), pid=2**22)


def test_a_borrowed_device_is_held_until_its_holder_ends(node: str) -> None:
    with Child(OPEN.format("os.O_RDWR"), node) as child:
        holder = Holder(child.pid, "vmm", is_hold=False, fd=int(child.said))
        device = Device(NAME, -1, how="borrowed", holder=holder, pidfd=opening._watch(holder))
        held = [device.is_held]
    with device:
        held.append(device.is_held)
    assert held == [True, False]
    gone = opening._watch(holder)
    assert gone == -1
    assert not Device(NAME, -1, how="borrowed", holder=holder, pidfd=gone).is_held
    assert Device(NAME, -1, how="inherited").is_held  # whoever has passed it on
    assert not Device(NAME, -1, how="group").is_held


def test_who_has_only_borrowed_it_is_asked_last(node: str) -> None:
    program = f"""
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.holders import mark_borrower, mark_hold
{{}}(HostDevice("{NAME}", "", "mdev", "", "", "", 7))
{OPEN.format("os.O_RDWR")}
"""
    with (
        Child(program.format("mark_borrower"), node) as borrower,
        Child(program.format("mark_hold"), node) as hold,
        Child(OPEN.format("os.O_RDWR"), node) as vmm,
    ):
        assert [one.pid for one in find_holders(device_of(node))] == [vmm.pid, hold.pid, borrower.pid]


def test_an_fd_that_is_swapped_is_not_duplicated(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has instead may be a file whose close waits for that process: so it is looked at many times."""
    device = device_of(node)
    number = device.node_number
    assert number is not None
    regular = proc.File(0o100600, 1, 1, 0)
    looks = iter([proc.File(0o20600, 1, 1, number)] * 5 + [regular] * 100)
    monkeypatch.setattr(proc, "look_at", lambda _: next(looks))
    monkeypatch.setattr(proc, "duplicate", lambda *_: pytest.fail("was duplicated"))
    refused = pytest.raises(DeviceBusyError, match=r"EBADF .*it has closed the device meanwhile")
    with Child(OPEN.format("os.O_RDWR"), node) as child, refused:
        module.duplicate_fd(device, Holder(child.pid, "x", False, int(child.said), "/dev/vfio/7"))


def test_a_snapshot_is_what_it_was(node: str) -> None:
    device = device_of(node)
    holder = Holder(1, "x", False, 3, "/dev/vfio/7")
    seen = Snapshot(Host("/nowhere"), [device], View({NAME: (holder, holder._replace(pid=2))}, None))
    assert seen.find(NAME) is device
    assert seen.find(NAME.upper()) is device
    assert seen.find("/dev/vfio/7") is device
    assert seen.holder_of(device) == holder
    assert seen.holder_of(device, 2) == holder._replace(pid=2)
    assert seen.holder_of(device, 3) is None


def test_looking_takes_about_as_long_for_many_devices_as_for_one(node: str) -> None:
    def seconds(look_once: Callable[[], object]) -> float:
        began = time.process_time()
        look_once()
        return time.process_time() - began

    devices = [device_of(node, f"device-{number}") for number in range(200)]
    one = min(seconds(lambda: look(devices[:1])) for _ in range(3))
    many = min(seconds(lambda: look(devices)) for _ in range(3))
    assert many < 3 * one + 0.1
