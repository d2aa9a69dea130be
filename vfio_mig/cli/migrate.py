# SPDX-License-Identifier: MIT
"""``migrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vfio_mig.cli import complete
from vfio_mig.cli.copying import Copying, copy_options, live_option, no_memory_option, pages_of_memory
from vfio_mig.cli.output import Meter, borrow_options, print_json, say, settings_of
from vfio_mig.cli.transfer import open_option

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options


def _words(command: str) -> list[str]:
    import shlex

    try:
        return shlex.split(command)
    except ValueError as error:
        raise click.UsageError(f"--rsh {command!r}: {error}") from None


@click.command("migrate", short_help="Move DEVICE's state to another device.")
@click.argument("device", shell_complete=complete.device)
@click.argument("target", metavar="DEVICE|ssh://HOST/DEVICE", shell_complete=complete.device)
@click.option(
    "--target-memory",
    multiple=True,
    metavar="FILE@GPA[:SIZE]",
    help="Memory of the target's guest, as its host knows it (repeatable).",
)
@live_option
@copy_options
@no_memory_option
@click.option("--no-start", is_flag=True, help="Leave the target stopped.")
@click.option("--force", is_flag=True, help="Also if DEVICE's state was moved before, and may go on elsewhere.")
@open_option("migration")
@click.option(
    "--rsh",
    default="ssh",
    show_default=True,
    metavar="COMMAND",
    help="What reaches another host: called with HOST and one line of command.",
)
@borrow_options
@click.pass_obj
def migrate_command(
    options: Options,
    device: str,
    target: str,
    *,
    copying: Copying,
    target_memory: tuple[str, ...],
    live: bool,
    no_memory: bool,
    no_start: bool,
    force: bool,
    open_closed: bool,
    rsh: str,
) -> None:
    """Move DEVICE's state, with --memory its dirty pages too, to a device of the same type, and start that.

    Some process must hold the target open (`vfio-mig hold`). DEVICE is left stopped, and start, save and migrate refuse
    it from then on without --force, as its state goes on elsewhere. It runs on if anything fails before the target has
    the whole, verified state. Never do both run. The pages of --memory go to --target-memory. On another host the
    target is ssh://[USER@]HOST[:PORT]/DEVICE, an IPv6 address in brackets. ssh asks nothing there: HOST takes a key of
    this user's, and its own key is known here.

    A vGPU's page tables and queued work are in guest memory that it only reads, and are not dirty: the target's has to
    have them, or --all-memory moves all.

    \b
    Examples:
      vfio-mig migrate $A $B
      vfio-mig migrate $A ssh://root@other/$B \\
        --memory /dev/shm/guest@0 --target-memory /dev/shm/guest@0
    """
    from vfio_mig.jobs.migrate import migrate

    with Meter(options) as meter:
        report = migrate(
            device,
            target,
            settings_of(options),
            **copying.wanted(),
            target_memory=target_memory,
            live=copying.live(options, meter, precopy=live),
            start=not no_start,
            rsh=_words(rsh),
            force=force,
            no_memory=no_memory,
            open_closed=open_closed,
        )
    options.done()
    if options.as_json:
        print_json(report.as_dict())
        return
    say(
        options,
        f"{report.device}: moved {report.state_bytes} bytes of state, "
        f"{pages_of_memory(report)} to "
        f"{report.target}, which is {'running' if report.target_state == 'running' else 'left stopped'}; "
        f"down for {report.downtime * 1e3:.1f} ms "
        f"(stop {report.stop_time * 1e3:.1f}, bitmap {report.bitmap_time * 1e3:.1f}, "
        f"read {report.state_read_time * 1e3:.1f}, transfer {report.transfer_time * 1e3:.1f}, "
        f"start {report.start_time * 1e3:.1f})",
    )
