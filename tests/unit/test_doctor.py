# SPDX-License-Identifier: MIT
"""What a host is found to lack, on made-up hosts."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_kvmgt_needs_a_kvm_and_only_ours_is_known_to_migrate(root: Path) -> None:
    assert not {"gvt", "kvm"} & set(results(examine_host(root=str(root))))
    put(root, "sys/module/kvmgt/initstate", "live")
    report = examine_host(root=str(root))
    assert "enable_gvt=1" in the(report, "gvt").text
    assert "kvm" not in results(report)
    put(root, "sys/class/mdev_bus/0000:00:02.0/mdev_supported_types/i915-GVTg_V5_4/name", "GVTg_V5_4")
    report = examine_host(root=str(root))
    assert (the(report, "gvt").result, the(report, "kvm").result) == (NOTE, PROBLEM)
    assert "scripts/kvmgt builds one that can" in the(report, "gvt").text
    assert "load kvm_intel or kvm_amd" in the(report, "kvm").text
    put(root, "dev/kvm")
    put(root, "sys/module/kvmgt/parameters/migration", "rfc")
    report = examine_host(root=str(root))
    assert the(report, "gvt") == HostCheck("gvt", OK, "kvmgt on 0000:00:02.0")
    assert the(report, "kvm") == HostCheck("kvm", OK, "/dev/kvm")


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
