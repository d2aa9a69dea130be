# SPDX-License-Identifier: MIT
"""What `vfio-mig conform` is worth: each defect of the sample driver is found, by the checks that say so and no others.

For each, the checks around it are run on a vGPU that has it, and find it and nothing else; on one that has none they
find nothing. The driver's README names the checks; the two tables are compared.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tools.lab.sample import defects, host
from tools.lab.vfio.v2 import HAS_PRE_COPY
from vfio_mig.conform.runner import conform_device
from vfio_mig.jobs.engine.session import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

README: Final = Path(__file__).parents[2] / "tools/kmod/README.md"
V2: Final = 7  # the module's parameter
RFC: Final = 0

FD: Final = ("v2.fd.*-direction", "v2.fd.*-seek", "v2.fd.*-cloexec", "v2.fd.zero-*", "v2.fd.unknown-ioctl")
READ: Final = (
    *("v2.fd.eof-sticky", "v2.fd.byte-*", "v2.fd.shared-position", "v2.fd.bad-*"),
    *("v2.fd.close-early", "v2.fd.new-session", "v2.fd.old-stays-dead"),
)
LOAD: Final = (
    *("v2.stream.round-trip", "v2.stream.empty", "v2.stream.cut-*", "v2.stream.trailing-*"),
    *("v2.stream.foreign-magic", "v2.stream.refused-then-stop"),
)
PRECOPY: Final = ("v2.precopy", "v2.arc.pre-copy", "v2.arc.pre-copy-p2p")
LOG: Final = ("v2.dirty", "v2.close.logging")


class Case(NamedTuple):
    """A defect, what is run, and what is found.

    :param run: ids or groups of checks.
    :param found: patterns: of what is run exactly these fail, or are warnings where ``warn:`` stands in front.
    """

    defect: str
    run: tuple[str, ...]
    found: tuple[str, ...]
    v2: int = V2


CASES: Final = (
    Case("state-unknown", ("v2.arc.*.unknown", "v2.arc.*.error"), ("v2.arc.*.unknown",)),
    Case("state-error", ("v2.arc.*.unknown", "v2.arc.*.error"), ("v2.arc.*.error",)),
    Case("state-stuck", ("v2.arc.stop",), ("v2.arc.stop.running-p2p",)),
    Case("state-new-fd", ("v2.arc.stop-copy",), ("v2.arc.stop-copy.stop-copy",)),
    Case("state-no-fd", ("v2.arc.resuming",), ("v2.arc.resuming.stop-copy",)),
    Case("error-left", ("v2.error", "v2.reset.error"), ("v2.error.refuses",)),
    Case(
        "stop-keeps-fd",
        ("v2.arc.stop-copy", "v2.fd.old-stays-dead"),
        ("v2.arc.stop-copy.stop", "v2.arc.stop-copy.running", "v2.arc.stop-copy.running-p2p"),
    ),
    Case("stop-unread", READ, ("v2.fd.close-early", "v2.fd.new-session", "v2.fd.old-stays-dead")),
    Case("reset-stays", ("v2.reset.stop",), ("v2.reset.stop",)),  # where RESET does not lead to RUNNING all else ends
    Case("reset-keeps-saving", ("v2.reset",), ("v2.reset.stop-copy", "v2.reset.pre-copy", "v2.reset.pre-copy-p2p")),
    Case("reset-keeps-resuming", ("v2.reset", "v2.stream.abandoned"), ("v2.reset.resuming", "v2.stream.abandoned")),
    Case("close-keeps-fd", ("v2.close",), ("v2.close.stop-copy", "v2.close.pre-copy", "v2.close.pre-copy-p2p")),
    Case("fd-both-ways", FD, ("v2.fd.save-direction", "v2.fd.resume-direction")),
    Case("fd-seekable", FD, ("v2.fd.save-seek", "v2.fd.resume-seek")),
    Case("fd-any-ioctl", FD, ("v2.fd.unknown-ioctl",)),
    Case("read-restarts", READ, ("v2.fd.eof-sticky",)),
    Case("read-loses", READ, ("v2.fd.byte-reads", "v2.fd.shared-position", "v2.fd.bad-read-pointer")),
    Case("read-fault", READ, ("v2.fd.bad-read-pointer",)),
    Case("size-refused", ("v2.size",), ("v2.size.every-state", "v2.size.covers", "v2.size.set", "v2.size.short-argsz")),
    Case("load-truncated", LOAD, ("v2.stream.empty", "v2.stream.cut-*")),
    Case("load-surplus", LOAD, ("v2.stream.trailing-*",)),
    Case("load-foreign", LOAD, ("v2.stream.foreign-magic",)),
    Case("load-refused", LOAD, ("v2.stream.refused-then-stop",)),
    Case("load-pieces", READ, ("v2.fd.byte-writes", "v2.fd.bad-write-pointer")),
    Case("load-nothing", ("v2.stream.takes-effect", "v2.stream.round-trip"), ("v2.stream.takes-effect",)),
    Case("load-loses-seed", ("v2.second",), ("v2.second.round-trip",)),
    Case("precopy-info-late", PRECOPY, ("v2.precopy.info-stop-copy",)),
    Case("precopy-info-argsz", PRECOPY, ("v2.precopy.info-short-argsz",)),
    Case("precopy-initial-stuck", PRECOPY, ("v2.precopy.initial-falls", "v2.precopy.drains")),
    Case(
        "precopy-new-fd",
        PRECOPY,
        (
            "v2.arc.pre-copy.stop-copy",
            "v2.arc.pre-copy-p2p.stop-copy",
            "v2.precopy.round-trip",
            "v2.precopy.unread",
            "v2.precopy.called-off",
        ),
    ),
    Case(
        "precopy-enomsg",
        PRECOPY,
        (
            "v2.precopy.one-stream",
            "v2.precopy.round-trip",
            "v2.precopy.unread",
            "v2.precopy.p2p-and-back",
            "v2.precopy.called-off",
        ),
    ),
    Case("precopy-restarts", PRECOPY, ("v2.precopy.initial-never-rises", "v2.precopy.p2p-and-back")),
    Case(
        "precopy-keeps-fd",
        PRECOPY,
        (
            *(f"v2.arc.pre-copy{p2p}.{to}" for p2p in ("", "-p2p") for to in ("stop", "running", "running-p2p")),
            "v2.precopy.info-ended",
            "v2.precopy.called-off",
        ),
    ),
    Case(
        "log-all",
        LOG,
        ("v2.dirty.report-idle", "v2.dirty.report-twice", "v2.dirty.report-outside", "v2.dirty.restart"),
    ),
    Case("log-start-twice", LOG, ("v2.dirty.start-twice",)),
    Case("log-unstarted", LOG, ("v2.dirty.report-not-started",)),
    Case("log-ends-at-stop", LOG, ("v2.dirty.every-state",)),
    Case("log-survives", LOG, ("v2.close.logging",)),
    Case("load-loses-register", LOAD, ("v2.stream.round-trip", "v2.stream.cut-recovers")),
    Case("load-loses-register", ("rfc.state",), ("rfc.state.round-trip", "rfc.state.refused-recovers"), RFC),
    Case("save-counts", ("v2.stream.repeat",), ("warn:v2.stream.repeat",)),
    Case(
        "save-counts",
        ("rfc.state",),
        ("rfc.state.repeat", "rfc.state.round-trip", "rfc.state.refused-recovers"),
        RFC,
    ),
    *(Case(f"status-{one}", ("rfc.status",), (f"rfc.status.{one}",), RFC) for one in ("no-flag", "both-flags")),
    Case("status-unknown-flag", ("rfc.status",), ("rfc.status.unknown-flag",), RFC),
    Case("status-argsz", ("rfc.status",), ("rfc.status.short-argsz",), RFC),
    Case("status-stop-twice", ("rfc.status",), ("rfc.status.stop-twice",), RFC),
    Case("dirty-tail", ("rfc.dirty",), ("rfc.dirty.tail",), RFC),
    Case("dirty-overrun", ("rfc.dirty.overrun",), ("rfc.dirty.overrun",), RFC),  # the others have no room for it
    Case("dirty-keeps-buffer", ("rfc.dirty",), ("rfc.dirty.overwrites", "rfc.dirty.read-only"), RFC),
    Case("dirty-invented", ("rfc.dirty",), ("rfc.dirty.no-memory",), RFC),
    Case("dirty-fault", ("rfc.dirty",), ("rfc.dirty.bad-pointer",), RFC),
    Case("dirty-copy-fault", ("rfc.dirty",), ("rfc.dirty.read-only",), RFC),
    Case("state-read-offset", ("rfc.state",), ("rfc.state.read-offset",), RFC),
    Case("state-write-offset", ("rfc.state",), ("rfc.state.write-offset",), RFC),
    Case("state-type", ("rfc.state",), ("rfc.state.bad-type",), RFC),
    Case("state-size", ("rfc.state.read", "rfc.state.repeat"), ("rfc.state.read",), RFC),
)


def conform(case: Case, *names: str) -> dict[str, str]:
    """Check a vGPU with these defects, and a second one with the same; returns all outcomes."""
    with host.parameter_set("v2", case.v2), host.instance() as one, host.instance() as second:
        for instance in (one, second):
            defects.switch(instance, *names)
        is_dangerous = case.defect == "error-left"
        settings = Settings(warn=str)  # that a device cannot be brought back is a warning, and may be so here
        report = conform_device(one.uuid, settings, checks=case.run, second=second.uuid, dangerous=is_dangerous)
        return {check.id: check.outcome for check in report.checks}


def findings(outcomes: dict[str, str]) -> set[str]:
    marks = {"fail": "", "warn": "warn:"}
    return {marks[outcome] + name for name, outcome in outcomes.items() if outcome in marks}


def expected(case: Case, ids: Iterable[str]) -> set[str]:
    """Return the findings: of those that were run, those that a pattern is for."""
    marked = {mark + name for name in ids for mark in ("", "warn:")}
    return {name for pattern in case.found for name in fnmatch.filter(marked, pattern)}


def parameters(case: Case) -> object:
    """Return a case for pytest; only of logging both kernels are told."""
    marks = [] if case.defect.startswith("log-") else [pytest.mark.slow]
    return pytest.param(case, marks=marks, id=f"{case.defect}-{'v2' if case.v2 else 'rfc'}")


@pytest.mark.parametrize("case", list(map(parameters, CASES)))
def test_a_defect_is_found_by_the_checks_that_are_for_it_and_by_no_other(case: Case) -> None:
    if not HAS_PRE_COPY and not case.defect.startswith("log-"):
        pytest.skip("Linux 6.1 is here for DMA logging; the rest is found on a later kernel, in more states")
    with host.parameter_set("v2", V2), host.instance() as one:
        if not defects.possible(case.defect, one):
            pytest.skip("not on this kernel")
    outcomes = conform(case, case.defect)
    asked = {name for name, outcome in outcomes.items() if outcome != "skip"}
    wanted = expected(case, asked)
    assert findings(outcomes) == wanted
    assert all(fnmatch.filter(wanted, pattern) for pattern in case.found)


@pytest.mark.parametrize("v2", [V2, RFC])
def test_without_a_defect_none_of_this_is_found(v2: int) -> None:
    run = tuple(sorted({name for case in CASES if case.v2 == v2 for name in case.run}))
    outcomes = conform(Case("error-left" if v2 else "", run, (), v2))
    assert findings(outcomes) == set()
    assert sum(outcome == "pass" for outcome in outcomes.values()) > (100 if v2 else 30)


def test_every_defect_has_a_case_and_the_checks_that_the_driver_s_readme_names() -> None:
    section = README.read_text().partition("## Defects")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|.*\| ([^|]+) \|$", section, re.MULTILINE)
    assert [name for name, _ in rows] == defects.known()
    for name, words in rows:
        named = {pattern.replace("STATE", "*") for pattern in re.findall(r"`([^`]+)`", words)}
        found = {pattern.removeprefix("warn:") for case in CASES if case.defect == name for pattern in case.found}
        assert named
        assert named <= found, name
    assert {case.defect for case in CASES} == set(defects.known())
