# SPDX-License-Identifier: MIT
"""What the commands that copy guest memory have in common: their options, and what is said meanwhile."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import click

from vfio_mig.cli.output import memory_option, parse_memory, parse_ranges, range_option, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.cli.options import Options
    from vfio_mig.cli.output import Meter
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.jobs.engine.live import Live, StateRound
    from vfio_mig.jobs.migrate import MigrateReport
    from vfio_mig.jobs.save import SaveReport

_OPTIONS = (
    memory_option,
    range_option,
    click.option(
        "--rounds",
        type=click.IntRange(min=0),
        metavar="N",
        help="Copy rounds before the stop, at most; 30 with --max-downtime.",
    ),
    click.option(
        "--max-downtime",
        type=click.FloatRange(min=0),
        metavar="MS",
        help="Stop as soon as the last round is expected to take no longer.",
    ),
    click.option(
        "--all-memory",
        is_flag=True,
        help="Copy every page of --memory once, also what the guest's CPUs write: right only while the VM is paused.",
    ),
    click.option(
        "--strict", is_flag=True, help="End with 4 if pages that DEVICE may have written are not in --memory."
    ),
)
live_option = click.option(
    "--live", is_flag=True, help="Read the state while DEVICE runs (PRE_COPY), and copy pages in rounds; stop it late."
)
no_memory_option = click.option("--no-memory", is_flag=True, help="Leave guest memory out: the state alone.")


class Wanted(TypedDict):
    """Which guest memory is copied, as the jobs take it."""

    memory: Sequence[MemoryMap]
    ranges: Sequence[PageRange]
    all_memory: bool
    strict: bool


class Copying(NamedTuple):
    """What :func:`copy_options` was given."""

    memory: tuple[str, ...]
    ranges: tuple[str, ...]
    rounds: int | None
    max_downtime: float | None
    all_memory: bool
    strict: bool

    def wanted(self) -> Wanted:
        """Return which guest memory is copied."""
        return {
            "memory": parse_memory(self.memory),
            "ranges": parse_ranges(self.ranges),
            "all_memory": self.all_memory,
            "strict": self.strict,
        }

    @property
    def seconds(self) -> float | None:
        """--max-downtime in seconds."""
        return None if self.max_downtime is None else self.max_downtime / 1e3

    def live(self, options: Options, meter: Meter, *, precopy: bool) -> Live:
        """Return what is copied while the device runs: no rounds unless an option asks for some."""
        from vfio_mig.jobs.engine.live import ROUNDS_LIVE, Live

        rounds = self.rounds
        if rounds is None:
            rounds = ROUNDS_LIVE if precopy or self.max_downtime is not None else 0
        return Live(
            rounds,
            self.seconds,
            meter,
            tell_round(options),
            precopy=precopy and rounds > 0,
            on_state_round=tell_state_round(options),
        )


def copy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what is copied of guest memory; the command gets them as *copying*."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> Any:
        copying = Copying(**{name: given.pop(name) for name in Copying._fields})
        return command(*args, copying=copying, **given)

    wrapped: Callable[..., Any] = run
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def tell_round(options: Options) -> Callable[[Round], None]:
    """Say what each round did, to a terminal or with -v; what the only one did is in the report."""
    told = False

    def tell(one: Round) -> None:
        nonlocal told
        if not options.verbose and not (sys.stderr.isatty() and (told or not one.stopped)):
            return
        told = True
        did = f"{one.pages_dirty} pages dirty, {one.pages_written} written, {one.pages_unchanged} unchanged"
        did += f", {one.rate / 1e6:.0f} MB/s"
        if one.stopped:
            say(options, f"round (stopped): {did}")
        else:
            say(options, f"round (running): {did}; a stop now: {one.estimated_downtime * 1e3:.1f} ms")

    return tell


def tell_state_round(options: Options) -> Callable[[StateRound], None]:
    """Say what each round of the state did, to a terminal or with -v."""

    def tell(one: StateRound) -> None:
        if sys.stderr.isatty() or options.verbose:
            say(
                options,
                f"state (running): {one.bytes_read} bytes read at {one.rate / 1e6:.0f} MB/s, "
                f"initial {one.initial_bytes}, dirty {one.dirty_bytes}; "
                f"a stop now: {one.rest_bytes} bytes, {one.estimated_downtime * 1e3:.1f} ms",
            )

    return tell


def pages_of_memory(report: SaveReport | MigrateReport) -> str:
    """Say how many pages were copied, as `verify` counts them, and which if not all of the memory's."""
    which = " (that the device may have written, no others)" if report.memory == "dirty" else ""
    return f"{report.pages_written + report.pages_zero} pages of memory{which}"
