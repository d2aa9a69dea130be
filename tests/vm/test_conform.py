# SPDX-License-Identifier: MIT
"""`vfio-mig conform` on real drivers, the sample and the kernel's own mtty: what it finds, and what it leaves.

That it finds defects is shown with a driver that has some; here a clean one has exactly the findings that
docs/conform.md explains.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import signal
import subprocess
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tools.lab import cli
from tools.lab.mtty import TYPES as MTTY_TYPES
from tools.lab.sample import host
from tools.lab.vfio.v2 import HAS_PRE_COPY, RUNNING, STOP_COPY, Device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.conftest import MakeInstance

DANGERS: Final = {
    "v2.arc.stop-copy.pre-copy",
    "v2.arc.stop-copy.pre-copy-p2p",
    "v2.error.refuses",
    "v2.close.resuming",
}
SECOND: Final = {"v2.second.independent", "v2.second.round-trip", "v2.second.other-type"}
KEPT: Final = ("stop", "stop-copy", "running-p2p", "pre-copy", "pre-copy-p2p")
FLIPS: Final = {"v2.stream.flip-head": "warn", "v2.stream.flip-body": "warn"}


@functools.cache
def logs() -> bool:
    """Tell whether the kernel has bitmaps to report in: Debian's since 6.7 are without iommufd, and have none."""
    return "iova_bitmap_set" in Path("/proc/kallsyms").read_text("utf-8")


def has_precopy_info_v2() -> bool:
    """Tell whether the kernel's own drivers may have VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: its header has it."""
    header = Path(os.environ["VFIO_MIG_KERNEL_UAPI"]) / "linux" / "vfio.h"
    return "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2" in header.read_text("utf-8")


def conform(*words: str, rc: int = 0, warm: bool = True) -> Any:
    return json.loads(cli.run("--json", "conform", *words, rc=rc, warm=warm).stdout)


def by_id(report: Any) -> dict[str, str]:
    return {check["id"]: check["outcome"] for check in report["checks"]}


def findings(report: Any) -> dict[str, str]:
    return {name: outcome for name, outcome in by_id(report).items() if outcome in {"fail", "warn"}}


def skipped(report: Any) -> set[str]:
    return {name for name, outcome in by_id(report).items() if outcome == "skip"}


def about_missing(ids: set[str], flags: int) -> set[str]:
    """Return the checks that a device with these flags has nothing for."""
    missing = {
        *([] if flags & 2 else ["running-p2p"]),
        *([] if flags & 4 else ["pre-copy"]),
        *([] if flags & 6 == 6 else ["pre-copy-p2p"]),
    }
    found = {one for one in ids if re.match(r"v2\.(arc|reset|close)\.", one) and one.split(".")[2] in missing}
    if not flags & 4:
        found |= {one for one in ids if one.startswith("v2.precopy.")}
    if not HAS_PRE_COPY:  # also of Linux 6.2
        found |= {one for one in ids if one.startswith("v2.size.")}
    if not logs():
        found |= {one for one in ids if one.startswith("v2.dirty.") or one == "v2.close.logging"}
    return found


@pytest.mark.parametrize("asked", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_clean_driver_of_v2_has_the_documented_findings_and_no_other(make_instance: MakeInstance, asked: int) -> None:
    flags = asked if HAS_PRE_COPY else asked & 3
    with host.parameter_set("v2", asked):
        one = make_instance()
    report = conform(one.uuid)
    assert findings(report) == FLIPS
    ids = set(by_id(report))
    assert skipped(report) == DANGERS | SECOND | {"v2.precopy.reinit"} | about_missing(ids, flags)
    assert len(ids) > 150
    assert (report["found"], report["state"], report["driver"]) == ("running", "closed", "gvt_sample_mdev")
    assert report["kernel"] == platform.release()
    assert report["counts"]["warn"] == 2
    assert report["seconds"] > 0
    with Device.opened(one) as device:
        assert device.state() == RUNNING


@pytest.mark.skipif(not HAS_PRE_COPY, reason="PRE_COPY is of Linux 6.2")
def test_a_device_that_dirties_its_state_and_begins_again_keeps_the_rules(
    make_instance: MakeInstance,
) -> None:
    with host.parameter_set("v2", 7):
        one = make_instance()
    for knob, value in (("v2_extra_bytes", 1 << 20), ("v2_reinit", 1 << 18), ("v2_dirty_rate", 100_000)):
        (one.debugfs / knob).write_text(str(value))
    report = conform(one.uuid, "--check", "v2.precopy", "--check", "v2.stream.round-trip")
    assert findings(report) == {}
    assert skipped(report) == set()


def test_with_a_second_device_and_what_is_dangerous_elsewhere_nothing_is_left_out(make_instance: MakeInstance) -> None:
    """This driver survives all of it; see tests/vm/test_driver_v2.py."""
    with host.parameter_set("v2", 7):
        one, same, other = make_instance(), make_instance(), make_instance("GVTg_V4_4")
    some = ("--check", "v2.second", *(word for name in sorted(DANGERS) for word in ("--check", name)))
    expected = {name for name in DANGERS if HAS_PRE_COPY or "pre-copy" not in name} | DANGERS
    report = conform(one.uuid, "--second", same.uuid, "--dangerous", *some)
    assert set(by_id(report)) == expected | SECOND
    assert findings(report) == {}
    assert skipped(report) == {"v2.second.other-type"}
    report = conform(one.uuid, "--second", other.uuid, "--check", "v2.second")
    assert by_id(report) == {
        "v2.second.independent": "pass",
        "v2.second.round-trip": "skip",
        "v2.second.other-type": "pass",
    }
    cli.refused("conform", one.uuid, "--second", one.uuid, code=2, words=("itself",), warm=True)


@pytest.mark.core
def test_a_clean_driver_of_the_rfc_passes_every_check(make_instance: MakeInstance) -> None:
    one, other = make_instance(), make_instance()
    report = conform(one.uuid, "--second", other.uuid, "--dangerous", warm=False)
    assert set(by_id(report).values()) == {"pass"}
    assert len(report["checks"]) >= 40
    assert (report["found"], report["state"]) == ("unknown", "closed")
    report = conform(one.uuid)
    assert findings(report) == {}
    assert skipped(report) == {"rfc.state.too-long", "rfc.second.round-trip"}


def test_a_device_that_somebody_has_open_is_left_alone_without_force(make_instance: MakeInstance) -> None:
    with host.parameter_set("v2", 1):
        one = make_instance()
    with cli.held(one.uuid):
        cli.run("stop", one.uuid, warm=True)
        cli.refused("conform", one.uuid, code=3, words=("vfio-mig", "--force"), warm=True)
        assert (one.debugfs / "v2_state").read_text() == "stop\n"
        report = conform(one.uuid, "--force", "--check", "v2.close", "--check", "v2.reset.stop")
        assert by_id(report)["v2.reset.stop"] == "pass"
        assert {name for name, outcome in by_id(report).items() if outcome == "skip"} == {
            name for name in by_id(report) if name.startswith("v2.close.")
        }
        assert (report["found"], report["state"]) == ("stop", "running")
        assert (one.debugfs / "v2_state").read_text() == "running\n"
        status = json.loads(cli.run("--json", "status", one.uuid, warm=True).stdout)
        assert status["left"] is None


def test_every_format_comes_to_a_file_or_to_stdout(make_instance: MakeInstance, tmp_path: Path) -> None:
    with host.parameter_set("v2", 1):
        one = make_instance()
    words = ("conform", one.uuid, "--check", "v2.reset.stop", "--check", "v2.reset.pre-copy")
    table = cli.run(*words, warm=True).stdout.decode()
    assert re.search(r"^pass +v2\.reset\.stop +running, \d+ bytes saved afterwards$", table, re.MULTILINE)
    assert table.splitlines()[-1].startswith("2 checks: 1 pass, 0 fail, 0 warn, 1 skip; ")
    tap = cli.run(*words, "--format", "tap", warm=True).stdout.decode()
    assert "\n1..2\n" in tap
    assert "\nok 2 - v2.reset.pre-copy # SKIP it has no pre-copy\n" in tap
    file = tmp_path / "report.xml"
    assert cli.run(*words, "--format", "junit", "--output", file, warm=True).stdout == b""
    assert len(list(ET.parse(file).iter("testcase"))) == 2  # noqa: S314 -- our own text
    assert file.stat().st_mode & 0o777 == 0o600
    cli.refused(*words, "--output", file, code=2, words=("report.xml",), warm=True)
    cli.refused("conform", one.uuid, "--check", "v2.nothing", code=2, words=("v2.nothing", "--list"), warm=True)


def test_a_device_without_migration_is_not_supported() -> None:
    with host.parameter_set("migratable", 0), host.instance() as one:
        cli.refused("conform", one.uuid, code=4, words=("migratable",), warm=True)
    with host.parameter_set("v2", 1), host.parameter_set("migratable", 0), host.instance() as one:
        cli.refused("--abi", "gvt-rfc", "conform", one.uuid, code=4, words=("mainline-v2",), warm=True)


def test_of_a_device_that_speaks_both_the_family_is_checked_that_is_asked_for() -> None:
    with host.parameter_set("v2", 1), host.instance() as one:
        for abi, check in (("auto", "v2.feature"), ("gvt-rfc", "rfc.reset"), ("mainline-v2", "v2.feature")):
            done = cli.run("--abi", abi, "--json", "conform", one.uuid, "--check", check, warm=True)
            results = json.loads(done.stdout)["checks"]
            assert results
            assert all(result["id"].startswith(check) for result in results)
        info = json.loads(cli.run("--json", "info", "--open", one.uuid, warm=True).stdout)
        assert (info["protocol"], info["speaks"]) == ("mainline-v2", ["mainline-v2", "gvt-rfc"])


@contextlib.contextmanager
def interrupted_at(check: str, *words: str) -> Iterator[subprocess.CompletedProcess[str]]:
    """Run it in a process of its own, and send SIGTERM when it has come to a check."""
    command = ["vfio-mig", "-v", "conform", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if check in line:
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=cli.SECONDS)
    yield subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("check", ["v2.arc.running.stop-copy", pytest.param("v2.stream.empty", marks=pytest.mark.slow)])
def test_a_signal_ends_it_with_the_device_running(make_instance: MakeInstance, check: str) -> None:
    with host.parameter_set("v2", 1):
        one = make_instance()
    with cli.held(one.uuid):
        with interrupted_at(f"pass {check}", one.uuid, "--force") as done:
            assert done.returncode == 130, done.stderr
            assert done.stdout == ""
            assert "Traceback" not in done.stderr
        assert (one.debugfs / "v2_state").read_text() == "running\n"
        assert json.loads(cli.run("--json", "status", one.uuid, warm=True).stdout)["left"] is None


def test_an_error_between_two_checks_ends_it_with_the_device_running(make_instance: MakeInstance) -> None:
    with host.parameter_set("v2", 1):
        one = make_instance()
    with cli.held(one.uuid):
        cli.run("stop", one.uuid, warm=True)
        fault = {"VFIO_MIG_FAULT": "conform:checking=EIO"}
        cli.refused("conform", one.uuid, "--force", code=5, words=("fault at conform:checking",), env=fault, warm=True)
        assert (one.debugfs / "v2_state").read_text() == "running\n"


# --- mtty


@contextlib.contextmanager
def mtty(kind: str = "mtty-2") -> Iterator[host.Instance]:
    name = str(uuid.uuid4())
    (MTTY_TYPES / kind / "create").write_text(name)
    one = host.Instance(name, kind)
    try:
        yield one
    finally:
        one.remove()


@pytest.mark.mtty
def test_mtty_has_the_documented_findings_and_no_other() -> None:
    with mtty() as one, mtty() as same, mtty("mtty-1") as other:
        report = conform(one.uuid, "--second", same.uuid, rc=5)
        assert findings(report) == {
            **FLIPS,
            "v2.stream.refused-then-stop": "fail",
            "v2.precopy.enomsg": "warn",
            "v2.dirty.start-twice": "fail",
            **({"v2.dirty.report-not-started": "fail"} if logs() else {"v2.dirty.report": "warn"}),
            **dict.fromkeys((f"v2.close.{name}" for name in KEPT), "warn"),
            "v2.reset.flag": "warn",
        }
        reports = {"v2.dirty.restart", "v2.dirty.every-state"} | {
            name for name in by_id(report) if re.match(r"v2\.dirty\.report-(?!page-size$|wrap)", name)
        }
        assert skipped(report) == {
            *DANGERS,
            *([] if has_precopy_info_v2() else ["v2.precopy.opt-in"]),
            "v2.precopy.reinit",
            "v2.reset.error",
            "v2.second.other-type",
            *([] if logs() else reports),
        }
        assert by_id(conform(one.uuid, "--second", other.uuid, "--check", "v2.second.other-type")) == {
            "v2.second.other-type": "pass"
        }
        with Device.opened(one) as device:
            assert device.state() == RUNNING


@pytest.mark.mtty
def test_mtty_closed_in_stop_is_reset_before_anything_else() -> None:
    """It keeps its state over a close, hence is found there."""
    with mtty() as one:
        with Device.opened(one) as device:
            device.reset = lambda: None  # type: ignore[method-assign]
            os.close(device.go(STOP_COPY))
        report = conform(one.uuid, "--check", "v2.arc.running")
        assert report["found"] == "stop-copy"
        assert findings(report) == {}
