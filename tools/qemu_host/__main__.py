# SPDX-License-Identifier: MIT
"""The command lines of ``scripts/qemu-save`` and ``scripts/qemu-restore``."""

from __future__ import annotations

import atexit
import contextlib
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vfio_mig import interrupts
from vfio_mig.cli import streams
from vfio_mig.errors import HostError, InterruptedJobError, UsageError, VfioMigError, errno_text, json_text, printable

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_HELP: Final = (
    "The guest's RAM: auto (found by itself; must be shared), none, or FILE@GPA[:SIZE[+OFFSET]] (repeatable)."
)
CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def _common(cont: str, force: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add what both commands take."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for one in (
            click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is done."),
            click.option("--force", is_flag=True, help=force),
            click.option("--memory", multiple=True, default=["auto"], show_default=True, help=MEMORY_HELP),
            click.option("--cont", is_flag=True, help=cont),
            click.argument("file"),
            click.argument("device"),
            click.argument("qmp_socket", metavar="QMP-SOCKET"),
        ):
            function = one(function)
        return function

    return add


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # only words about the job go there
        click.echo(printable(text), err=True)


def _summarise(summary: dict[str, Any], *, err: bool = False) -> None:
    """Print what was done. It is done, so a summary that nobody takes is a warning."""
    try:
        click.echo(json_text(summary), err=err)
    except OSError as error:
        _say(f"warning: standard output: cannot write: {errno_text(error.errno or 0)}; what was asked for is done")


@click.command("qemu-save", context_settings=CONTEXT)
@_common(cont="Let the vGPU and the VM go on afterwards.", force="Replace an existing FILE.")
def save_command(qmp_socket: str, device: str, file: str, *, verbose: bool, **options: Any) -> None:
    """Pause the VM behind QMP-SOCKET and save its vGPU DEVICE to FILE, with the guest's pages that it may have written.

    Both stay stopped, unless --cont. After a failure the VM and the vGPU are as they were found, and there is no FILE.
    Prints a summary as JSON; to stderr when FILE is -, standard output. Run it as root.

    Example: scripts/qemu-save --cont /run/vm.qmp 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 gpu.vfm
    """
    from tools.qemu_host.jobs import save_vgpu
    from tools.qemu_host.qmp import Qmp

    with Qmp(qmp_socket) as qmp:
        summary = save_vgpu(qmp, device, file, tell=_say if verbose else lambda _: None, **options)
    _summarise(summary, err=file == "-")


@click.command("qemu-restore", context_settings=CONTEXT)
@_common(cont="Let the vGPU and the VM go on afterwards.", force="Go on over mismatches that may be forced.")
def restore_command(qmp_socket: str, device: str, file: str, *, verbose: bool, **options: Any) -> None:
    """Load FILE into the vGPU DEVICE of the paused VM behind QMP-SOCKET, and the pages in it into the guest's RAM.

    Both stay stopped, unless --cont: `vfio-mig start DEVICE` first, then `cont` in the monitor. Run it as root.

    Example: scripts/qemu-restore --cont /run/vm.qmp 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 gpu.vfm
    """
    from tools.qemu_host.jobs import restore_vgpu
    from tools.qemu_host.qmp import Qmp

    with Qmp(qmp_socket) as qmp:
        summary = restore_vgpu(qmp, device, file, tell=_say if verbose else lambda _: None, **options)
    _summarise(summary)


COMMANDS: Final = {"save": save_command, "restore": restore_command}


def _fail(program: str, error: VfioMigError) -> NoReturn:
    _say(f"{program}: {error}")
    sys.exit(error.exit_code)


def main(arguments: list[str]) -> NoReturn:
    """Run one of the two; errors and exit codes are those of ``vfio-mig``."""
    command = COMMANDS[arguments[0]]
    program = f"qemu-{arguments[0]}"
    streams.fill()
    interrupts.install()
    atexit.register(streams.settle)
    try:
        with command.make_context(program, arguments[1:]) as context:
            command.invoke(context)
        sys.exit(0)
    except VfioMigError as error:
        _fail(program, error)
    except click.exceptions.Exit as done:  # --help
        sys.exit(done.exit_code)
    except click.UsageError as error:
        _fail(program, UsageError(error.format_message().rstrip("."), hint=f"see '{program} --help'"))
    except KeyboardInterrupt:
        _fail(program, InterruptedJobError("interrupted; what was begun has been undone"))
    except MemoryError:
        _fail(program, HostError("out of memory"))
    except OSError as error:
        _fail(program, HostError(f"{error.filename or 'standard output'}: {errno_text(error.errno or 0)}"))


if __name__ == "__main__":
    main(sys.argv[1:])
