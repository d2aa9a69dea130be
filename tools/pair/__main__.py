# SPDX-License-Identifier: MIT
"""The host's part of ``scripts/pair``: starts both VMs, carries the stream from one to the other, sums up.

With ``--ssh`` and ``--gvt`` a cable joins the VMs instead, and they find each other by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NamedTuple, NoReturn

from tools.pair import sshd
from tools.pair.sides import CUT
from tools.vm.cache import cache_root
from tools.vm.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
SECONDS: Final = 300
HOSTS: Final = {
    "6.12": "",
    "6.1": "aperture_mb=512 host_low_mb=64 host_high_mb=256 top_reserved_mb=128 host_fences=8",
}
"""Kernels, and the driver's parameters: each host has another pool of graphics memory."""
FORWARD: Final = ("6.12", "6.1")
BACK: Final = ("6.1", "6.12")


class Stream(NamedTuple):
    """What has gone through the pipe: bytes, and seconds from the first to the last."""

    size: int
    seconds: float


@contextlib.contextmanager
def vm(kernel: str, side: str, out: str, **pipes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run one side in a VM, which ends with the block."""
    options = ["--kernel", kernel, "--module-args", HOSTS[kernel], *(["--stdin"] if "stdin" in pipes else [])]
    with _vm(options, ["tools.pair.sides", side], {"VFIO_MIG_VM_OUT": out}, **pipes) as process:
        yield process


@contextlib.contextmanager
def _vm(
    options: list[str], module: list[str], variables: dict[str, str], seconds: int = SECONDS, **pipes: int
) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(ROOT / "scripts/vm"), "--timeout", str(seconds), *options, "--", "python", "-m", *module]
    # Our own terminal's Ctrl-C comes to both; what is left to do then is to wait for them.
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def carry(source: IO[bytes], target: IO[bytes], cut: int | None) -> Stream:
    """Carry the stream to its end, or cut it after *cut* bytes; the source is read to its end anyway."""
    size, began, ended = 0, 0.0, 0.0
    while data := source.read1(1 << 16):  # type: ignore[attr-defined]
        ended = time.monotonic()
        began = began or ended
        part = data if cut is None else data[: max(0, cut - size)]
        size += len(data)
        with contextlib.suppress(BrokenPipeError):  # the target's exit code says why
            target.write(part)
    with contextlib.suppress(BrokenPipeError):
        target.close()
    return Stream(size, ended - began)


def migrate(kernels: tuple[str, str], cut: int | None) -> bool:
    """Migrate once between two VMs; says whether all checks hold."""
    source_kernel, target_kernel = kernels
    print(f"\nFrom a host with {source_kernel} to one with {target_kernel}", flush=True)
    print("  $ vfio-mig save DEV - --memory … | vfio-mig restore DEV - --memory …", flush=True)
    began = time.monotonic()
    os.environ.pop(CUT, None)
    if cut is not None:
        os.environ[CUT] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="vfio-mig-pair-") as out,
        vm(source_kernel, "source", out, stdout=subprocess.PIPE) as source,
        vm(target_kernel, "target", out, stdin=subprocess.PIPE) as target,
    ):
        assert source.stdout is not None  # noqa: S101 -- for the type checker
        assert target.stdin is not None  # noqa: S101 -- for the type checker
        stream = carry(source.stdout, target.stdin, cut)
        codes = source.wait(), target.wait()
    good = codes == (0, 0)
    print(f"  {'ok  ' if codes[0] == 0 else 'FAIL'}  the source's exit code is {codes[0]}")
    if codes[1] not in (0, 1):
        print(f"  FAIL  the target's exit code is {codes[1]}")
    print(
        f"  {stream.size} bytes in {stream.seconds:.1f} s{'' if cut is None else f', cut after {cut}'}; "
        f"with the start of both VMs {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return good


class Kind(NamedTuple):
    """Two VMs that reach each other by ssh."""

    title: str
    module: str  # what runs in them
    source: list[str]  # options of scripts/vm
    target: list[str]
    seconds: int = 2 * SECONDS  # of a busy machine: a command that hangs is noticed by itself


SSH: Final = Kind(
    "Two hosts and a real sshd: the sample driver",
    "tools.pair.network",
    ["--module-args", HOSTS["6.12"]],
    ["--module-args", HOSTS["6.1"]],
)
GVT: Final = Kind(
    "Two hosts and a real sshd: the real kvmgt with our patches, each on a GPU of its own",
    "tools.pair.gvt",
    ["--no-module", "--gvt", "--kvmgt", "ours"],
    ["--no-module", "--gvt", "--kvmgt", "ours"],
)

FLEET: Final = Kind(
    "Two hosts and Ansible: a playbook moves vGPUs of the sample driver",
    "tools.pair.fleet",
    ["--module-args", HOSTS["6.12"]],
    ["--module-args", HOSTS["6.1"]],
    1800,  # Ansible starts many a Python, each of which takes seconds in there
)
GVT_FLEET: Final = GVT._replace(
    title="Two hosts and Ansible: a playbook moves vGPUs of the real kvmgt with our patches",
    module="tools.pair.fleet_gvt",
    seconds=FLEET.seconds,
)
KINDS: Final = {"ssh": SSH, "gvt": GVT, "ansible": FLEET, "ansible_gvt": GVT_FLEET}


def meet(kind: Kind) -> bool:
    """Run both sides, joined by a cable; says whether all checks hold."""
    print(f"\n{kind.title}", flush=True)
    began = time.monotonic()
    tree = sshd.fetch(cache_root(os.environ), lambda message: print(f"pair: {message}", file=sys.stderr, flush=True))
    cable = f"pair-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="vfio-mig-pair-") as out:
        variables = {"VFIO_MIG_VM_OUT": out, sshd.TREE: str(tree)}
        with (
            _vm([*kind.target, "--link", f"{cable}/2"], [kind.module, "target"], variables, kind.seconds) as target,
            _vm([*kind.source, "--link", f"{cable}/1"], [kind.module, "source"], variables, kind.seconds) as source,
        ):
            codes = await_both(source, target)
    print(
        f"  exit codes {codes[0]} and {codes[1]}; with the start of both VMs {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return codes == (0, 0)


def await_both(source: subprocess.Popen[bytes], target: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for both; one that fails is not waited for by the other."""
    while source.poll() is None or target.poll() is None:
        for one, other in (source, target), (target, source):
            if one.poll() and other.poll() is None:
                other.terminate()
        time.sleep(0.1)
    return source.wait(), target.wait()


def _end(signum: int, _frame: object) -> NoReturn:
    sys.exit(128 + signum)


def main(arguments: list[str]) -> int:
    """Run the command line; 1 if a check fails."""
    parser = argparse.ArgumentParser(
        prog="scripts/pair", description="Migrate a vGPU between two VMs with different kernels and memory pools."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--forward", action="store_true", help="only from 6.12 to 6.1")
    which.add_argument("--back", action="store_true", help="only from 6.1 to 6.12")
    which.add_argument("--ssh", action="store_true", help="by migrate and a real sshd, with all that goes wrong there")
    which.add_argument("--gvt", action="store_true", help="the same with the real kvmgt on two emulated GPUs")
    which.add_argument("--ansible", action="store_true", help="by the playbook of contrib/ansible")
    which.add_argument("--ansible-gvt", action="store_true", help="the same with the real kvmgt")
    parser.add_argument("--cut", type=int, metavar="N", help="cut the stream after N bytes; it must be refused")
    options = parser.parse_args(arguments)
    kind = next((kind for name, kind in KINDS.items() if getattr(options, name)), None)
    if kind is not None:
        if options.cut is not None:
            parser.error("--cut is for the pipe")
        return _sum_up([meet(kind)])
    directions = [FORWARD] if options.forward else [BACK] if options.back else [FORWARD, BACK]
    return _sum_up([migrate(direction, options.cut) for direction in directions])


def _sum_up(good: list[bool]) -> int:
    print("\nAll checks hold." if all(good) else "\nChecks FAILED.")
    return int(not all(good))


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(ending, _end)
    try:
        sys.exit(main(sys.argv[1:]))
    except RunnerError as error:
        sys.exit(f"pair: {error}")
