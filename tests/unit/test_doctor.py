# SPDX-License-Identifier: MIT
"""What a host is found to lack, on made-up hosts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vfio_mig import proc
from vfio_mig.jobs.engine.session import Settings
from vfio_mig.jobs.queries.doctor import NOTE, OK, PROBLEM, DoctorReport, HostCheck, examine_host

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
ROOT = Path(__file__).parents[2]
BARE = HostCheck("vfio", PROBLEM, "neither /dev/vfio/vfio nor /dev/iommu; load a driver: modprobe vfio-pci")


def put(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def results(report: DoctorReport) -> dict[str, str]:
    return {one.name: one.result for one in report.checks}


def the(report: DoctorReport, name: str) -> HostCheck:
    (one,) = [one for one in report.checks if one.name == name]
    return one


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIO_MIG_LOCK_DIR", str(tmp_path / "locks"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


def test_a_host_without_vfio_has_a_problem_and_is_told_what_to_load(root: Path) -> None:
    report = examine_host(root=str(root))
    assert the(report, "vfio") == BARE
    assert report.problems == sum(one.result == PROBLEM for one in report.checks) >= 1
    assert results(report)["iommufd"] == results(report)["debugfs"] == results(report)["devices"] == NOTE


@pytest.mark.parametrize("node", ["vfio/vfio", "iommu"])
def test_either_way_to_a_device_is_enough(root: Path, node: str) -> None:
    put(root, f"dev/{node}")
    assert the(examine_host(root=str(root)), "vfio") == HostCheck("vfio", OK, f"/dev/{node}")


@pytest.mark.parametrize(
    ("release", "result"),
    [
        ("6.1.0-18-amd64", OK),
        ("6.2.0", NOTE),
        ("7.1.3", NOTE),
        ("7.2.0", OK),
        ("10.0", OK),
        ("x", OK),
    ],
)
def test_kernels_that_may_hang_are_told(root: Path, monkeypatch: pytest.MonkeyPatch, release: str, result: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release, machine="x86_64"))
    assert the(examine_host(root=str(root)), "kernel").result == result


def test_a_capability_is_a_bit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        proc, "read_small", lambda _: b"Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000080001\n"
    )
    assert [number for number in range(64) if proc.has_capability(number)] == [0, 19]
    monkeypatch.setattr(proc, "read_small", lambda _: b"Name:\tx\n")
    assert not proc.has_capability(0)


def test_a_host_that_has_everything_has_no_problem(root: Path) -> None:
    for path in (
        "dev/vfio/vfio",
        "dev/iommu",
        "dev/vfio/7",
        "sys/module/vfio_iommu_type1/x",
        "sys/kernel/debug/vfio/x",
    ):
        put(root, path)
    device = root / "sys/bus/mdev/devices" / UUID
    device.mkdir(parents=True)
    (device / "iommu_group").symlink_to("../../../../kernel/iommu_groups/7")
    put(root, "proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")
    put(root, "proc/sys/kernel/yama/ptrace_scope", "1\n")
    report = examine_host(Settings(uapi_header=None), root=str(root))
    assert report.problems == 0
    for name in ("vfio", "type1", "iommufd", "debugfs", "devices", "borrowing", "memlock", "locks", "numpy"):
        assert results(report)[name] == OK, name
    assert report.as_dict()["checks"][0]["name"] == "kernel"


GVT_CHECKS = {"gvt", "guc", "iommu", "kvmgt", "source", "types", "kvm", "secure-boot"}
TYPES = "sys/class/mdev_bus/0000:00:02.0/mdev_supported_types/i915-GVTg_V5_4"
EFI = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def gpu(root: Path, device: str = "0x1912", vendor: str = "0x8086", kind: str = "0x030000") -> None:
    for name, text in (("class", kind), ("vendor", vendor), ("device", device)):
        put(root, f"sys/bus/pci/devices/0000:00:02.0/{name}", f"{text}\n")


def gvt_host(root: Path, migration: str = "") -> None:
    """Make it a host where all is as it should be; without *migration* with the distribution's kvmgt."""
    gpu(root)
    put(root, "sys/module/i915/parameters/enable_gvt", "Y\n")
    put(root, "sys/module/i915/parameters/enable_guc", "-1\n")
    put(root, "sys/class/iommu/dmar0/x")
    put(root, f"{TYPES}/name", "GVTg_V5_4")
    put(root, f"{TYPES}/available_instances", "2\n")
    put(root, "dev/kvm")
    put(root, "sys/module/kvmgt/initstate", "live")
    if migration:
        put(root, "sys/module/kvmgt/parameters/migration", f"{migration}\n")
        put(root, "sys/module/kvmgt/version", "0.1.0\n")


def test_a_host_without_a_gpu_of_gvt_g_hears_nothing_of_it(root: Path) -> None:
    for device, vendor, kind in (
        ("0x8a50", "0x8086", "0x030000"),  # Ice Lake
        ("0x1912", "0x10de", "0x030000"),
        ("0x1912", "0x8086", "0x020000"),  # a network card
        ("", "", "0x030000"),
    ):
        gpu(root, device, vendor, kind)
        put(root, EFI, "\6\0\0\0\1")
        assert not GVT_CHECKS & set(results(examine_host(root=str(root)))), device


def test_a_host_whose_gpu_could_have_vgpus_is_told_how_and_no_more(root: Path) -> None:
    gpu(root, "0x9bc5")
    put(root, "sys/module/i915/parameters/enable_gvt", "N\n")
    report = examine_host(root=str(root))
    assert the(report, "gvt").result == NOTE
    assert "0000:00:02.0 (Comet Lake) can have vGPUs" in the(report, "gvt").text
    assert "options i915 enable_gvt=1" in the(report, "gvt").text
    assert GVT_CHECKS & set(results(report)) == {"gvt"}


def test_a_host_without_types_of_gvt_g_is_told_of_no_room(root: Path) -> None:
    gvt_host(root)
    for name in ("name", "available_instances"):
        (root / TYPES / name).unlink()
    (root / TYPES).rmdir()
    other = str(Path(TYPES).with_name("nvidia-35"))
    put(root, f"{other}/name", "GRID")
    put(root, f"{other}/available_instances", "2\n")
    assert "types" not in results(examine_host(root=str(root)))


@pytest.mark.parametrize(
    ("migration", "result", "words"),
    [("rfc", OK, "0.1.0: the interface of the 2017 RFC"), ("v2", OK, "protocol v2"), ("off", NOTE, "migration=v2")],
)
def test_our_kvmgt_is_named_with_the_interface_that_it_has(root: Path, migration: str, result: str, words: str) -> None:
    gvt_host(root, migration)
    report = examine_host(root=str(root))
    assert the(report, "kvmgt").result == result
    assert words in the(report, "kvmgt").text
    assert the(report, "gvt") == HostCheck("gvt", OK, "vGPUs on 0000:00:02.0 (Skylake)")
    assert the(report, "types") == HostCheck("types", OK, "how many more of each: i915-GVTg_V5_4 2")
    assert {results(report)[name] for name in GVT_CHECKS - {"source", "kvmgt"}} == {OK}
    assert the(report, "secure-boot").text == "off: modules need no signature"
    assert "source" not in results(report)


def test_of_the_distribution_s_kvmgt_it_is_said_how_to_get_another(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gvt_host(root)
    names = list(os.uname())
    names[2:4] = ["6.12.117+deb12-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1~deb12u1 (2026-11-14)"]
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(names))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    put(tmp_path, "bin/apt-cache", "#!/bin/sh\necho 'linux-source-6.12 | 6.12.117-1~deb12u1 | http://x/debian main'\n")
    (tmp_path / "bin/apt-cache").chmod(0o755)
    report = examine_host(root=str(root))
    assert the(report, "kvmgt").result == NOTE
    assert "install vfio-mig-kvmgt-dkms, or as root: scripts/kvmgt install" in the(report, "kvmgt").text
    assert the(report, "source") == HostCheck("source", OK, "linux-source-6.12=6.12.117-1~deb12u1")

    names[3] = "#1 SMP Debian 6.12.9-1 (2025-01-10)"
    assert "apt-get update" in the(examine_host(root=str(root)), "source").text

    put(root, "var/lib/vfio-mig-kvmgt/6.12.117+deb12-amd64", "kvmgt: gate: it is not\nmore\n")
    text = the(examine_host(root=str(root)), "kvmgt").text
    assert "could not build one: kvmgt: gate: it is not (/var/lib/vfio-mig-kvmgt/6.12.117+deb12-amd64" in text

    put(root, "lib/modules/6.12.117+deb12-amd64/updates/dkms/kvmgt.ko")
    assert "is installed: without vGPUs" in the(examine_host(root=str(root)), "kvmgt").text


def test_what_is_in_gvt_g_s_way_is_named_with_the_way_out(root: Path) -> None:
    gvt_host(root, "rfc")
    put(root, "sys/module/i915/parameters/enable_guc", "3\n")
    put(root, f"{TYPES}/available_instances", "0\n")
    (root / "dev/kvm").unlink()
    (root / "sys/class/iommu/dmar0/x").unlink()
    (root / "sys/class/iommu/dmar0").rmdir()
    report = examine_host(root=str(root))
    assert the(report, "guc").result == the(report, "kvm").result == PROBLEM
    assert "enable_guc=3" in the(report, "guc").text
    assert "load kvm_intel or kvm_amd" in the(report, "kvm").text
    assert "larger aperture" in the(report, "types").text
    assert the(report, "iommu").result == NOTE
    (root / "sys/module/kvmgt/parameters/migration").unlink()
    put(root, EFI, "\6\0\0\0\1")
    assert "is then to be enrolled" in the(examine_host(root=str(root)), "secure-boot").text
    put(root, "var/lib/dkms/mok.pub")
    assert "mokutil --import /var/lib/dkms/mok.pub" in the(examine_host(root=str(root)), "secure-boot").text
    put(root, EFI, "\6\0\0\0\0")
    assert the(examine_host(root=str(root)), "secure-boot").result == OK


def test_the_guc_is_in_the_way_only_where_it_submits_work(root: Path) -> None:
    """Bit 1 has it load the HuC's firmware, which does no harm."""
    gvt_host(root)
    for value, result in (("0", OK), ("1", PROBLEM), ("2", OK), ("3", PROBLEM)):
        put(root, "sys/module/i915/parameters/enable_guc", f"{value}\n")
        assert the(examine_host(root=str(root)), "guc").result == result


def test_a_kvmgt_without_a_gpu_for_it_is_odd(root: Path) -> None:
    put(root, "sys/module/kvmgt/initstate", "live")
    report = examine_host(root=str(root))
    assert "no GPU here has GVT-g" in the(report, "gvt").text
    assert "kvm" not in results(report)
    gpu(root)
    put(root, "sys/module/i915/parameters/enable_gvt", "Y\n")
    assert "offers no type of vGPU" in the(examine_host(root=str(root)), "gvt").text


def test_a_node_that_may_not_be_opened_is_named_with_its_device(root: Path) -> None:
    device = root / "sys/bus/mdev/devices" / UUID
    device.mkdir(parents=True)
    (device / "iommu_group").symlink_to("../../../../kernel/iommu_groups/7")  # and no /dev/vfio/7
    found = the(examine_host(root=str(root)), "node")
    assert found.result == PROBLEM
    assert found.text == f"{UUID}: /dev/vfio/7 is not there; is udev running?"


@pytest.mark.parametrize(
    ("scope", "capabilities", "result", "words"),
    [
        ("3", "000001ffffffffff", PROBLEM, "ptrace_scope is 3"),
        ("1", "0000000000080000", OK, "CAP_SYS_PTRACE"),
        ("1", "0000000000000000", NOTE, "ptrace_scope is 1"),
    ],
)
def test_what_may_be_borrowed_depends_on_yama_and_a_capability(
    root: Path, scope: str, capabilities: str, result: str, words: str
) -> None:
    put(root, "proc/sys/kernel/yama/ptrace_scope", f"{scope}\n")
    put(root, "proc/self/status", f"CapEff:\t{capabilities}\n")
    found = the(examine_host(root=str(root)), "borrowing")
    assert found.result == result
    assert words in found.text


@pytest.mark.parametrize(
    ("standing", "result", "words"),
    [
        (proc.Standing(True, True, True, True, False), OK, "every process can be seen"),
        (proc.Standing(True, False, True, True, False), NOTE, "outside this PID namespace cannot be seen; run it in"),
        (proc.Standing(False, True, True, True, False), NOTE, "/proc is not there"),
    ],
)
def test_where_not_every_process_can_be_seen_it_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, standing: proc.Standing, result: str, words: str
) -> None:
    monkeypatch.setattr(proc, "standing", lambda: standing)
    found = the(examine_host(root=str(root)), "holders")
    assert found.result == result
    assert words in found.text


def test_a_directory_for_locks_that_others_may_write_to_is_a_problem(root: Path, tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o777)
    found = the(examine_host(root=str(root)), "locks")
    assert found.result == PROBLEM
    assert "others may write to the directory for locks; chmod go-w" in found.text


@pytest.mark.parametrize(("release", "result"), [("6.1.0-56", OK), ("6.12.95", NOTE), ("7.2.0", OK), ("odd", OK)])
def test_kernels_that_hang_on_an_arc_are_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, release: str, result: str
) -> None:
    names = list(os.uname())
    names[2] = release
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(names))
    assert the(examine_host(root=str(root)), "kernel").result == result


def test_a_header_that_is_none_is_a_problem_and_not_a_traceback(root: Path, tmp_path: Path) -> None:
    bad = tmp_path / "vfio.h"
    bad.write_text("nothing")
    assert the(examine_host(Settings(uapi_header=str(bad)), root=str(root)), "numbers").result == PROBLEM


def test_what_is_not_installed_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = results(examine_host(root=str(root)))
    assert (found["numpy"], found["matplotlib"]) == (PROBLEM, NOTE)
