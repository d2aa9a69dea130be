# SPDX-License-Identifier: MIT
"""``list`` and ``info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from vfio_mig.cli import complete
from vfio_mig.cli.output import borrow_options, print_json, put, repeat, say_none, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options
    from vfio_mig.jobs.queries.devices import DeviceInfo, DeviceRow


def _word(text: str | None) -> str:
    """Make one column of a text."""
    return "_".join((text or "-").split())


def _yes_or_no(migratable: bool | None) -> str:
    return "?" if migratable is None else "yes" if migratable else "no"


COLUMNS: Final = ("NAME", "KIND", "TYPE", "DRIVER", "NODE", "HOLDER", "MIGRATABLE", "STATE", "CDEV", "JOB")
FOR_SCRIPTS: Final = COLUMNS[:9]
"""Those that a script gets without asking: they stay."""
_WANTED: Final = ("NAME", "HOLDER", "STATE", "JOB", "MIGRATABLE", "TYPE", "DRIVER", "KIND", "NODE", "CDEV")
"""Which columns a terminal that is too narrow for all of them has: the first ones."""
WATCH_SECONDS: Final = 1.0


def _words(one: DeviceRow) -> list[str]:
    """Return a device's words, one for each of COLUMNS."""
    holder = one.holder if one.holder_pid is None else f"{one.holder_pid}:{one.holder}"
    words = (one.device, one.kind, one.type, one.driver, one.node, holder, _yes_or_no(one.migratable), one.state)
    return [_word(word) for word in (*words, one.cdev, _job(one))]


def _job(one: DeviceRow) -> str | None:
    """Return the job that is at work on a device, with its last step."""
    if one.job is None:
        return None
    return ":".join(filter(None, (one.job or "?", one.job_step)))


def _columns(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Turn the names of columns into their numbers."""
    del ctx
    if value is None:
        return None
    names = [name.strip().upper() for name in value.split(",")]
    for name in names:
        if name not in COLUMNS:
            raise click.BadParameter(f"there is no column {name!r}; there are {', '.join(COLUMNS)}", param=param)
    return [COLUMNS.index(name) for name in names]


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Name a column, behind those that are there."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in COLUMNS if name.startswith(last.upper())]


def _table(rows: list[list[str]], columns: list[int] | None, *, header: bool) -> list[str]:
    """Lay the words of devices out: on a terminal below each other, with a header and what fits; else as they are."""
    from vfio_mig.cli.columns import aligned, fitting, terminal_width

    width = terminal_width()
    every = [list(COLUMNS), *rows]
    if columns is None:
        order = [COLUMNS.index(name) for name in _WANTED]
        columns = list(range(len(FOR_SCRIPTS))) if width is None else fitting(every, order, width)
    chosen = [[row[column] for column in columns] for row in every]
    if width is None:
        return [" ".join(row) for row in (chosen if header else chosen[1:])]
    return list(aligned(chosen)) if rows or header else []


@click.command("list", short_help="List VFIO devices and who has them open.")
@click.option(
    "-o",
    "--columns",
    metavar="NAME[,...]",
    callback=_columns,
    shell_complete=_complete,
    help="Print these columns only, in this order.",
)
@click.option("--header", is_flag=True, help="Name the columns in a first line, as on a terminal.")
@click.option("--watch", is_flag=True, help="Show them anew each second until a signal comes, with the jobs at work.")
@click.pass_obj
def list_command(options: Options, columns: list[int] | None, *, header: bool, watch: bool) -> None:
    """List VFIO devices, one per line: NAME KIND TYPE DRIVER NODE HOLDER MIGRATABLE STATE CDEV.

    HOLDER is PID:COMMAND, - for none, ? where not every process can be seen. MIGRATABLE (yes, no, ?) and STATE are what
    the kernel and the driver's name tell without opening anything; ? means that only an open device tells, or that a
    driver does not answer. A terminal gets a header, and the columns that fit; JOB, which -o can have as well, is the
    command of ours that is at work on the device, with its last step. `vfio-mig watch` is `vfio-mig list --watch`.

    \b
    Examples:
      vfio-mig list | awk '$6 == "-" { print $1 }'
      vfio-mig list -o name,type,holder,job
    """
    from vfio_mig.jobs.queries.devices import list_devices

    def show(found: list[DeviceRow]) -> None:
        if options.as_json:
            print_json([one.as_dict() for one in found])
            return
        for line in _table([_words(one) for one in found], columns, header=header):
            put(line)

    if watch:
        repeat(list_devices, show, WATCH_SECONDS)
        return
    found = list_devices()
    show(found)
    if not found and not options.as_json:
        say_none(options, "there is no VFIO device here; 'vfio-mig doctor' says more")


_PCI_FLAG: Final = 1 << 1
"""VFIO_DEVICE_FLAGS_PCI."""
_PCI_REGIONS: Final = (*(f"BAR{number}" for number in range(6)), "ROM", "config", "VGA")


def _print_regions(info: DeviceInfo) -> None:
    is_pci = bool((info.flags or 0) & _PCI_FLAG)
    for region in info.regions:
        known = is_pci and region.number < len(_PCI_REGIONS)
        parts = [_PCI_REGIONS[region.number]] if known else []
        parts += [f"{region.size} bytes at {region.offset:#x}", region.access]
        parts += [f"mmap {area[0]:#x}+{area[1]:#x}" for area in region.sparse_areas]
        if region.type is not None:
            parts.append(f"type {region.type:#x} subtype {region.subtype}")
        if region.purpose:
            parts.append(region.purpose)
        put(f"region {region.number}  {', '.join(parts)}")


def _print_closed(info: DeviceInfo) -> None:
    """Tell what is known of a device that was not opened."""
    nodes = [node for node in (info.node, info.cdev) if node is not None]
    holder = f"PID {info.holder_pid} ({info.holder})" if info.holder_pid is not None else "nobody"
    if info.holder_pid is None and info.holder is not None:
        holder = f"no process that can be seen: {info.unseen}"
    source = {"debugfs": "the kernel says so", "driver": f"by its driver's name, {info.driver}"}.get(info.source or "")
    put(f"kind      {info.kind} {info.type}".rstrip())
    put(f"driver    {info.driver or 'none'}")
    put(f"nodes     {', '.join(nodes) or 'none'}")
    put(f"open in   {holder}")
    if info.migratable is None:
        put("migration known only of an open device")
    else:
        put(f"migration {_yes_or_no(info.migratable)}: {source}")
    if info.state == "?":
        put("state     its driver does not answer, so it was not asked for more")
        return
    if info.state is not None:
        put(f"state     {info.state}")
    put("not opened, as that resets a PCI function and restarts a vGPU; --open does it and tells the rest")


def _print_info(info: DeviceInfo) -> None:
    put(f"device    {info.device}")
    put(f"reached   {info.how}")
    if info.how == "closed":
        _print_closed(info)
    else:
        put(f"flags     {info.flags:#x}")
        _print_regions(info)
        for check in info.checks:
            put(f"{'ok ' if check.ok else 'NO '} {check.name}: {check.text}", alarm=not check.ok)
        put(f"protocol  {info.described or 'none'}")
        others = [name for name in info.speaks if name != info.protocol]
        if others:
            put(f"note: it speaks {' and '.join(others)}, too; --abi chooses")
    if info.better_driver is not None:
        put(f"note: the driver {info.better_driver} fits it better than {info.driver or 'none'}")


@click.command("info", short_help="Tell regions, and whether DEVICE can be migrated.")
@click.argument("device", shell_complete=complete.device)
@click.option("--open", "open_closed", is_flag=True, help="Open it if nobody has it open: it is reset, or restarts.")
@borrow_options
@click.pass_obj
def info_command(options: Options, device: str, *, open_closed: bool) -> None:
    """Tell DEVICE's regions and whether it can be migrated, check by check; borrowed from the process that has it open.

    Of a device that nobody has open, what the kernel shows without opening it.

    \b
    Example: vfio-mig info 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.queries.devices import device_info

    info = device_info(device, settings_of(options), open_closed=open_closed)
    if options.as_json:
        print_json(info.as_dict())
    else:
        _print_info(info)
