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

from tools.kvmgt import build, installed, mail, secure_boot, series, source
from tools.vm import kernels, newest
from tools.vm.cache import cache_root
from tools.vm.errors import EXIT_RUNNER, Interrupted, RunnerError
from tools.vm.kernels import Kernel

_EPILOG: Final = """\
The distribution's source of exactly that kernel is fetched, kvmgt is built unmodified and compared with the \
distribution's own module; where one byte of code differs, nothing else is built. Then the patches of \
tools/kvmgt/series are applied and the result is built with W=1 and sparse, without a new warning. stdout has the \
path of the module, nothing else. Everything is kept in $VFIO_MIG_CACHE (default: $XDG_CACHE_HOME/vfio_mig, \
~/.cache/vfio_mig). Exit status: 125 when anything fails."""
_NOT_OURS: Final = 1  # exit status of `status`


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
    building.add_argument("--plain", action="store_true", help="leave out the builds with W=1 and sparse")
    checking = commands.add_parser("check", help="build after each patch of the series, and check their style")
    listing = commands.add_parser("series", help="print the patches for the kernel; fails where there are none")
    listing.add_argument(
        "directory",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="write them there as for the kernel's lists",
    )
    for one in (building, checking, listing):
        one.add_argument(
            "--kernel",
            default=kernels.SERIES[0],
            metavar="6.12|6.1|newest|PATH|RELEASE",
            help="as for scripts/vm, or one that is installed here; default: %(default)s",
        )
    for name, text in (
        ("install", "build for a kernel of this host, and have modprobe load it; as root"),
        ("remove", "have modprobe load the distribution's own again; as root"),
        ("status", "say which kvmgt modprobe would load; exit status 1 if it is not the one that would be built"),
    ):
        one = commands.add_parser(name, help=text, allow_abbrev=False)
        one.add_argument(
            "--kernel", default=os.uname().release, metavar="RELEASE", help="default: the running one, %(default)s"
        )
    return result


def _on_signal(signum: int, _frame: FrameType | None) -> Never:
    raise Interrupted(signum)


def _installed(release: str) -> Kernel:
    kernel = kernels.installed(release)
    if kernel is None:
        raise RunnerError(f"kernel {release} is not installed: there is no /lib/modules/{release}")
    return kernel


def _setting(kernel: Kernel, cache: Path, *, is_plain: bool) -> build.Setting:
    if kernel.is_installed and not (kernel.headers / ".config").exists():
        raise RunnerError(f"the headers are missing; as root: apt-get install linux-headers-{kernel.release}")
    series.load(source.series_of(kernel.release))  # or say so before anything is fetched
    build.stock_module(kernel)
    setting = build.Setting(
        kernel,
        source.fetch(kernel, cache, say),
        cache,
        sparse=None if is_plain else source.fetch_sparse(cache, say),
        log=say,
    )
    setting.modules.mkdir(parents=True, exist_ok=True)
    return setting


def _build(options: argparse.Namespace, setting: build.Setting) -> None:
    if options.command == "check" or options.each:
        build.check(setting)
    if options.command == "build":
        wanted = dict.fromkeys([options.mutation, *([None, *series.mutation_names()] if options.build_all else [])])
        directory = build.build(setting, tuple(wanted))
        built = directory / build.file_name(options.mutation)
        if options.output is not None:
            shutil.copyfile(built, options.output)
        print(built)


def _series(kernel: Kernel, cache: Path, directory: Path | None) -> None:
    patches = series.load(source.series_of(kernel.release))
    if directory is None:
        print(*(patch.path for patch in patches), sep="\n")
        return
    unmodified = source.fetch(kernel, cache, say)
    version = source.version_of_source(unmodified)
    written = mail.write(unmodified, source.series_of(kernel.release), directory, f"{kernel.release} ({version})")
    print(*written, sep="\n")


def _status(kernel: Kernel) -> int:
    found = installed.find(kernel)
    whose = f"vfio_mig {found.version} for {found.source}" if found.is_ours else "the distribution's"
    print(f"{found.path}: {whose}, {f'signed by {found.signer}' if found.signer else 'not signed'}")
    wrong = installed.problems(kernel)
    for line in (*wrong, *secure_boot.advice()):
        say(line)
    return _NOT_OURS if wrong else 0


def _run(options: argparse.Namespace) -> int:
    cache = cache_root(os.environ)
    if options.command in {"install", "remove", "status"}:
        kernel = _installed(options.kernel)
        if options.command == "status":
            return _status(kernel)
        if options.command == "remove":
            installed.remove(kernel, say)
            return 0
        directory = build.build(_setting(kernel, cache, is_plain=True), (None,))
        print(installed.install(kernel, directory / build.file_name(None), say))
        return 0
    kernel = kernels.installed(options.kernel) or newest.find(options.kernel, cache, say)
    if options.command == "series":
        _series(kernel, cache, options.directory)
    else:
        is_plain = options.command == "build" and options.plain and not options.each
        _build(options, _setting(kernel, cache, is_plain=is_plain))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _on_signal)
    try:
        return _run(options)
    except (RunnerError, OSError) as error:
        say(str(error))
        return EXIT_RUNNER
    except Interrupted as interrupted:
        return 128 + interrupted.signum
