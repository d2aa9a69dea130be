# SPDX-License-Identifier: MIT
"""The command line of ``scripts/kvmgt``."""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, Never

from tools.kvmgt import build, series, source
from tools.vm import kernels, newest
from tools.vm.cache import cache_root
from tools.vm.errors import EXIT_RUNNER, Interrupted, RunnerError

_EPILOG: Final = """\
The distribution's source of exactly that kernel is fetched, kvmgt is built unmodified and compared with the \
distribution's own module; where one byte of code differs, nothing else is built. Then the patches of \
tools/kvmgt/series are applied and the result is built with W=1 and sparse, without a new warning. stdout has the \
path of the module, nothing else. Everything is kept in $VFIO_MIG_CACHE (default: $XDG_CACHE_HOME/vfio_mig, \
~/.cache/vfio_mig). Exit status: 125 when anything fails."""


def say(message: str) -> None:
    """Tell the user something; stdout is for the path."""
    print(f"kvmgt: {message}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="scripts/kvmgt",
        description="Build GVT-g's driver kvmgt with migration, for a stock kernel.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    building = commands.add_parser("build", help="build kvmgt.ko with the series", epilog=_EPILOG, allow_abbrev=False)
    building.add_argument("--each", action="store_true", help="the same as check, then build")
    building.add_argument("--mutation", choices=series.mutation_names(), help="build with this mechanism broken")
    building.add_argument("--build-all", action="store_true", help="build all mutations, too")
    building.add_argument("-o", "--output", type=Path, metavar="FILE", help="copy the module there")
    checking = commands.add_parser("check", help="build after each patch of the series, and check their style")
    listing = commands.add_parser("series", help="print the patches for the kernel; fails where there are none")
    for one in (building, checking, listing):
        one.add_argument(
            "--kernel",
            default=kernels.SERIES[0],
            metavar="6.12|6.1|newest|PATH",
            help="as for scripts/vm; default: %(default)s",
        )
    return result


def _on_signal(signum: int, _frame: FrameType | None) -> Never:
    raise Interrupted(signum)


def _run(options: argparse.Namespace) -> None:
    cache = cache_root(os.environ)
    kernel = newest.find(options.kernel, cache, say)
    if options.command == "series":
        for patch in series.load(source.series_of(kernel.release)):
            print(patch.path)
        return
    setting = build.Setting(
        kernel, source.fetch(kernel, cache, say), cache, sparse=source.fetch_sparse(cache, say), log=say
    )
    setting.modules.mkdir(parents=True, exist_ok=True)
    if options.command == "check" or options.each:
        build.check(setting)
    if options.command == "build":
        wanted = dict.fromkeys([options.mutation, *([None, *series.mutation_names()] if options.build_all else [])])
        directory = build.build(setting, tuple(wanted))
        built = directory / build.file_name(options.mutation)
        if options.output is not None:
            shutil.copyfile(built, options.output)
        print(built)


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _on_signal)
    try:
        _run(options)
    except (RunnerError, OSError) as error:
        say(str(error))
        return EXIT_RUNNER
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    return 0
