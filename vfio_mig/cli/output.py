# SPDX-License-Identifier: MIT
"""What the commands have in common: settings from the global options, printing."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from vfio_mig.errors import HostError, errno_text, json_text, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Self

    from vfio_mig.cli.options import Options
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.jobs.engine.session import Settings


def settings_of(options: Options) -> Settings:
    """Turn the global options into what the jobs take."""
    from vfio_mig.jobs.engine.session import Settings

    tell = (lambda text: say(options, text)) if options.verbose else None
    return Settings(
        abi=options.abi,
        uapi_header=options.uapi_header,
        pid=options.pid,
        fd=options.fd,
        via=options.via,
        tell=tell,
        warn=warn,
        on_step=_listener(options),
        on_commit=options.done,
    )


def _listener(options: Options) -> Callable[[str, str, str], None] | None:
    """Pass the steps of a job on to events and hooks."""
    if options.events is None and options.hooks is None:
        return None

    def on_step(job: str, step: str, device: str) -> None:
        if options.events is not None:
            options.events.emit(step, job=job, device=device)
        if options.hooks is not None:
            options.hooks.run(job, step, device)

    return on_step


def _options() -> Options | None:
    """Return the global options of the command that is running, if one is."""
    from vfio_mig.cli.options import Options

    context = click.get_current_context(silent=True)
    return None if context is None else context.find_object(Options)


_Seen = TypeVar("_Seen")
_SHOWN: Final = 500
"""Characters of what was lost that a warning repeats."""


@contextmanager
def _to_stdout(lost: Callable[[], str]) -> Iterator[None]:
    """Say that standard output did not take what was printed there.

    :param lost: returns that.
    :raises HostError: it is what the command is for. Once a job is done it is not: then a warning has it.
    """
    options = _options()
    try:
        yield
    except OSError as error:
        what = f"standard output: cannot write: {errno_text(error.errno or 0)}"
        if options is None or not options.is_done:
            raise HostError(what, hint="what it was to have is lost") from error
        text = " ".join(lost().split())
        warn(f"{what}; what was asked for is done, and this is lost: {text[:_SHOWN]}{'…' * (len(text) > _SHOWN)}")
    finally:
        if options is not None:
            options.has_report = True


_RED: Final = "\033[31m"
_PLAIN: Final = "\033[0m"


def _takes_colours() -> bool:
    """Tell whether standard output is a terminal whose user has not asked for none (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def put(text: str, *, err: bool = False, alarm: bool = False) -> None:
    """Print one line, to stderr with *err*; with *alarm* in red on a terminal's stdout.

    Every text of the command line goes through here, and nothing goes around. Names of files, devices, processes and
    drivers, and all that images and streams hold, were written by others. What would move the cursor, break the line,
    or speak to the terminal in another way is escaped here, so no caller has to think of it.
    tests/unit/test_output.py sees to it that nothing else in the package prints.

    :raises HostError: standard output does not take it, and nothing has been done yet. A lost standard error is no
        failure: only words about the job go there, and there is nowhere to complain.
    """
    options = _options()
    if options is not None and options.meter is not None:
        options.meter.clear()
    before, behind = (_RED, _PLAIN) if alarm and not err and _takes_colours() else ("", "")
    with suppress(OSError) if err else _to_stdout(lambda: text):
        click.echo(f"{before}{printable(text)}{behind}", err=err)


def put_lines(text: str, *, err: bool = False, alarm: str | None = None) -> None:
    """Print a text of several lines of ours, each as :func:`put` does. What others wrote must have no newline in it.

    :param alarm: how a line begins that is in red.
    """
    for line in text.splitlines():
        put(line, err=err, alarm=alarm is not None and line.startswith(alarm))


def warn(text: str) -> None:
    """Print a warning: one line on stderr, also for a user who wants quiet."""
    put(f"vfio-mig: warning: {text}", err=True)


def print_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print one JSON document, keys in the order given. JSON escapes control characters in its own way.

    :raises HostError: as :func:`put`.
    """
    with _to_stdout(lambda: json_text(value)):
        click.echo(json_text(value))


def say(options: Options, text: str) -> None:
    """Print a sentence on what was done, unless the user wants quiet; to stderr, as stdout may be the image."""
    if not options.quiet:
        put(text, err=True)


def say_none(options: Options, text: str) -> None:
    """Tell a user at a terminal why nothing is listed; a script reads no line, as it should."""
    from vfio_mig.cli.columns import terminal_width

    if terminal_width() is not None:
        say(options, f"vfio-mig: {text}")


def repeat(look: Callable[[], _Seen], show: Callable[[_Seen], object], seconds: float) -> None:
    """Print what there is to see, again and again until a signal ends that; a terminal is cleared before each time."""
    terminal = sys.stdout.isatty()
    with suppress(KeyboardInterrupt):  # that is how it ends
        while True:
            seen = look()
            if terminal:
                click.echo("\033[H\033[J", nl=False)
            show(seen)
            time.sleep(seconds)


class Meter:
    """Shows on a terminal's stderr how far a copy has come; silent elsewhere, and in the first second.

    Called with the bytes of each step. tqdm draws it, and is loaded here, before anything is stopped.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._make_bar = _bars() if sys.stderr.isatty() and not options.quiet else None
        self._bar: Any = None

    def expect(self, size: int) -> None:
        """Take note that so many bytes are still to come."""
        if self._make_bar is not None:
            self._begin()
            self._bar.total = self._bar.n + size

    def _begin(self) -> None:
        """Begin when the first byte is about to come: what was done before that is no copying."""
        if self._bar is None and self._make_bar is not None:
            self._bar = self._make_bar()

    def __call__(self, size: int) -> None:
        """Count one step."""
        if self._make_bar is not None:
            self._begin()
            with suppress(OSError):  # a terminal that has gone is not a reason to end a copy
                self._bar.update(size)

    def clear(self) -> None:
        """Make room for a line of words."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.clear()

    def __enter__(self) -> Self:
        self._options.meter = self
        return self

    def __exit__(self, *_: object) -> None:
        self._options.meter = None
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


_PATIENCE: Final = 1.0
"""Seconds before a copy is shown; *_REDRAWN*: before it is shown anew."""
_REDRAWN: Final = 0.2
_COLUMNS: Final = 80
_ROWS: Final = 24


def _bars() -> Callable[[], Any]:
    """Load what draws bars, and return what makes one."""
    from threading import RLock

    from tqdm import tqdm

    columns = 0
    with suppress(OSError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    tqdm.monitor_interval = 0  # no thread that looks after the bars
    tqdm.set_lock(RLock())  # nor a lock that processes share
    return partial(
        tqdm,
        unit="B",  # in thousands, as tqdm counts the rate in these whatever is said
        unit_scale=True,
        delay=_PATIENCE,
        mininterval=_REDRAWN,
        miniters=1,
        ncols=(columns or _COLUMNS) - 1,
        nrows=_ROWS,  # said, because a serial line has none, and there tqdm would show nothing
        leave=False,
    )


memory_option = click.option(
    "--memory",
    multiple=True,
    metavar="FILE@GPA[:SIZE]",
    help="Guest memory: FILE is the guest's from address GPA on (repeatable).",
)
range_option = click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="START[+LENGTH|-END]",
    help="Guest addresses to ask for (repeatable); by default those of --memory, else the first 4 GiB.",
)


def _keep(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    """Put an option's value where the global ones are."""
    if value is not None:
        setattr(ctx.find_object(object), str(param.name), value)


p2p_option = click.option(
    "--no-p2p", "without_p2p", is_flag=True, help="Several devices, also if one lacks the P2P states of v2."
)


def borrow_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say whom to borrow a device from."""
    for option in (
        click.option(
            "--fd",
            type=click.IntRange(min=3),  # those below take our words
            metavar="N",
            expose_value=False,
            callback=_keep,
            help="Get the device from this inherited fd of its group, or of its own node.",
        ),
        click.option(
            "--pid",
            type=click.IntRange(min=1),
            metavar="PID",
            expose_value=False,
            callback=_keep,
            help="Borrow the device from this process.",
        ),
    ):
        command = option(command)
    return command


def parse_memory(texts: Sequence[str]) -> list[MemoryMap]:
    """Parse every --memory; the files are not opened yet."""
    if not texts:
        return []
    from vfio_mig.dirty.memory import MemoryMap

    return [MemoryMap.parse(text) for text in texts]


def parse_ranges(texts: Sequence[str]) -> list[PageRange]:
    """Parse every --range."""
    if not texts:
        return []
    from vfio_mig.dirty.ranges import parse_range

    return [parse_range(text) for text in texts]
