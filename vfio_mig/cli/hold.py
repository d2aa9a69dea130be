# SPDX-License-Identifier: MIT
"""``hold``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from vfio_mig.cli import complete
from vfio_mig.cli.names import require_once
from vfio_mig.cli.output import memory_option, parse_memory, print_json, put, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.cli.options import Options
    from vfio_mig.jobs.engine.session import Session


@click.command("hold", short_help="Keep DEVICE open for the other commands.")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...", shell_complete=complete.device)
@memory_option
@click.option(
    "--kvm", is_flag=True, help="Give the device a KVM VM in any case, not only where its driver asks for one."
)
@click.option("--daemon", is_flag=True, help="Return once all are held, and go on holding them in the background.")
@click.option("--ready-fd", type=click.IntRange(min=0), help="Write one line to this inherited fd when ready.")
@click.option("--pidfile", metavar="FILE", help="Write the PID there when ready; removed at the end.")
@click.pass_obj
def hold_command(
    options: Options,
    devices: tuple[str, ...],
    memory: tuple[str, ...],
    ready_fd: int | None,
    pidfile: str | None,
    *,
    kvm: bool,
    daemon: bool,
) -> None:
    """Keep DEVICE open until a signal ends this command; others borrow it meanwhile.

    Prints one line for each device when all are ready, and tells systemd (Type=notify). With --memory the files are
    mapped for the devices' DMA. A driver that opens a device only for a process with a KVM VM, as kvmgt does, gets one:
    without a CPU, with a slot for each piece of memory.

    \b
    Examples:
      vfio-mig hold $UUID --memory /dev/shm/guest@0 --daemon --pidfile hold.pid
      vfio-mig stop $UUID; vfio-mig save $UUID gpu.vfm; vfio-mig start $UUID
      kill $(cat hold.pid)
    """
    from vfio_mig.jobs.hold import Background, announce, hold_devices, pid_file

    require_once(devices)
    maps = parse_memory(memory)
    background = Background() if daemon else None
    if background is not None and background.is_starter:
        options.events = None  # its steps are the other process's to tell
        sys.exit(background.wait())

    with pid_file(pidfile) as write_pid:

        def ready(sessions: Sequence[Session]) -> None:
            write_pid()
            if ready_fd is not None:
                announce(ready_fd, "; ".join(map(_held, sessions)))
            options.done()
            _report(options, sessions)
            if background is not None:
                background.ready()

        hold_devices(devices, settings_of(options)._replace(kvm=kvm), memory=maps, ready=ready)


def _held(session: Session) -> str:
    return f"{session.device.name}: held open by PID {os.getpid()}"


def _report(options: Options, sessions: Sequence[Session]) -> None:
    from vfio_mig.jobs.hold import HoldReport

    if options.as_json:
        held = [
            HoldReport(device=one.device.name, pid=os.getpid(), protocol=one.protocol_name).as_dict()
            for one in sessions
        ]
        print_json(held[0] if len(held) == 1 else held)
    elif not options.quiet:
        for session in sessions:
            put(_held(session))
