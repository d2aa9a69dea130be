# SPDX-License-Identifier: MIT
"""``mdev types``, ``mdev create``, ``mdev remove``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vfio_mig.cli.main import Group
from vfio_mig.cli.output import print_json, put, say, say_none

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options


@click.group("mdev", cls=Group)
def mdev_command() -> None:
    """List mdev types, create and remove mdevs.

    \b
    Example:
      vfio-mig mdev types
      UUID=$(vfio-mig mdev create GVTg_V4_8)
      vfio-mig mdev remove $UUID
    """


@mdev_command.command("types")
@click.pass_obj
def types_command(options: Options) -> None:
    """List what mdevs can be created: PARENT TYPE AVAILABLE NAME, one per line.

    \b
    Example: vfio-mig mdev types | awk '$3 > 0 { print $2 }'
    """
    from vfio_mig.host.mdev import types

    found = types()
    if options.as_json:
        print_json([one._asdict() for one in found])
        return
    for one in found:
        put(f"{one.parent} {one.type} {one.available} {one.name}")
    if not found:
        say_none(options, "no device here offers mdevs; 'vfio-mig doctor' says more")


@mdev_command.command("create")
@click.argument("type_name", metavar="TYPE")
@click.argument("uuid", required=False)
@click.option("--parent", help="The parent device, when several offer TYPE.")
@click.pass_obj
def create_command(options: Options, type_name: str, uuid: str | None, parent: str | None) -> None:
    """Create an mdev of TYPE, with a new UUID unless one is given, and print its UUID.

    \b
    Example: UUID=$(vfio-mig mdev create GVTg_V4_8)
    """
    from vfio_mig.host.mdev import create

    made = create(type_name, parent=parent, uuid=uuid)
    options.done()
    if options.as_json:
        print_json({"device": made})
    else:
        put(made)


@mdev_command.command("remove")
@click.argument("uuid")
@click.pass_obj
def remove_command(options: Options, uuid: str) -> None:
    """Remove an mdev for good. Refused while a process has it open.

    \b
    Example: vfio-mig mdev remove 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.host.mdev import remove

    remove(uuid)
    options.done()
    say(options, f"{uuid}: removed")
