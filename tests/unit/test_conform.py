# SPDX-License-Identifier: MIT
"""The conformance checks: their list, their logic on a played device, the reports. What drivers do, tests/vm has."""

from __future__ import annotations

import json
import re
import signal
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner

from tests.unit.conform_device import Played, rig_of
from vfio_mig.cli.main import cli
from vfio_mig.conform import runner
from vfio_mig.conform.kit import rfc_device, v2_device
from vfio_mig.conform.kit.check import FAIL, OUTCOMES, PASS, SKIP, V2, WARN, Check, Result
from vfio_mig.conform.kit.v2_device import STATES
from vfio_mig.conform.kit.verdict import NotApplicable
from vfio_mig.conform.registry import all_checks, select
from vfio_mig.conform.report import FORMATS
from vfio_mig.conform.runner import ConformReport, run_check
from vfio_mig.conform.v2 import dirty
from vfio_mig.errors import UsageError
from vfio_mig.uapi import ffi
from vfio_mig.uapi.v2 import ERROR, NAMES

LAYOUTS: Final = (
    v2_device.HEAD,
    v2_device.STATE,
    v2_device.INFO,
    v2_device.NUMBER,
    dirty.CONTROL,
    dirty.RANGE,
    dirty.REQUEST,
    rfc_device.STATUS,
    rfc_device.DIRTY,
)
DOCS: Final = Path(__file__).parents[2] / "docs/conform.md"


def run(kernel: Played, *patterns: str, second: Played | None = None, dangerous: bool = True) -> dict[str, Result]:
    rig = rig_of(kernel, second, dangerous=dangerous)
    checks = select(patterns, V2)
    results = {check.id: run_check(check, rig, dangerous=dangerous) for check in checks}
    rig.begin()
    return results


def findings(results: dict[str, Result]) -> dict[str, str]:
    return {
        name: f"{result.outcome} {result.seen}" for name, result in results.items() if result.outcome in (FAIL, WARN)
    }


# --- the list


def test_ids_are_unique_and_every_check_says_what_where_and_what_is_expected() -> None:
    checks = all_checks()
    assert len({check.id for check in checks}) == len(checks)
    for check in checks:
        assert re.fullmatch(r"(v2|rfc)(\.[a-z0-9]+(-[a-z0-9]+)*){2,3}", check.id), check.id
        assert check.id.startswith(f"{check.family}.")
        for text in (check.rule, check.source, check.expected):
            assert text
            assert not text.endswith(".")


def test_the_raw_structs_have_the_sizes_of_the_header_s() -> None:
    assert {
        v2_device.HEAD: ffi.sizeof("struct vfio_device_feature"),
        v2_device.STATE: ffi.sizeof("struct vfio_device_feature_mig_state"),
        v2_device.INFO: ffi.sizeof("struct vfio_precopy_info"),
        v2_device.NUMBER: ffi.sizeof("struct vfio_device_feature_mig_data_size"),
        dirty.CONTROL: ffi.sizeof("struct vfio_device_feature_dma_logging_control"),
        dirty.RANGE: ffi.sizeof("struct vfio_device_feature_dma_logging_range"),
        dirty.REQUEST: ffi.sizeof("struct vfio_device_feature_dma_logging_report"),
        rfc_device.STATUS: ffi.sizeof("struct vfio_pci_status_set"),
        rfc_device.DIRTY: ffi.sizeof("struct vfio_pci_get_dirty_bitmap"),
    } == {layout: layout.size for layout in LAYOUTS}


def test_states_have_the_names_that_they_have_everywhere() -> None:
    assert sorted([ERROR, *STATES]) == sorted(NAMES)


def test_every_pair_of_states_has_its_check() -> None:
    ids = {check.id for check in all_checks()}
    for source in STATES:
        for target in (*(NAMES[state] for state in STATES), "error", "unknown"):
            assert f"v2.arc.{NAMES[source]}.{target}" in ids
        assert f"v2.reset.{NAMES[source]}" in ids
        assert f"v2.close.{NAMES[source]}" in ids


def test_what_hangs_or_crashes_kernels_is_marked() -> None:
    assert [check.id for check in all_checks() if check.danger] == [
        "v2.arc.stop-copy.pre-copy",
        "v2.arc.stop-copy.pre-copy-p2p",
        "v2.error.refuses",
        "v2.close.resuming",
        "rfc.state.too-long",
    ]


@pytest.mark.parametrize(
    ("patterns", "number"),
    [
        (["v2.reset.stop"], 1),
        (["v2.arc"], 63),
        (["v2.arc.*"], 63),
        (["v2.arc.stop.*", "v2.arc.stop.error"], 9),
        (["*.seek*"], 0),
    ],
)
def test_checks_are_selected_by_id_by_prefix_and_by_pattern(patterns: list[str], number: int) -> None:
    if number:
        assert len(select(patterns)) == number
    else:
        with pytest.raises(UsageError, match="no check matches"):
            select(patterns)


def test_a_pattern_that_matches_nothing_is_refused_even_beside_one_that_does() -> None:
    with pytest.raises(UsageError, match="'v3'"):
        select(["v2.arc", "v3"])


# --- a played device


@pytest.mark.parametrize("flags", [1, 3, 5, 7])
def test_a_device_that_keeps_every_rule_passes_every_check(flags: int) -> None:
    kernel = Played(flags)
    results = run(kernel, second=Played(flags))
    assert findings(results) == {}
    assert results["v2.arc.running.stop-copy"].outcome == PASS
    skipped = {name for name, result in results.items() if result.outcome == SKIP}
    # what it has not, what others have, and what its check of sums makes needless
    expected = {
        "v2.precopy.opt-in",
        "v2.precopy.reinit",
        "v2.second.other-type",
        "v2.stream.takes-effect",
        "v2.error.refuses",
        "v2.reset.error",
    }
    if flags == 7:
        assert skipped == expected
    else:
        assert skipped > expected
    assert kernel.files == {}
    assert kernel.state == 2


def test_what_a_device_has_not_is_refused_and_what_begins_there_is_skipped() -> None:
    results = run(Played(1), "v2.arc")
    assert results["v2.arc.running.pre-copy"].seen == "EINVAL, state kept"
    assert results["v2.arc.stop-copy.running-p2p"].seen == "EINVAL, state kept, session goes on"
    assert results["v2.arc.running-p2p.stop"].outcome == SKIP


DEFECTS: Final = [
    ("unknown flag", "v2.feature.migration-flags", WARN),
    ("argsz", "v2.feature.state-short-argsz", FAIL),
    ("unknown feature", "v2.feature.unknown-feature", WARN),
    ("get fd", "v2.state.get-fd", FAIL),
    ("get stops", "v2.state.get-changes-nothing", FAIL),
    ("reset stops", "v2.state.after-reset", FAIL),
    ("size fails", "v2.size.every-state", FAIL),
    ("small size", "v2.size.covers", WARN),
    ("accepts unknown", "v2.arc.running.unknown", FAIL),
    ("accepts error", "v2.arc.stop.error", FAIL),
    ("refusal", "v2.arc.running.error", FAIL),
    ("moves when refused", "v2.arc.running.unknown", FAIL),
    ("fd twice", "v2.arc.pre-copy.pre-copy-p2p", FAIL),
    ("no fd", "v2.arc.stop.stop-copy", FAIL),
    ("wrong state", "v2.arc.running.stop", FAIL),
    ("keeps session", "v2.arc.stop-copy.stop", FAIL),
    ("seek", "v2.fd.save-seek", FAIL),
    ("inherited", "v2.fd.save-cloexec", FAIL),
    ("eof", "v2.fd.eof-sticky", FAIL),
    ("poll", "v2.fd.poll", FAIL),
    ("position", "v2.fd.new-session", FAIL),
    ("loses bytes", "v2.fd.bad-read-pointer", FAIL),
    ("adds bytes", "v2.fd.bad-write-pointer", FAIL),
    ("salt", "v2.stream.repeat", WARN),
    ("truncation", "v2.stream.cut-half", FAIL),
    ("no load", "v2.stream.trailing-byte", FAIL),
    ("no sum", "v2.stream.flip-body", WARN),
    ("stop loads", "v2.stream.refused-then-stop", FAIL),
    ("info anywhere", "v2.precopy.info-stop-copy", FAIL),
    ("info argsz", "v2.precopy.info-short-argsz", FAIL),
    ("no initial", "v2.precopy.initial-not-zero", WARN),
    ("initial rises", "v2.precopy.initial-never-rises", FAIL),
    ("initial rises", "v2.precopy.initial-falls", FAIL),
    ("initial rises", "v2.precopy.drains", FAIL),
    ("dirty", "v2.precopy.dirty-begins-zero", WARN),
    ("zero", "v2.precopy.enomsg", WARN),
    ("overlap", "v2.dirty.overlap", FAIL),
    ("start twice", "v2.dirty.start-twice", FAIL),
    ("no bitmaps", "v2.dirty.report", WARN),
    ("report always", "v2.dirty.report-not-started", FAIL),
    ("clears buffer", "v2.dirty.report-keeps-bits", FAIL),
    ("ghost bit", "v2.dirty.report-idle", FAIL),
    ("ghost bit", "v2.dirty.report-twice", FAIL),
    ("long bitmap", "v2.dirty.report-tail", FAIL),
    ("reset keeps session", "v2.reset.stop-copy", FAIL),
    ("reset keeps session, full", "v2.reset.resuming", FAIL),
    ("dead errno", "v2.arc.stop-copy.stop", WARN),
    ("reset fails", "v2.reset.stop", FAIL),
    ("no reset flag", "v2.reset.flag", WARN),
    ("close keeps state", "v2.close.stop", WARN),
    ("close keeps logging", "v2.close.logging", FAIL),
]


@pytest.mark.parametrize(("defect", "check", "outcome"), DEFECTS)
def test_a_defect_is_found_by_its_check(defect: str, check: str, outcome: str) -> None:
    rig = rig_of(Played(7, defect.split(", ")))
    assert run_check(select([check])[0], rig, dangerous=True).outcome == outcome
    assert run_check(select([check])[0], rig_of(Played()), dangerous=True).outcome == PASS


def test_error_is_left_by_a_reset_only() -> None:
    results = run(Played(7, {"to error"}), "v2.error", "v2.reset.error")
    assert [result.outcome for result in results.values()] == [PASS, PASS]


def test_a_load_that_changes_nothing_is_found() -> None:
    assert run(Played(7, {"no sum", "no load"}), "v2.stream.takes-effect")["v2.stream.takes-effect"].outcome == FAIL
    assert run(Played(7, {"no sum"}), "v2.stream.takes-effect")["v2.stream.takes-effect"].outcome == PASS


@pytest.mark.parametrize(("defect", "outcome"), [("", PASS), ("reinit stays", FAIL), ("reinit empty", FAIL)])
def test_new_initial_data_are_announced_and_over_when_they_were_read(defect: str, outcome: str) -> None:
    kernel = Played(7, {defect})
    kernel.reinit = 40
    results = run(kernel, "v2.precopy.opt-in", "v2.precopy.reinit")
    assert [result.outcome for result in results.values()] == [PASS, outcome]
    kernel = Played(7)
    kernel.reinit = 40
    assert findings(run(kernel, "v2.precopy")) == {}


def test_a_stream_of_another_type_is_to_be_refused() -> None:
    check = "v2.second.other-type"
    assert run(Played(), check, second=Played(kind=2))[check].outcome == PASS
    assert run(Played(), check, second=Played(defects={"any kind"}, kind=2))[check].outcome == FAIL


def test_a_device_that_never_saves_the_same_twice_fails_nothing_for_that() -> None:
    results = run(Played(7, {"salt"}), second=Played(7, {"salt"}))
    assert set(findings(results)) == {"v2.stream.repeat", "v2.stream.flip-head"}


def test_after_something_else_was_loaded_the_device_gets_its_own_state_back() -> None:
    kernel = Played(7, {"no sum"})
    before = kernel.memory
    assert run(kernel, "v2.stream.flip-body")["v2.stream.flip-body"].outcome == WARN
    assert kernel.memory == before


def test_without_dangerous_nothing_that_hangs_or_warns_is_asked_for() -> None:
    kernel = Played(7, {"to error"})
    results = run(kernel, dangerous=False)
    assert findings(results) == {}
    dangers = [result for result in results.values() if result.seen.startswith("only with --dangerous: ")]
    assert len(dangers) == 4


def test_a_check_that_breaks_is_its_own_failure_and_no_other_s() -> None:
    def breaks(_: object) -> str:
        raise ZeroDivisionError("by zero\n")

    def skips(_: object) -> str:
        raise NotApplicable("nothing there")

    rig = rig_of(Played())
    broken = run_check(Check("v2.x.y", "r", "s", "e", breaks), rig)
    assert (broken.outcome, broken.seen) == (FAIL, r"ZeroDivisionError: by zero\n")
    assert run_check(Check("v2.x.y", "r", "s", "e", skips), rig)[4:6] == ("nothing there", SKIP)
    assert run_check(select(["v2.arc.running.stop"])[0], rig).outcome == PASS


def test_a_signal_is_no_check_s_result() -> None:
    def interrupted(_: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "0"

    with pytest.raises(KeyboardInterrupt):
        run_check(Check("v2.x.y", "r", "s", "e", interrupted), rig_of(Played()))


def test_a_check_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PATIENCE", 0.01)
    said, heard = [], threading.Event()

    def warn(text: str) -> None:
        said.append(text)
        heard.set()

    with runner.Watchdog(warn, "v2.x.y"):
        assert heard.wait(5)
    assert said == ["still in v2.x.y after 0 s"]
    with runner.Watchdog(None, "v2.x.y"):
        pass


# --- reports


def a_report() -> ConformReport:
    results = [
        Result(
            f"v2.x.{outcome}", 'a "rule" <&> # 1', "linux/vfio.h", "0", f"seen {outcome} #\\ <&>", outcome, note, 0.25
        )
        for outcome, note in zip(OUTCOMES, ("", "", "why # it is none", ""), strict=True)
    ]
    return ConformReport(
        device="dev",
        type="type-1",
        driver="driver",
        kernel="6.12",
        protocol="mainline-v2 (stop-copy)",
        found="running",
        state="closed",
        seconds=1.0,
        checks=results,
    )


def test_the_table_has_a_line_per_check_and_tells_rule_and_source_of_findings() -> None:
    lines = FORMATS["table"](a_report()).splitlines()
    assert lines[0] == "dev: type-1 driver, mainline-v2 (stop-copy), Linux 6.12"
    assert [line.split()[:2] for line in lines if line[:4] in {"pass", "FAIL", "WARN", "skip"}] == [
        ["pass", "v2.x.pass"],
        ["FAIL", "v2.x.fail"],
        ["WARN", "v2.x.warn"],
        ["skip", "v2.x.skip"],
    ]
    assert sum("linux/vfio.h" in line for line in lines) == 2
    told = [number for number, line in enumerate(lines) if "linux/vfio.h" in line]
    assert [lines[number - 2].split()[0] for number in told] == ["FAIL", "WARN"]
    assert lines[-1].startswith(
        "4 checks: 1 pass, 1 fail, 1 warn, 1 skip; 1.0 s; the device was running, is now closed"
    )


def test_tap_has_its_plan_and_a_line_per_check() -> None:
    lines = FORMATS["tap"](a_report()).splitlines()
    assert lines[:2] == ["TAP version 14", "1..4"]
    points = [line for line in lines if re.match(r"(not )?ok ", line)]
    assert points == [
        "ok 1 - v2.x.pass",
        "not ok 2 - v2.x.fail",
        "not ok 3 - v2.x.warn # TODO why \\# it is none",
        "ok 4 - v2.x.skip # SKIP seen skip \\#\\\\ <&>",
    ]
    assert lines.count("  ---") == lines.count("  ...") == 2
    texts = [line.partition(": ")[2] for line in lines if line.startswith("  ") and ": " in line]
    assert json.loads(texts[0]) == 'a "rule" <&> # 1'


def test_junit_is_xml_with_every_check_as_a_case() -> None:
    root = ET.fromstring(FORMATS["junit"](a_report()))  # noqa: S314 -- our own text
    suite = root.find("testsuite")
    assert suite is not None
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")] == [
        "4",
        "1",
        "0",
        "1",
        "1.000",
    ]
    cases = suite.findall("testcase")
    assert [(case.get("classname"), case.get("name"), case.get("time")) for case in cases] == [
        ("v2.x", outcome, "0.250") for outcome in OUTCOMES
    ]
    assert [case[0].tag for case in cases] == ["system-out", "failure", "system-out", "skipped"]
    assert cases[1][0].get("message") == "seen fail #\\ <&>"
    assert 'rule: a "rule" <&> # 1' in str(cases[1][0].text)
    assert {one.get("name"): one.get("value") for one in suite.iter("property")}["warnings"] == "1"


def test_json_has_the_documented_keys() -> None:
    document = json.loads(FORMATS["json"](a_report()))
    assert list(document) == [
        "device",
        "type",
        "driver",
        "kernel",
        "protocol",
        "found",
        "state",
        "seconds",
        "checks",
        "counts",
    ]
    assert document["counts"] == dict.fromkeys(OUTCOMES, 1)
    assert list(document["checks"][0]) == ["id", "rule", "source", "expected", "seen", "outcome", "note", "seconds"]


# --- the command, without a device


def test_list_names_every_check_with_its_rule() -> None:
    done = CliRunner().invoke(cli, ["conform", "--list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == [check.id for check in all_checks()]
    done = CliRunner().invoke(cli, ["--json", "conform", "--list", "--check", "v2.reset"])
    assert [one["id"] for one in json.loads(done.output)] == [check.id for check in select(["v2.reset"])]


def test_a_device_or_the_list_is_needed() -> None:
    done = CliRunner().invoke(cli, ["conform"])
    assert done.exit_code == 2
    assert "DEVICE" in done.output


# --- the documentation


def test_the_documentation_s_table_is_the_list_of_the_checks() -> None:
    rows = re.findall(
        r"^\| `((?:v2|rfc)\.[^`]+)` \| (.+?) \| (.+?) \| (.+?) \|$", DOCS.read_text("utf-8"), re.MULTILINE
    )
    made = [(check.id, check.rule, check.expected, check.source) for check in all_checks()]
    assert rows == made, "run python -m tools.conform_table"


def test_every_finding_that_the_documentation_prints_is_explained_in_it() -> None:
    text, _, printed = DOCS.read_text("utf-8").partition("## As printed")
    explained = text.partition("## What it finds")[2].partition("## The checks")[0]
    found = re.findall(r"^(pass|FAIL|WARN|skip) +(\S+)", printed, re.MULTILINE)
    ids = [check.id for check in all_checks()]
    assert [name for _, name in found] == [
        name for family in ("v2.", "v2.", "rfc.") for name in ids if name.startswith(family)
    ]
    bad = {(outcome, name) for outcome, name in found if outcome in {"FAIL", "WARN"}}
    assert len(bad) == 12
    for outcome, name in bad:
        assert re.search(rf"^\| {outcome} .*`{re.escape(name)}`", explained, re.MULTILINE), name
