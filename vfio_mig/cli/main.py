# SPDX-License-Identifier: MIT
"""The command line's frame: global options, commands loaded when they are called, errors, signals."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from vfio_mig import __version__, interrupts
from vfio_mig.cli.output import put, put_lines
from vfio_mig.errors import HostError, InterruptedJobError, UsageError, VfioMigError, errno_text

if TYPE_CHECKING:
    from vfio_mig.jobs.steps import Events, Hooks

PROGRAM = "vfio-mig"
COMPLETION = "_VFIO_MIG_COMPLETE"

COMMANDS = {  # command: module below vfio_mig.cli
    "check": "image",
    "conform": "conform",
    "diff": "inspect",
    "dirty": "transfer",
    "doctor": "doctor",
    "extract": "inspect",
    "hold": "hold",
    "info": "devices",
    "inspect": "inspect",
    "list": "devices",
    "mdev": "mdev",
    "migrate": "migrate",
    "pack": "inspect",
    "pages": "image",
    "reset": "control",
    "restore": "transfer",
    "save": "transfer",
    "start": "control",
    "state": "control",
    "status": "control",
    "stop": "control",
    "sync": "transfer",
    "verify": "image",
}


ABIS = ("auto", "gvt-rfc", "mainline-v2")
WAYS = ("auto", "group", "cdev")


class Group(click.Group):
    """A group that, called with nothing, prints its help on stderr as wrong usage: click 8.1 takes that for done."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what follows the group's name."""
        if not args and not ctx.resilient_parsing:
            put_lines(ctx.get_help(), err=True)
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)


class Lazy(Group):
    """A group that imports a command's module only to run it, or to tell about it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Name every command."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command."""
        module_name = COMMANDS.get(cmd_name)
        if module_name is None:
            return None
        import importlib

        module = importlib.import_module(f"vfio_mig.cli.{module_name}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


class Options:
    """The global options, as every command finds them in its context."""

    __slots__ = ("abi", "as_json", "events", "fd", "hooks", "pid", "quiet", "uapi_header", "verbose", "via")

    def __init__(
        self, *, as_json: bool, verbose: bool, quiet: bool, abi: str, uapi_header: str | None, via: str
    ) -> None:
        self.events: Events | None = None
        self.hooks: Hooks | None = None
        self.as_json = as_json
        self.verbose = verbose
        self.quiet = quiet
        self.abi = abi
        self.uapi_header = uapi_header
        self.via = via
        self.pid: int | None = None  # set by the options of a command, as is fd
        self.fd: int | None = None


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="vfio-mig", message="%(prog)s %(version)s")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: sizes in bytes, times in seconds.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr how the device was reached and what is being done.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and what was asked for.")
@click.option("--abi", type=click.Choice(ABIS), default="auto", show_default=True, help="Accept this protocol only.")
@click.option(
    "--uapi-header",
    metavar="FILE",
    envvar="VFIO_MIG_UAPI_HEADER",
    help="Take the RFC's numbers from this linux/vfio.h of a patched kernel.",
)
@click.option(
    "--via",
    type=click.Choice(WAYS),
    default="auto",
    show_default=True,
    help="Open a device that nobody has through its group, or its own node (cdev) and an iommufd.",
)
@click.option("--events", metavar="FILE", help="Append one JSON object per step of a job to FILE.")
@click.option("--status-fd", type=click.IntRange(min=0), metavar="N", help="Write the same to this inherited fd.")
@click.option(
    "--hook",
    "hooks",
    multiple=True,
    metavar="STEP=COMMAND",
    help="Run COMMAND (no shell) at pre-stop, post-stop, pre-start, post-start or any step of --events (repeatable).",
)
@click.pass_context
def cli(
    ctx: click.Context,
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    abi: str,
    uapi_header: str | None,
    via: str,
    events: str | None,
    status_fd: int | None,
    hooks: tuple[str, ...],
) -> None:
    """Stop, save and restore VFIO devices without a VMM in the way.

    DEVICE is an mdev's UUID, a PCI address, a path in /sys, /dev/vfio/devices/vfioN, or /dev/vfio/N for a group of one
    device.

    \b
    Example: move a vGPU's state from one device to another
      vfio-mig hold $A & vfio-mig hold $B &
      vfio-mig save $A gpu.vfm
      vfio-mig restore $B gpu.vfm --start

    \b
    Exit codes: 0 done, 1 differences (diff --exit-code), 2 wrong usage, 3 no such device or it cannot be opened,
    4 not supported by the device, 5 the device or kernel failed, 6 the image is invalid or does not fit,
    7 the host failed, 130 interrupted.
    """
    options = Options(as_json=as_json, verbose=verbose, quiet=quiet, abi=abi, uapi_header=uapi_header, via=via)
    ctx.obj = options
    if events is not None or status_fd is not None or hooks:
        _listen(options, events if status_fd is None else status_fd, hooks)


def _listen(options: Options, target: str | int | None, hooks: tuple[str, ...]) -> None:
    from vfio_mig.jobs.steps import Events, Hooks

    options.hooks = Hooks(hooks)
    if target is not None:
        options.events = Events(target)


def _run() -> int:
    """Parse and run, without click's own ideas of errors and interrupts; returns the exit code."""
    if COMPLETION in os.environ:
        cli.main(prog_name=PROGRAM, complete_var=COMPLETION)
    try:
        with cli.make_context(PROGRAM, sys.argv[1:]) as context:
            _invoke(context)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    return 0


def _invoke(context: click.Context) -> None:
    """Run the command; whoever listens hears how it ended."""
    try:
        cli.invoke(context)
    except VfioMigError as error:
        _emit(context, "failed", code=error.exit_code, error=str(error))
        raise
    except KeyboardInterrupt:
        _emit(context, "failed", code=InterruptedJobError.exit_code, error="interrupted")
        raise
    _emit(context, "done", code=0)


def _emit(context: click.Context, step: str, **more: object) -> None:
    options = context.obj
    if isinstance(options, Options) and options.events is not None:
        options.events.emit(step, **more)


def _fail(error: VfioMigError) -> NoReturn:
    put(f"vfio-mig: {error}", err=True)
    sys.exit(error.exit_code)


def main() -> NoReturn:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    interrupts.install()
    try:
        sys.exit(_run())
    except VfioMigError as error:
        _fail(error)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else PROGRAM
        _fail(UsageError(error.format_message().rstrip("."), hint=f"see '{command} --help'"))
    except KeyboardInterrupt:
        if interrupts.finished():
            sys.exit(0)
        _fail(InterruptedJobError("interrupted; what was begun has been undone"))
    except MemoryError:
        _fail(HostError("out of memory"))
    except BrokenPipeError:
        # whoever read our output is gone; nothing more can be said there
        sys.stderr.close()
        sys.exit(InterruptedJobError.exit_code)
    except OSError as error:
        # jobs have errors of their own: this is standard output, and what it has not taken would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(HostError(f"{error.filename or 'standard output'}: {errno_text(error.errno or 0)}"))
