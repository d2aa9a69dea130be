# SPDX-License-Identifier: MIT
"""Devices with a node of their own. The kernel's answers are played; holders are real processes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import pytest

from vfio_mig import uapi
from vfio_mig.errors import DeviceBusyError, OpenError, VfioMigError
from vfio_mig.host import cdev, opening
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.discover import Host
from vfio_mig.host.dma import ContainerDma, IommufdDma
from vfio_mig.host.holders import find_holder, find_holders
from vfio_mig.host.opening import open_device
from vfio_mig.uapi import IoctlError, Request, iommufd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.uapi._generated import CData

NAME: Final = "0000:3b:00.1"
IOAS, HWPT, DEVID = 5, 6, 7
STEPS: Final = ["IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP", "IOMMU_GET_HW_INFO"]


class NodeDevice(HostDevice):
    """Its own node is its *sysfs*, which may be any file; its group's node is *parent*."""

    __slots__ = ()

    @property
    def node(self) -> str | None:
        return self.parent or None

    @property
    def cdev(self) -> str:
        return self.sysfs

    @property
    def cdev_number(self) -> int:
        return Path(self.sysfs).stat().st_rdev


def made(node: str, group: str = "") -> NodeDevice:
    return NodeDevice(NAME, node, "pci", "8086:591d", group, "mlx5_vfio_pci", 12)


class Kernel:
    """Answers for nodes, /dev/iommu, groups and containers, which are plain files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refuse: dict[Request, int] = {}
        self.can_track = 0
        for name in ("node", "iommu", "group", "container"):
            (tmp_path / name).touch()
        monkeypatch.setattr(cdev, "NODE", str(tmp_path / "iommu"))
        monkeypatch.setattr(opening, "CONTAINER", str(tmp_path / "container"))
        monkeypatch.setattr(uapi, "call", self.call)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def call(self, fd: int, request: Request, arg: CData | bytearray | int = 0) -> int:
        file = Path(f"/proc/self/fd/{fd}").readlink().name
        struct: Any = arg
        self.calls.append((f"{file} {request.name}", struct))
        if request in self.refuse:
            raise IoctlError(self.refuse[request], request)
        if request == uapi.DEVICE_BIND_IOMMUFD:
            assert Path(f"/proc/self/fd/{struct.iommufd}").readlink().name == "iommu"
            struct.out_devid = DEVID
        elif request == iommufd.IOAS_ALLOC:
            struct.out_ioas_id = IOAS
        elif request == iommufd.GET_HW_INFO:
            assert struct.dev_id == DEVID
            struct.out_capabilities = self.can_track
        elif request == iommufd.HWPT_ALLOC:
            assert (struct.flags, struct.dev_id, struct.pt_id) == (2, DEVID, IOAS)
            struct.out_hwpt_id = HWPT
        elif request == uapi.GROUP_GET_STATUS:
            struct.flags = 1
        elif request == uapi.GROUP_GET_DEVICE_FD:
            return os.open("/dev/null", os.O_RDWR)
        return 0


class Memory(NamedTuple):
    """A page of guest memory."""

    mapping: mmap.mmap
    gpa: int = 0x100000
    size: int = 4096

    def __str__(self) -> str:
        return "page@0x100000"

    def map(self) -> mmap.mmap:
        return self.mapping


@pytest.fixture
def memory() -> Any:
    return Memory(mmap.mmap(-1, 4096))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    return Kernel(monkeypatch, tmp_path)


@pytest.fixture
def device(tmp_path: Path) -> NodeDevice:
    return made(str(tmp_path / "node"), str(tmp_path / "group"))


@pytest.fixture(autouse=True)
def no_open_file_is_left() -> Iterator[None]:
    def is_open(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    before = set(filter(is_open, range(256)))
    yield
    assert set(filter(is_open, range(256))) == before


def test_a_device_with_a_node_of_its_own_is_bound_to_an_iommufd_and_its_group_left_alone(
    device: NodeDevice, kernel: Kernel
) -> None:
    with open_device(device) as opened:
        assert (opened.how, opened.node, opened.borrowed, opened.dma) == ("cdev", device.cdev, False, None)
        assert Path(f"/proc/self/fd/{opened.fileno()}").readlink() == Path(device.cdev)
    assert kernel.names == ["node VFIO_DEVICE_BIND_IOMMUFD"]
    assert kernel.calls[0][1].argsz == 16


def test_guest_memory_is_mapped_in_an_address_space_that_the_device_is_attached_to(
    device: NodeDevice, kernel: Kernel, memory: Any
) -> None:
    with open_device(device, memory=[memory]) as opened:
        assert fcntl.fcntl(opened.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert isinstance(opened.dma, IommufdDma)
        assert opened.dma[1:] == (None, "its IOMMU cannot track writes", ((0x100000, 4096),))
    assert kernel.names[1:] == [*(f"iommu {name}" for name in STEPS), "node VFIO_DEVICE_ATTACH_IOMMUFD_PT"]
    mapped, attached = kernel.calls[2][1], kernel.calls[4][1]
    assert (mapped.size, mapped.flags, mapped.ioas_id, mapped.length, mapped.iova) == (40, 7, IOAS, 4096, 0x100000)
    assert mapped.user_va
    assert mapped.user_va % 4096 == 0
    assert (attached.argsz, attached.pt_id) == (12, IOAS)


def test_page_tables_that_can_track_are_used_where_the_iommu_has_them(
    device: NodeDevice, kernel: Kernel, memory: Any
) -> None:
    kernel.can_track = 1
    with open_device(device, memory=[memory]) as opened:
        assert isinstance(opened.dma, IommufdDma)
        assert (opened.dma.hwpt, opened.dma.why_not) == (HWPT, "")
    assert kernel.names[-2:] == ["iommu IOMMU_HWPT_ALLOC", "node VFIO_DEVICE_ATTACH_IOMMUFD_PT"]
    assert kernel.calls[-1][1].pt_id == HWPT


@pytest.mark.parametrize(
    ("request_", "number", "why"),
    [
        (iommufd.GET_HW_INFO, errno.ENOENT, "there is no IOMMU in front of it"),
        (iommufd.HWPT_ALLOC, errno.EOPNOTSUPP, "its IOMMU: IOMMU_HWPT_ALLOC failed: "),
    ],
)
def test_a_device_that_cannot_be_tracked_is_attached_all_the_same(
    device: NodeDevice, kernel: Kernel, memory: Any, *, request_: Request, number: int, why: str
) -> None:
    kernel.can_track = 1
    kernel.refuse[request_] = number
    with open_device(device, memory=[memory]) as opened:
        assert isinstance(opened.dma, IommufdDma)
        assert opened.dma.hwpt is None
        assert opened.dma.why_not.startswith(why)
    assert kernel.calls[-1][1].pt_id == IOAS


@pytest.mark.parametrize(
    ("request_", "number", "kind", "words"),
    [
        (uapi.DEVICE_BIND_IOMMUFD, errno.EINVAL, DeviceBusyError, "node is open in another process: VFIO_DEVICE_BIND"),
        (uapi.DEVICE_BIND_IOMMUFD, errno.EBUSY, DeviceBusyError, "group is open in another process: .*EBUSY"),
        (uapi.DEVICE_BIND_IOMMUFD, errno.EPERM, OpenError, "EPERM .*allow_unsafe_interrupts"),
        (uapi.DEVICE_BIND_IOMMUFD, errno.ENOTTY, OpenError, "ENOTTY .*--via group"),
        (iommufd.IOAS_ALLOC, errno.ENOMEM, OpenError, "IOMMU_IOAS_ALLOC failed: ENOMEM"),
        (iommufd.IOAS_MAP, errno.EFAULT, OpenError, "guest memory page@0x100000: IOMMU_IOAS_MAP failed: EFAULT"),
        (uapi.DEVICE_ATTACH_IOMMUFD_PT, errno.EINVAL, OpenError, "guest memory: VFIO_DEVICE_ATTACH_IOMMUFD_PT failed"),
    ],
)
def test_a_refused_step_closes_what_was_open_and_says_what_to_do(
    device: NodeDevice,
    kernel: Kernel,
    memory: Any,
    *,
    request_: Request,
    number: int,
    kind: type[VfioMigError],
    words: str,
) -> None:
    kernel.refuse[request_] = number
    with pytest.raises(kind, match=words) as caught:
        open_device(device, memory=[memory])
    assert type(caught.value) is kind
    assert caught.value.device == NAME


@pytest.mark.parametrize("lacking", ["node", "iommu"])
def test_the_group_is_taken_where_the_node_or_dev_iommu_cannot_be_opened(
    device: NodeDevice, kernel: Kernel, memory: Any, tmp_path: Path, lacking: str
) -> None:
    (tmp_path / lacking).rename(tmp_path / "away")
    with pytest.raises(OpenError, match=f"cannot open .*/{lacking}: ENOENT .*; (is udev running|load the module)"):
        open_device(device, via="cdev") if lacking == "iommu" else open_device(gone(device), via="cdev")
    if lacking == "node":
        device = gone(device)
    with open_device(device, memory=[memory]) as opened:
        assert (opened.how, opened.node) == ("group", device.node)
        assert isinstance(opened.dma, ContainerDma)
        assert opened.dma.pieces == ((0x100000, 4096),)
    assert "node VFIO_DEVICE_BIND_IOMMUFD" not in kernel.names
    with pytest.raises(OpenError, match="cannot open"):
        open_device(device._replace(parent=""))


class GoneDevice(NodeDevice):
    """Its node was never made."""

    __slots__ = ()

    @property
    def cdev_number(self) -> int:
        return 7


def gone(device: HostDevice) -> GoneDevice:
    return GoneDevice(*device)


def test_a_node_left_by_another_device_is_not_opened(device: NodeDevice, kernel: Kernel) -> None:
    with pytest.raises(OpenError, match="is the node of another device"):
        open_device(gone(device), via="cdev")
    assert kernel.calls == []


def test_the_way_can_be_chosen(device: NodeDevice, kernel: Kernel) -> None:
    with open_device(device, via="group") as opened:
        assert (opened.how, opened.dma) == ("group", None)
    with open_device(device, via="cdev") as opened:
        assert opened.how == "cdev"
    kernel.calls.clear()
    with pytest.raises(OpenError, match="it has no group; leave out --via group"):
        open_device(device._replace(parent=""), via="group")
    with pytest.raises(OpenError, match="it has no node of its own; that takes CONFIG_VFIO_DEVICE_CDEV"):
        open_device(HostDevice(NAME, "/nowhere", "pci", "", "", "", 1 << 30), via="cdev")
    assert kernel.calls == []


def test_a_device_without_a_group_is_opened_by_its_node(device: NodeDevice, kernel: Kernel) -> None:
    with open_device(device._replace(parent="")) as opened:
        assert opened.how == "cdev"
    assert kernel.names == ["node VFIO_DEVICE_BIND_IOMMUFD"]


MASTER, TERMINAL = os.openpty()
NODE: Final = os.ttyname(TERMINAL)  # a character device that nobody else on this machine has open
os.close(TERMINAL)


class Open:
    """A process with the node open *times* times."""

    def __init__(self, times: int = 1) -> None:
        self._fds = [os.open(NODE, os.O_RDWR | os.O_NOCTTY) for _ in range(times)]
        self._child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=self._fds)
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        for fd in self._fds:
            os.close(fd)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def borrowing_is_forbidden() -> bool:
    import ctypes

    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        pidfd = os.pidfd_open(child.pid)
        fd: int = ctypes.CDLL(None).syscall(438, pidfd, 0, 0)
        os.close(pidfd)
    if fd >= 0:
        os.close(fd)
    return fd < 0


def test_a_holder_of_the_node_is_found_and_lends_it_without_its_group(kernel: Kernel) -> None:
    device = made(NODE)
    with Open() as owner:
        found = find_holder(device)
        assert found is not None
        assert (found.pid, found.node) == (owner.pid, NODE)
        if borrowing_is_forbidden():
            pytest.skip("pidfd_getfd is not permitted here")
        with open_device(device) as opened:
            assert (opened.how, opened.node, opened.borrowed, opened.is_held) == ("borrowed", NODE, True, True)
            assert os.fstat(opened.fileno()).st_rdev == Path(NODE).stat().st_rdev
            assert not os.get_inheritable(opened.fileno())
        assert kernel.names == [f"{Path(NODE).name} VFIO_DEVICE_GET_INFO"]
    assert find_holder(device) is None


def test_a_path_alone_is_no_proof_of_a_node() -> None:
    class Renumbered(NodeDevice):
        """In another mount namespace the path may be another device's."""

        __slots__ = ()

        @property
        def cdev_number(self) -> int:
            return Path(NODE).stat().st_rdev + 1

    with Open():
        assert find_holder(made(NODE)) is not None
        assert find_holder(Renumbered(*made(NODE))) is None


def test_a_node_that_is_open_and_not_bound_is_told_with_its_holder(kernel: Kernel) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    kernel.refuse[uapi.DEVICE_GET_INFO] = errno.EINVAL
    with Open(2) as owner:
        assert len(list(find_holders(made(NODE)))) == 2
        with pytest.raises(OpenError) as caught:
            open_device(made(NODE))
    assert f"PID {owner.pid} (cat) has {NODE} open and has not bound it to an iommufd; wait" in str(caught.value)
    assert kernel.names == [f"{Path(NODE).name} VFIO_DEVICE_GET_INFO"] * 2


def test_of_several_open_nodes_the_bound_one_is_borrowed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    if borrowing_is_forbidden():
        pytest.skip("pidfd_getfd is not permitted here")
    answers = iter([errno.EINVAL, errno.EINVAL, 0])

    def call(_fd: int, request: Request, _arg: object = 0) -> int:
        kernel.calls.append((request.name, None))
        if number := next(answers):
            raise IoctlError(number, request)
        return 0

    monkeypatch.setattr(uapi, "call", call)
    with Open(2), Open(1), open_device(made(NODE)) as opened:
        assert opened.how == "borrowed"
    assert len(kernel.calls) == 3


def test_an_inherited_fd_of_the_node_is_the_device_if_it_is_bound(kernel: Kernel) -> None:
    device = made(NODE)
    fd = os.open(NODE, os.O_RDWR | os.O_NOCTTY)
    other = os.open("/dev/zero", os.O_RDWR)
    try:
        with open_device(device, fd=fd) as opened:
            assert (opened.how, opened.node, opened.borrowed) == ("inherited", NODE, True)
            assert opened.fileno() != fd
        kernel.refuse[uapi.DEVICE_GET_INFO] = errno.EINVAL
        with pytest.raises(OpenError, match=f"fd {fd}, {NODE}, is not bound to an iommufd; bind it first"):
            open_device(device, fd=fd)
        kernel.refuse[uapi.GROUP_GET_DEVICE_FD] = errno.ENOTTY
        with pytest.raises(OpenError, match=f"fd {other} is /dev/zero; --fd takes the fd of {NODE}, bound to an iommu"):
            open_device(device, fd=other)
        assert os.fstat(fd).st_rdev == Path(NODE).stat().st_rdev
    finally:
        os.close(fd)
        os.close(other)


@pytest.mark.parametrize("text", [None, "", "246", "246:x", "246:0:1", "9" * 30 + ":0", "-1:0"])
def test_a_node_without_a_number_in_sysfs_is_none(tmp_path: Path, text: str | None) -> None:
    """As on kernels without VFIO_DEVICE_CDEV, which show the directory all the same."""
    entry = tmp_path / "vfio-dev" / "vfio3"
    entry.mkdir(parents=True)
    if text is not None:
        (entry / "dev").write_text(text)
    device = HostDevice(NAME, str(tmp_path), "pci", "", "", "", None)
    assert (device.cdev, device.cdev_number) == (None, None)
    (entry / "dev").write_text("246:3\n")
    assert (device.cdev, device.cdev_number) == ("/dev/vfio/devices/vfio3", os.makedev(246, 3))


def test_an_iommufd_that_was_closed_is_not_used(kernel: Kernel, tmp_path: Path) -> None:
    from vfio_mig.host.iommufd import Iommufd

    iommu = Iommufd(str(tmp_path / "iommu"))
    assert iommu.alloc_ioas() == IOAS
    iommu.close()
    iommu.close()
    with pytest.raises(ValueError, match="closed"):
        iommu.alloc_ioas()
    assert len(kernel.calls) == 1
    assert Host(str(tmp_path)).devices() == []
