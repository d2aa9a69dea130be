# SPDX-License-Identifier: MIT
"""``hold``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from vfio_mig.cli import complete
from vfio_mig.cli.output import memory_option, parse_memory, print_json, put, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options
    from vfio_mig.jobs.engine.session import Session


@click.command("hold", short_help="Keep DEVICE open for the other commands.")
@click.argument("device", shell_complete=complete.device)
@memory_option
@click.option(
    "--kvm", is_flag=True, help="Give the device a KVM VM in any case, not only where its driver asks for one."
)
@click.option("--ready-fd", type=click.IntRange(min=0), help="Write one line to this inherited fd when ready.")
@click.option("--pidfile", metavar="FILE", help="Write the PID there when ready; removed at the end.")
@click.pass_obj
def hold_command(
    options: Options, device: str, memory: tuple[str, ...], ready_fd: int | None, pidfile: str | None, *, kvm: bool
) -> None:
    """Keep DEVICE open until a signal ends this command; others borrow it meanwhile.

    Prints one line when the device is ready, and tells systemd (Type=notify). With --memory the files are mapped for
    the device's DMA. A driver that opens a device only for a process with a KVM VM, as kvmgt does, gets one: without a
    CPU, with a slot for each piece of memory.

    \b
    Examples:
      mkfifo ready; vfio-mig hold $UUID --ready-fd 3 3>ready & read -r _ <ready
      vfio-mig hold $UUID --memory /dev/shm/guest@0 &
      vfio-mig stop $UUID; vfio-mig save $UUID gpu.vfm; vfio-mig start $UUID
      kill %1
    """
    from vfio_mig.jobs.hold import announce, hold_device, pid_file

    with pid_file(pidfile) as write_pid:

        def ready(session: Session) -> None:
            write_pid()
            text = f"{session.device.name}: held open by PID {os.getpid()}"
            if ready_fd is not None:
                announce(ready_fd, text)
            options.done()
            if options.as_json:
                print_json({"device": session.device.name, "pid": os.getpid(), "protocol": session.protocol_name})
            elif not options.quiet:
                put(text)

        hold_device(device, settings_of(options)._replace(kvm=kvm), memory=parse_memory(memory), ready=ready)
