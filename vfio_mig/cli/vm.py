# SPDX-License-Identifier: MIT
"""``vm list``, ``vm save``, ``vm restore``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from vfio_mig.cli import complete
from vfio_mig.cli.main import Group
from vfio_mig.cli.output import print_json, put, say, say_none, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.cli.options import Options
    from vfio_mig.vm.survey import VmRow

COLUMNS: Final = ("VM", "PID", "STATE", "MEMORY", "DEVICES")

connect_option = click.option(
    "--connect",
    metavar="URI",
    shell_complete=complete.connect,
    help="Ask the libvirt at URI, as `virsh --connect` does; VM is a domain then (needs libvirt-python).",
)


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what save and restore have in common."""
    for option in (
        click.option(
            "--memory",
            multiple=True,
            default=["auto"],
            show_default=True,
            metavar="auto|none|FILE@GPA[:SIZE]",
            help="The guest's RAM: found by itself, which takes shared RAM; left alone; or as told (repeatable).",
        ),
        click.option("--device", metavar="DEVICE", shell_complete=complete.device, help="Which device of the VM's."),
        connect_option,
        click.argument("file", shell_complete=complete.file),
        click.argument("vm", metavar="VM", shell_complete=complete.vm),
    ):
        command = option(command)
    return command


@click.group("vm", cls=Group)
def vm_command() -> None:
    """Save and restore a device together with the pause of the VM that has it.

    VM is the path of a QMP socket of its QEMU, or with --connect URI a libvirt domain, by its name or UUID.

    \b
    Example:
      vfio-mig vm list --connect qemu:///system
      vfio-mig vm save --connect qemu:///system win10 gpu.vfm
      vfio-mig vm restore --connect qemu:///system win10 gpu.vfm --start
    """


def _word(text: str | None) -> str:
    return "_".join((text or "-").split())


def _words(row: VmRow) -> list[str]:
    pid = "-" if row.pid is None else str(row.pid)
    devices = ",".join(one.device for one in row.devices)
    return [*map(_word, (row.vm or (row.command and f"({row.command})"), pid, row.state, row.memory, devices))]


@vm_command.command("list", short_help="List VMs, their state, RAM and devices.")
@click.argument("vms", nargs=-1, metavar="[VM]...", shell_complete=complete.vm)
@connect_option
@click.option("--header", is_flag=True, help="Name the columns in a first line, as on a terminal.")
@click.pass_obj
def list_command(options: Options, vms: tuple[str, ...], *, connect: str | None, header: bool) -> None:
    """List VMs, one per line: VM PID STATE MEMORY DEVICES. What stands in the way of a save is on stderr.

    Without --connect these are the processes of this host that have VFIO devices open, or the QEMUs behind the sockets
    that are named; a process that was not asked shows its command in the place of its name, and its STATE is unknown.
    With it they are libvirt's domains; of a libvirt on another host (qemu+ssh://HOST/system) only what the XML has.
    MEMORY is shared when other processes can have the guest's RAM, which it takes to save pages; else private.

    \b
    Examples:
      vfio-mig vm list
      vfio-mig vm list /run/vm.qmp
      vfio-mig vm list --connect qemu:///system
    """
    from vfio_mig.cli.columns import aligned, terminal_width
    from vfio_mig.vm.survey import list_vms

    found = list_vms(vms, connect=connect)
    if options.as_json:
        print_json([one.as_dict() for one in found])
        return
    rows = [_words(one) for one in found]
    width = terminal_width()
    if header or (width is not None and rows):
        rows.insert(0, list(COLUMNS))
    for line in map(" ".join, rows) if width is None else aligned(rows):
        put(line)
    if not found:
        say_none(options, "libvirt has no domain" if connect else "no process here has a VFIO device open")
    for row in found:
        name = row.vm or f"PID {row.pid}"
        if row.vm is None and row.sockets:
            say(options, f"{name}: listens at {', '.join(row.sockets)}")
        for note in row.notes:
            say(options, f"{name}: {note}")


@vm_command.command("save", short_help="Pause VM and save a device of its to a file.")
@_job_options
@click.option("--all-memory", is_flag=True, help="Save all of the guest's RAM, for a target that does not have it.")
@click.option("--leave-running", is_flag=True, help="Let the device and the VM go on afterwards.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.pass_obj
def save_command(
    options: Options,
    vm: str,
    file: str,
    *,
    connect: str | None,
    device: str | None,
    memory: tuple[str, ...],
    all_memory: bool,
    leave_running: bool,
    force: bool,
) -> None:
    """Pause VM and save its device to FILE, with the guest's pages that the device may have written.

    VM and device stay stopped unless --leave-running. After a failure both are as they were found, and there is no
    FILE; so too if somebody else lets the VM go on meanwhile. A domain is paused through libvirt. A VM with several
    devices needs --device. Run it as root on the VM's own host.

    \b
    Examples:
      vfio-mig vm save /run/vm.qmp gpu.vfm --leave-running
      vfio-mig vm save --connect qemu:///system win10 gpu.vfm
    """
    from vfio_mig.vm.named import save_vm

    report = save_vm(
        vm, file, settings_of(options),
        connect=connect, device=device, memory=memory, all_memory=all_memory, leave_running=leave_running, force=force,
    )  # fmt: skip
    options.done()
    if options.as_json and file != "-":
        print_json(report.as_dict())
        return
    saved = report.saved
    say(
        options,
        f"{report.device}: saved {saved.state_bytes} bytes of state and {saved.pages_written + saved.pages_zero} pages "
        f"to {file}; the VM {report.vm} is {report.run_state}",
    )


@vm_command.command("restore", short_help="Load a file into a device of a paused VM.")
@_job_options
@click.option("--start", is_flag=True, help="Let the device and the VM go on afterwards.")
@click.option("--force", is_flag=True, help="Go on over mismatches that `vfio-mig check` calls forcible.")
@click.pass_obj
def restore_command(
    options: Options,
    vm: str,
    file: str,
    *,
    connect: str | None,
    device: str | None,
    memory: tuple[str, ...],
    start: bool,
    force: bool,
) -> None:
    """Load FILE into the device of the paused VM, and the pages in it into the guest's RAM.

    VM must be paused: `virsh suspend`, `virsh start --paused`, or QEMU's -S. Both stay stopped unless --start:
    `vfio-mig start DEVICE` first, then `virsh resume`, or `cont` in the monitor. A failure leaves the VM paused.

    \b
    Examples:
      vfio-mig vm restore /run/vm.qmp gpu.vfm --start
      vfio-mig vm restore --connect qemu:///system win10 gpu.vfm
    """
    from vfio_mig.vm.named import restore_vm

    report = restore_vm(
        vm, file, settings_of(options), connect=connect, device=device, memory=memory, start=start, force=force
    )
    options.done()
    if options.as_json:
        print_json(report.as_dict())
        return
    restored = report.restored
    say(
        options,
        f"{report.device}: restored {restored.state_bytes} bytes of state and {restored.pages_written} pages from "
        f"{file}; the VM {report.vm} is {report.run_state}",
    )
