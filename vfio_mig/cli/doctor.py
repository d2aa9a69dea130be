# SPDX-License-Identifier: MIT
"""``doctor``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click

from vfio_mig.cli.output import print_json, put, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.cli.options import Options
    from vfio_mig.jobs.queries.host_report import Fact, HostReport

UNFIT: Final = 7
COLUMNS: Final = 80
_OUTCOMES: Final = ("pass", "fail", "warn", "skip")


@click.command("doctor", short_help="Check this host, and say what to do.")
@click.option("--report", "wants_report", is_flag=True, help="Print a text for a bug report, without private details.")
@click.option(
    "--conform",
    "conform_file",
    metavar="FILE",
    help="With --report: take the outcomes from this file, which `vfio-mig --json conform` has printed.",
)
@click.pass_obj
def doctor_command(options: Options, *, wants_report: bool, conform_file: str | None) -> None:
    """Check this host: kernel, nodes, rights, limits, the RFC's numbers. Opens no device.

    One line per check: RESULT NAME: TEXT; the results are ok, note (something does without it) and problem. Exit code
    7 says that there is a problem.

    --report prints what others have to know of this host to help: versions, GPU, firmware, driver, IOMMU, these
    checks. Names of the host and of its people, UUIDs, addresses, serial numbers and paths in home directories are left
    out, and the text says so. It ends with 0. Read it before you send it.

    \b
    Examples:
      vfio-mig doctor | grep -v '^ok'
      vfio-mig doctor --report > report.txt
    """
    if conform_file is not None and not wants_report:
        raise click.UsageError("--conform goes with --report")
    if wants_report:
        _report(options, conform_file)
        return
    from vfio_mig.jobs.queries.doctor import examine_host

    report = examine_host(settings_of(options))
    if options.as_json:
        print_json(report.as_dict())
    else:
        for one in report.checks:
            put(f"{one.result:<8} {one.name}: {one.text}", alarm=one.result == "problem")
    if report.problems:
        sys.exit(UNFIT)


def _report(options: Options, conform_file: str | None) -> None:
    from vfio_mig.jobs.queries.host_report import report_host

    report = report_host(settings_of(options), conform=conform_file)
    if options.as_json:
        print_json(report.as_dict())
        return
    for line in _text(report):
        put(line)


def _text(report: HostReport) -> Iterator[str]:
    """Yield the lines of a report, none wider than a terminal, so that they can be pasted anywhere."""
    yield "vfio-mig: a report on a host, by 'vfio-mig doctor --report'"
    yield from _facts(report.facts)
    yield ""
    yield f"what doctor finds (problems: {report.problems})"
    for one in report.checks:
        yield from _wrapped(f"  {one.result:<8} ", f"{one.name}: {one.text}")
    yield from _of_conform(report.conform)
    yield ""
    yield "left out of these lines, and how often"
    for kind, times in report.left_out.items():
        yield f"  {kind}: {times}"
    yield from _wrapped("  ", "Of logs, processes, serial numbers, disks and the network nothing was read.")


def _facts(facts: list[Fact]) -> Iterator[str]:
    section = ""
    for one in facts:
        if one.section != section:
            section = one.section
            yield ""
            yield section
        yield from _wrapped(f"  {one.name}: ", one.value)


def _of_conform(facts: list[Fact]) -> Iterator[str]:
    """Yield how many checks had each outcome, and the names of those that did not pass."""
    if not facts:
        yield ""
        yield "conform: no report of it was given (--conform FILE)"
        return
    outcomes = {outcome: [one.name for one in facts if one.value == outcome] for outcome in _OUTCOMES}
    yield from _facts([one for one in facts if one.value not in _OUTCOMES])
    for outcome, names in outcomes.items():
        shown = "" if outcome == "pass" else f": {', '.join(names)}"
        yield from _wrapped("  ", f"{len(names)} {outcome}{shown if names else ''}")


def _wrapped(first: str, text: str) -> Iterator[str]:
    from textwrap import wrap

    yield from wrap(text, COLUMNS, initial_indent=first, subsequent_indent="    ", break_on_hyphens=False)
