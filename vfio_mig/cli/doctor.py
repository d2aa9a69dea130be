# SPDX-License-Identifier: MIT
"""``doctor``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click

from vfio_mig.cli.output import print_json, put, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options

UNFIT: Final = 7


@click.command("doctor", short_help="Check this host, and say what to do.")
@click.pass_obj
def doctor_command(options: Options) -> None:
    """Check this host: kernel, nodes, rights, limits, the RFC's numbers. Opens no device.

    One line per check: RESULT NAME: TEXT; the results are ok, note (something does without it) and problem. Exit code
    7 says that there is a problem.

    \b
    Example: vfio-mig doctor | grep -v '^ok'
    """
    from vfio_mig.jobs.queries.doctor import examine_host

    report = examine_host(settings_of(options))
    if options.as_json:
        print_json(report.as_dict())
    else:
        for one in report.checks:
            put(f"{one.result:<8} {one.name}: {one.text}", alarm=one.result == "problem")
    if report.problems:
        sys.exit(UNFIT)
