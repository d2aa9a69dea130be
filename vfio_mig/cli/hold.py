# SPDX-License-Identifier: MIT
"""``hold``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from vfio_mig.cli.output import memory_option, parse_memory, print_json, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.main import Options
    from vfio_mig.jobs.session import Session


@click.command("hold", short_help="Keep DEVICE open for the other commands.")
@click.argument("device")
@memory_option
@click.pass_obj
def hold_command(options: Options, device: str, memory: tuple[str, ...]) -> None:
    """Keep DEVICE open until a signal ends this command; others borrow it meanwhile.

    Prints one line when the device is ready. With --memory the files are mapped for the device's DMA.

    \b
    Example:
      vfio-mig hold $UUID --memory /dev/shm/guest@0 &
      vfio-mig stop $UUID; vfio-mig save $UUID gpu.vfm; vfio-mig start $UUID
      kill %1
    """
    from vfio_mig.jobs.hold import hold_device

    def ready(session: Session) -> None:
        if options.as_json:
            print_json({"device": session.device.name, "pid": os.getpid(), "protocol": session.protocol.name})
        else:
            click.echo(f"{session.device.name}: held open by PID {os.getpid()}")

    hold_device(device, settings_of(options), memory=parse_memory(memory), ready=ready)
