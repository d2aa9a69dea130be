# SPDX-License-Identifier: MIT
"""The command line's frame: global options, commands loaded when they are called, errors, signals, the end."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vfio_mig import interrupts
from vfio_mig.cli import complete, streams
from vfio_mig.cli.options import Options
from vfio_mig.cli.output import print_json, put, put_lines, warn
from vfio_mig.errors import HostError, InterruptedJobError, UsageError, VfioMigError, errno_text
from vfio_mig.protocols.registry import AUTO, MODULES
from vfio_mig.version import __version__
from vfio_mig.words import WAYS

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = "vfio-mig"
COLUMNS: Final = 80
"""Help is never wider, however wide the terminal."""
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
    "vm": "vm",
}
ALIASES: Final = {"watch": ("list", "--watch")}
"""Other names, and what they stand for."""
_DEVICES: Final = frozenset({"device", "devices", "targets"})
"""Arguments that are, or begin with, a device."""
_SHOWN: Final = 8
STDOUT_IS_DATA: Final = frozenset({"save", "sync"})
"""Commands whose FILE may be - for standard output; no other document is put there then."""


def _set(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep the value of a global option, wherever it stands; the last one counts, and hooks add up."""
    options = ctx.ensure_object(Options)
    name = str(param.name)
    if ctx.get_parameter_source(name) in _GIVEN:
        setattr(options, name, getattr(options, name) + value if name == "hook_texts" else value)


_GIVEN: Final = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)


def _global_options(*, hidden: bool) -> list[click.Parameter]:
    """Return the global options: those of the program itself, or, hidden, the same for each of its commands."""

    def option(*names: str, **more: Any) -> click.Option:
        return click.Option(names, expose_value=False, callback=_set, hidden=hidden, **more)

    return [
        option("--json", "as_json", is_flag=True, help="Print JSON: sizes in bytes, times in seconds."),
        option(
            "-v", "--verbose", is_flag=True, help="Say on stderr how the device was reached and what is being done."
        ),
        option("-q", "--quiet", is_flag=True, help="Print nothing but errors and what was asked for."),
        option(
            "--abi",
            type=click.Choice((AUTO, *MODULES)),
            default="auto",
            show_default=True,
            help="Accept this protocol only.",
        ),
        option(
            "--uapi-header",
            metavar="FILE",
            envvar=None if hidden else "VFIO_MIG_UAPI_HEADER",
            help="Take the RFC's numbers from this linux/vfio.h of a patched kernel.",
        ),
        option(
            "--via",
            type=click.Choice(WAYS),
            default="auto",
            show_default=True,
            help="Open a device that nobody has through its group, or its own node (cdev) and an iommufd.",
        ),
        option("--events", "events_file", metavar="FILE", help="Append one JSON object per step of a job to FILE."),
        option("--status-fd", type=click.IntRange(min=0), metavar="N", help="Write the same to this inherited fd."),
        option(
            "--hook",
            "hook_texts",
            multiple=True,
            metavar="STEP=COMMAND",
            shell_complete=complete.hook,
            help="Run COMMAND (no shell) at before-stop, after-stop, before-start, after-start or any other step of "
            "the job (repeatable; docs/scripting.md).",
        ),
    ]


_BEHIND: Final = _global_options(hidden=True)
_EPILOG: Final = "The options of `vfio-mig` itself (`vfio-mig --help`) may stand here, too."


def _with_global_options(command: click.Command) -> click.Command:
    """Let a command, and those below it, take the global options, and have it listened to when it begins."""
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _with_global_options(one)
    elif _BEHIND[0] not in command.params and command.callback is not None:
        command.params.extend(_BEHIND)
        command.epilog = _EPILOG
        command.callback = _listening(command.callback)
    return command


def _listening(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def run(*args: Any, **kwargs: Any) -> Any:
        context = click.get_current_context()
        context.ensure_object(Options).listen(str(context.command.name), context.params)
        return callback(*args, **kwargs)

    return run


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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``help COMMAND`` for ``COMMAND --help``."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that a command line names; of one that there is not, say which is like it."""
        args = [*ALIASES.get(args[0], args[:1]), *args[1:]]
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            like = get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            more = f" (did you mean '{like[0]}'?)" if like else ""
            ctx.fail(f"No such command {name!r}{more}")
        return super().resolve_command(ctx, args)

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
        return _with_global_options(command)


@click.group(
    cls=Lazy,
    params=_global_options(hidden=False),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": COLUMNS},
)
@click.version_option(__version__, prog_name="vfio-mig", message="%(prog)s %(version)s")
def cli() -> None:
    """Stop, save and restore VFIO devices without a VMM in the way.

    DEVICE is an mdev's UUID (or as much of its beginning as no other has), a PCI address, a path in /sys,
    /dev/vfio/devices/vfioN, or /dev/vfio/N for a group of one device. `vfio-mig help COMMAND` tells about a command.

    \b
    Example: move a vGPU's state from one device to another
      vfio-mig hold $A & vfio-mig hold $B &
      vfio-mig save $A gpu.vfm
      vfio-mig restore $B gpu.vfm --start

    \b
    Exit codes:
        0  done
        1  there are differences (diff --exit-code)
        2  wrong usage
        3  no such device, or it cannot be opened
        4  the device does not support it
        5  the device or the kernel failed
        6  the image is invalid or does not fit
        7  the host failed
      130  interrupted, rolled back
    """


def _outcome(options: Options) -> tuple[int, VfioMigError | None]:
    """Parse and run, without click's own ideas of errors and interrupts.

    :returns: the exit code, and the error if it is one's.
    """
    try:
        if COMPLETION in os.environ:
            cli.main(prog_name=PROGRAM, complete_var=COMPLETION)
        with cli.make_context(PROGRAM, sys.argv[1:], obj=options) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code, None
    except SystemExit as done:  # a command with a code of its own: its report says more
        return done.code if isinstance(done.code, int) else 0, None
    except (VfioMigError, click.ClickException, KeyboardInterrupt, MemoryError, OSError) as caught:
        error = _error_of(caught)
        return error.exit_code, error
    return 0, None


def _error_of(caught: BaseException) -> VfioMigError:
    """Turn what may end a command into an error of ours."""
    if isinstance(caught, VfioMigError):
        return caught
    if isinstance(caught, click.ClickException):
        context = getattr(caught, "ctx", None)
        command = PROGRAM if context is None else context.command_path
        return UsageError(caught.format_message().rstrip("."), hint=f"{_choice(caught)}see '{command} --help'")
    if isinstance(caught, KeyboardInterrupt):
        notes = getattr(caught, "__notes__", ())  # of a job that could not undo everything
        return InterruptedJobError(f"interrupted; {'; '.join(notes) or 'what was begun has been undone'}")
    is_memory = isinstance(caught, OSError) and caught.errno == errno.ENOMEM and caught.filename is None  # of mmap(2)
    if isinstance(caught, OSError) and not is_memory:  # jobs have errors of their own: this is click's help
        return HostError(f"{caught.filename or 'standard output'}: {errno_text(caught.errno or 0)}")
    return HostError("out of memory")


def _choice(caught: click.ClickException) -> str:
    """Say which devices there are to one who has not said which is meant."""
    if not isinstance(caught, click.MissingParameter) or caught.param is None:
        return ""
    if caught.param.name not in _DEVICES:
        return ""
    from vfio_mig.host.discover import Host

    names = [one.name for one in Host().devices()]
    more = ", …" if len(names) > _SHOWN else ""
    return f"there are {', '.join(names[:_SHOWN])}{more}; " if names else "there is no VFIO device here; "


def _end(options: Options, code: int, error: VfioMigError | None) -> int:
    """Tell how it ended, and return the exit code.

    The first error counts: what is lost on the way of telling it is no other one. A job that is done stays done.
    """
    for number in interrupts.ENDING:  # there is nothing left to interrupt
        signal.signal(number, signal.SIG_IGN)
    is_signal = isinstance(error, InterruptedJobError)
    if error is not None and options.is_done:
        if not is_signal:
            warn(f"what was asked for is done, but then: {error}")
        code, error = 0, None
    if code == 0 and options.hooks is not None:
        for step in dict.fromkeys(options.hooks.idle):
            warn(f"the hook {step} has not run: nothing of the kind was to be done")
    lost = _tell_listeners(options, code, error)
    if lost is not None and options.is_done:
        warn(f"what was asked for is done, but then: {lost}")
    elif lost is not None and code == 0:
        code, error = lost.exit_code, lost
    if error is not None:
        put(f"{PROGRAM}: {error}", err=True)
        _print_error(options, error)
    streams.settle()
    return code


def _tell_listeners(options: Options, code: int, error: VfioMigError | None) -> HostError | None:
    """Write the last event; returns what kept it from its reader."""
    if options.events is None:
        return None
    try:
        if error is None:
            options.events.emit("done", code=code)
        else:
            options.events.emit("failed", code=code, error=str(error))
    except HostError as lost:
        return lost
    return None


def _print_error(options: Options, error: VfioMigError) -> None:
    """Print an error's document for programs, unless there is one on standard output already, or it has the image."""
    words = sys.argv[1:]
    before_names = words[: words.index("--")] if "--" in words else words
    wanted = options.as_json or "--json" in before_names  # a command line that could not be parsed has set nothing
    has_data = not STDOUT_IS_DATA.isdisjoint(words) and any(word == "-" or word.endswith("=-") for word in words)
    if wanted and not has_data and not options.has_report:
        try:
            print_json(error.as_dict())
        except HostError:  # there is nobody to tell
            return


def main() -> NoReturn:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    streams.fill()
    interrupts.install()
    options = Options()
    sys.exit(_end(options, *_outcome(options)))
