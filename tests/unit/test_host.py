# SPDX-License-Identifier: MIT
"""Devices of a made-up sysfs; holders are real processes with a file open that stands for a group's node."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from vfio_mig import uapi
from vfio_mig.device import Holder
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    DeviceNotFoundError,
    OpenError,
    UnsupportedError,
    UsageError,
    VfioMigError,
)
from vfio_mig.host import holders, kvm, mdev, opening
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.discover import Host, Snapshot
from vfio_mig.host.holders import Unseen, View, duplicate_container, duplicate_fd, find_holder, find_holders
from vfio_mig.host.opening import open_device
from vfio_mig.uapi import IoctlError, Request, address_of
from vfio_mig.uapi import kvm as kvm_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.uapi._generated import CData

ONE: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
TWO: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
GPU: Final = "0000:00:02.0"
NIC: Final = "0000:3b:00.1"
TWIN: Final = "0000:3b:00.2"
PLAIN: Final = "0001:05:00.0"
BARE: Final = "0000:06:00.0"


class Tree:
    """A sysfs in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = Host(str(root))

    def link(self, path: str, target: str) -> None:
        place, goal = self.root / path, self.root / target
        goal.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(goal, place.parent))

    def write(self, path: str, text: str) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place

    def pci(self, address: str, *, driver: str = "", group: int | None = None, cdev: str = "") -> None:
        directory = f"sys/devices/pci0000:00/{address}"
        self.link(f"sys/bus/pci/devices/{address}", directory)
        self.write(f"{directory}/vendor", "0x8086\n")
        self.write(f"{directory}/device", "0x591d\n")
        if driver:
            self.link(f"{directory}/driver", f"sys/bus/pci/drivers/{driver}")
        if group is not None:
            self.link(f"{directory}/iommu_group", f"sys/kernel/iommu_groups/{group}")
        if cdev:
            number = int(cdev.removeprefix("vfio"))
            self.write(f"{directory}/vfio-dev/{cdev}/dev", f"246:{number}\n")

    def mdev(self, uuid: str, *, group: int | None, parent: str = GPU, kind: str = "i915-GVTg_V4_8") -> None:
        directory = f"sys/devices/pci0000:00/{parent}/{uuid}"
        self.link(f"sys/bus/mdev/devices/{uuid}", directory)
        self.link(f"{directory}/mdev_type", f"sys/devices/pci0000:00/{parent}/mdev_supported_types/{kind}")
        self.link(f"{directory}/driver", "sys/bus/mdev/drivers/vfio_mdev")
        if group is not None:
            self.link(f"{directory}/iommu_group", f"sys/kernel/iommu_groups/{group}")
        self.write(f"{directory}/remove", "")

    def mdev_type(self, parent: str, kind: str, **attributes: str) -> Path:
        if not (self.root / f"sys/class/mdev_bus/{parent}").exists():
            self.link(f"sys/class/mdev_bus/{parent}", f"sys/devices/pci0000:00/{parent}")
        directory = f"sys/devices/pci0000:00/{parent}/mdev_supported_types/{kind}"
        for name, text in attributes.items():
            self.write(f"{directory}/{name}", text)
        return self.write(f"{directory}/create", "")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A host with a bit of everything, to be looked at only."""
    tree = Tree(tmp_path_factory.mktemp("host"))
    tree.pci(GPU, driver="i915")
    tree.pci(NIC, driver="mlx5_vfio_pci", group=12, cdev="vfio3")
    tree.pci(TWIN, driver="vfio-pci", group=12, cdev="vfio4")
    tree.pci(PLAIN, driver="vfio-pci", group=13, cdev="vfio5")
    tree.pci(BARE)
    tree.mdev(TWO, group=8)
    tree.mdev(ONE, group=7)
    return tree


def test_devices_are_the_mdevs_and_the_functions_with_a_vfio_driver(tree: Tree) -> None:
    gpu = tree.root / "sys/devices/pci0000:00"
    assert tree.host.devices() == [
        HostDevice(ONE, str(gpu / GPU / ONE), "mdev", "i915-GVTg_V4_8", GPU, "vfio_mdev", 7),
        HostDevice(TWO, str(gpu / GPU / TWO), "mdev", "i915-GVTg_V4_8", GPU, "vfio_mdev", 8),
        HostDevice(NIC, str(gpu / NIC), "pci", "8086:591d", "", "mlx5_vfio_pci", 12),
        HostDevice(TWIN, str(gpu / TWIN), "pci", "8086:591d", "", "vfio-pci", 12),
        HostDevice(PLAIN, str(gpu / PLAIN), "pci", "8086:591d", "", "vfio-pci", 13),
    ]


def test_a_host_without_vfio_has_no_devices(tmp_path: Path) -> None:
    assert Host(str(tmp_path)).devices() == []


def test_an_mdev_without_links_is_listed_with_gaps(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.link(f"sys/bus/mdev/devices/{ONE}", f"sys/devices/virtual/mtty/{ONE}")
    (device,) = tree.host.devices()
    assert device[2:7] == ("mdev", "", "mtty", "", None)
    assert device.node is None


@pytest.mark.parametrize("group", ["x", "-1", "1_0", "\u0664"])
def test_a_group_that_is_no_number_is_none(tmp_path: Path, group: str) -> None:
    tree = Tree(tmp_path)
    tree.mdev(ONE, group=None)
    tree.link(f"sys/devices/pci0000:00/{GPU}/{ONE}/iommu_group", f"sys/kernel/iommu_groups/{group}")
    assert tree.host.find(ONE).group is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (ONE, ONE),
        (ONE.upper(), ONE),
        (NIC, NIC),
        ("3b:00.1", NIC),
        ("3B:00.1", NIC),
        ("0000:3B:00.1", NIC),
        (PLAIN, PLAIN),
        ("/dev/vfio/7", ONE),
        ("/dev/vfio/8", TWO),
        ("/dev/vfio/13", PLAIN),
        ("/dev/vfio/devices/vfio3", NIC),
        ("/dev/vfio/devices/vfio4", TWIN),
    ],
)
def test_a_device_has_many_names(tree: Tree, name: str, found: str) -> None:
    assert tree.host.find(name).name == found


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"sys/bus/mdev/devices/{ONE}", ONE),
        (f"sys/bus/mdev/devices/{ONE}/", ONE),
        (f"sys/devices/pci0000:00/{GPU}/{TWO}", TWO),
        (f"sys/bus/pci/devices/{NIC}", NIC),
        (f"sys/bus/pci/devices/{GPU}/../{TWIN}", TWIN),
    ],
)
def test_a_device_is_found_by_its_directory(tree: Tree, path: str, found: str) -> None:
    device = tree.host.find(str(tree.root / path))
    assert device.name == found
    assert device in tree.host.devices()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1003", "there is no such mdev; 'vfio-mig list'"),
        ("0000:3b:00.3", "there is no such PCI device"),
        ("0001:3b:00.1", "there is no such PCI device"),
        ("00:02.0", "its driver is i915, which is not a VFIO driver"),
        (BARE, "its driver is none, which is not a VFIO driver"),
        ("/dev/vfio/99", "no VFIO device is in this group"),
        ("/dev/vfio/devices/vfio9", "no VFIO device has this node"),
        ("/dev/vfio/devices/", "no VFIO device has this node"),
        ("/dev/vfio/vfio", "is not a directory of a VFIO device"),
        ("/dev/vfio/1234567890", "is not a directory of a VFIO device"),
        ("/", "is not a directory of a VFIO device"),
        ("./nowhere", "is not a directory of a VFIO device"),
    ],
)
def test_a_device_that_is_not_there_is_not_found(tree: Tree, name: str, words: str) -> None:
    with pytest.raises(DeviceNotFoundError) as caught:
        tree.host.find(name)
    assert str(caught.value).startswith(f"{name}: {words}")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "name",
    [
        *["", "\0", f"{ONE}\0", "gpu", "vfio3", "7", "..", "3b:00", "3b:00.8", "3b:00.1.0", "3b:0.1", "00003b:00.1"],
        *[f"{ONE}\n", f" {ONE}", f"{ONE}0", ONE.replace("-", ""), "0000:3b:00.1\n", "0000:0000:3b:00.1", "g3:00.1"],
    ],
)
def test_what_is_no_name_of_a_device_is_wrong_usage(tree: Tree, name: str) -> None:
    with pytest.raises(UsageError, match="is not a device name") as caught:
        tree.host.find(name)
    assert str(caught.value).isprintable()


def test_an_mdev_is_found_by_as_much_of_its_uuid_as_no_other_has(tree: Tree) -> None:
    other = "0123abcd" + ONE[8:]
    tree.mdev(other, group=9)
    for begin in (other[:4], other[:8].upper(), other[:14]):
        assert tree.host.find(begin).name == other
    with pytest.raises(UsageError) as caught:
        tree.host.find(ONE[:8])
    assert str(caught.value) == f"{ONE[:8]!r} is the beginning of several mdevs: {ONE}, {TWO}; give more of it"
    with pytest.raises(DeviceNotFoundError, match="no mdev whose UUID begins so"):
        tree.host.find("0124")


def test_a_group_with_several_devices_names_them(tree: Tree) -> None:
    with pytest.raises(UsageError) as caught:
        tree.host.find("/dev/vfio/12")
    assert str(caught.value) == f"group 12 has several devices: {NIC}, {TWIN}; name the one you mean"


def test_an_attribute_that_is_not_there_is_empty(tree: Tree) -> None:
    assert tree.host.read("sys", "nothing") == ""
    assert tree.host.read("sys") == ""
    assert tree.host.names("sys", "nothing") == []
    assert tree.host.link("sys") == ""


class HeldDevice(HostDevice):
    """Its group's node is its *sysfs*, which may be any character device."""

    __slots__ = ()

    @property
    def node(self) -> str:
        return self.sysfs


@pytest.fixture
def held() -> Iterator[HeldDevice]:
    """Give one whose node is a terminal: a character device that nobody else on this machine has open."""
    master, terminal = os.openpty()
    node = os.ttyname(terminal)
    os.close(terminal)
    yield HeldDevice(ONE, node, "mdev", "i915-GVTg_V4_8", GPU, "vfio_mdev", 7)
    os.close(master)


@contextmanager
def process(device: HostDevice, command: list[str]) -> Iterator[tuple[int, int]]:
    """Run a command that repeats a line and reads on, with the device's node open; gives its PID and fd."""
    fd = os.open(device.sysfs, os.O_RDWR | os.O_NOCTTY)
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(fd,))
    finally:
        os.close(fd)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        # until it answers, /proc may still show it without its arguments
        child.stdin.write(b"ready\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"ready\n"
        yield child.pid, fd


def script(directory: Path, name: str) -> str:
    path = directory / name
    path.write_text("#!/bin/sh\nread line\necho $line\nread line\n")
    path.chmod(stat.S_IRWXU)
    return str(path)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_fds() -> set[int]:
    return set(filter(is_open, range(256)))


def test_a_holder_is_the_process_that_has_the_node_open(held: HeldDevice) -> None:
    assert find_holder(held) is None
    with process(held, ["cat"]) as (pid, fd):
        assert find_holder(held) == Holder(pid, "cat", False, fd, str(held.node))
        assert find_holder(held, pid) == Holder(pid, "cat", False, fd, str(held.node))
        assert find_holder(held, os.getppid()) is None
        assert find_holder(held._replace(sysfs=held.sysfs + "1")) is None
    assert find_holder(held) is None
    assert find_holder(held, pid) is None


def test_a_process_borrows_from_itself_what_it_has_opened_itself(held: HeldDevice) -> None:
    me = Holder(os.getpid(), Path("/proc/self/comm").read_text().strip(), True, 0, str(held.node))
    fd = os.open(held.sysfs, os.O_RDONLY | os.O_NOCTTY)
    try:
        assert find_holder(held) == find_holder(held, os.getpid()) == me._replace(fd=fd)
        copy = duplicate_fd(held, me._replace(fd=fd))
        assert os.path.samestat(os.fstat(copy), os.fstat(fd))
        os.close(copy)
        with process(held, ["cat"]) as (pid, _):
            assert [one.pid for one in find_holders(held)] == [pid, os.getpid()]
        # what was inherited is its launcher's: it would end with this process
        os.set_inheritable(fd, True)
        assert find_holder(held) is None
    finally:
        os.close(fd)


def test_a_device_without_a_group_has_no_holder(tree: Tree) -> None:
    assert find_holder(tree.host.find(ONE)._replace(group=None)) is None


HOLD: Final = """
import sys
from vfio_mig.host.discover import HostDevice
from vfio_mig.host.holders import mark_hold
mark_hold(HostDevice(sys.argv[1], "", "mdev", "", "", "", 7))
print(sys.stdin.readline(), end="", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("vfio-mig", ["hold", ONE]),
        ("vfio-mig", ["--json", "hold", ONE, "--memory", "x@0"]),
        ("vfio-mig", ["save", ONE, "file"]),
        ("other", ["vfio-mig", "hold"]),
    ],
)
def test_a_name_and_arguments_make_no_process_our_own_holder(
    tmp_path: Path, held: HeldDevice, program: str, arguments: list[str]
) -> None:
    with process(held, [script(tmp_path, program), *arguments]) as (pid, fd):
        holder = find_holder(held, pid)
    assert holder == Holder(pid, program, False, fd, str(held.node))


@pytest.mark.parametrize(("name", "expected"), [(ONE, True), (TWO, False)])
def test_our_own_holder_is_known_by_what_it_has_open(held: HeldDevice, name: str, expected: bool) -> None:
    """By whatever interpreter and arguments it was started; the mark is for one device."""
    with process(held, [sys.executable, "-c", HOLD, name]) as (pid, fd):
        holder = find_holder(held, pid)
        assert holder is not None
        assert (holder.is_hold, holder.fd) == (expected, fd)
        assert (holder.command == "vfio-mig") is expected


def borrowing_is_forbidden() -> bool:
    """Whether this machine lets nobody borrow from a child: a sandbox, yama, or an old kernel."""
    import ctypes

    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        pidfd = os.pidfd_open(child.pid)
        fd: int = ctypes.CDLL(None).syscall(438, pidfd, 0, 0)
        os.close(pidfd)
    if fd >= 0:
        os.close(fd)
    return fd < 0


def test_a_borrowed_fd_is_the_same_open_file(held: HeldDevice) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    before = open_fds()
    with process(held, ["cat"]) as (pid, fd):
        borrowed = duplicate_fd(held, Holder(pid, "cat", False, fd, str(held.node)))
        try:
            assert os.path.samestat(os.fstat(borrowed), Path(held.sysfs).stat())
            os.set_blocking(borrowed, False)
            flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split()[3]
            assert int(flags, 8) & os.O_NONBLOCK
            assert not os.get_inheritable(borrowed)
        finally:
            os.close(borrowed)
    assert open_fds() == before


def test_a_holder_s_container_is_borrowed_by_its_device_number(
    held: HeldDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    monkeypatch.setattr(holders, "_CONTAINER", Path(held.sysfs).stat().st_rdev)
    before = open_fds()
    with process(held, ["cat"]) as (pid, fd):
        holder = Holder(pid, "vfio-mig", True, fd, "/dev/vfio/7")
        borrowed = duplicate_container(ONE, holder)
        assert borrowed is not None
        assert os.path.samestat(os.fstat(borrowed), Path(held.sysfs).stat())
        os.close(borrowed)
        monkeypatch.setattr(holders, "_CONTAINER", os.makedev(10, 196))
        assert duplicate_container(ONE, holder) is None
    assert open_fds() == before
    gone = holder._replace(pid=pid)
    assert duplicate_container(ONE, gone) is None


def test_of_several_containers_none_is_borrowed(held: HeldDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_CONTAINER", Path(held.sysfs).stat().st_rdev)
    fds = [os.open(held.sysfs, os.O_RDWR | os.O_NOCTTY) for _ in range(2)]
    try:
        me = Holder(os.getpid(), "vfio-mig", True, fds[0], "/dev/vfio/7")
        with pytest.raises(DeviceBusyError, match=f"PID {os.getpid()} .vfio-mig. has 2 containers open"):
            duplicate_container(ONE, me)
        os.close(fds.pop())
        copy = duplicate_container(ONE, me)
        assert copy is not None
        assert os.path.samestat(os.fstat(copy), Path(held.sysfs).stat())
        os.close(copy)
    finally:
        for fd in fds:
            os.close(fd)


def test_an_fd_that_the_holder_has_closed_cannot_be_borrowed(held: HeldDevice) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    before = open_fds()
    with process(held, ["cat"]) as (pid, _), pytest.raises(DeviceBusyError) as caught:
        duplicate_fd(held, Holder(pid, "cat", False, 999, str(held.node)))
    assert f"{ONE}: PID {pid} (cat) has it open and its fd cannot be borrowed: EBADF" in str(caught.value)
    assert "it has closed the device meanwhile" in str(caught.value)
    assert open_fds() == before


def test_nothing_is_borrowed_from_a_process_that_has_ended(held: HeldDevice) -> None:
    with process(held, ["cat"]) as (pid, fd):
        pass
    with pytest.raises(DeviceBusyError, match=r"ESRCH .* it has ended meanwhile; try again"):
        duplicate_fd(held, Holder(pid, "cat", False, fd, str(held.node)))


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EPERM, "CAP_SYS_PTRACE"), (errno.ENOSYS, "Linux 5.6 or newer is needed"), (errno.EMFILE, "EMFILE")],
)
def test_a_refusal_to_borrow_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, held: HeldDevice, number: int, hint: str
) -> None:
    def refuse(_pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with process(held, ["cat"]) as (pid, fd), pytest.raises(DeviceBusyError, match=hint) as caught:
        duplicate_fd(held, Holder(pid, "cat", False, fd, str(held.node)))
    assert errno.errorcode[number] in str(caught.value)


class Kernel:
    """Answers the requests of opening a device; group and container are plain files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.calls: list[tuple[str, bytes | int]] = []
        self.viable = 1
        self.refuse: dict[Request, int] = {}
        self.device_fds: list[int] = []
        self.demands_kvm = self.has_kvm = False
        self.kvm = tmp_path / "kvm"
        for name in ("kvm", "vm", "vfio"):
            self.kvm.with_name(name).write_bytes(b"")
        monkeypatch.setattr(kvm, "NODE", str(self.kvm))
        container = tmp_path / "container"
        container.write_bytes(b"")
        monkeypatch.setattr(opening, "CONTAINER", str(container))
        monkeypatch.setattr(uapi, "call", self.call)

    def call(self, fd: int, request: Request, arg: CData | bytearray | int = 0) -> int:
        name = "node" if stat.S_ISCHR(os.fstat(fd).st_mode) else Path(f"/proc/self/fd/{fd}").readlink().name
        sent = arg if isinstance(arg, int) else bytes(arg if isinstance(arg, bytearray) else uapi.ffi.buffer(arg))
        self.calls.append((f"{name} {request.name}", sent))
        if request in self.refuse:
            raise IoctlError(self.refuse[request], request)
        if request == uapi.GROUP_GET_DEVICE_FD and self.demands_kvm and not self.has_kvm:
            raise IoctlError(errno.ESRCH, request)
        if request in (kvm_words.CREATE_VM, kvm_words.CREATE_DEVICE):
            made = os.open(self.kvm.with_name("vm" if request == kvm_words.CREATE_VM else "vfio"), os.O_RDONLY)
            os.set_inheritable(made, True)  # as old kernels make it
            if isinstance(arg, int):
                return made
            device: Any = arg
            device.fd = made
        if request == kvm_words.SET_DEVICE_ATTR:
            self.has_kvm = True
        if request == uapi.GROUP_GET_STATUS:
            status: Any = arg
            status.flags = self.viable
        if request == uapi.GROUP_GET_DEVICE_FD:
            self.device_fds.append(os.open("/dev/null", os.O_RDWR))
            return self.device_fds[-1]
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    return Kernel(monkeypatch, tmp_path)


class Memory:
    """A page of guest memory."""

    gpa = 0x100000
    size = 4096

    def __init__(self) -> None:
        self.mapping = mmap.mmap(-1, 4096)

    def __str__(self) -> str:
        return "page@0x100000"

    def map(self) -> mmap.mmap:
        return self.mapping


NAME: Final = f"{ONE}\0".encode()


def test_a_device_is_opened_through_its_group_and_a_container(held: HeldDevice, kernel: Kernel) -> None:
    before = open_fds()
    with open_device(held, memory=[Memory()]) as device:
        assert (device.name, device.how, device.borrowed) == (ONE, "group", False)
        assert device.fileno() == kernel.device_fds[0]
    assert open_fds() == before
    names = [name for name, _ in kernel.calls]
    assert names == [
        "node VFIO_GROUP_GET_STATUS",
        "node VFIO_GROUP_SET_CONTAINER",
        "container VFIO_SET_IOMMU",
        "container VFIO_IOMMU_MAP_DMA",
        "node VFIO_GROUP_GET_DEVICE_FD",
    ]
    assert kernel.calls[2][1] == 3
    mapped = kernel.calls[3][1]
    assert isinstance(mapped, bytes)
    argsz, flags, vaddr, iova, size = struct.unpack("=IIQQQ", mapped)
    assert (argsz, flags, iova, size) == (32, 3, 0x100000, 4096)
    assert vaddr % 4096 == 0
    assert vaddr > 0
    assert kernel.calls[4][1] == NAME


@pytest.mark.parametrize(
    ("refused", "kind", "words"),
    [
        ((uapi.GROUP_GET_STATUS, errno.ENOTTY), OpenError, "VFIO_GROUP_GET_STATUS failed: ENOTTY"),
        ((uapi.GROUP_SET_CONTAINER, errno.EBUSY), OpenError, "VFIO_GROUP_SET_CONTAINER failed: EBUSY"),
        ((uapi.SET_IOMMU, errno.ENODEV), OpenError, "modprobe vfio_iommu_type1"),
        ((uapi.SET_IOMMU, errno.EPERM), OpenError, "EPERM .*; the IOMMU does not remap interrupts; vfio_iommu_type1's"),
        ((uapi.GROUP_SET_CONTAINER, errno.EPERM), OpenError, "another device of its group belongs to a host driver"),
        (
            (uapi.IOMMU_MAP_DMA, errno.ENOMEM),
            OpenError,
            "guest memory page@0x100000: VFIO_IOMMU_MAP_DMA failed: ENOMEM",
        ),
        ((uapi.GROUP_GET_DEVICE_FD, errno.ENODEV), DeviceNotFoundError, "group 7 does not have it"),
        ((uapi.GROUP_GET_DEVICE_FD, errno.EBUSY), OpenError, "VFIO_GROUP_GET_DEVICE_FD failed: EBUSY"),
    ],
)
def test_a_refused_step_of_opening_closes_what_was_open(
    held: HeldDevice, kernel: Kernel, refused: tuple[Request, int], kind: type[VfioMigError], words: str
) -> None:
    before = open_fds()
    kernel.refuse = dict([refused])
    with pytest.raises(kind, match=words) as caught:
        open_device(held, memory=[Memory()])
    assert type(caught.value) is kind
    assert caught.value.device == ONE
    assert open_fds() == before


def test_a_group_that_is_not_viable_gets_no_container(held: HeldDevice, kernel: Kernel) -> None:
    before = open_fds()
    kernel.viable = 2
    with pytest.raises(OpenError, match="group 7 is not viable; bind every device of the group"):
        open_device(held)
    assert [name for name, _ in kernel.calls] == ["node VFIO_GROUP_GET_STATUS"]
    assert open_fds() == before


IN_A_VM: Final = [
    "kvm KVM_CREATE_VM",
    "vm KVM_SET_USER_MEMORY_REGION",
    "vm KVM_CREATE_DEVICE",
    "vfio KVM_SET_DEVICE_ATTR",
    "node VFIO_GROUP_GET_DEVICE_FD",
    "node VFIO_DEVICE_RESET",
]


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "demanded by the driver"])
def test_a_driver_that_demands_a_kvm_gets_one_with_the_guest_s_memory(
    held: HeldDevice, kernel: Kernel, asked: bool
) -> None:
    before = open_fds()
    kernel.demands_kvm = True
    memory = Memory()
    with open_device(held, memory=[memory], kvm=asked) as device:
        assert device.how == "group"
        names = [name for name, _ in kernel.calls]
        assert names[4:] == ([] if asked else ["node VFIO_GROUP_GET_DEVICE_FD"]) + IN_A_VM
        slot = dict(kernel.calls)["vm KVM_SET_USER_MEMORY_REGION"]
        assert isinstance(slot, bytes)
        number, flags, gpa, size, address = struct.unpack("=IIQQQ", slot)
        assert (number, flags, gpa, size) == (0, 0, 0x100000, 4096)
        assert address == address_of(memory.mapping)
        assert kernel.kvm.with_name("vm") in {Path(f"/proc/self/fd/{fd}").resolve() for fd in open_fds()}
        assert not [fd for fd in set(open_fds()) - set(before) if os.get_inheritable(int(fd))]
    assert open_fds() == before


def test_without_a_kvm_such_a_device_says_what_it_needs(held: HeldDevice, kernel: Kernel) -> None:
    before = open_fds()
    kernel.demands_kvm = True
    kernel.kvm.unlink()
    with pytest.raises(OpenError, match=r"only for a process with a KVM, and \S+ cannot be opened: ENOENT .*kvm_intel"):
        open_device(held)
    kernel.kvm.write_bytes(b"")
    kernel.refuse = {kvm_words.CREATE_VM: errno.ENOMEM}
    with pytest.raises(OpenError, match="a VM for it: KVM_CREATE_VM failed: ENOMEM"):
        open_device(held)
    kernel.refuse = {kvm_words.SET_DEVICE_ATTR: errno.EINVAL}
    with pytest.raises(OpenError, match="a VM for it: KVM_SET_DEVICE_ATTR failed: EINVAL"):
        open_device(held)
    kernel.refuse = {uapi.DEVICE_RESET: errno.EIO}
    with pytest.raises(DeviceError, match="VFIO_DEVICE_RESET failed: EIO"):
        open_device(held)
    kernel.refuse = {uapi.GROUP_GET_DEVICE_FD: errno.ESRCH}
    with pytest.raises(OpenError, match=r"ESRCH .*; its driver demands a process that has made a KVM VM"):
        open_device(held)
    assert open_fds() == before


def test_a_device_that_no_iommu_confines_takes_no_guest_memory(held: HeldDevice, kernel: Kernel) -> None:
    confined = held._replace(is_noiommu=True)
    with pytest.raises(UnsupportedError, match=r"no IOMMU confines it .*leave out --memory"):
        open_device(confined, memory=[Memory()])
    assert kernel.calls == []
    with open_device(confined) as device:
        assert device.how == "group"
    assert kernel.calls[2] == ("container VFIO_SET_IOMMU", 8)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOENT, OpenError, "is the device bound to a VFIO driver, and udev running?"),
        (errno.EACCES, OpenError, "run as root, or give this user the group's node"),
        (errno.EPERM, OpenError, "a no-IOMMU group needs CAP_SYS_RAWIO"),
        (errno.EBUSY, DeviceBusyError, "is open in another process: EBUSY"),
    ],
)
def test_a_node_that_cannot_be_opened_says_why(
    monkeypatch: pytest.MonkeyPatch, held: HeldDevice, number: int, kind: type[VfioMigError], words: str
) -> None:
    def refuse(_path: str, _flags: int) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(kind) as caught:
            open_device(held)
    assert words in str(caught.value)
    assert errno.errorcode[number] in str(caught.value)
    assert held.sysfs in str(caught.value)


def test_a_missing_container_is_a_missing_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, held: HeldDevice
) -> None:
    before = open_fds()
    monkeypatch.setattr(opening, "CONTAINER", str(tmp_path / "none"))
    with pytest.raises(OpenError, match=r"ENOENT .*; load the module: modprobe vfio$"):
        open_device(held)
    assert open_fds() == before


def test_a_device_without_a_group_cannot_be_opened(tree: Tree) -> None:
    with pytest.raises(OpenError, match="it has neither a group nor a node"):
        open_device(tree.host.find(ONE)._replace(group=None))


def test_a_process_that_does_not_hold_it_lends_nothing(held: HeldDevice, kernel: Kernel) -> None:
    with pytest.raises(DeviceBusyError, match=f"PID {os.getppid()} does not have it open; leave out --pid"):
        open_device(held, pid=os.getppid())
    assert kernel.calls == []


def test_the_vmm_lends_before_our_own_holder_does(held: HeldDevice) -> None:
    command = [sys.executable, "-c", HOLD, ONE]
    with process(held, command) as (ours, _), process(held, ["cat"]) as (vmm, _):
        found = find_holder(held)
        assert found is not None
        assert found.pid == vmm
        assert [holder.pid for holder in find_holders(held)] == [vmm, ours]
        other = find_holder(held, ours)
        assert other is not None
        assert other.pid == ours


def test_an_fd_that_has_become_another_file_is_not_borrowed(tmp_path: Path, held: HeldDevice) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    before = open_fds()
    other = tmp_path / "other"
    other.write_bytes(b"")
    with process(held._replace(sysfs=str(other)), ["cat"]) as (pid, fd), pytest.raises(DeviceBusyError) as caught:
        duplicate_fd(held, Holder(pid, "cat", False, fd, str(held.node)))
    assert "it has closed the device meanwhile" in str(caught.value)
    assert open_fds() == before


def test_a_group_that_its_holder_has_not_set_up_is_told_with_the_holder(held: HeldDevice, kernel: Kernel) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    kernel.refuse[uapi.GROUP_GET_DEVICE_FD] = errno.EINVAL
    before = open_fds()
    with process(held, ["cat"]) as (pid, _), pytest.raises(OpenError) as caught:
        open_device(held)
    assert str(caught.value) == (
        f"{ONE}: PID {pid} (cat) has its group open: VFIO_GROUP_GET_DEVICE_FD failed: EINVAL (Invalid argument); "
        "wait until that process has set it up, or end it"
    )
    assert open_fds() == before


def test_an_inherited_group_gives_the_device_and_stays_open(held: HeldDevice, kernel: Kernel) -> None:
    fd = os.open(held.sysfs, os.O_RDONLY)
    try:
        with open_device(held, fd=fd) as device:
            assert (device.how, device.holder, device.borrowed) == ("inherited", None, True)
            assert device.fileno() == kernel.device_fds[-1]
        assert is_open(fd)
        kernel.refuse[uapi.GROUP_GET_DEVICE_FD] = errno.ENOTTY
        with pytest.raises(OpenError, match=f"ENOTTY .*; fd {fd} is {held.sysfs}; --fd takes the fd of"):
            open_device(held, fd=fd)
    finally:
        os.close(fd)
    with pytest.raises(OpenError, match=f"fd {fd} is not open: ENOENT"):
        open_device(held, fd=fd)


@pytest.mark.parametrize("named", [True, False], ids=["named by --pid", "our own holder"])
def test_a_holder_lends_its_group_and_the_kernel_names_the_device(
    held: HeldDevice, kernel: Kernel, named: bool
) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    before = open_fds()
    command = ["cat"] if named else [sys.executable, "-c", HOLD, ONE]
    with process(held, command) as (pid, _), open_device(held, pid=pid if named else None) as device:
        assert (device.how, device.borrowed) == ("borrowed", True)
        assert device.holder is not None
        assert device.holder.pid == pid
        assert device.fileno() == kernel.device_fds[0]
    assert kernel.calls == [("node VFIO_GROUP_GET_DEVICE_FD", NAME)]
    assert open_fds() == before


OTHER_GPU: Final = "0000:00:03.0"


@pytest.fixture
def types_tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    text = "low_gm_size: 64MB\nhigh_gm_size: 384MB\n"
    tree.mdev_type(GPU, "i915-GVTg_V4_8", available_instances="3\n", name="GVTg_V4_8\n", description=text)
    tree.mdev_type(GPU, "i915-GVTg_V4_4", available_instances="0\n", name="GVTg_V4_4\n")
    tree.mdev_type("mtty", "mtty-1", available_instances="many\n")
    return tree


def test_mdev_types_are_listed_with_what_is_known(types_tree: Tree) -> None:
    assert mdev.types(types_tree.host) == [
        mdev.MdevType(GPU, "i915-GVTg_V4_4", "GVTg_V4_4", 0, ""),
        mdev.MdevType(GPU, "i915-GVTg_V4_8", "GVTg_V4_8", 3, "low_gm_size: 64MB\nhigh_gm_size: 384MB"),
        mdev.MdevType("mtty", "mtty-1", "1", 0, ""),
    ]


def test_a_host_without_mdevs_has_no_types(tmp_path: Path) -> None:
    assert mdev.types(Host(str(tmp_path))) == []


def created(tree: Tree, parent: str, kind: str) -> str:
    return (tree.root / f"sys/class/mdev_bus/{parent}/mdev_supported_types/{kind}/create").read_text()


@pytest.mark.parametrize("name", ["i915-GVTg_V4_8", "GVTg_V4_8"])
@pytest.mark.parametrize("uuid", [TWO, TWO.upper()])
def test_an_mdev_is_created_by_the_types_long_or_short_name(types_tree: Tree, name: str, uuid: str) -> None:
    assert mdev.create(name, uuid=uuid, host=types_tree.host) == TWO
    assert created(types_tree, GPU, "i915-GVTg_V4_8") == TWO
    assert created(types_tree, GPU, "i915-GVTg_V4_4") == ""


def test_an_mdev_without_a_given_uuid_gets_a_new_one(types_tree: Tree) -> None:
    first = mdev.create("GVTg_V4_8", host=types_tree.host)
    assert created(types_tree, GPU, "i915-GVTg_V4_8") == first
    assert mdev.create("GVTg_V4_8", host=types_tree.host) != first


@pytest.mark.parametrize("uuid", ["", "x", ONE[:-1], ONE + "0", f"{ONE}\n", f"{{{ONE}}}", ONE.replace("-", "")])
def test_what_is_no_uuid_is_not_written(types_tree: Tree, uuid: str) -> None:
    with pytest.raises(UsageError, match="is not a UUID"):
        mdev.create("GVTg_V4_8", uuid=uuid, host=types_tree.host)
    assert created(types_tree, GPU, "i915-GVTg_V4_8") == ""


@pytest.mark.parametrize(("name", "parent"), [("GVTg_V5_8", None), ("GVTg_V4_8", OTHER_GPU), ("i915", None)])
def test_a_type_that_nobody_offers_is_not_found(types_tree: Tree, name: str, parent: str | None) -> None:
    with pytest.raises(DeviceNotFoundError, match=f"no parent offers mdev type '{name}'; see 'vfio-mig mdev types'"):
        mdev.create(name, parent=parent, host=types_tree.host)


def test_a_type_of_two_parents_is_ambiguous_until_one_is_named(types_tree: Tree) -> None:
    types_tree.mdev_type(OTHER_GPU, "i915-GVTg_V4_8", available_instances="1", name="GVTg_V4_8")
    with pytest.raises(UsageError) as caught:
        mdev.create("GVTg_V4_8", host=types_tree.host)
    assert f"{GPU}/i915-GVTg_V4_8, {OTHER_GPU}/i915-GVTg_V4_8; say which with --parent" in str(caught.value)
    uuid = mdev.create("GVTg_V4_8", parent=OTHER_GPU, host=types_tree.host)
    assert created(types_tree, OTHER_GPU, "i915-GVTg_V4_8") == uuid
    assert created(types_tree, GPU, "i915-GVTg_V4_8") == ""


def test_a_parent_without_room_is_the_kernels_refusal(types_tree: Tree) -> None:
    attribute = types_tree.root / f"sys/class/mdev_bus/{GPU}/mdev_supported_types/i915-GVTg_V4_8/create"
    attribute.unlink()
    attribute.symlink_to("/dev/full")
    before = open_fds()
    with pytest.raises(DeviceError) as caught:
        mdev.create("GVTg_V4_8", uuid=ONE, host=types_tree.host)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value).startswith(f"creating a i915-GVTg_V4_8 on {GPU} failed: ENOSPC")
    assert "the parent has no room for another" in str(caught.value)
    assert open_fds() == before


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.EEXIST, DeviceError, "an mdev with this UUID exists"),
        (errno.EUSERS, DeviceError, "the parent has no room for another"),
        (errno.EACCES, OpenError, "run as root"),
        (errno.EPERM, OpenError, "run as root"),
        (errno.EIO, DeviceError, None),
    ],
)
def test_a_refused_creation_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, types_tree: Tree, number: int, kind: type[VfioMigError], hint: str | None
) -> None:
    def refuse(_fd: int, _data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(kind) as caught:
            mdev.create("GVTg_V4_8", uuid=ONE, host=types_tree.host)
    assert errno.errorcode[number] in caught.value.problem
    assert (caught.value.hint or "").startswith(hint or "")
    assert (caught.value.hint is None) is (hint is None)


@pytest.fixture
def mdev_tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    tree.mdev(ONE, group=7)
    tree.mdev(TWO, group=8)
    return tree


def seen(tree: Tree, *holders: Holder, unseen: Unseen | None = None) -> Snapshot:
    return Snapshot(tree.host, tree.host.devices(), View({ONE: holders}, unseen))


@pytest.mark.parametrize("name", [ONE, ONE.upper(), "/dev/vfio/7"])
def test_an_mdev_is_removed_by_writing_1(mdev_tree: Tree, name: str) -> None:
    mdev.remove(name, host=mdev_tree.host, seen=seen(mdev_tree))
    written = [(mdev_tree.root / f"sys/bus/mdev/devices/{uuid}/remove").read_text() for uuid in (ONE, TWO)]
    assert written == ["1", ""]


def test_an_mdev_that_is_open_is_not_removed(mdev_tree: Tree) -> None:
    view = seen(mdev_tree, Holder(42, "qemu-system-x86", False, 9))
    with pytest.raises(DeviceBusyError, match=r"it is open in PID 42 \(qemu-system-x86\); end that process first"):
        mdev.remove(ONE, host=mdev_tree.host, seen=view)
    assert (mdev_tree.root / f"sys/bus/mdev/devices/{ONE}/remove").read_text() == ""


def test_an_mdev_is_removed_only_when_its_group_shows_that_it_is_free(mdev_tree: Tree) -> None:
    """Where not every process can be seen, and also where an fd is on its way between two."""
    removal = mdev_tree.root / f"sys/bus/mdev/devices/{ONE}/remove"
    blind = seen(mdev_tree, unseen=Unseen("it is dark", "make light"))
    with pytest.raises(OpenError, match=r"cannot open /dev/vfio/7, to see that nobody else has: ENOENT .*udev"):
        mdev.remove(ONE, host=mdev_tree.host, seen=blind)
    node = mdev_tree.write("dev/vfio/7", "")
    busy = OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    for view, hint in ((blind, "it is dark; make light"), (seen(mdev_tree), "end the process that has sent its fd")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", raising(busy))
            with pytest.raises(DeviceBusyError, match=f"EBUSY .*; {hint}"):
                mdev.remove(ONE, host=mdev_tree.host, seen=view)
    assert removal.read_text() == ""
    node.write_text("")
    mdev.remove(ONE, host=mdev_tree.host, seen=blind)
    assert removal.read_text() == "1"


def test_an_mdev_with_a_node_of_its_own_is_not_removed_in_the_dark(mdev_tree: Tree) -> None:
    """Its node may be open without being in use, which the group does not show, and the kernel would wait for it."""
    mdev_tree.write("dev/vfio/7", "")
    mdev_tree.write(f"sys/devices/pci0000:00/{GPU}/{ONE}/vfio-dev/vfio9/dev", "246:9\n")
    blind = seen(mdev_tree, unseen=Unseen("it is dark", "make light"))
    with pytest.raises(DeviceBusyError, match=r"it may be open: it is dark; the kernel would wait .*; make light"):
        mdev.remove(ONE, host=mdev_tree.host, seen=blind)
    mdev.remove(ONE, host=mdev_tree.host, seen=seen(mdev_tree))
    assert (mdev_tree.root / f"sys/bus/mdev/devices/{ONE}/remove").read_text() == "1"


def raising(error: OSError) -> Any:
    def refuse(*_: object, **__: object) -> int:
        raise error

    return refuse


def test_parents_without_room_are_left_out(types_tree: Tree) -> None:
    types_tree.mdev_type(OTHER_GPU, "i915-GVTg_V4_8", available_instances="0", name="GVTg_V4_8")
    assert mdev.create("GVTg_V4_8", uuid=ONE, host=types_tree.host) == ONE
    assert created(types_tree, GPU, "i915-GVTg_V4_8") == ONE
    types_tree.write(f"sys/devices/pci0000:00/{GPU}/mdev_supported_types/i915-GVTg_V4_8/available_instances", "0\n")
    with pytest.raises(DeviceError, match="none of the 2 parents of 'GVTg_V4_8' has room for another") as caught:
        mdev.create("GVTg_V4_8", uuid=TWO, host=types_tree.host)
    assert (caught.value.exit_code, caught.value.errno) == (5, errno.ENOSPC)
    assert created(types_tree, OTHER_GPU, "i915-GVTg_V4_8") == ""


def test_a_parent_that_does_not_say_whether_it_has_room_may_have_some(types_tree: Tree) -> None:
    types_tree.mdev_type(OTHER_GPU, "i915-GVTg_V4_8", name="GVTg_V4_8")
    with pytest.raises(UsageError, match=f"{GPU}/i915-GVTg_V4_8, {OTHER_GPU}/i915-GVTg_V4_8"):
        mdev.create("GVTg_V4_8", host=types_tree.host)


def test_a_pci_function_is_not_removed(mdev_tree: Tree) -> None:
    mdev_tree.pci(NIC, driver="vfio-pci", group=12, cdev="vfio3")
    removal = mdev_tree.write(f"sys/devices/pci0000:00/{NIC}/remove", "")
    with pytest.raises(UsageError, match=f"^{NIC}: is not an mdev"):
        mdev.remove(NIC, host=mdev_tree.host)
    assert removal.read_text() == ""


def test_an_mdev_that_is_not_there_is_not_removed(mdev_tree: Tree) -> None:
    with pytest.raises(DeviceNotFoundError):
        mdev.remove(ONE.replace("1001", "1009"), host=mdev_tree.host)
