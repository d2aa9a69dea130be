# SPDX-License-Identifier: MIT
"""VMs by their names: what is made of libvirt's answers and descriptions, of /proc, and of names that are wrong.

libvirt is played here; tests/vm/test_gvt_libvirt.py has the real one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import pytest

from tests.schemas import validate
from tests.unit.click_runner import runner
from vfio_mig.cli import complete
from vfio_mig.cli.main import cli
from vfio_mig.errors import DeviceNotFoundError, HostError, OpenError, UnsupportedError, UsageError
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.vm import connection, domain, jobs, machine, named, survey
from vfio_mig.vm.domainxml import parse
from vfio_mig.vm.monitor import QMP_WORDS, GoneError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
OTHER = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
SHARED = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


def hostdev(uuid: str) -> str:
    return (
        "<hostdev mode='subsystem' type='mdev' model='vfio-pci'>"
        f"<source><address uuid='{uuid}'/></source><address type='pci' bus='0x01'/></hostdev>"
    )


def xml(devices: str = "", memory: str = SHARED, more: str = "") -> str:
    head = f"<domain type='kvm'><name>win10</name><uuid>{OTHER}</uuid>"
    return f"{head}{memory}{more}<devices>{devices}</devices></domain>"


PCI = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
    "<address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source></hostdev>"
    "<interface type='hostdev'><source><address type='pci' domain='0' bus='59' slot='1' function='0x2'/></source>"
    "</interface><hostdev mode='subsystem' type='usb'><source><vendor id='1'/></source></hostdev>"
)


def test_the_devices_of_a_domain_are_those_of_its_xml() -> None:
    found = parse(xml(hostdev(UUID.upper()) + PCI + hostdev(UUID)))
    assert found.devices == [UUID, "0000:3b:00.1", "0000:3b:01.2"]
    assert (found.name, found.uuid, found.memory) == ("win10", OTHER, "shared")
    assert parse(xml()).devices == []


CELLS = "<cpu><numa><cell id='0' {0}/><cell id='1' {1}/></numa></cpu>"


@pytest.mark.parametrize(
    ("memory", "more", "kind"),
    [
        ("", "", "private"),
        ("<memoryBacking><source type='memfd'/></memoryBacking>", "", "private"),
        ("<memoryBacking><access mode='private'/></memoryBacking>", "", "private"),
        (SHARED, "", "shared"),
        ("", CELLS.format("memAccess='shared'", "memAccess='shared'"), "shared"),
        ("", CELLS.format("memAccess='shared'", ""), "private"),
        (SHARED, CELLS.format("", "memAccess='private'"), "private"),
    ],
)
def test_ram_is_shared_only_if_all_of_it_is(memory: str, more: str, kind: str) -> None:
    assert parse(xml(memory=memory, more=more)).memory == kind


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("<domain>", "cannot be read"),
        ("<network/>", "begins with 'network'"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><domain/>", "has a document type"),
        ("<domain>" + "x" * (5 << 20) + "</domain>", "endless"),
        (xml(hostdev("../../etc")), "an mdev called '../../etc'"),
        (xml(hostdev("x" * 10000)), "an mdev called 'xxx"),
        (xml(PCI.replace("0x3b", "0x100")), "whose bus is '0x100'"),
        (xml(PCI.replace("0x3b", "-1")), "whose bus is '-1'"),
        (xml(PCI.replace("0x3b", "010")), "whose bus is '010'"),
        (xml(PCI * 3000), "6000 host devices"),
    ],
)
def test_xml_that_is_not_libvirt_s_is_an_error_of_one_line(text: str, words: str) -> None:
    with pytest.raises(HostError, match=words) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("uri", "remote"),
    [
        ("qemu:///system", False),
        ("qemu:///session", False),
        ("qemu+unix:///system?socket=/run/x", False),
        ("qemu:///embed?root=/run/x", False),
        ("qemu+ssh://root@host/system", True),
        ("qemu+ssh:///system", True),
        ("qemu://host/system", True),
        ("qemu+tls://[::1]/system", True),
        ("qemu+ext:///system?command=x", True),
    ],
)
def test_what_may_be_on_another_host_is_told_by_the_uri(uri: str, *, remote: bool) -> None:
    assert connection.is_remote(uri) is remote
    if remote:
        with pytest.raises(UnsupportedError, match=r"there, use --connect qemu:///system; 'vfio-mig vm list' works"):
            named.save_vm("win10", "x", connect=uri)


@pytest.mark.parametrize("uri", ["", "system", "/run/x", "qemu//system", "qemu+ssh://[x/system"])
def test_what_is_no_uri_is_wrong_usage(uri: str) -> None:
    with pytest.raises(UsageError, match="--connect qemu:///system"):
        connection.is_remote(uri)


class LibvirtError(Exception):
    """As the binding raises it."""


class FakeDomain:
    """A domain, and what it is asked."""

    def __init__(self, *, active: bool = True, devices: str = "", status: str = "running") -> None:
        self.active = active
        self.description = xml(devices or hostdev(UUID))
        self.status = status
        self.asked: list[str] = []
        self.answers: dict[str, Any] = {"query-cpus-fast": [{"thread-id": threading.get_native_id()}]}
        self.uri = ""
        self.number = 1 if active else 5

    def name(self) -> str:
        return "win10"

    def isActive(self) -> bool:  # noqa: N802 -- the binding's
        return self.active

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802
        return self.description

    def state(self) -> tuple[int, int]:
        return self.number, 0

    def suspend(self) -> int:
        self.asked.append("suspend")
        self.status = "paused"
        return 0

    def resume(self) -> int:
        self.asked.append("resume")
        self.status = "running"
        return 0


class FakeLibvirt(ModuleType):
    """The binding."""

    libvirtError = LibvirtError  # noqa: N815
    VIR_DOMAIN_EVENT_ID_LIFECYCLE, VIR_DOMAIN_EVENT_ID_REBOOT, VIR_DOMAIN_EVENT_ID_PMWAKEUP = 0, 1, 3
    VIR_DOMAIN_EVENT_RESUMED, VIR_DOMAIN_EVENT_SHUTDOWN, VIR_DOMAIN_EVENT_CRASHED = 4, 6, 8

    def __init__(self, one: FakeDomain) -> None:
        super().__init__("libvirt")
        self.one = one
        self.kind = "QEMU"
        self.heard: dict[int, Callable[..., None]] = {}
        self.closed = 0
        self.qemu = SimpleNamespace(qemuMonitorCommand=self.ask)

    def open(self, uri: str) -> Any:
        if uri == "qemu:///gone":
            raise LibvirtError("Failed to connect\nsocket")
        return SimpleNamespace(
            getType=lambda: self.kind,
            lookupByName=self.look_up,
            lookupByUUIDString=self.look_up,
            # VIR_CONNECT_LIST_DOMAINS_ACTIVE is 1; 0 is all of them
            listAllDomains=lambda flags: [self.one] if flags == 0 or self.one.active else [],
            domainEventRegisterAny=lambda _domain, event, hear, _opaque: self.heard.__setitem__(event, hear),
            getLibVersion=lambda: 9000000,
            close=self.close,
        )

    def close(self) -> None:
        self.closed += 1

    def look_up(self, name: str) -> FakeDomain:
        if name not in {"win10", OTHER}:
            raise LibvirtError("Domain not found")
        return self.one

    def ask(self, one: FakeDomain, text: str, _flags: int) -> str:
        command = json.loads(text)["execute"]
        one.asked.append(command)
        answer = one.answers.get(command, {})
        if command == "query-status":
            answer = one.answers.get(command, {"status": one.status, "running": one.status == "running"})
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, str) else json.dumps({"return": answer})

    def virEventAddTimeout(self, _after: int, call: Callable[[int, object], None], _opaque: object) -> None:  # noqa: N802
        threading.Thread(target=call, args=(7, None)).start()

    def virEventRemoveTimeout(self, timer: int) -> None:  # noqa: N802
        assert timer == 7


@contextmanager
def played(monkeypatch: pytest.MonkeyPatch, one: FakeDomain) -> Iterator[FakeLibvirt]:
    fake = FakeLibvirt(one)
    monkeypatch.setattr(connection, "binding", lambda: fake)
    monkeypatch.setattr(domain, "binding", lambda: fake)
    monkeypatch.setattr(connection, "_run_events", lambda: None)
    yield fake


URI = "qemu:///system"


def test_a_domain_is_paused_and_goes_on_by_libvirt_and_its_process_is_that_of_its_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = FakeDomain()
    with played(monkeypatch, one) as fake:
        with domain.Domain(URI, OTHER) as vm:
            assert (vm.pid, vm.listed, vm.name) == (os.getpid(), [UUID], "win10")
            assert machine.run_state(vm) == "running"
            vm.execute("stop")
            assert machine.run_state(vm) == "paused"
            vm.execute("cont")
            assert "stop" not in one.asked
            assert [word for word in one.asked if word in {"suspend", "resume"}] == ["suspend", "resume"]
            one.answers["human-monitor-command"] = json.dumps({"return": "a\r\nb"})
            assert vm.monitor("info mtree -f") == "a\nb"
            assert vm.words.stop == "'virsh suspend win10'"
        assert fake.closed == 1


def test_what_libvirt_tells_meanwhile_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FakeDomain(status="paused")
    with played(monkeypatch, one) as fake, domain.Domain(URI, "win10") as vm:
        machine.require_paused(vm, "paused")
        for event in (2, 5):  # suspended, stopped: as a QEMU that has ended, it has stood still until then
            fake.heard[0](None, None, event, 0, None)
        assert vm.news == []
        fake.heard[0](None, None, 4, 0, None)
        fake.heard[0](None, None, 4, 0, None)
        fake.heard[1](None, None, None)
        assert vm.news == ["RESUME", "RESET"]
        with pytest.raises(HostError, match=r"did not stand still while its vGPU was being saved \(RESUME, RESET\)"):
            machine.require_paused(vm, "paused")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ('{"error": {"class": "GenericError", "desc": "no such thing"}}', RefusedError, "refuses 'x': 'no such thing'"),
        ('{"error": 7}', HostError, "is not understood"),
        ("[]", HostError, "is not understood"),
        ("{", HostError, "is not understood"),
        ("[" * 100000, HostError, "is not understood"),
        ("", HostError, "is not understood"),
    ],
)
def test_an_answer_that_is_none_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, answer: str, error: type[Exception], words: str
) -> None:
    one = FakeDomain()
    with played(monkeypatch, one), domain.Domain(URI, "win10") as vm:
        one.answers["x"] = answer
        with pytest.raises(error, match=words) as caught:
            vm.execute("x")
        assert len(str(caught.value)) < 400


def test_a_domain_that_ends_is_told_from_a_libvirt_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FakeDomain()
    with played(monkeypatch, one), domain.Domain(URI, "win10") as vm:
        one.answers["query-status"] = LibvirtError("cannot acquire state change lock")
        with pytest.raises(HostError, match="qemu:///system: libvirt: cannot acquire") as caught:
            machine.run_state(vm)
        assert not isinstance(caught.value, GoneError)
        one.active = False
        with pytest.raises(GoneError, match="the domain win10 has ended while it was asked for 'query-status'"):
            machine.run_state(vm)
        machine.require_paused(vm, "paused")


def test_a_libvirt_that_hangs_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FakeDomain()
    with played(monkeypatch, one), domain.Domain(URI, "win10") as vm:
        monkeypatch.setattr(connection, "CALL_SECONDS", 0.05)
        monkeypatch.setattr(one, "suspend", lambda: time.sleep(0.5))
        with pytest.raises(HostError, match=r"no answer from libvirt within 0 s"):
            vm.execute("stop")


@pytest.mark.parametrize("threads", [[], [{}], [{"thread-id": "7"}], [{"thread-id": -1}]])
def test_a_process_that_is_not_told_is_an_error(monkeypatch: pytest.MonkeyPatch, threads: list[Any]) -> None:
    one = FakeDomain()
    one.answers["query-cpus-fast"] = threads
    with played(monkeypatch, one) as fake:
        with pytest.raises(HostError, match="'query-cpus-fast' is not understood"):
            domain.Domain(URI, "win10")
        assert fake.closed == 1


def test_threads_of_nobody_or_of_two_are_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FakeDomain()
    for threads in ([1 << 30], [1, os.getpid()]):
        one.answers["query-cpus-fast"] = [{"thread-id": thread} for thread in threads]
        with played(monkeypatch, one), domain.Domain(URI, "win10") as vm:
            assert vm.pid == 0


def test_what_is_not_there_or_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FakeDomain(active=False)
    with played(monkeypatch, one) as fake:
        with pytest.raises(OpenError, match="the domain win10 does not run; 'virsh start --paused win10' starts it"):
            domain.Domain(URI, "win10")
        with pytest.raises(OpenError, match="libvirt has no domain 'win11'; it has win10"):
            domain.Domain(URI, "win11")
        with pytest.raises(OpenError, match="cannot connect to libvirt: Failed to connect socket; see that libvirtd"):
            domain.Domain("qemu:///gone", "win10")
        fake.kind = "LXC"
        with pytest.raises(UnsupportedError, match="its VMs are not QEMU's"):
            domain.Domain("lxc:///", "win10")
        assert fake.closed == 3


def test_without_the_binding_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    connection.binding.cache_clear()
    monkeypatch.setitem(sys.modules, "libvirt", None)
    for call in (lambda: named.save_vm("win10", "x", connect=URI), lambda: survey.list_vms(connect=URI)):
        with pytest.raises(HostError, match="libvirt-python is missing; apt install python3-libvirt") as caught:
            call()
        assert "pip install 'vfio_mig[libvirt]'" in str(caught.value)
        assert str(caught.value).count("\n") == 0


def monitor(*names: str, listed: list[str] | None = None) -> Any:
    def execute(command: str, **words: str) -> Any:
        if command == "qom-get":
            name = words["path"].rpartition("/")[2]
            return "" if name.startswith("fd") else f"/sys/bus/mdev/devices/{name}"
        return [{"name": name, "type": "child<vfio-pci>"} for name in names] if "anon" not in words["path"] else []

    return SimpleNamespace(execute=execute, listed=listed, words=QMP_WORDS)


def test_no_device_is_chosen_for_a_user_who_has_a_choice() -> None:
    assert named.choose(monitor(UUID), "vm", None) == UUID
    assert named.choose(monitor(UUID, OTHER), "vm", OTHER[:4]) == OTHER[:4]
    assert named.choose(monitor(listed=[OTHER]), "vm", None) == OTHER
    with pytest.raises(UsageError, match=f"the VM vm has several devices; --device names one: {UUID}, {OTHER}"):
        named.choose(monitor(UUID, OTHER), "vm", None)
    with pytest.raises(UsageError, match=f"{UUID}, one that QEMU cannot name"):
        named.choose(monitor(UUID, "fd0"), "vm", None)
    with pytest.raises(UsageError, match="QEMU cannot name the device of the VM vm; find it with 'vfio-mig list'"):
        named.choose(monitor("fd0"), "vm", None)
    with pytest.raises(DeviceNotFoundError, match="the VM vm has no VFIO device; 'vfio-mig vm list' tells"):
        named.choose(monitor(), "vm", None)


def test_a_device_that_the_xml_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(device=UUID, holder_pid=7, migratable=True)
    monkeypatch.setattr(jobs, "device_status", lambda _name: status)
    vm = monitor(UUID, listed=[OTHER])
    vm.pid = 7
    with pytest.raises(DeviceNotFoundError, match=f"the domain's XML does not have it; it has {OTHER}"):
        jobs.owner(vm, UUID)
    vm.listed = [UUID]
    assert jobs.owner(vm, UUID) == (UUID, 7)


def test_a_domain_that_is_shut_off_is_listed_with_what_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    one = FakeDomain(active=False)
    one.description = xml(hostdev(UUID), memory="")
    with played(monkeypatch, one):
        (row,) = survey.list_vms(connect=URI)
        assert (row.vm, row.state, row.memory, row.pid) == ("win10", "shut off", "private", None)
        assert [device.device for device in row.devices] == [UUID]
        assert "<memoryBacking>" in row.notes[0]
        (row,) = survey.list_vms(["win10"], connect="qemu+ssh://host/system")
        assert row.pid is None


@pytest.mark.parametrize(
    ("number", "state"), [(0, "no state"), (2, "running"), (7, "pmsuspended"), (8, "unknown"), (-1, "unknown")]
)
def test_a_state_of_a_newer_libvirt_is_unknown(monkeypatch: pytest.MonkeyPatch, number: int, state: str) -> None:
    one = FakeDomain(active=False)
    one.number = number
    with played(monkeypatch, one):
        (row,) = survey.list_vms(connect=URI)
    assert row.state == state


def test_a_domain_whose_devices_nobody_has_open_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with played(monkeypatch, FakeDomain()):
        (row,) = survey.list_vms(connect=URI)
        assert (row.state, row.pid, row.memory) == ("running", None, "shared")
        assert any("nobody that is seen from here has it open" in note for note in row.notes)


UNIX = """Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/vm.qmp
0000000000000000: 00000003 00000000 00000000 0001 03 4712 /run/vm.qmp
0000000000000000: 00000002 00000000 00010000 0001 01 4713 /run/other with space
0000000000000000: 00000002 00000000 00010000 0001 01 4714 @abstract
0000000000000000: 00000003 00000000 00000000 0001 03 4715
"""


def test_the_sockets_at_which_a_process_listens() -> None:
    links = {f"socket:[{inode}]" for inode in (4711, 4712, 4714, 4715)}
    assert survey.listening(UNIX, links) == ["/run/vm.qmp"]
    assert survey.listening(UNIX, {"socket:[4713]", "/dev/null"}) == ["/run/other with space"]
    assert survey.listens(os.getpid()) == []


RAM = "7000-9000 rw-s 00000000 00:01 592                        /memfd:ram (deleted)"


@pytest.mark.parametrize(
    ("maps", "kind"),
    [
        ("", "unknown"),
        (RAM, "shared"),
        (f"{RAM}\n10000-90000 rwxp 00000000 00:00 0", "shared"),  # TCG's code
        (f"{RAM}\n10000-90000 rw-s 00000000 00:0f 1 anon_inode:[vfio-device]", "shared"),
        (f"{RAM}\n10000-90000 rw-p 00000000 00:00 0 [heap]", "shared"),
        (f"{RAM}\n10000-90000 r--p 00000000 00:00 0 /usr/lib/x.so", "shared"),
        (f"{RAM}\n10000-90000 rw-p 00000000 00:00 0", "private"),
        ("nonsense", "unknown"),
    ],
)
def test_ram_is_what_a_vmm_has_mapped_most_of(maps: str, kind: str) -> None:
    assert survey.kind_of_largest(maps) == kind
    assert survey.memory_kind(1 << 30) == "unknown"


def test_settings_reach_the_library_s_jobs_and_the_pause_is_proved() -> None:
    seen: list[str] = []
    settings = Settings(on_step=lambda _job, step, _device: seen.append(step), on_commit=lambda: seen.append("commit"))
    watched = jobs._watched(settings, lambda: seen.append("proved"), lambda: seen.append("noted"))
    assert watched.on_step is not None
    assert watched.on_commit is not None
    for step in ("after-stop", "written"):
        watched.on_step("save", step, UUID)
    watched.on_commit()
    assert seen == ["after-stop", "proved", "written", "noted", "commit"]


ROWS = [
    survey.VmRow(
        vm="a\x1b[2Jb", pid=None, command=None, state="shut off", memory="private",
        devices=[survey.VmDevice(UUID, None)], sockets=[], notes=["its RAM is private"],
    ),
    survey.VmRow(
        vm=None, pid=7, command="qemu-system-x86", state="unknown", memory="shared",
        devices=[survey.VmDevice(UUID, "gvt-rfc"), survey.VmDevice(OTHER, None)], sockets=["/run/vm.qmp"], notes=[],
    ),
]  # fmt: skip


def test_vm_list_prints_a_line_for_each_and_says_the_rest_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def list_vms(names: Any, *, connect: str | None) -> list[survey.VmRow]:
        asked.append((tuple(names), connect))
        return ROWS

    monkeypatch.setattr(survey, "list_vms", list_vms)
    done = runner().invoke(cli, ["vm", "list", "--connect", URI, "x", "--header"])
    assert done.stdout.splitlines() == [
        "VM PID STATE MEMORY DEVICES",
        f"a\\x1b[2Jb - shut_off private {UUID}",
        f"(qemu-system-x86) 7 unknown shared {UUID},{OTHER}",
    ]
    assert done.stderr.splitlines() == [
        "a\\x1b[2Jb: its RAM is private",
        "PID 7: listens at /run/vm.qmp",
    ]
    assert asked == [(("x",), URI)]
    assert runner().invoke(cli, ["-q", "vm", "list"]).stderr == ""
    shown = validate("vm-list", runner().invoke(cli, ["vm", "list", "--json"]).stdout)
    assert [row["pid"] for row in shown] == [None, 7]


def test_shells_complete_domains_of_this_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = click.Argument(["vm"])
    with played(monkeypatch, FakeDomain()):
        for uri, names in ((URI, ["win10"]), ("qemu+ssh://host/system", []), ("qemu:///gone", [])):
            context = click.Context(click.Command("save"))
            context.params["connect"] = uri
            assert complete.vm(context, parameter, "w") == names
    (item,) = complete.vm(click.Context(click.Command("save")), parameter, "/run/v")
    assert getattr(item, "type", None) == "file"
    assert complete.connect(click.Context(click.Command("save")), parameter, "qemu:///sy") == [URI]
