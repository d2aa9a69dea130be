# SPDX-License-Identifier: MIT
"""``python -m tools.fuzz``: what scripts/fuzz runs; see docs/fuzzing.md."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from tools.fuzz import engine

ROOT: Final = Path(__file__).parents[2]
STORE: Final = ROOT / ".fuzz"
"""Corpora, logs and inputs that crash, kept between runs; git ignores it."""
AT_ONCE: Final = 2
_GRACE: Final = 300
"""Seconds that a target may take besides, to start and to end: on a busy machine that is much."""
_MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 20)}
"""Otherwise the C library keeps free what an input was given, and the address space does not tell of the next."""
_COVERAGE: Final = re.compile(r" cov: ([0-9]+) ")
_RUNS: Final = re.compile(r"^stat::number_of_executed_units: ([0-9]+)$", re.MULTILINE)


class Outcome(NamedTuple):
    """What became of a target.

    :param edges: covered branches of vfio_mig; None without atheris.
    :param corpus: number of inputs that each cover something new; without atheris, seeds.
    :param growth: bytes by which the process has grown after its warm-up.
    :param crashes: files with the inputs that crashed it.
    :param failed: it crashed, with or without a file.
    """

    target: str
    runs: int
    seconds: float
    edges: int | None
    corpus: int
    growth: int
    crashes: list[Path]
    failed: bool


HEADINGS: Final = ("target", "runs", "seconds", "runs/s", "edges", "corpus", "growth", "outcome")


def table(outcomes: list[Outcome]) -> str:
    """Return the table, in Markdown."""
    rows = [
        (
            one.target,
            f"{one.runs:,}",
            f"{one.seconds:.0f}",
            f"{one.runs / one.seconds:,.0f}" if one.seconds else "-",
            "-" if one.edges is None else str(one.edges),
            str(one.corpus),
            f"{one.growth / (1 << 20):.1f} MiB",
            "CRASH" if one.failed else "clean",
        )
        for one in outcomes
    ]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + "-:"[number > 0] for number, width in enumerate(widths)) + "|"
    return "\n".join([line(HEADINGS), rule, *map(line, rows)])


def report(outcomes: list[Outcome]) -> int:
    """Print the table and how to repeat each crash; returns the exit status."""
    print(table(outcomes))
    for one in outcomes:
        for path in one.crashes:
            print(
                f"{one.target}: crashed by {path}; again: scripts/fuzz --repeat {one.target} {shlex.quote(str(path))}"
            )
        if one.failed and not one.crashes:
            print(f"{one.target}: ended without saying which input did it; see {STORE / 'log' / one.target}")
    return 1 if any(one.failed for one in outcomes) else 0


def _outcome(name: str, seconds: float, scratch: Path, *, guided: bool, seed: int) -> Outcome:
    """Run one target in a process of its own."""
    from tools.fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus, crashes, log = STORE / "corpus" / name, STORE / "crashes" / name, STORE / "log" / name
    for directory in (corpus, crashes, log.parent):
        directory.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    status = scratch / f"status-{name}"
    command = [sys.executable, "-m", "tools.fuzz", "--work", name, "--status", str(status), "--seed", str(seed)]
    if guided:
        command += ["--", *engine.libfuzzer_arguments(target, seconds, scratch, corpus, crashes)]
    else:
        command += ["--seconds", str(seconds), "--crashes", str(crashes)]
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(scratch), **_MALLOC},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds + _GRACE,
                check=False,
            )
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            failed = True
    words = log.read_text("utf-8", "replace")
    counted = engine.read_status(status)
    runs = _RUNS.search(words)
    edges = _COVERAGE.findall(words)
    return Outcome(
        name,
        int(runs[1]) if runs else counted["runs"],
        counted["seconds"],
        max(map(int, edges)) if edges else None,
        len(list(corpus.iterdir())) if guided else len(target.seeds()),
        counted["growth"],
        sorted(set(crashes.iterdir()) - before),
        failed,
    )


def _work(options: argparse.Namespace, libfuzzer: list[str]) -> int:
    if not libfuzzer:
        return engine.work_plainly(options.work, options.seconds, options.crashes, options.status, options.seed)
    engine.work_with_atheris(options.work, options.status, [*libfuzzer, f"-seed={options.seed}"])
    return 0


def _repeat(name: str, file: Path) -> int:
    from tools.fuzz.targets import TARGETS

    good = engine.repeat(TARGETS[name], file.read_bytes())
    print(f"{name}: {'takes it' if good else 'crashes'}")
    return 0 if good else 1


def _run(names: list[str], minutes: float, seed: int, *, guided: bool) -> int:
    at_once = min(AT_ONCE, len(os.sched_getaffinity(0)), len(names))
    seconds = minutes * 60 * at_once / len(names)
    print(f"{len(names)} targets, {at_once} at a time, {seconds:.0f} s each", file=sys.stderr)
    # The made-up sysfs is there; libFuzzer ends its process without any of Python's cleaning up
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 -- the name is made up there
    with (
        tempfile.TemporaryDirectory(prefix="vfio-mig-fuzz-", dir=memory) as scratch,
        ThreadPoolExecutor(at_once) as pool,
    ):
        return report(
            list(pool.map(lambda name: _outcome(name, seconds, Path(scratch), guided=guided, seed=seed), names))
        )


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, or repeat one input."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Run the fuzzers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, divided among the targets (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of chance (default: 1)")
    parser.add_argument("--plain", action="store_true", help="by plain chance, as if there were no atheris")
    parser.add_argument("--repeat", nargs=2, metavar=("TARGET", "FILE"), help="run one target on one input")
    # What the processes that it starts are told
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--status", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--crashes", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return _work(options, options.targets)

    from tools.fuzz.targets import TARGETS

    names = [options.repeat[0]] if options.repeat else options.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if options.repeat:
        return _repeat(names[0], Path(options.repeat[1]))
    guided = not options.plain and engine.have_atheris()
    if not guided:
        why = "as asked" if options.plain else "atheris is not installed"
        print(f"by plain chance, without coverage: {why}", file=sys.stderr)
    return _run(names, options.minutes, options.seed, guided=guided)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the targets' processes have had it, too
        sys.exit(130)
