# SPDX-License-Identifier: MIT
"""The command line of ``scripts/vm``: the runner of :mod:`tools.vm`, with what others build for its guests."""

import argparse
import compileall
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, Never

from tools.kvmgt import build as kvmgt
from tools.kvmgt import source
from tools.l2 import image as l2
from tools.vm import custom, guest, gvt, kernels, kvm, libvirt, link, machine, module, mtty, newest, qemu
from tools.vm.cache import cache_root
from tools.vm.errors import EXIT_KERNEL_FAULT, EXIT_RUNNER, EXIT_TIMEOUT, Interrupted, RunnerError

_CHECKOUT: Final = Path(__file__).resolve().parents[1]
_KEPT_RUNS: Final = 5
_EPILOG: Final = f"""\
Exit status: COMMAND's own; {EXIT_KERNEL_FAULT} the kernel printed a WARN, BUG or Oops (shown on stderr); \
{EXIT_TIMEOUT} the time ran out; {EXIT_RUNNER} the runner failed; 128+N ended by signal N. \
Everything is kept in $VFIO_MIG_CACHE (default: $XDG_CACHE_HOME/vfio_mig, ~/.cache/vfio_mig). \
COMMAND's stdin is /dev/null unless --stdin; its writes are lost, except those below $VFIO_MIG_VM_OUT."""


def say(message: str) -> None:
    """Tell the user something; stdout is COMMAND's."""
    print(f"vm: {message}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="scripts/vm",
        description="Run COMMAND in a VM with the sample driver loaded; without COMMAND, a shell.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    result.add_argument(
        "--kernel", default=kernels.SERIES[0], metavar="6.12|6.1|newest|custom|PATH",
        help="default: %(default)s; newest: of the distribution's newer suites; "
        "custom: built here once, with iommufd and the kernel's checks, 5 to 15 minutes",
    )  # fmt: skip
    which = result.add_mutually_exclusive_group()
    which.add_argument("--break", dest="mutation", choices=module.MUTATIONS, help="load the driver with this broken")
    which.add_argument("--no-module", action="store_true", help="do not build or load the sample driver")
    result.add_argument("--module-args", default="", metavar="'a=1 b=2'", help="parameters of the sample driver")
    result.add_argument("--mtty", action="store_true", help="load the kernel's own sample mtty, too (not on 6.1)")
    result.add_argument(
        "--gvt", action="store_true",
        help="with an emulated Intel GPU, its host driver of GVT-g (the kernel's own i915 and kvmgt), and KVM",
    )  # fmt: skip
    result.add_argument("--gpu", choices=gvt.MODELS, help=f"model of --gvt's GPU; default: {gvt.MODELS[0]}")
    result.add_argument(
        "--gpu-args",
        default="",
        metavar="'--conventional'",
        help="more arguments for the GPU (python -m tools.gpu --help)",
    )
    result.add_argument(
        "--kvmgt", choices=("stock", "ours"), default="stock",
        help="with --gvt: the kernel's own, or the one that scripts/kvmgt builds; default: %(default)s",
    )  # fmt: skip
    result.add_argument("--kvmgt-args", default="", metavar="'migration=off'", help="parameters of our kvmgt")
    result.add_argument(
        "--l2", action="store_true",
        help="with --gvt: make a guest for a vGPU, whose driver has a load; $VFIO_MIG_L2 has it (tools/l2/README.md)",
    )  # fmt: skip
    result.add_argument(
        "--l2-qemu", metavar="SUITE", help="what $VFIO_MIG_QEMU names for COMMAND: the QEMU of this newer suite of the "
        "distribution; default: the one that runs the VM",
    )  # fmt: skip
    result.add_argument(
        "--link", type=link.parse, metavar="NAME/1|2",
        help="a network cable to the VM that is started with the other end of it; its address is $VFIO_MIG_LINK, the "
        "other VM's $VFIO_MIG_LINK_PEER",
    )  # fmt: skip
    result.add_argument(
        "--libvirt", action="store_true",
        help="fetch a libvirt daemon with its QEMU, 55 MB, once; $VFIO_MIG_LIBVIRT has it unpacked",
    )  # fmt: skip
    result.add_argument("--build-all", action="store_true", help="build all mutations first; alone: do only that")
    result.add_argument("--stdin", action="store_true", help="pass standard input to COMMAND, instead of /dev/null")
    result.add_argument("--memory", default="1G", help="default: %(default)s")
    result.add_argument("--cpus", type=int, default=2, help="default: %(default)s")
    result.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="default: %(default)s")
    result.add_argument(
        "--repeat", type=int, metavar="N",
        help="run COMMAND in N VMs, one after another, without second starts; say how many kernels died at boot",
    )  # fmt: skip
    result.add_argument("-v", "--verbose", action="store_true")
    result.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    return result


def _check_gvt(options: argparse.Namespace) -> None:
    if options.gpu and not options.gvt:
        parser().error("--gpu needs --gvt")
    if options.gpu_args and not options.gvt:
        parser().error("--gpu-args needs --gvt")
    if options.kvmgt == "ours" and not options.gvt:
        parser().error("--kvmgt needs --gvt")
    if options.kvmgt_args and options.kvmgt != "ours":
        parser().error("--kvmgt-args needs --kvmgt ours")
    if options.l2 and not options.gvt:
        parser().error("--l2 needs --gvt")
    if options.l2_qemu and not options.l2:
        parser().error("--l2-qemu needs --l2")
    if options.gvt and not options.gpu:
        options.gpu = gvt.MODELS[0]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; what follows the options is COMMAND's and stays as it is.

    >>> parse(["--cpus", "1", "--", "sh", "-c", "--"]).command
    ['sh', '-c', '--']
    """
    options = parser().parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if options.stdin and not options.command:
        parser().error("--stdin needs a COMMAND")
    _check_gvt(options)
    if options.repeat is not None:
        if not options.command:
            parser().error("--repeat needs a COMMAND")
        if options.stdin:
            parser().error("--repeat and --stdin exclude each other: there is only one input")
        if options.repeat < 1:
            parser().error("--repeat needs a number of at least 1")
    return options


def _on_signal(signum: int, _frame: FrameType | None) -> Never:
    raise Interrupted(signum)


def _forget_old_runs(runs: Path) -> None:
    old = sorted((path for path in runs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in old[:-_KEPT_RUNS]:
        # Another runner may be in the same place, or in this directory: only what is a day old is nobody's.
        if time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _precompile() -> None:
    # Compiling under emulation costs seconds per file, and what the guest compiles is lost.
    for name in ("vfio_mig", "tools", "tests"):
        compileall.compile_dir(_CHECKOUT / name, quiet=2)


def _prepare(options: argparse.Namespace, cache: Path) -> tuple[machine.Options, guest.Guest]:
    if options.kernel == custom.NAME:
        kernel = custom.fetch(_CHECKOUT, cache, say)
    else:
        kernel = newest.find(options.kernel, cache, say)
    modules = None
    loaded = None
    if not options.no_module:
        wanted = {None, options.mutation, *(module.MUTATIONS if options.build_all else ())}
        modules = module.build(_CHECKOUT, kernel, cache, tuple(sorted(wanted, key=str)))
        loaded = modules / module.file_name(options.mutation)
    other = mtty.build(kernel, cache, say) if options.mtty else None
    out = Path(os.environ.get("VFIO_MIG_VM_OUT") or cache / "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    by_kvm = kvm.usable(kernel.image, cache)
    # mtty's protocol is spoken by a QEMU that is new enough for emulation, too
    need = gvt.NEED if options.gvt else qemu.KVM if by_kvm and not options.mtty else qemu.EMULATION
    cable = link.Link(cache / "links" / options.link[0], options.link[1]) if options.link else None
    inner = qemu.of_suite(options.l2_qemu, cache, say) if options.l2_qemu else None
    machine_options = machine.Options(
        kernel=kernel, kvm=by_kvm, qemu=qemu.find(need, cache, say, say), gpu=options.gpu,
        gpu_args=tuple(options.gpu_args.split()),
        memory=options.memory, cpus=options.cpus, timeout=options.timeout,
        second_start=options.repeat is None, link=cable,
    )  # fmt: skip
    host_driver = gvt.modules(kernel, cache, say) if options.gvt else None
    environment = guest.environment(
        os.environ, venv=Path(sys.prefix), modules=modules, out=out, release=kernel.release,
        gpu=options.gpu, gvt=host_driver, uapi=kernel.uapi, l2=_guest_of_vgpu(cache, say) if options.l2 else None,
        qemu=(inner or machine_options.qemu).shell_words(), link=cable,
        libvirt=libvirt.fetch(cache, say) if options.libvirt else None,
    )  # fmt: skip
    what = guest.Guest(
        tree=kernel.tree, module=loaded, module_args=options.module_args.split(), out=out,
        cwd=Path.cwd(), environment=environment, command=options.command, stdin=options.stdin,
        mtty=other, gvt=host_driver,
        kvmgt=_our_kvmgt(kernel, cache, say) if options.kvmgt == "ours" else None,
        kvmgt_args=options.kvmgt_args.split(), link=cable,
    )  # fmt: skip
    if options.verbose:
        say(machine.environment_note(machine_options))
    return machine_options, what


def _guest_of_vgpu(cache: Path, log: kernels.Log) -> Path:
    # Whichever kernel the VM has: i915 of 6.1 takes three times as long to bind to a vGPU under nested emulation
    return l2.build(kernels.find(kernels.SERIES[0], cache, log), cache, log)


def _our_kvmgt(kernel: kernels.Kernel, cache: Path, log: kernels.Log) -> Path:
    setting = kvmgt.Setting(
        kernel, source.fetch(kernel, cache, log), cache, sparse=source.fetch_sparse(cache, log), log=log
    )
    setting.modules.mkdir(parents=True, exist_ok=True)
    return kvmgt.build(setting, (None,)) / kvmgt.file_name(None)


def _run(options: argparse.Namespace) -> int:
    cache = cache_root(os.environ)
    machine_options, what = _prepare(options, cache)
    if options.build_all and not options.command:
        return 0
    runs = cache / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    _forget_old_runs(runs)
    _precompile()
    if options.repeat is None:
        return _run_once(machine_options, what, runs, keep=options.verbose)[0]
    return _repeat(options.repeat, machine_options, what, runs, keep=options.verbose)


def _run_once(machine_options: machine.Options, what: guest.Guest, runs: Path, *, keep: bool) -> tuple[int, bool]:
    """Run COMMAND or a shell; return the exit code and whether the kernel died at boot."""
    directory = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=runs))
    try:
        if not what.command:
            return machine.shell(machine_options, what, directory), False
        outcome = machine.run(machine_options, what, directory, say)
        if message := machine.explain(outcome, machine_options, directory):
            keep = True
            say(message)
        keep = keep or (directory / machine.FIRST_CONSOLE).exists()
        return outcome.exit_code(), machine.died_at_boot(directory, outcome)
    except RunnerError:
        keep = True
        raise
    finally:
        if keep:
            say(f"logs: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _repeat(times: int, machine_options: machine.Options, what: guest.Guest, runs: Path, *, keep: bool) -> int:
    """Run COMMAND in so many VMs; return the first exit code that is not 0."""
    done = died = failed = result = 0
    try:
        for _ in range(times):
            code, at_boot = _run_once(machine_options, what, runs, keep=keep)
            done += 1
            died += at_boot
            failed += code != 0
            result = result or code
    finally:
        say(f"{done} of {times} runs: {failed} failed, {died} of them as the kernel died at boot")
    return result


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    options = parse(arguments)
    if not options.command and not options.build_all and not sys.stdin.isatty():
        say("a shell needs a terminal; give a COMMAND")
        return EXIT_RUNNER
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _on_signal)
    try:
        return _run(options)
    except (RunnerError, OSError) as error:
        say(str(error))
        return EXIT_RUNNER
    except Interrupted as interrupted:
        return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
