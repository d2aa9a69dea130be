# SPDX-License-Identifier: MIT
"""``status``, ``stop``, ``start``, ``reset``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vfio_mig.cli import complete
from vfio_mig.cli.names import require_once
from vfio_mig.cli.output import borrow_options, p2p_option, print_json, put, settings_of

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options
    from vfio_mig.jobs.control import ActionReport, StatusReport

PAST = {"stop": "stopped", "start": "started", "reset": "reset"}


def _report(options: Options, reports: list[ActionReport]) -> None:
    options.done()
    if options.as_json:
        print_json(reports[0].as_dict() if len(reports) == 1 else [done.as_dict() for done in reports])
    elif not options.quiet:
        for done in reports:
            put(f"{done.device}: {PAST[done.action]} in {done.seconds * 1e3:.1f} ms")


@click.command("stop", short_help="Pause DEVICE and leave it stopped.")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...", shell_complete=complete.device)
@p2p_option
@borrow_options
@click.pass_obj
def stop_command(options: Options, devices: tuple[str, ...], *, without_p2p: bool) -> None:
    """Stop DEVICE and leave it stopped; running work finishes, queued work stays queued. Several are one job.

    The device must be open in some process, as a stop ends with the last close: see `vfio-mig hold`.
    (In mdevctl, `stop` removes the mdev; here it pauses the device.)

    \b
    Example: vfio-mig stop 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.control import stop_devices

    require_once(devices)
    _report(options, stop_devices(devices, settings_of(options), without_p2p=without_p2p))


@click.command("start")
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...", shell_complete=complete.device)
@p2p_option
@click.option("--force", is_flag=True, help="Also if its state was moved to another device, which may run, too.")
@borrow_options
@click.pass_obj
def start_command(options: Options, devices: tuple[str, ...], *, without_p2p: bool, force: bool) -> None:
    """Let a stopped DEVICE go on; its queued work runs.

    \b
    Example: vfio-mig start 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.control import start_devices

    require_once(devices)
    _report(options, start_devices(devices, settings_of(options), without_p2p=without_p2p, force=force))


@click.command("reset")
@click.argument("device", shell_complete=complete.device)
@click.option("--force", is_flag=True, help="Also when another process uses the device.")
@borrow_options
@click.pass_obj
def reset_command(options: Options, device: str, *, force: bool) -> None:
    """Reset DEVICE: its registers, queued work and interrupts are lost.

    \b
    Example: vfio-mig reset 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.control import reset_device

    _report(options, [reset_device(device, settings_of(options), force=force)])


def _job(status: StatusReport) -> str:
    """Tell whose job is at work, since when, and at which step."""
    from vfio_mig.cli.render import moment

    who = f"'vfio-mig {status.job}', PID {status.job_pid}" if status.job else "another vfio-mig"
    since = "" if status.job_since is None else f", since {moment(status.job_since)}"
    return f"{who}{since}" + ("" if status.job_step is None else f", at step {status.job_step}")


@click.command("status", short_help="Tell who has DEVICE open.")
@click.argument("device", shell_complete=complete.device)
@borrow_options
@click.pass_obj
def status_command(options: Options, device: str) -> None:
    """Tell who has DEVICE open and which protocol it speaks; opens nothing that is closed.

    The 2017 RFC has no way to ask whether a device runs: an open one is `unknown`.

    \b
    Example: vfio-mig --json status 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
    """
    from vfio_mig.jobs.control import device_status

    status = device_status(device, settings_of(options))
    if options.as_json:
        print_json(status.as_dict())
        return
    nobody = "nobody" if status.unseen is None else f"no process that can be seen: {status.unseen}"
    holder = nobody if status.holder_pid is None else f"PID {status.holder_pid} ({status.holder})"
    put(f"{status.device}: {status.state}; {status.kind} {status.type}, open in {holder}")
    if status.driver_state == "?":
        put("note: its driver does not answer, so it was not asked; what waits for it cannot be ended")
    elif status.driver_state not in (None, status.state):
        put(f"state in its driver: {status.driver_state}")
    if status.job is not None:
        put(f"job: {_job(status)}")
    if status.left is not None:
        put(f"note: {status.left}; {status.repair}")
    if status.protocol is not None:
        put(f"protocol: {status.protocol}")
    elif status.holder_pid is not None and status.migratable is False:
        put("protocol: none, it cannot be migrated; 'vfio-mig info' says why")


@click.command("state", short_help="Show a mainline v2 device's state, or go to another.")
@click.argument("device", shell_complete=complete.device)
@click.argument("new", required=False, metavar="[running|running-p2p|stop]")
@borrow_options
@click.pass_obj
def state_command(options: Options, device: str, new: str | None) -> None:
    """Print the migration state of DEVICE, after going to NEW if it is given.

    Only states without a stream can be gone to by hand: in the others it would be lost, and on some drivers the kernel
    with it. The device must be open in some process.

    \b
    Example: vfio-mig state 0000:3b:00.1 running-p2p
    """
    from vfio_mig.jobs.control import device_state

    state = device_state(device, settings_of(options), new=new)
    if new is not None:
        options.done()
    if options.as_json:
        print_json(state.as_dict())
    else:
        put(state.state)
