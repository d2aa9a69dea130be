# SPDX-License-Identifier: MIT
"""``dirty``, ``sync``, ``save``, ``restore``: what moves a device's memory and state."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from vfio_mig.cli import complete
from vfio_mig.cli.copying import Copying, copy_options, live_option, no_memory_option, pages_of_memory, tell_round
from vfio_mig.cli.names import device_first, parse_pairs
from vfio_mig.cli.output import (
    Meter,
    borrow_options,
    memory_option,
    p2p_option,
    parse_memory,
    parse_ranges,
    print_json,
    put,
    range_option,
    say,
    settings_of,
    warn,
)
from vfio_mig.cli.pictures import plot_dirty, plot_rounds, prepare, rounds_plot_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.cli.options import Options
    from vfio_mig.dirty.bitmap import Dirty


def open_option(what: str) -> Callable[..., Any]:
    """Add the option that allows a device which nobody holds."""
    text = f"Also if nobody has DEVICE open: it is opened for this {what} alone, and closed, which loses its state."
    return click.option("--open", "open_closed", is_flag=True, help=text)


pinned_option = click.option(
    "--pinned",
    is_flag=True,
    help="Of a v2 device that another process has, and which keeps no log: the pages that are pinned in that process's "
    "VFIO container; it stands still for an instant.",
)
NOW: Final = {"running": "it runs", "stop": "left stopped", "closed": "closed, as nobody else has it open"}


def print_reports(targets: Sequence[str], reports: list[dict[str, Any]]) -> None:
    """Print one report as such, those of DEVICE=FILE as a list."""
    print_json(reports if "=" in targets[0] else reports[0])


@click.command("save", short_help="Save DEVICE to a file.")
@click.argument(
    "targets", nargs=-1, required=True, metavar="DEVICE FILE | DEVICE=FILE...", shell_complete=complete.target
)
@live_option
@copy_options
@p2p_option
@pinned_option
@click.option("--leave-running", is_flag=True, help="Let the device go on as it was found once everything is read.")
@click.option("--raw", is_flag=True, help="Write the bare device state: no bitmap, no pages, no integrity.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace FILE if it exists, and save a state that `migrate` has moved to another device.",
)
@open_option("save")
@borrow_options
@click.pass_obj
def save_command(
    options: Options,
    targets: tuple[str, ...],
    *,
    copying: Copying,
    live: bool,
    without_p2p: bool,
    pinned: bool,
    leave_running: bool,
    raw: bool,
    force: bool,
    open_closed: bool,
) -> None:
    """Stop DEVICE and save dirty bitmap, with --memory the dirty pages, and state to FILE (- is stdout).

    DEVICE is left stopped unless --leave-running. After a failure it runs and there is no FILE. With --rounds or
    --max-downtime pages are copied while it still runs, with --live what v2 devices have of their state, too.
    Several DEVICE=FILE are one job: all stop before any is read, and the first FILE has the memory of all.

    A v2 device tells only the pages that it writes from now on, so FILE has no others; --all-memory copies every page,
    --pinned those that the driver has pinned.
    A GVT-g vGPU of the 2017 RFC tells the pages that are mapped when it is asked: without --rounds a page that it wrote
    and the guest unmapped before the stop cannot be known. What such a vGPU only reads, page tables and batches, is not
    among them either: a target that does not have the rest of the guest's memory needs --all-memory, and `check` says
    so (docs/gvt-host.md).

    \b
    Examples:
      vfio-mig save $UUID gpu.vfm
      vfio-mig save $UUID gpu.vfm --memory /dev/shm/guest@0 --leave-running
      vfio-mig -v save 0000:3b:00.1 nic.vfm --live --max-downtime 100
      vfio-mig save $UUID - | ssh HOST vfio-mig restore $UUID -
      vfio-mig save $GPU=gpu.vfm $NIC=nic.vfm
    """
    from vfio_mig.jobs.save import save_all

    pairs = parse_pairs(targets, writes=True)
    with Meter(options) as meter:
        reports = save_all(
            pairs,
            settings_of(options),
            **copying.wanted(),
            live=copying.live(options, meter, precopy=live),
            leave_running=leave_running,
            raw=raw,
            force=force,
            without_p2p=without_p2p,
            pinned=pinned,
            open_closed=open_closed,
        )
    options.done()
    if options.as_json and all(file != "-" for _, file in pairs):
        print_reports(targets, [report.as_dict() for report in reports])
        return
    for report in reports:
        say(
            options,
            f"{report.device}: saved {report.state_bytes} bytes of state, {report.pages_dirty} dirty pages, "
            f"{pages_of_memory(report)} to {report.file}; "
            f"stopped for {report.stopped_time * 1e3:.1f} ms (stop {report.stop_time * 1e3:.1f}, "
            f"bitmap {report.bitmap_time * 1e3:.1f}, state {report.state_read_time * 1e3:.1f}); {NOW[report.state]}",
        )


@click.command("restore", short_help="Load a file into DEVICE.")
@click.argument(
    "targets", nargs=-1, required=True, metavar="DEVICE FILE | DEVICE=FILE...", shell_complete=complete.target
)
@memory_option
@no_memory_option
@click.option("--start", is_flag=True, help="Start the device once the state is loaded.")
@p2p_option
@open_option("restore")
@click.option("--raw", is_flag=True, help="FILE is a bare device state.")
@click.option("--force", is_flag=True, help="Go on over mismatches that `vfio-mig check` calls forcible.")
@click.option(
    "--no-verify-state",
    is_flag=True,
    help="DANGEROUS: load a state of unknown layout; the kernel may believe whatever it says.",
)
@click.option(
    "--await-word",
    is_flag=True,
    help="Once loaded, wait for a line `start` or `stay` behind the image; `migrate` uses this.",
)
@borrow_options
@click.pass_obj
def restore_command(
    options: Options,
    targets: tuple[str, ...],
    memory: tuple[str, ...],
    *,
    no_memory: bool,
    start: bool,
    without_p2p: bool,
    open_closed: bool,
    raw: bool,
    force: bool,
    no_verify_state: bool,
    await_word: bool,
) -> None:
    """Load FILE (- is stdin) into DEVICE, a fresh one of the same type; left stopped unless --start.

    All of FILE is verified before the first byte reaches DEVICE. The saved pages are written to --memory; a FILE that
    has some is refused without it, unless --no-memory says that they may be left out. Several DEVICE=FILE are one job:
    all are loaded before any is started, and each page is written once, the newest.

    \b
    Examples:
      vfio-mig restore $UUID gpu.vfm --start
      vfio-mig restore $UUID - <gpu.vfm
    """
    from vfio_mig.jobs.restore import restore_all

    with Meter(options) as meter:
        reports = restore_all(
            parse_pairs(targets),
            settings_of(options),
            memory=parse_memory(memory),
            start=start,
            raw=raw,
            force=force,
            verify_state=not no_verify_state,
            await_verdict=await_word,
            without_p2p=without_p2p,
            no_memory=no_memory,
            open_closed=open_closed,
            progress=meter,
        )
    options.done()
    for report in reports:
        for warning in report.warnings:
            warn(f"{report.device}: {warning}")
    if options.as_json:
        print_reports(targets, [report.as_dict() for report in reports])
        return
    for report in reports:
        say(
            options,
            f"{report.device}: restored {report.state_bytes} bytes of state and {report.pages_written} pages "
            f"from {report.file} in {report.state_write_time * 1e3:.1f} ms; {NOW[report.state]}",
        )


@click.command("dirty", short_help="Tell which guest pages DEVICE may have written.")
@click.argument("device", shell_complete=complete.device)
@memory_option
@range_option
@click.option("--list", "list_ranges", is_flag=True, help="Print the dirty ranges, one per line: ADDRESS BYTES.")
@click.option(
    "--for",
    "log_time",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long a v2 device logs its writes before it is asked; 1 by default.",
)
@pinned_option
@click.option("--map", "as_map", is_flag=True, help="Draw a map of the pages in characters.")
@click.option("--plot", metavar="FILE", help="Draw a map of the pages to FILE (.png or .svg; needs matplotlib).")
@borrow_options
@click.pass_obj
def dirty_command(
    options: Options,
    device: str,
    memory: tuple[str, ...],
    ranges: tuple[str, ...],
    *,
    list_ranges: bool,
    log_time: float | None,
    pinned: bool,
    as_map: bool,
    plot: str | None,
) -> None:
    """Tell which guest pages DEVICE may have written.

    A GVT-g vGPU with the RFC always knows them, and nothing is cleared by asking. A mainline v2 device is told to log
    its writes, and asked after a while for those since then. Of a device that keeps no log, or cannot be migrated at
    all, its container tells which pages the driver has pinned, if this command opens it or `vfio-mig hold` has it, or
    with --pinned whoever has it.

    \b
    Examples:
      vfio-mig dirty $UUID
      vfio-mig dirty 0000:3b:00.1 --for 5 --memory /dev/shm/guest@0
      vfio-mig dirty $UUID --range 0+1G --list
      vfio-mig dirty $UUID --map
    """
    from vfio_mig.jobs.dirty import fetch_dirty

    prepare(plot)
    chunks: list[Dirty] = []
    report = fetch_dirty(
        device,
        settings_of(options),
        memory=parse_memory(memory),
        ranges=parse_ranges(ranges),
        list_ranges=list_ranges,
        log_time=log_time,
        pinned=pinned,
        look=chunks.extend,
    )
    plot_dirty(plot, report.device, chunks)
    if options.as_json:
        print_json(report.as_dict())
        return
    for address, size in report.ranges:
        put(f"{address:#x} {size}")
    if as_map:
        from vfio_mig.pictures.terminal import dirty_map

        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        for line in dirty_map(chunks, unicode=encoding.startswith("utf")):
            put(line)
    if not list_ranges:
        put(
            f"{report.device}: {report.pages_dirty} of {report.pages} pages may have been written "
            f"({report.bitmap_time * 1e3:.1f} ms)"
        )


@click.command("sync", short_help="Copy the pages that DEVICE may have written.")
@click.argument("device", shell_complete=complete.device)
@click.argument("file", shell_complete=complete.file)
@copy_options
@click.option("--leave-running", is_flag=True, help="Let the device go on as it was found after the last round.")
@open_option("sync")
@rounds_plot_option
@borrow_options
@click.pass_obj
def sync_command(
    options: Options,
    device: str,
    file: str,
    *,
    copying: Copying,
    leave_running: bool,
    open_closed: bool,
    plot: str | None,
) -> None:
    """Copy the pages that DEVICE may have written from guest memory to FILE, a sparse file.

    A page at guest address A is put at offset A, and again only when its content has changed. Rounds repeat while
    they bring something, or until the rest fits into --max-downtime; then DEVICE is stopped for the last one and left
    stopped unless --leave-running. A new FILE appears only when it is whole; - is stdout, for `vfio-mig pages`.
    FILE has no page that DEVICE only reads, as the page tables of a vGPU, unless --all-memory copies all.

    \b
    Examples:
      vfio-mig sync $UUID copy.mem --memory /dev/shm/guest@0
      vfio-mig sync $UUID copy.mem --memory /proc/$PID/fd/12@0 --max-downtime 50
    """
    from vfio_mig.jobs.sync import sync_dirty

    device, file = device_first(device, file, "DEVICE FILE")
    prepare(plot)
    with Meter(options) as meter:
        report = sync_dirty(
            device,
            file,
            settings_of(options),
            **copying.wanted(),
            rounds=copying.rounds,
            max_downtime=copying.seconds,
            leave_running=leave_running,
            open_closed=open_closed,
            progress=tell_round(options),
            copied=meter,
        )
    options.done()
    if options.as_json and file != "-":
        print_json(report.as_dict())
    else:
        say(
            options,
            f"{report.device}: {report.pages_dirty} dirty pages, {report.bytes_written} bytes written to {file} "
            f"in {len(report.rounds)} rounds; stopped for {report.stopped_time * 1e3:.1f} ms; "
            f"{NOW[report.state]}",
        )
    plot_rounds(plot, report.device, report.rounds)
