# SPDX-License-Identifier: MIT
"""What qemu-save and qemu-restore make of QEMU's answers and of /proc, and do in which order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from vfio_mig import interrupts
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    DeviceNotFoundError,
    HostError,
    MismatchError,
    OpenError,
    UnsupportedError,
    UsageError,
)
from vfio_mig.jobs.check import FitCheck
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.vm import jobs
from vfio_mig.vm.machine import ENDED, PAUSED, REFUSED, RUNNING, require_no_migration, run_state, vfio_devices
from vfio_mig.vm.memory import (
    GuestRange,
    Mapping,
    Piece,
    find_memory,
    locate,
    parse_flat_view,
    parse_hva,
    parse_maps,
    path_of,
)
from vfio_mig.vm.monitor import QMP_WORDS, RefusedError
from vfio_mig.vm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[2]
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
GIB = 1 << 30
MIB = 1 << 20

# `info mtree -f` of QEMU 7.2, q35 with 5000 MiB behind the PCI hole, after its firmware; shortened
FLAT_VIEW = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000cf8-0000000000000cf8 (prio 0, i/o): pci-conf-idx

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 AS "ich9-ahci", root: bus master container
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000c9fff (prio 0, rom): ram @00000000000c0000
  00000000000ca000-00000000000fffff (prio 0, ram): ram @00000000000ca000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000c0000000-00000000c3ffffff (prio 0, ramd): 37bdd784-2cf7-4149-9257-4ac13d5fa192 BAR 2 mmaps[0]
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-00000001b87fffff (prio 0, ram): ram @0000000080000000
  0000000200000000-000000023fffffff (prio 0, nv-ram): /objects/dimm

FlatView #2
  No rendered FlatView
"""

MAPS = """\
5646c4b30000-5646c4b63000 rw-p 00000000 00:00 0 
5646f4721000-5646f56d8000 rw-p 00000000 00:00 0                          [heap]
7fd12f7ff000-7fd1af7ff000 rw-s 00000000 00:01 592                        /memfd:memory-backend-memfd (deleted)
7fd1af7ff000-7fd267fff000 rw-s 80000000 00:01 592                        /memfd:memory-backend-memfd (deleted)
7fd2ac400000-7fd2ac401000 r--p 00001000 fe:01 1234                       /usr/lib/with a space.so
7fd300000000-7fd340000000 rw-s 00000000 00:1b 7                          /dev/shm/dimm
"""  # noqa: W291


def test_ram_is_found_on_both_sides_of_the_pci_hole() -> None:
    assert parse_flat_view(FLAT_VIEW, ["ram", "dimm", "unused"]) == [
        GuestRange(0, 0xA0000, "ram"),
        GuestRange(0xC0000, 0xA000, "ram"),
        GuestRange(0xCA000, 0x36000, "ram"),
        GuestRange(MIB, 2 * GIB - MIB, "ram"),
        GuestRange(4 * GIB, 5000 * MIB - 2 * GIB, "ram"),
        GuestRange(8 * GIB, GIB, "dimm"),
    ]
    assert parse_flat_view(FLAT_VIEW, ["elsewhere"]) == []
    with pytest.raises(HostError, match="no address space called memory"):
        parse_flat_view("FlatView #0\n  No rendered FlatView\n", ["ram"])


def test_the_host_s_address_is_taken_from_the_monitor_s_answer() -> None:
    assert parse_hva("Host virtual address for 0x100000 (ram) is 0x7fd12f8ff000\r\n") == 0x7FD12F8FF000
    for text in ("No memory is mapped at address 0x100000\n", "Memory at address 0xc0000000 is not RAM\n", ""):
        with pytest.raises(HostError, match="does not tell where"):
            parse_hva(text)


def test_every_line_of_maps_is_understood() -> None:
    maps = parse_maps(MAPS)
    assert len(maps) == 6
    assert maps[2] == Mapping(
        0x7FD12F7FF000,
        0x7FD1AF7FF000,
        shared=True,
        offset=0,
        device=os.makedev(0, 1),
        inode=592,
        path="/memfd:memory-backend-memfd (deleted)",
    )
    assert (maps[4].shared, maps[4].offset, maps[4].path) == (False, 0x1000, "/usr/lib/with a space.so")
    assert (maps[4].device, maps[0].inode, maps[0].path) == (os.makedev(0xFE, 1), 0, "")


def placed() -> list[tuple[GuestRange, int]]:
    ram = 0x7FD12F7FF000
    offsets = {0: 0, 0xC0000: 0xC0000, 0xCA000: 0xCA000, MIB: MIB, 4 * GIB: 2 * GIB}
    return [
        (range_, 0x7FD300000000 if range_.name == "dimm" else ram + offsets[range_.gpa])
        for range_ in parse_flat_view(FLAT_VIEW, ["ram", "dimm"])
    ]


def test_neighbours_in_guest_and_file_become_one_piece() -> None:
    pieces = locate(placed(), parse_maps(MAPS))
    assert [(piece.gpa, piece.size, piece.offset, piece.mapping.path) for piece in pieces] == [
        (0, 0xA0000, 0, "/memfd:memory-backend-memfd (deleted)"),
        (0xC0000, 2 * GIB - 0xC0000, 0xC0000, "/memfd:memory-backend-memfd (deleted)"),
        (4 * GIB, 5000 * MIB - 2 * GIB, 2 * GIB, "/memfd:memory-backend-memfd (deleted)"),
        (8 * GIB, GIB, 0, "/dev/shm/dimm"),
    ]


def test_a_range_may_lie_in_several_mappings_of_one_file() -> None:
    whole = GuestRange(0, 5000 * MIB, "ram")
    (piece,) = locate([(whole, 0x7FD12F7FF000)], parse_maps(MAPS))
    assert (piece.gpa, piece.size, piece.offset) == (0, 5000 * MIB, 0)
    # the same neighbourhood in memory, but not in the file
    moved = parse_maps(MAPS.replace("80000000 00:01 592", "00000000 00:01 593"))
    assert [(one.gpa, one.size, one.offset) for one in locate([(whole, 0x7FD12F7FF000)], moved)] == [
        (0, 2 * GIB, 0),
        (2 * GIB, 5000 * MIB - 2 * GIB, 0),
    ]


@pytest.mark.parametrize("maps", [MAPS.replace("rw-s", "rw-p"), MAPS.replace("00:01 592", "00:00 0")])
def test_private_ram_is_refused_with_what_to_do(maps: str) -> None:
    with pytest.raises(UnsupportedError, match=r"'ram' is private to it \(share=off\); start QEMU with .*share=on"):
        locate(placed(), parse_maps(maps))


def test_ram_that_is_not_mapped_is_no_memory() -> None:
    with pytest.raises(HostError, match="'ram' at 0x0 is not mapped"):
        locate(placed(), [])


def test_the_file_of_a_mapping_is_the_process_s_fd_of_it(tmp_path: Path) -> None:
    with (tmp_path / "ram").open("w+b") as file:
        status = os.fstat(file.fileno())
        mapping = Mapping(0x1000, 0x2000, True, 0, status.st_dev, status.st_ino, str(tmp_path / "ram"))
        found = path_of(os.getpid(), mapping)
        assert Path(found).parent == Path(f"/proc/{os.getpid()}/fd")
        assert os.path.samestat(Path(found).stat(), status)
        (tmp_path / "ram").unlink()
    assert path_of(os.getpid(), mapping) == f"/proc/{os.getpid()}/map_files/1000-2000"


class FakeQmp:
    """A monitor that plays QEMU and writes down what it is asked."""

    pid = 4711
    words = QMP_WORDS
    listed: list[str] | None = None

    def __init__(self, status: str = "running", *, devices: Sequence[str] = (UUID,), fails: str = "") -> None:
        self.status = status
        self.devices = devices
        self.fails = fails
        self.asked: list[str] = []
        self.news: list[str] = []
        self.ignores_signals = False
        self.migration: dict[str, Any] = {}
        self.iommu = ""
        self.mtree = FLAT_VIEW
        self.after_stop = "paused"
        self.devfn: Any = 3 << 3

    def execute(self, command: str, **arguments: str) -> Any:
        self.asked.append(command)
        if command == self.fails:
            raise HostError(f"QEMU has gone while it was asked for {command!r}")
        if command == "qom-list":
            return self._children(arguments["path"])
        if command == "qom-get":
            if arguments["property"] == "addr":
                return self.devfn
            name = arguments["path"].partition("[")[2].rstrip("]")
            return name and f"/sys/bus/mdev/devices/{name}"
        if command == "query-migrate":
            return self.migration
        self.status = {"stop": self.after_stop, "cont": "running"}.get(command, self.status)
        return {"status": self.status, "running": self.status == "running"}

    def _children(self, path: str) -> list[dict[str, str]]:
        if path.endswith("-anon"):
            return [{"name": f"device[{one}]", "type": "child<vfio-pci-nohotplug>"} for one in self.devices]
        iommu = [{"name": "iommu0", "type": f"child<{self.iommu}>"}] if self.iommu else []
        return [{"name": "type", "type": "string"}, {"name": "net0", "type": "child<e1000>"}, *iommu]

    def monitor(self, line: str) -> str:
        assert line == "info mtree -f"
        return self.mtree

    @property
    def changes(self) -> list[str]:
        return [command for command in self.asked if command in ("stop", "cont")]


class Report(NamedTuple):
    state: str

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


class RestoreReport(NamedTuple):
    state: str
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


class Played:
    """The library: what it is asked to do, and how it fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: BaseException | None = None
        self.commits = False
        self.checks: list[FitCheck] = []
        self.holder_pid: int | None = FakeQmp.pid
        self.migratable: bool | None = True
        self.all_memory: bool | None = None
        self.warnings: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def save(
        self,
        name: str,
        file: str,
        settings: Any,
        *,
        memory: Any,
        all_memory: bool,
        leave_running: bool,
        force: bool,
        guest_paused: bool,
    ) -> Report:
        assert guest_paused
        self.all_memory = all_memory
        self.calls.append(("save", name, file, settings.pid, [str(one) for one in memory], leave_running, force))
        self.meanwhile()
        for step in ("after-stop", "after-pages", "written"):
            settings.on_step("save", step, name)
        if self.commits:
            settings.on_commit()
        return self._end(running=leave_running)

    def restore(
        self, name: str, file: str, settings: Any, *, memory: Any, start: bool, force: bool, no_memory: bool
    ) -> RestoreReport:
        assert no_memory == (not memory)
        self.calls.append(("restore", name, file, settings.pid, [str(one) for one in memory], start, force))
        return RestoreReport(self._end(running=start).state, self.warnings)

    def _end(self, *, running: bool) -> Report:
        if self.fails is not None:
            raise self.fails
        return Report("running" if running else "stop")

    def device_status(self, name: str) -> Any:
        return type(
            "Status", (), {"device": name.lower(), "holder_pid": self.holder_pid, "migratable": self.migratable}
        )

    def check_image(self, device: str, file: str, settings: Any) -> Any:
        del device, file, settings
        return type("Check", (), {"checks": self.checks})


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    for name in ("save", "restore", "device_status", "check_image"):
        monkeypatch.setattr(jobs, name, getattr(played, name))
    monkeypatch.setattr(jobs, "find_memory", lambda _qmp, _pid: ["/proc/4711/fd/9@0x0:0x1000+0x0"])
    return played


PIECE = "/proc/4711/fd/9@0x0:0x1000"


def test_save_pauses_the_vm_first_and_leaves_it_paused(played: Played) -> None:
    qmp: Any = FakeQmp()
    said: list[str] = []
    summary = jobs.save_vgpu(qmp, UUID.upper(), "gpu.vfm", tell=said.append).summary()
    assert played.calls == [("save", UUID, "gpu.vfm", 4711, [PIECE], False, False)]
    assert qmp.changes == ["stop"]
    assert summary == {"state": "stop", "pid": 4711, "vm": "paused", "memory": [PIECE]}
    assert said == [
        "pausing the VM of PID 4711",
        f"vfio-mig save {UUID} gpu.vfm --pid 4711 --memory {PIECE}",
    ]
    assert played.all_memory is False


def test_save_takes_all_of_the_guest_s_ram_where_there_is_some(played: Played) -> None:
    qmp: Any = FakeQmp()
    said: list[str] = []
    jobs.save_vgpu(qmp, UUID, "gpu.vfm", all_memory=True, tell=said.append)
    assert played.all_memory is True
    assert said[-1] == f"vfio-mig save --all-memory {UUID} gpu.vfm --pid 4711 --memory {PIECE}"
    with pytest.raises(UsageError, match="--all-memory and --memory none exclude each other"):
        jobs.save_vgpu(qmp, UUID, "gpu.vfm", all_memory=True, memory=["none"])


@pytest.mark.parametrize(
    ("status", "cont", "changes"),
    [
        ("running", True, ["stop", "cont"]),
        ("paused", True, ["cont"]),
        ("prelaunch", False, []),
    ],
)
def test_save_changes_only_what_is_needed(played: Played, status: str, cont: bool, changes: list[str]) -> None:
    qmp: Any = FakeQmp(status)
    summary = jobs.save_vgpu(qmp, UUID, "gpu.vfm", cont=cont, force=True, memory=["none"]).summary()
    assert qmp.changes == changes
    assert summary["vm"] == ("running" if cont else status)
    assert played.calls == [("save", UUID, "gpu.vfm", 4711, [], cont, True)]


@pytest.mark.parametrize("error", [DeviceError("EIO"), HostError("ENOSPC"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("cont", [True, False])
def test_a_failed_save_leaves_the_vm_as_it_was(played: Played, error: BaseException, cont: bool) -> None:
    played.fails = error
    for status, changes in (("running", ["stop", "cont"]), ("paused", [])):
        qmp: Any = FakeQmp(status)
        with pytest.raises(type(error)):
            jobs.save_vgpu(qmp, UUID, "gpu.vfm", cont=cont)
        assert (qmp.changes, qmp.status) == (changes, status)


def test_a_signal_after_the_save_lets_no_vm_run_on_a_stopped_device(played: Played) -> None:
    played.fails = KeyboardInterrupt()
    played.commits = True
    for cont, changes in ((False, ["stop"]), (True, ["stop", "cont"])):
        qmp: Any = FakeQmp()
        with pytest.raises(KeyboardInterrupt):
            jobs.save_vgpu(qmp, UUID, "gpu.vfm", cont=cont)
        assert qmp.changes == changes


@contextmanager
def signals_as_a_program_has_them() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in interrupts.ENDING}
    interrupts.install()
    try:
        yield
    finally:
        with suppress(KeyboardInterrupt):
            interrupts.check()  # forgets what it has noted
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("cont", "changes"), [(False, ["stop"]), (True, ["stop", "cont"])])
@pytest.mark.parametrize("when", ["committed", "finishing"])
def test_a_signal_after_the_commit_undoes_nothing_and_stops_nothing(
    played: Played, monkeypatch: pytest.MonkeyPatch, cont: bool, changes: list[str], when: str
) -> None:
    """A job returns only when it is committed, and raises only when it is undone; nothing else decides."""
    for _ in range(2):  # also in a second job of one process
        qmp: Any = FakeQmp()
        end, execute = played._end, qmp.execute
        kill = once(lambda: os.kill(os.getpid(), signal.SIGTERM))

        def ends(*, running: bool, end: Any = end, kill: Any = kill) -> Report:
            report: Report = end(running=running)
            kill()
            return report

        def executes(command: str, *, execute: Any = execute, kill: Any = kill, qmp: Any = qmp, **words: str) -> Any:
            if qmp.ignores_signals:
                kill()
            return execute(command, **words)

        with signals_as_a_program_has_them(), monkeypatch.context() as patch:
            if when == "committed":
                patch.setattr(played, "_end", ends)
            else:
                patch.setattr(qmp, "execute", executes)
            summary = jobs.save_vgpu(qmp, UUID, "gpu.vfm", cont=cont).summary()
        assert qmp.changes == changes
        assert summary["vm"] == ("running" if cont else "paused")


def once(function: Callable[[], object]) -> Callable[[], object]:
    calls: list[object] = []
    return lambda: calls.append(function()) if not calls else None


@pytest.mark.parametrize("news", [["RESUME"], ["RESET"], []])
def test_a_vm_that_somebody_lets_go_on_meanwhile_is_not_saved(played: Played, news: list[str]) -> None:
    for status in ("running", "paused"):
        qmp: Any = FakeQmp(status)
        qmp.news = ["RESUME"]  # of before: no matter

        def meanwhile(qmp: Any = qmp) -> None:
            qmp.news = list(news)
            qmp.status = qmp.status if news else "running"

        played.meanwhile = meanwhile
        with pytest.raises(HostError, match="did not stand still while its vGPU was being saved"):
            jobs.save_vgpu(qmp, UUID, "gpu.vfm")
    played.meanwhile = lambda: None
    qmp = FakeQmp()
    qmp.after_stop = "shutdown"  # the guest was quicker
    with pytest.raises(UsageError, match="state 'shutdown'; its guest has shut down"):
        jobs.save_vgpu(qmp, UUID, "gpu.vfm")


def test_a_vm_that_goes_after_the_save_is_told_with_the_image(played: Played) -> None:
    qmp: Any = FakeQmp("paused", fails="cont")
    with pytest.raises(HostError, match=r"asked for 'cont'; gpu\.vfm is whole"):
        jobs.save_vgpu(qmp, UUID, "gpu.vfm", cont=True)
    assert played.calls
    assert qmp.changes == ["cont"]


def test_restore_wants_a_paused_vm_and_the_right_image(played: Played) -> None:
    running: Any = FakeQmp()
    with pytest.raises(UsageError, match="state 'running'; pause it first"):
        jobs.restore_vgpu(running, UUID, "gpu.vfm")
    qmp: Any = FakeQmp("prelaunch")
    played.checks = [FitCheck("type", "mismatch", "image A, device B", forcible=True), FitCheck("kernel", "note", "x")]
    with pytest.raises(MismatchError, match=r"gpu\.vfm: image A, device B; see 'vfio-mig check gpu\.vfm"):
        jobs.restore_vgpu(qmp, UUID, "gpu.vfm")
    with pytest.raises(UsageError, match="must be a file"):
        jobs.restore_vgpu(qmp, UUID, "-")
    assert played.calls == []
    summary = jobs.restore_vgpu(qmp, UUID, "gpu.vfm", force=True).summary()
    assert summary == {"state": "stop", "warnings": [], "pid": 4711, "vm": "prelaunch", "memory": [PIECE]}
    played.warnings = ["guest memory: not all"]
    warned: list[str] = []
    jobs.restore_vgpu(qmp, UUID, "gpu.vfm", force=True, cont=True, settings=Settings(warn=warned.append))
    assert warned == [f"{UUID}: guest memory: not all"]
    assert played.calls == [("restore", UUID, "gpu.vfm", 4711, [PIECE], start, True) for start in (False, True)]
    assert qmp.changes == ["cont"]


def test_a_device_of_another_vm_or_process_is_refused(played: Played) -> None:
    for devices, words in (((), "it has no VFIO device"), (("other", "third"), "it has other, third")):
        qmp: Any = FakeQmp(devices=devices)
        with pytest.raises(DeviceNotFoundError, match=f"the VM does not have it; {words}"):
            jobs.save_vgpu(qmp, UUID, "gpu.vfm")
    qmp = FakeQmp()
    played.holder_pid = 12
    with pytest.raises(DeviceBusyError, match="open in PID 12, and the monitor is PID 4711's"):
        jobs.save_vgpu(qmp, UUID, "gpu.vfm")
    assert played.calls == []
    assert qmp.changes == []


def test_a_device_given_by_fd_is_found_by_who_has_it_open(played: Played) -> None:
    qmp: Any = FakeQmp(devices=[""])
    assert [one.name for one in vfio_devices(qmp)] == [""]
    assert jobs.save_vgpu(qmp, UUID, "gpu.vfm").pid == 4711
    played.holder_pid = 12
    with pytest.raises(DeviceBusyError, match="open in PID 12"):
        jobs.save_vgpu(qmp, UUID, "gpu.vfm")


@pytest.mark.parametrize(
    ("pid", "holder", "words"),
    [
        (0, 4711, "in a PID namespace that is not seen from here; use the host's PID namespace"),
        (4711, 0, "it is open in another PID namespace, and the monitor is PID 4711's"),
        (4711, None, "nobody that is seen from here has it open, and the monitor"),
    ],
)
def test_what_is_not_seen_is_not_called_a_pid(played: Played, pid: int, holder: int | None, words: str) -> None:
    qmp: Any = FakeQmp()
    qmp.pid = pid
    played.holder_pid = holder
    with pytest.raises(DeviceBusyError, match=words) as caught:
        jobs.save_vgpu(qmp, UUID, "gpu.vfm")
    assert "None" not in str(caught.value)
    assert "PID 0" not in str(caught.value)


class Answers:
    """A monitor that gives the same answers, whatever is asked."""

    words = QMP_WORDS

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def execute(self, command: str, **_: object) -> Any:
        answer = self.answers[command.replace("-", "_")]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def monitor(self, line: str) -> str:
        return FLAT_VIEW if "mtree" in line else "Host virtual address for 0x0 (ram) is 0x7fd12f7ff000"


CHILD = {"name": "gpu", "type": "child<vfio-pci>"}


@pytest.mark.parametrize("sysfs", ["", "relative", "../x", "/sys/\0"])
def test_a_path_that_names_no_device_does_not_become_a_directory_of_ours(sysfs: str) -> None:
    qmp: Any = Answers(qom_list=[CHILD], qom_get=sysfs)
    assert {one.name for one in vfio_devices(qmp)} == {""}
    qmp = Answers(qom_list=[CHILD], qom_get=RefusedError("no such property"))
    assert {one.name for one in vfio_devices(qmp)} == {""}


@pytest.mark.parametrize(
    ("kind", "is_vfio"),
    [("vfio-pci", True), ("vfio-pci-nohotplug", True), ("vfio-ap", True), ("vfio-user-pci", False), ("e1000", False)],
)
def test_vfio_devices_of_every_bus_are_seen(kind: str, is_vfio: bool) -> None:
    qmp: Any = Answers(qom_list=[{"name": "x", "type": f"child<{kind}>"}], qom_get="/sys/x")
    assert bool(vfio_devices(qmp)) == is_vfio


@pytest.mark.parametrize(
    "answer",
    [None, "", 7, {}, [7], [{}], [{"name": "x"}], [{"type": 7, "name": "x"}], [{"type": "child<vfio-pci>"}],
     [{"type": "child<vfio-pci>", "name": "x" * 5000}], [{}] * 70000],
)  # fmt: skip
def test_an_answer_that_no_qemu_gives_is_an_error_of_one_line(answer: Any) -> None:
    qmp: Any = Answers(qom_list=answer, qom_get=answer, query_status=answer, query_migrate=answer, query_memdev=answer)
    with pytest.raises(HostError, match="QEMU's answer to 'qom-list' is not understood") as caught:
        vfio_devices(qmp)
    assert len(str(caught.value)) < 400
    with pytest.raises(HostError, match="QEMU's answer to 'query-status' is not understood"):
        run_state(qmp)
    if answer != {}:
        with pytest.raises(HostError, match="QEMU's answer to 'query-migrate' is not understood"):
            require_no_migration(qmp)


@pytest.mark.parametrize("share", [{}, {"share": True}, {"share": False}, {"share": "yes"}])
def test_a_qemu_that_does_not_tell_what_is_shared_is_no_key_error(
    monkeypatch: pytest.MonkeyPatch, share: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        "vfio_mig.vm.memory.read_maps",
        lambda _: MAPS.replace("7fd12f7ff000-7fd1af7ff000 rw-s", "7fd12f7ff000-7fd1af7ff000 rw-p"),
    )
    qmp: Any = Answers(query_memdev=[{"size": 1}, {"id": "ram", "size": 67108864, "host-nodes": [], **share}])
    if share == {"share": "yes"}:
        with pytest.raises(HostError, match="'share' is 'yes'"):
            find_memory(qmp, 1)
    else:  # the kernel knows
        with pytest.raises(UnsupportedError, match=r"'ram' is private to it \(share=off\)"):
            find_memory(qmp, 1)


@pytest.mark.parametrize(
    "line",
    [
        "0000000000100000-00000000000fffff (prio 0, ram): ram",
        "0000000000100800-00000000001fffff (prio 0, ram): ram",
        "0000000000100000-00000000001ff7ff (prio 0, ram): ram",
    ],
)
def test_ram_that_is_not_whole_pages_is_not_taken_for_ram(line: str) -> None:
    with pytest.raises(HostError, match="QEMU's answer to 'info mtree -f' is not understood: RAM 'ram' at"):
        parse_flat_view(f'FlatView #0\n AS "memory", root: system\n  {line}\n', ["ram"])


def test_what_qemu_has_mapped_read_only_is_left_out() -> None:
    pieces = locate(
        placed(), parse_maps(MAPS.replace("7fd300000000-7fd340000000 rw-s", "7fd300000000-7fd340000000 r--s"))
    )
    assert [piece.gpa for piece in pieces] == [0, 0xC0000, 4 * GIB]


STATES = [
    "colo",
    "debug",
    "finish-migrate",
    "guest-panicked",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
]  # qapi/run-state.json of QEMU 7.2 and 10.0


def test_every_run_state_of_qemu_has_its_answer() -> None:
    assert sorted([RUNNING, *PAUSED, *ENDED, *REFUSED]) == STATES


@pytest.mark.parametrize("status", [*STATES, "of-the-future", "bad\x1b[2J\n"])
@pytest.mark.parametrize("cont", [True, False])
@pytest.mark.parametrize("word", ["save", "restore"])
def test_a_vm_is_saved_and_restored_in_the_states_that_allow_it(
    played: Played, status: str, cont: bool, word: str
) -> None:
    qmp: Any = FakeQmp(status)
    may = status in PAUSED or (word == "save" and (status == RUNNING or (status in ENDED and not cont)))
    command: Any = {"save": jobs.save_vgpu, "restore": jobs.restore_vgpu}[word]
    if may:
        command(qmp, UUID, "gpu.vfm", cont=cont)
        assert played.calls
        return
    with pytest.raises(UsageError, match=r"the VM is in state '.*'; ") as caught:
        command(qmp, UUID, "gpu.vfm", cont=cont)
    assert str(caught.value).isprintable()
    assert status not in STATES or f"'{status}'" in str(caught.value)
    assert (played.calls, qmp.changes) == ([], [])


@pytest.mark.parametrize(
    "status", ["setup", "active", "device", "postcopy-active", "cancelling", "pre-switchover", "?"]
)
def test_a_vm_that_qemu_migrates_is_left_alone(played: Played, status: str) -> None:
    for command, state in ((jobs.save_vgpu, "running"), (jobs.restore_vgpu, "paused")):
        qmp: Any = FakeQmp(state)
        qmp.migration = {"status": status, "ram": {}}
        with pytest.raises(DeviceBusyError, match="QEMU is migrating the VM"):
            command(qmp, UUID, "gpu.vfm")
        assert (played.calls, qmp.changes) == ([], [])
    for idle in ("none", "completed", "failed", "cancelled"):
        qmp = FakeQmp()
        qmp.migration = {"status": idle}
        jobs.save_vgpu(qmp, UUID, "gpu.vfm")


# The views that real QEMUs 7.2 give a device at 03.0; with VT-d switched on it has no RAM at all
def with_view(spaces: str, ram: str) -> str:
    return FLAT_VIEW + f"\nFlatView #3\n{spaces}\n Root memory region: x\n{ram}\n"


RAM_OF_CPU = FLAT_VIEW.partition("Root memory region: system\n")[2].partition("\n\n")[0]
NO_RAM = "  0000000000000000-ffffffffffffffff (prio 0, i/o): vtd-03.0-dmar"
VTD = ' AS "vtd-root", root: vtd-00.0\n AS "vtd-root", root: vtd-03.0'


@pytest.mark.parametrize(
    ("iommu", "mtree", "is_off"),
    [
        ("intel-iommu", with_view(VTD, RAM_OF_CPU), True),
        ("intel-iommu", with_view(VTD, NO_RAM), False),
        # another device's is on, ours is not
        ("intel-iommu", with_view(' AS "vtd-root", root: vtd-04.0', NO_RAM), True),
        ("intel-iommu", with_view(VTD, RAM_OF_CPU.replace("@0000000080000000", "@0000000090000000")), False),
        ("intel-iommu", FLAT_VIEW, False),  # nothing is known
        ("amd-iommu", with_view(' AS "amd_iommu_devfn_24", root: amdvi_root', NO_RAM), False),
        (
            "virtio-iommu-pci",
            FLAT_VIEW.replace(
                ' AS "cpu-memory-0", root: system',
                ' AS "virtio-iommu-device", root: virtio-iommu-memory-region-3-24',
            ),
            True,
        ),
        ("virtio-iommu-pci", with_view(' AS "v", root: virtio-iommu-memory-region-3-24', NO_RAM), False),
        ("arm-smmuv3", with_view(' AS "arm-smmuv3-24-1", root: smmuv3-iommu-memory-region-24-1', NO_RAM), False),
        # here, too, another device's is on, and ours is not
        ("amd-iommu", with_view(' AS "amd_iommu_devfn_32", root: amdvi_root', NO_RAM), True),
        ("virtio-iommu-pci", with_view(' AS "v", root: virtio-iommu-memory-region-3-32', NO_RAM), True),
        ("arm-smmuv3", with_view(' AS "arm-smmuv3-32-1", root: smmuv3-iommu-memory-region-32-1', NO_RAM), True),
        ("spapr-pci-host-bridge", FLAT_VIEW, False),
    ],
)  # fmt: skip
def test_behind_a_virtual_iommu_the_guest_s_pages_are_not_named_by_the_device(
    played: Played, iommu: str, mtree: str, is_off: bool
) -> None:
    for command, state in ((jobs.save_vgpu, "running"), (jobs.restore_vgpu, "paused")):
        qmp: Any = FakeQmp(state)
        qmp.iommu, qmp.mtree = iommu, mtree
        warned: list[str] = []
        if is_off:
            command(qmp, UUID, "gpu.vfm", settings=Settings(warn=warned.append))
            assert [f"a virtual IOMMU ({iommu}); it is off" in one for one in warned] == [True]
            continue
        with pytest.raises(UnsupportedError, match=rf"a virtual IOMMU \({iommu}\).*--memory none goes on"):
            command(qmp, UUID, "gpu.vfm")
        assert qmp.changes == []
        command(qmp, UUID, "gpu.vfm", memory=["none"])
    assert len(played.calls) == 2


@pytest.mark.parametrize(
    ("devfn", "is_off"),
    [(0, True), (4 << 3, False), (255, True), (256, False), (-1, False), ("04.0", False)],
    ids=["the first of its bus", "translated", "the last", "too large", "negative", "a word"],
)
def test_of_which_slot_the_iommu_translates_is_looked_at_and_of_all_where_it_is_not_known(
    played: Played, devfn: Any, is_off: bool
) -> None:
    """A device below a PCI Express root port is 00.0."""
    qmp: Any = FakeQmp()
    qmp.devfn = devfn
    qmp.iommu, qmp.mtree = "intel-iommu", with_view(' AS "vtd-root", root: vtd-04.0', NO_RAM)
    if is_off:
        jobs.save_vgpu(qmp, UUID, "gpu.vfm", settings=Settings(warn=str))
        assert len(played.calls) == 1
    else:
        with pytest.raises(UnsupportedError, match="a virtual IOMMU"):
            jobs.save_vgpu(qmp, UUID, "gpu.vfm")


@pytest.mark.parametrize(
    "kind", ["iommufd", "memory-region", "e1000", "iommu-memory-region", "qemu:iommu-memory-region"]
)
def test_what_is_no_iommu_is_not_taken_for_one(played: Played, kind: str) -> None:
    del played
    qmp: Any = FakeQmp()
    qmp.iommu = kind
    warned: list[str] = []
    jobs.save_vgpu(qmp, UUID, "gpu.vfm", settings=Settings(warn=warned.append))
    assert warned == []


def test_a_device_that_cannot_be_migrated_is_refused_before_the_vm_is_paused(played: Played) -> None:
    played.migratable = False
    qmp: Any = FakeQmp()
    with pytest.raises(UnsupportedError, match="it speaks no migration protocol; 'vfio-mig info"):
        jobs.save_vgpu(qmp, UUID, "gpu.vfm")
    assert (played.calls, qmp.changes) == ([], [])


def test_memory_is_found_or_named(played: Played) -> None:
    del played
    qmp: Any = FakeQmp()
    assert [str(one) for one in jobs.memory_maps(qmp, 1, ["auto"])] == [PIECE]
    assert [str(one) for one in jobs.memory_maps(qmp, 1, ["/a@0:4K", "/b@4G:8K"])] == [
        "/a@0x0:0x1000",
        "/b@0x100000000:0x2000",
    ]
    assert jobs.memory_maps(qmp, 1, ["none"]) == []
    with pytest.raises(UsageError, match="stand alone"):
        jobs.memory_maps(qmp, 1, ["auto", "/a@0"])


GREETING = '{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}'


@contextmanager
def monitor(
    path: Path, greeting: str, *answers: dict[str, Any], before: Sequence[dict[str, Any]] = ()
) -> Iterator[None]:
    """Greet, agree on nothing, give one answer to each command that comes, with events before it, and hang up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.sendall(greeting.encode() + b"\n")
                for answer in ({"return": {}}, *answers) if answers else ():
                    asked = json.loads(connected.recv(4096))  # requests have no ends of line
                    told = {**answer, "id": asked["id"]} if "id" in asked else answer
                    with suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
                        for one in (*(before if any(answer is one for one in answers) else ()), told):
                            connected.sendall(json.dumps(one).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_qmp_answers_errors_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    answers: list[dict[str, Any]] = [
        {"return": {"status": "paused"}},
        {"return": "one\r\ntwo\r\n"},
        {"error": {"class": "GenericError", "desc": "no such thing"}},
    ]
    with monitor(path, GREETING, *answers), Qmp(str(path)) as qmp:
        assert qmp.pid == os.getpid()
        assert qmp.execute("query-status") == {"status": "paused"}
        assert qmp.monitor("info version") == "one\ntwo\n"
        with pytest.raises(HostError, match="QEMU refuses 'device_del': no such thing"):
            qmp.execute("device_del", id="x")
        with pytest.raises(HostError, match="QEMU has gone while it was asked for 'cont'"):
            qmp.execute("cont")


def test_an_answer_without_end_is_told_and_events_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    stamp = {"seconds": 1, "microseconds": 2}
    flood = [
        {"event": name, "timestamp": stamp} for name in ("RESUME", "RTC_CHANGE", "RESUME", "STOP") for _ in range(50)
    ]
    with monitor(path, GREETING, {"return": {}}, before=flood), Qmp(str(path)) as qmp:
        assert qmp.execute("query-status") == {}
        assert qmp.news == ["RESUME"]
        assert qmp._client.events.empty()
    path = tmp_path / "huge"
    with (
        monitor(path, GREETING, {"return": "x" * (11 << 20)}),
        Qmp(str(path)) as qmp,
        pytest.raises(HostError, match=r"has gone while .*'human-monitor-command'; what it said is not an answer: "),
    ):
        qmp.monitor("info mtree -f")
    path = tmp_path / "number"
    with (
        monitor(path, GREETING, {"return": 7}),
        Qmp(str(path)) as qmp,
        pytest.raises(HostError, match="QEMU's answer to 'info mtree -f' is not understood: 7 is not text"),
    ):
        qmp.monitor("info mtree -f")


def test_a_socket_without_qemu_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OpenError, match=r"cannot connect to QMP: ENOENT .*-qmp unix:PATH"):
        Qmp(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="too long"):
        Qmp("/" + "x" * 200)
    monkeypatch.setattr("vfio_mig.vm.qmp.GREETING_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent"))
        listener.listen()
        with pytest.raises(OpenError, match=r"no QMP greeting: none within .*a second -qmp socket"):
            Qmp(str(tmp_path / "silent"))
    with monitor(tmp_path / "other", "220 mail.example.org ESMTP"), pytest.raises(OpenError, match="no QMP greeting"):
        Qmp(str(tmp_path / "other"))


def test_without_the_qemu_package_the_scripts_say_what_to_install() -> None:
    code = "import sys; sys.modules['qemu'] = None; from vfio_mig.cli.qemu import save; save()"
    command = [sys.executable, "-c", code, "a", "b", "c"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "qemu-save: the Python package qemu.qmp is missing; pip install 'vfio_mig[qemu]'\n"
    assert done.returncode == 7


@pytest.mark.parametrize("name", ["save", "restore"])
def test_the_scripts_speak_as_vfio_mig_does(name: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / f"scripts/qemu-{name}", *arguments], cwd="/", capture_output=True, text=True, check=False
        )

    shown = run("--help")
    assert shown.returncode == 0
    assert f"Usage: qemu-{name} [OPTIONS] QMP-SOCKET DEVICE FILE" in shown.stdout
    wrong = run("one")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith(f"qemu-{name}: Missing argument")
    gone = run("/nowhere/qmp", UUID, "gpu.vfm")
    assert (gone.returncode, gone.stderr.count("\n")) == (3, 1)


def test_a_piece_follows_in_guest_and_file_only() -> None:
    mapping = parse_maps(MAPS)[2]
    one = Piece(0, 0x1000, 0, mapping)
    assert Piece(0x1000, 0x1000, 0x1000, mapping).follows(one)
    assert not Piece(0x2000, 0x1000, 0x1000, mapping).follows(one)
    assert not Piece(0x1000, 0x1000, 0x2000, mapping).follows(one)
