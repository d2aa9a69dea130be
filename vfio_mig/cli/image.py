# SPDX-License-Identifier: MIT
"""``verify`` and ``check``: what an image is, and whether it fits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from vfio_mig.cli import complete
from vfio_mig.cli.names import device_first, is_device
from vfio_mig.cli.output import (
    Meter,
    borrow_options,
    memory_option,
    parse_memory,
    print_json,
    put,
    say,
    settings_of,
    warn,
)

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options

MISFIT = 6


@click.command("verify", short_help="Verify an image file on its own.")
@click.argument("file", shell_complete=complete.file)
@click.option("--raw", is_flag=True, help="FILE is a bare GVT-g device state.")
@click.option("--no-verify-state", is_flag=True, help="Leave out the device state: its layout is not known here.")
@click.pass_obj
def verify_command(options: Options, file: str, *, raw: bool, no_verify_state: bool) -> None:
    """Verify FILE (- is stdin): every checksum, and the device state where its layout is known. No device is needed.

    Exit code 6 says that it is not whole, or that its state is broken.

    \b
    Example: vfio-mig verify gpu.vfm
    """
    from vfio_mig.jobs.check import verify_image

    report = verify_image(file, raw=raw, verify_state=not no_verify_state)
    if options.as_json:
        print_json(report.as_dict())
        return
    of = "" if report.type is None else f" of a {report.type}"
    what = "bare state" if raw else f"{report.protocol} image{of}, {report.members} members"
    if not options.quiet:
        text = f"{file}: good: {what}, {report.state_bytes} bytes of state, {report.pages} pages of memory"
        put(text)
    for warning in report.warnings:
        warn(f"{file}: {warning}")


@click.command("check", short_help="Tell whether an image fits DEVICE.")
@click.argument("file", shell_complete=complete.file)
@click.argument("device", shell_complete=complete.device)
@click.option("--raw", is_flag=True, help="FILE is a bare device state.")
@borrow_options
@click.pass_obj
def check_command(options: Options, file: str, device: str, *, raw: bool) -> None:
    """Tell check by check whether FILE (- is stdin) fits DEVICE, whose state is not touched. `restore` does the same.

    One line per check: RESULT NAME: TEXT; the results are ok, note (differs, and may) and mismatch. Exit code 6 says
    that there is a mismatch; those marked forcible do not stop `restore --force`.

    \b
    Example: vfio-mig check gpu.vfm 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.check import check_image

    # The names are those of the usage; in the other order they are told apart, too
    if is_device(file) and not is_device(device):
        file, device = device, file
    elif not is_device(device):
        device, file = device_first(device, file, "FILE DEVICE")
    report = check_image(device, file, settings_of(options), raw=raw)
    if options.as_json:
        print_json(report.as_dict())
    else:
        for one in report.checks:
            forcible = " (forcible)" if one.forcible and one.result == "mismatch" else ""
            put(f"{one.result:<8} {one.name}: {one.text}{forcible}", alarm=one.result == "mismatch")
    if not report.fits:
        sys.exit(MISFIT)


@click.command("pages", short_help="Write an image's guest memory, without a device.")
@click.argument("file", shell_complete=complete.file)
@memory_option
@click.pass_obj
def pages_command(options: Options, file: str, memory: tuple[str, ...]) -> None:
    """Verify FILE (- is stdin) and write its pages to --memory. No device is needed.

    \b
    Example: follow a running device's pages to another host
      vfio-mig sync $UUID - --memory /dev/shm/guest@0 --max-downtime 50 |
        ssh HOST vfio-mig pages - --memory copy@0
    """
    from vfio_mig.jobs.files.pages import load_pages

    with Meter(options) as meter:
        report = load_pages(file, memory=parse_memory(memory), progress=meter)
    options.done()
    if options.as_json:
        print_json(report.as_dict())
    else:
        say(options, f"{file}: {report.pages_written} pages written")
