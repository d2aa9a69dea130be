# SPDX-License-Identifier: MIT
"""A report as text: a table for people, TAP 14 and JUnit XML for machines. JSON is the report's own dictionary."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import FAIL, OUTCOMES, PASS, SKIP, WARN
from vfio_mig.errors import json_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_mig.conform.kit.check import Result
    from vfio_mig.conform.runner import ConformReport

_WIDTH: Final = 5
_LOUD: Final = {PASS: "pass", FAIL: "FAIL", WARN: "WARN", SKIP: "skip"}


def _title(report: ConformReport) -> str:
    what = " ".join(part for part in (report.type, report.driver) if part)
    return f"{report.device}: {what}, {report.protocol}, Linux {report.kernel}"


def summary(report: ConformReport) -> str:
    """Say in one sentence what came of it, and what state the device is left in."""
    counts = ", ".join(f"{report.count(outcome)} {outcome}" for outcome in OUTCOMES)
    left = {"closed": "closed, running before"}.get(report.state, report.state)
    return (
        f"{len(report.checks)} checks: {counts}; {report.seconds:.1f} s; the device was {report.found}, is now {left}"
    )


def _findings(result: Result) -> Iterator[tuple[str, str]]:
    yield "rule", result.rule
    yield "source", result.source
    yield "expected", result.expected
    yield "seen", result.seen
    if result.note:
        yield "note", result.note


def as_table(report: ConformReport) -> str:
    """One line per check: outcome, id, what was seen; with rule, source and expectation where it deviates."""
    width = max((len(result.id) for result in report.checks), default=0)
    lines = [_title(report)]
    for result in report.checks:
        lines.append(f"{_LOUD[result.outcome]:<{_WIDTH}} {result.id:<{width}}  {result.seen}".rstrip())
        if result.outcome in (FAIL, WARN):
            lines += [f"{'':<{_WIDTH}}   {name:<9} {text}" for name, text in _findings(result) if name != "seen"]
    return "\n".join([*lines, summary(report), ""])


def _tap(text: str) -> str:
    return text.replace("\\", "\\\\").replace("#", "\\#")


def as_tap(report: ConformReport) -> str:
    """TAP 14; a warning is a TODO, which is not a failure."""
    lines = ["TAP version 14", f"1..{len(report.checks)}", f"# {_title(report)}"]
    for number, result in enumerate(report.checks, 1):
        word = "ok" if result.outcome in (PASS, SKIP) else "not ok"
        line = f"{word} {number} - {_tap(result.id)}"
        if result.outcome == SKIP:
            line += f" # SKIP {_tap(result.seen)}"
        elif result.outcome == WARN:
            line += f" # TODO {_tap(result.note)}"
        lines.append(line)
        if result.outcome in (FAIL, WARN):
            lines += ["  ---", *(f"  {name}: {json_text(text)}" for name, text in _findings(result)), "  ..."]
    return "\n".join([*lines, f"# {summary(report)}", ""])


def _attributes(**values: object) -> str:
    return "".join(f' {name}="{escape(str(value))}"' for name, value in values.items())


def _case(result: Result) -> str:
    family, _, name = result.id.rpartition(".")
    attributes = _attributes(classname=family, name=name, time=f"{result.seconds:.3f}")
    text = escape("\n".join(f"{key}: {value}" for key, value in _findings(result)))
    inner = {
        PASS: f"<system-out>{text}</system-out>",
        WARN: f"<system-out>warning\n{text}</system-out>",
        SKIP: f"<skipped{_attributes(message=result.seen)}/>",
        FAIL: f"<failure{_attributes(message=result.seen, type=result.id)}>{text}</failure>",
    }[result.outcome]
    return f"    <testcase{attributes}>{inner}</testcase>"


def as_junit(report: ConformReport) -> str:
    """JUnit XML; a warning is a passed case that says so in its output."""
    attributes = _attributes(
        name="vfio-mig conform",
        tests=len(report.checks),
        failures=report.count(FAIL),
        errors=0,
        skipped=report.count(SKIP),
        time=f"{report.seconds:.3f}",
    )
    properties = {
        "device": report.device,
        "type": report.type,
        "driver": report.driver,
        "kernel": report.kernel,
        "protocol": report.protocol,
        "found": report.found,
        "state": report.state,
        "warnings": report.count(WARN),
    }
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            "<testsuites>",
            f"  <testsuite{attributes}>",
            "    <properties>",
            *(f"      <property{_attributes(name=name, value=value)}/>" for name, value in properties.items()),
            "    </properties>",
            *map(_case, report.checks),
            "  </testsuite>",
            "</testsuites>",
            "",
        ]
    )


def as_json(report: ConformReport) -> str:
    """One JSON document."""
    return json_text(report.as_dict()) + "\n"


FORMATS: Final[dict[str, Callable[[ConformReport], str]]] = {
    "table": as_table,
    "tap": as_tap,
    "junit": as_junit,
    "json": as_json,
}
