# SPDX-License-Identifier: MIT
"""``list`` and ``info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vfio_mig.cli.output import borrow_options, print_json, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.main import Options
    from vfio_mig.jobs.inform import DeviceInfo, Listed


def _line(one: Listed) -> str:
    holder = (one.holder or "-") if one.holder_pid is None else f"{one.holder_pid}:{one.holder}"
    return f"{one.device} {one.kind} {one.type or '-'} {one.driver or '-'} {one.node or '-'} {holder}"


@click.command("list", short_help="List VFIO devices and who has them open.")
@click.pass_obj
def list_command(options: Options) -> None:
    """List VFIO devices, one per line: NAME KIND TYPE DRIVER NODE HOLDER (PID:COMMAND); - is none, ? not seen.

    \b
    Example: vfio-mig list | awk '$6 == "-" { print $1 }'
    """
    from vfio_mig.jobs.inform import list_devices

    found = list_devices()
    if options.as_json:
        print_json([one._asdict() for one in found])
        return
    for one in found:
        click.echo(_line(one))


def _print_info(info: DeviceInfo) -> None:
    click.echo(f"device    {info.device}")
    click.echo(f"reached   {info.how}")
    click.echo(f"flags     {info.flags:#x}")
    for region in info.regions:
        parts = [f"{region.size} bytes at {region.offset:#x}", region.access]
        parts += [f"mmap {area[0]:#x}+{area[1]:#x}" for area in region.sparse_areas]
        if region.type is not None:
            parts.append(f"type {region.type:#x} subtype {region.subtype}")
        click.echo(f"region {region.number}  {', '.join(parts)}")
    for check in info.checks:
        click.echo(f"{'ok ' if check.ok else 'NO '} {check.name}: {check.text}")
    click.echo(f"protocol  {info.protocol or 'none'}")


@click.command("info", short_help="Tell regions, and whether DEVICE can be migrated.")
@click.argument("device")
@borrow_options
@click.pass_obj
def info_command(options: Options, device: str) -> None:
    """Open DEVICE (or borrow it) and tell its regions and whether it can be migrated, check by check.

    \b
    Example: vfio-mig info 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.inform import device_info

    info = device_info(device, settings_of(options))
    if options.as_json:
        print_json(info.as_dict())
    else:
        _print_info(info)
