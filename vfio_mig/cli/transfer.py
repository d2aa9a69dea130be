# SPDX-License-Identifier: MIT
"""``dirty``, ``sync``, ``save``, ``restore``: what moves a device's memory and state."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click

from vfio_mig.cli.output import (
    Meter,
    borrow_options,
    memory_option,
    parse_memory,
    parse_ranges,
    print_json,
    range_option,
    say,
    settings_of,
    warn,
)

if TYPE_CHECKING:
    from vfio_mig.cli.main import Options
    from vfio_mig.dirty.sync import Round

NOW: Final = {"running": "it runs", "stop": "left stopped", "closed": "closed, as nobody else has it open"}


@click.command("save", short_help="Save DEVICE to a file.")
@click.argument("device")
@click.argument("file")
@memory_option
@range_option
@click.option("--leave-running", is_flag=True, help="Start the device again once everything is read.")
@click.option("--raw", is_flag=True, help="Write the bare device state: no bitmap, no pages, no integrity.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@borrow_options
@click.pass_obj
def save_command(
    options: Options,
    device: str,
    file: str,
    memory: tuple[str, ...],
    ranges: tuple[str, ...],
    *,
    leave_running: bool,
    raw: bool,
    force: bool,
) -> None:
    """Stop DEVICE and save dirty bitmap, with --memory the dirty pages, and state to FILE (- is stdout).

    DEVICE is left stopped unless --leave-running. After a failure it runs and there is no FILE.

    \b
    Examples:
      vfio-mig save $UUID gpu.vfm
      vfio-mig save $UUID gpu.vfm --memory /dev/shm/guest@0 --leave-running
      vfio-mig save $UUID - | ssh HOST vfio-mig restore $UUID -
    """
    from vfio_mig.jobs.save import save

    with Meter(options) as meter:
        report = save(
            device,
            file,
            settings_of(options),
            memory=parse_memory(memory),
            ranges=parse_ranges(ranges),
            leave_running=leave_running,
            raw=raw,
            force=force,
            progress=meter,
        )
    if options.as_json and file != "-":
        print_json(report._asdict())
        return
    say(
        options,
        f"{report.device}: saved {report.state_bytes} bytes of state, {report.pages_dirty} dirty pages, "
        f"{report.pages_written} pages of memory to {file}; stopped for {report.stopped_time * 1e3:.1f} ms "
        f"(stop {report.stop_time * 1e3:.1f}, bitmap {report.bitmap_time * 1e3:.1f}, "
        f"state {report.state_read_time * 1e3:.1f}); {NOW[report.state]}",
    )


@click.command("restore", short_help="Load a file into DEVICE.")
@click.argument("device")
@click.argument("file")
@memory_option
@click.option("--start", is_flag=True, help="Start the device once the state is loaded.")
@click.option("--raw", is_flag=True, help="FILE is a bare device state.")
@click.option("--force", is_flag=True, help="Go on over mismatches that `vfio-mig check` calls forcible.")
@click.option(
    "--no-verify-state",
    is_flag=True,
    help="DANGEROUS: load a state of unknown layout; the kernel may believe whatever it says.",
)
@borrow_options
@click.pass_obj
def restore_command(
    options: Options,
    device: str,
    file: str,
    memory: tuple[str, ...],
    *,
    start: bool,
    raw: bool,
    force: bool,
    no_verify_state: bool,
) -> None:
    """Load FILE (- is stdin) into DEVICE, a fresh one of the same type; left stopped unless --start.

    All of FILE is verified before the first byte reaches DEVICE. With --memory the saved pages are written there.

    \b
    Examples:
      vfio-mig restore $UUID gpu.vfm --start
      vfio-mig restore $UUID - <gpu.vfm
    """
    from vfio_mig.jobs.restore import restore

    with Meter(options) as meter:
        report = restore(
            device,
            file,
            settings_of(options),
            memory=parse_memory(memory),
            start=start,
            raw=raw,
            force=force,
            verify_state=not no_verify_state,
            progress=meter,
        )
    for warning in report.warnings:
        warn(f"{report.device}: {warning}")
    if options.as_json:
        print_json(report._asdict())
        return
    say(
        options,
        f"{report.device}: restored {report.state_bytes} bytes of state and {report.pages_written} pages from {file} "
        f"in {report.state_write_time * 1e3:.1f} ms; {NOW[report.state]}",
    )


@click.command("dirty", short_help="Tell which guest pages DEVICE may have written.")
@click.argument("device")
@memory_option
@range_option
@click.option("--list", "list_ranges", is_flag=True, help="Print the dirty ranges, one per line: ADDRESS BYTES.")
@borrow_options
@click.pass_obj
def dirty_command(
    options: Options,
    device: str,
    memory: tuple[str, ...],
    ranges: tuple[str, ...],
    *,
    list_ranges: bool,
) -> None:
    """Tell which guest pages DEVICE may have written. Nothing is cleared by asking.

    \b
    Examples:
      vfio-mig dirty $UUID
      vfio-mig dirty $UUID --range 0+1G --list
    """
    from vfio_mig.jobs.dirty import fetch_dirty

    report = fetch_dirty(
        device,
        settings_of(options),
        memory=parse_memory(memory),
        ranges=parse_ranges(ranges),
        list_ranges=list_ranges,
    )
    if options.as_json:
        print_json(report._asdict())
        return
    for address, size in report.ranges:
        click.echo(f"{address:#x} {size}")
    if not list_ranges:
        click.echo(
            f"{report.device}: {report.pages_dirty} of {report.pages} pages may have been written "
            f"({report.bitmap_time * 1e3:.1f} ms)"
        )


@click.command("sync", short_help="Copy the pages that DEVICE may have written.")
@click.argument("device")
@click.argument("file")
@memory_option
@range_option
@click.option(
    "--rounds", type=click.IntRange(min=0), help="Rounds before the stop, at most: 3, or 30 with --max-downtime."
)
@click.option(
    "--max-downtime",
    type=click.FloatRange(min=0),
    metavar="MS",
    help="Stop as soon as the last round is expected to take no longer.",
)
@click.option("--leave-running", is_flag=True, help="Start the device again after the last round.")
@borrow_options
@click.pass_obj
def sync_command(
    options: Options,
    device: str,
    file: str,
    memory: tuple[str, ...],
    ranges: tuple[str, ...],
    *,
    rounds: int | None,
    max_downtime: float | None,
    leave_running: bool,
) -> None:
    """Copy the pages that DEVICE may have written from guest memory to FILE, a sparse file.

    A page at guest address A is put at offset A, and again only when its content has changed. Rounds repeat while
    they bring something, or until the rest fits into --max-downtime; then DEVICE is stopped for the last one and left
    stopped unless --leave-running. A new FILE appears only when it is whole.

    \b
    Examples:
      vfio-mig sync $UUID copy.mem --memory /dev/shm/guest@0
      vfio-mig -v sync $UUID copy.mem --memory /proc/$PID/fd/12@0 --max-downtime 50
    """
    from vfio_mig.jobs.dirty import sync_dirty

    def progress(one: Round) -> None:
        if sys.stderr.isatty() or options.verbose:
            state = "stopped" if one.stopped else "running"
            say(
                options,
                f"round ({state}): {one.pages_dirty} pages dirty, {one.pages_written} written, "
                f"{one.pages_unchanged} unchanged, {one.rate / 1e6:.0f} MB/s; "
                f"a stop now: {one.estimated_downtime * 1e3:.1f} ms",
            )

    report = sync_dirty(
        device,
        file,
        settings_of(options),
        memory=parse_memory(memory),
        ranges=parse_ranges(ranges),
        rounds=rounds,
        max_downtime=None if max_downtime is None else max_downtime / 1e3,
        leave_running=leave_running,
        progress=progress,
    )
    if options.as_json:
        print_json({**report._asdict(), "rounds": [one.as_dict() for one in report.rounds]})
        return
    say(
        options,
        f"{report.device}: {report.pages_dirty} dirty pages, {report.bytes_written} bytes written to {file} "
        f"in {len(report.rounds)} rounds; stopped for {report.stopped_time * 1e3:.1f} ms; "
        f"{NOW[report.state]}",
    )
