# SPDX-License-Identifier: MIT
"""What is known of devices that nobody opens: in a made-up sysfs and debugfs."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.test_host import NIC, ONE, PLAIN, Tree
from vfio_mig.cli.devices import _words
from vfio_mig.errors import DeviceNotFoundError, UsageError
from vfio_mig.host import drivers
from vfio_mig.host.offline import OfflineStatus, look, read_within
from vfio_mig.jobs.queries.devices import DeviceRow, device_info

if TYPE_CHECKING:
    from vfio_mig.host.devices import HostDevice

STATE: Final = "migration/state"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    tree.pci(NIC, driver="mlx5_vfio_pci", group=12, cdev="vfio3")
    tree.pci(PLAIN, driver="vfio-pci", group=13, cdev="vfio5")
    tree.mdev(ONE, group=7)
    return tree


def debugfs(tree: Tree, name: str, text: str | None = None) -> Path:
    """Make a device's directory, with a state if it has one."""
    directory = tree.root / "sys/kernel/debug/vfio" / name
    directory.mkdir(parents=True)
    if text is not None:
        tree.write(f"sys/kernel/debug/vfio/{name}/{STATE}", text)
    return directory


def known(tree: Tree, name: str, seconds: float = 10) -> OfflineStatus:
    (one,) = look([tree.host.find(name)], tree.host, seconds)
    return one


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("RUNNING\n", "running"),
        ("STOP_COPY\n", "stop-copy"),
        ("PRE_COPY_P2P\n", "pre-copy-p2p"),
        ("ERROR\n", "error"),
        ("Invalid\n", None),
        ("", None),
    ],
)
def test_the_kernel_shows_the_state_of_what_can_be_migrated(tree: Tree, text: str, state: str | None) -> None:
    debugfs(tree, ONE, text)
    assert known(tree, ONE) == OfflineStatus(True, "debugfs", state)


def test_what_is_registered_without_migration_has_none_unless_it_has_the_rfc(tree: Tree) -> None:
    debugfs(tree, NIC)
    debugfs(tree, ONE)
    assert known(tree, NIC) == OfflineStatus(False, "debugfs", None)
    assert known(tree, ONE) == OfflineStatus(None, None, None)


def test_without_debugfs_the_driver_s_name_tells(tree: Tree) -> None:
    assert known(tree, PLAIN) == OfflineStatus(False, "driver", None)
    assert known(tree, NIC) == OfflineStatus(drivers.migrates("mlx5_vfio_pci"), "driver", None)
    assert known(tree, ONE) == OfflineStatus(None, None, None)


@pytest.mark.parametrize(
    ("driver", "release", "expected"),
    [
        ("mlx5_vfio_pci", "5.18.0", True),
        ("mlx5-vfio-pci", "6.12.117+deb12-amd64", True),
        ("mtty", "6.1.0-56-amd64", None),
        ("qat_vfio_pci", "6.9.12", None),
        ("qat_vfio_pci", "6.10.1", True),
        ("xe_vfio_pci", "7.1", True),
        ("mlx5_vfio_pci", "unknown", None),
        ("vfio-pci", "7.1", False),
        ("nvgrace_gpu_vfio_pci", "6.12", False),
        ("nvidia-vgpu-vfio", "6.12", None),
        ("", "6.12", None),
    ],
)
def test_drivers_migrate_from_some_release_on(driver: str, release: str, expected: bool | None) -> None:
    assert drivers.migrates(driver, release) is expected


def test_a_driver_that_does_not_answer_does_not_hang_us(tree: Tree) -> None:
    state = debugfs(tree, NIC) / STATE
    state.parent.mkdir()
    os.mkfifo(state)  # cat waits for somebody to write
    debugfs(tree, ONE, "STOP\n")
    began = time.monotonic()
    found = [tree.host.find(name) for name in (NIC, ONE)]
    assert look(found, tree.host, 0.3) == [OfflineStatus(True, "debugfs", "?"), OfflineStatus(True, "debugfs", "stop")]
    assert time.monotonic() - began < 5


def test_a_file_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    paths = [str(tmp_path / "none"), str(tmp_path), "--help"]
    assert read_within(paths, 10) == dict.fromkeys(paths, "")


def test_nothing_stays_open_or_unreaped(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    (tmp_path / "state").write_text("STOP\n")
    assert read_within([str(tmp_path / "state")] * 3, 10) == {str(tmp_path / "state"): "STOP\n"}
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def platform_device(tree: Tree, name: str = "fff51000.dma") -> None:
    directory = f"sys/devices/platform/{name}"
    tree.link(f"{directory}/subsystem", "sys/bus/platform")
    tree.link(f"{directory}/driver", "sys/bus/platform/drivers/vfio-platform")
    tree.link(f"{directory}/iommu_group", "sys/kernel/iommu_groups/21")
    tree.link(f"{directory}/vfio-dev/vfio9/device", directory)
    tree.write(f"{directory}/vfio-dev/vfio9/dev", "246:9\n")
    tree.link("sys/class/vfio-dev/vfio9", f"{directory}/vfio-dev/vfio9")


def test_devices_of_other_buses_are_found_too(tree: Tree) -> None:
    names = [device.name for device in tree.host.devices()]
    platform_device(tree)
    entry = f"sys/devices/pci0000:00/{NIC}/vfio-dev/vfio3"
    tree.link(f"{entry}/device", f"sys/devices/pci0000:00/{NIC}")
    tree.link("sys/class/vfio-dev/vfio3", entry)  # a PCI function is there as well, and listed once
    (tree.root / "sys/class/vfio").mkdir()
    assert [device.name for device in tree.host.devices()] == [*names, "fff51000.dma"]
    device = tree.host.find("fff51000.dma")
    assert device[2:7] == ("platform", "", "", "vfio-platform", 21)
    assert (device.node, device.cdev) == ("/dev/vfio/21", "/dev/vfio/devices/vfio9")
    assert tree.host.find("/dev/vfio/devices/vfio9") == tree.host.find("/dev/vfio/21") == device
    assert look([device], tree.host) == [OfflineStatus(False, "driver", None)]
    with pytest.raises(UsageError, match="is not a device name"):
        tree.host.find("fff52000.dma")


def without_class(tree: Tree, address: str, driver: str, *, group: int, node: str = "") -> None:
    """Add a function as Linux before 6.1 has it: only its group says that VFIO knows it."""
    tree.pci(address, driver=driver, group=group)
    if node:
        tree.write(f"sys/class/vfio/{node}/dev", f"240:{group}\n")
        tree.link(f"sys/kernel/iommu_groups/{group}/devices/{address}", f"sys/devices/pci0000:00/{address}")


@pytest.mark.parametrize("driver", ["vfio-pci", "mlx5_vfio_pci"])
def test_before_linux_6_1_a_function_is_known_by_its_group_and_driver(tmp_path: Path, driver: str) -> None:
    tree = Tree(tmp_path)
    without_class(tree, NIC, driver, group=42, node="42")
    without_class(tree, "0000:3b:00.7", "nvme", group=43)
    (device,) = tree.host.devices()
    assert (device.name, device.driver, device.node, device.node_number) == (
        NIC,
        driver,
        "/dev/vfio/42",
        os.makedev(240, 42),
    )
    for name in (NIC, NIC.removeprefix("0000:"), "/dev/vfio/42", device.sysfs):
        assert tree.host.find(name) == device


def test_before_linux_6_1_devices_of_other_buses_are_found_too(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    directory = "sys/devices/platform/fff51000.dma"
    tree.link(f"{directory}/driver", "sys/bus/platform/drivers/vfio-platform")
    tree.link(f"{directory}/subsystem", "sys/bus/platform")
    tree.link(f"{directory}/iommu_group", "sys/kernel/iommu_groups/21")
    tree.link("sys/kernel/iommu_groups/21/devices/fff51000.dma", directory)
    tree.write("sys/class/vfio/21/dev", "240:21\n")
    (device,) = tree.host.devices()
    assert (device.name, device.kind, device.node) == ("fff51000.dma", "platform", "/dev/vfio/21")


def test_what_is_so_already_is_not_advised(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    without_class(tree, NIC, "vfio-pci", group=42)
    words = "its driver is vfio-pci, which has not registered it with VFIO; the kernel's log says why: dmesg"
    with pytest.raises(DeviceNotFoundError, match=words):
        tree.host.find(NIC)
    (tree.root / "sys/class/vfio-dev").mkdir(parents=True)
    with pytest.raises(DeviceNotFoundError, match=words):
        tree.host.find(NIC)


def test_an_nvidia_function_without_a_type_is_told_about_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    without_class(tree, NIC, "nvidia", group=42, node="42")
    assert tree.host.devices() == []
    for name in (NIC, "/dev/vfio/42"):
        with pytest.raises(
            DeviceNotFoundError, match=r"only once it has a vGPU type; write a .* nvidia/current_vgpu_type"
        ):
            tree.host.find(name)


def test_a_function_that_no_iommu_confines_has_a_node_of_another_name(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.pci(NIC, driver="vfio-pci", group=3, cdev="vfio0")
    (tree.root / "sys/class/vfio-dev").mkdir(parents=True)
    tree.write("sys/class/vfio/noiommu-3/dev", "240:3\n")
    device = tree.host.find("/dev/vfio/noiommu-3")
    assert (device.name, device.is_noiommu, device.node) == (NIC, True, "/dev/vfio/noiommu-3")
    with pytest.raises(DeviceNotFoundError, match="no VFIO device is in this group"):
        tree.host.find("/dev/vfio/3")


def test_where_vfio_has_no_groups_a_function_has_none(tree: Tree) -> None:
    (tree.root / "sys/class/vfio-dev").mkdir(parents=True)
    assert (tree.host.find(NIC).group, tree.host.find(NIC).node) == (None, None)
    (tree.root / "sys/class/vfio").mkdir()
    assert tree.host.find(NIC).node == "/dev/vfio/12"


ALIASES: Final = """\
# Aliases extracted from modules themselves.
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v00008086d*sv*sd*bc03sc*i* other_vfio_pci
alias vfio_pci:v00008086d0000591Dsv*sd*bc*sc*i* close_vfio_pci
alias pci:v00008086d0000591Dsv*sd*bc*sc*i* i915
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
alias vfio_pci:broken
"""


@pytest.mark.parametrize(
    ("modalias", "expected"),
    [
        ("pci:v00008086d0000591Dsv00001028sd00000A1Fbc03sc00i00", "close_vfio_pci"),
        ("pci:v00008086d00001912sv00001028sd00000A1Fbc03sc00i00", "other_vfio_pci"),
        ("pci:v000015B3d0000101Esv000015B3sd00000001bc02sc00i00", "mlx5_vfio_pci"),
        ("pci:v000010DEd00001234sv000010DEsd00000001bc03sc02i00", None),
        ("of:NdmaT(null)Carm,pl330", None),
        ("", None),
    ],
)
def test_the_closest_alias_names_the_variant(tmp_path: Path, modalias: str, expected: str | None) -> None:
    (tmp_path / "modules.alias").write_text(ALIASES)
    assert drivers.variant_of(modalias, str(tmp_path / "modules.alias")) == expected
    assert drivers.variant_of(modalias, str(tmp_path / "none")) is None


def with_aliases(tree: Tree, name: str) -> HostDevice:
    tree.write(f"sys/devices/pci0000:00/{name}/modalias", "pci:v00008086d0000591Dsv00001028sd00000A1Fbc03sc00i00\n")
    tree.write(f"lib/modules/{os.uname().release}/modules.alias", ALIASES)
    return tree.host.find(name)


def test_a_better_driver_is_one_that_it_does_not_have(tree: Tree) -> None:
    device = with_aliases(tree, PLAIN)
    root = str(tree.root)
    assert drivers.better_driver(device, root) == "close_vfio_pci"
    assert drivers.better_driver(device._replace(driver="close-vfio-pci"), root) is None
    assert drivers.better_driver(tree.host.find(ONE), root) is None


def test_a_function_without_a_vfio_driver_is_told_its_variant(tree: Tree) -> None:
    bare = "0000:06:00.0"
    tree.pci(bare, driver="i915")
    with pytest.raises(
        DeviceNotFoundError, match=r"its driver is i915, which is not a VFIO driver; bind it to vfio-pci$"
    ):
        tree.host.find(bare)
    with pytest.raises(DeviceNotFoundError, match=r"bind it to close_vfio_pci$"):
        with_aliases(tree, bare)


def test_a_column_of_list_has_no_spaces() -> None:
    full = DeviceRow(
        device="name",
        kind="pci",
        type="1:2",
        parent="",
        driver="vfio-pci",
        node="/dev/vfio/1",
        holder_pid=42,
        holder="a b\tc",
        migratable=False,
        state="running",
        cdev="/dev/cdev",
    )
    assert " ".join(_words(full)) == "name pci 1:2 vfio-pci /dev/vfio/1 42:a_b_c no running /dev/cdev -"
    empty = DeviceRow(
        device="name",
        kind="mdev",
        type="",
        parent="",
        driver="",
        node=None,
        holder_pid=None,
        holder=None,
        migratable=None,
        state=None,
        cdev=None,
    )
    assert " ".join(_words(empty)) == "name mdev - - - - ? - - -"
    unseen = replace(empty, holder="?", migratable=True, state="?")
    assert " ".join(_words(unseen)) == "name mdev - - - ? yes ? - -"


@pytest.fixture
def here(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Have the jobs see the made-up host, where nothing can be opened."""
    monkeypatch.setattr("vfio_mig.host.discover.Host", lambda: tree.host)
    monkeypatch.setattr("vfio_mig.host.opening.open_device", lambda *_, **__: pytest.fail("was opened"))
    return tree


def test_info_does_not_open_what_is_closed(here: Tree) -> None:
    debugfs(here, NIC, "RUNNING\n")
    info = device_info(NIC)
    assert (info.how, info.flags, info.regions, info.checks, info.protocol) == ("closed", None, [], [], None)
    assert (info.migratable, info.source, info.state) == (True, "debugfs", "running")
    assert (info.node, info.cdev, info.driver) == ("/dev/vfio/12", "/dev/vfio/devices/vfio3", "mlx5_vfio_pci")


def test_a_driver_that_does_not_answer_is_asked_nothing_more(here: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfio_mig.host.offline.look", lambda *_: [OfflineStatus(True, "debugfs", "?")])
    info = device_info(NIC, open_closed=True)
    assert (info.how, info.state) == ("closed", "?")
    assert here.host.find(NIC).name == info.device
