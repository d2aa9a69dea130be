# SPDX-License-Identifier: MIT
"""``conform``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from vfio_mig.cli import complete
from vfio_mig.cli.output import borrow_options, print_json, put, put_lines, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options
    from vfio_mig.conform.runner import ConformReport

SHOWN = 3


@click.command("conform", short_help="Check DEVICE's migration driver against the kernel's rules.")
@click.argument("device", required=False, shell_complete=complete.device)
@click.option(
    "--check",
    "checks",
    multiple=True,
    metavar="PATTERN",
    shell_complete=complete.check,
    help="Run these checks only (repeatable).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "tap", "junit", "json"]),
    default=None,
    help="How to print the report; a table by default, JSON with the global --json.",
)
@click.option("--output", metavar="FILE", help="Write the report to this new file.")
@click.option("--list", "only_list", is_flag=True, help="List the checks and run none; takes no DEVICE.")
@click.option("--second", metavar="DEVICE2", help="Another device, for the checks that take two.")
@click.option("--dangerous", is_flag=True, help="Also ask for what is known to hang or crash some kernels.")
@click.option("--force", is_flag=True, help="Also when another process has the device open.")
@borrow_options
@click.pass_obj
def conform_command(
    options: Options,
    device: str | None,
    *,
    checks: tuple[str, ...],
    form: str | None,
    output: str | None,
    only_list: bool,
    second: str | None,
    dangerous: bool,
    force: bool,
) -> None:
    """Check the migration driver of DEVICE against the rules of linux/vfio.h, one by one, as root.

    The device's state is lost: it is reset, stopped, and given wrong streams to load. At the end it runs. Exit code 5
    says that at least one check failed; warnings are not failures. docs/conform.md explains every check.

    \b
    Example:
      vfio-mig conform $UUID --check 'v2.arc.*' --format tap
    """
    if only_list:
        _list(options, checks)
        return
    if device is None:
        raise click.UsageError("Missing argument 'DEVICE'.")
    from vfio_mig.conform.report import FORMATS
    from vfio_mig.conform.runner import conform_device
    from vfio_mig.image.files import committed

    with nullcontext() if output is None else committed(output) as file:
        report = conform_device(
            device, settings_of(options), checks=checks, second=second, dangerous=dangerous, force=force
        )
        text = FORMATS[form or ("json" if options.as_json else "table")](report)
        if file is None:
            put_lines(text, alarm="FAIL ")
        else:
            file.write(text.encode())
    _judge(report)


def _list(options: Options, patterns: tuple[str, ...]) -> None:
    from vfio_mig.conform.registry import select

    checks = select(patterns)
    if options.as_json:
        names = ("id", "rule", "source", "expected", "family", "danger")
        print_json([{name: getattr(check, name) for name in names} for check in checks])
        return
    from vfio_mig.cli.columns import hanging, terminal_width

    width = terminal_width()
    for check in checks:
        rule = f"{check.rule}{' (--dangerous)' if check.danger else ''}"
        for line in hanging(f"{check.id:<34} ", rule, width):
            put(line)


def _judge(report: ConformReport) -> None:
    from vfio_mig.errors import DeviceError

    failed = [result.id for result in report.checks if result.outcome == "fail"]
    if failed:
        shown = ", ".join(failed[:SHOWN]) + (", …" if len(failed) > SHOWN else "")
        raise DeviceError(f"{len(failed)} of {len(report.checks)} checks failed: {shown}", device=report.device)
