# SPDX-License-Identifier: MIT
"""Starting QEMU through virtme-ng, passing its output on while it runs, and judging how it ended."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from tools.vm import guest, gvt
from tools.vm.errors import EXIT_KERNEL_FAULT, EXIT_RUNNER, EXIT_TIMEOUT
from tools.vm.feed import Feeder
from tools.vm.guest import Guest
from tools.vm.kernels import Kernel
from tools.vm.kernlog import faults
from tools.vm.link import Link, plugged
from tools.vm.qemu import ON_PATH, Qemu, dotted

CONSOLE: Final = "console"
FIRST_CONSOLE: Final = "console.first"  # of a kernel that died at boot, when there was a second start
_POLL_SECONDS: Final = 0.05
_TAIL_LINES: Final = 25
_MAX_LEAK_LINES: Final = 200
_CHUNK: Final = 1 << 16

# Found by a udev in the guest and useless there; loading them takes half of the boot under emulation.
_BLACKLIST: Final = (
    "kvm kvm_amd kvm_intel ahci libata sr_mod sg cdrom psmouse evdev i2c_i801 iTCO_wdt i6300esb lpc_ich pcspkr "
    "serio_raw button qemu_fw_cfg aesni_intel ghash_clmulni_intel sha1_ssse3 sha256_ssse3 sha512_ssse3 "
    "crc32_pclmul crct10dif_pclmul crc32c_intel ccp "
    "i915 kvmgt"  # without enable_gvt the first is no use
)
_KERNEL_OPTIONS: Final = (
    f"modprobe.blacklist={','.join(_BLACKLIST.split())}",
    "loglevel=5",  # warnings reach the console, which is all that is left after a panic
    "log_buf_len=8M",  # a long run must not push a WARN out of the buffer
    # An Oops leaves locks held and threads dead: end at once (virtme adds panic=-1) and not by time-out.
    "oops=panic",
    # Under emulation on a busy host the timer's interrupts may come too late for the boot's check, which then panics.
    "no_timer_check",
    "mitigations=off",  # nobody attacks this kernel, and emulation makes retpolines slow: a tenth of all time
)
# Emulation walks each level of page tables by hand, does `rep movsb` byte by byte, and AVX slower than SSE.
_EMULATED_CPU: Final = "max,-la57,-erms,-fsrm,-avx,-avx2"


@dataclass(frozen=True, slots=True)
class Options:
    """How the machine is built and how long it may run."""

    kernel: Kernel
    kvm: bool
    memory: str
    cpus: int
    timeout: float  # seconds, from start to end
    qemu: Qemu = ON_PATH
    gpu: str | None = None  # the model of an emulated one
    gpu_args: tuple[str, ...] = ()
    link: Link | None = None
    second_start: bool = True  # a kernel that dies at boot gets one


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known when QEMU has ended."""

    status: int | None  # COMMAND's own, if it came to an end
    failure: str | None  # why COMMAND was not started
    faults: Sequence[str]  # of the kernel's log
    timed_out: bool
    leaks: str = ""  # kmemleak's report, when the log says that it found some

    def exit_code(self) -> int:
        """Return the runner's exit code. A kernel that complained outweighs whatever COMMAND said."""
        if self.faults:
            return EXIT_KERNEL_FAULT
        if self.timed_out:
            return EXIT_TIMEOUT
        if self.failure is not None or self.status is None:
            return EXIT_RUNNER
        return self.status


def _share(path: Path, tag: str, *, readonly: bool) -> list[str]:
    escaped = str(path).replace(",", ",,")  # QEMU's own quoting
    access = ",readonly=on" if readonly else ""
    return [
        "-fsdev", f"local,id={tag},path={escaped},security_model=none,multidevs=remap{access}",
        "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]  # fmt: skip


def _port(name: str, chardev: str) -> list[str]:
    return [
        "-chardev", f"{chardev},id=vm_{name}",
        "-device", f"virtserialport,bus=vm_ports.0,name=vm.{name},chardev=vm_{name}",
    ]  # fmt: skip


def _ports(run: Path, stdin: int | None) -> list[str]:
    escaped = str(run).replace(",", ",,")
    return [
        "-device", "virtio-serial-pci,id=vm_ports",
        *_port(guest.STDOUT, f"file,path={escaped}/{guest.STDOUT}"),
        *_port(guest.STDERR, f"file,path={escaped}/{guest.STDERR}"),
        *([] if stdin is None else _port(guest.STDIN, f"socket,fd={stdin}")),
    ]  # fmt: skip


def virtme_command(
    options: Options,
    run: Path,
    out: Path,
    *,
    interactive: bool,
    stdin: int | None = None,
    devices: Sequence[str] = (),
) -> list[str]:
    """Return the command line of virtme-ng's runner.

    :param stdin: a socket for COMMAND's input, which the new process is to inherit.
    :param devices: QEMU's arguments for an emulated GPU and a network cable.

    The lower-level ``virtme-run`` is used and not ``vng``, which puts a shell in between that would survive us.
    """
    virtme_run = Path(sys.executable).parent / "virtme-run"
    how = ["--shell", str(run / "shell")] if interactive else ["--show-boot-console", "--script-sh", guest.BOOTSTRAP]
    return [
        "setpriv", "--pdeathsig", "KILL", "--", str(virtme_run),
        "--kimg", str(options.kernel.image), "--mods", "auto",
        "--qemu-bin", str(run / "qemu"), "--disable-microvm", "--force-9p",
        *([] if options.kvm else ["--disable-kvm"]),
        "--user", "root", "--memory", options.memory, "--cpus", str(options.cpus),
        # An overlay makes virtme's initramfs load the module, which we need too, and faster than we could.
        "--overlay-rwdir", "/etc",
        *how,
        *(part for option in _KERNEL_OPTIONS for part in ("--kopt", option)),
        # What a boot without udev complains of is no user's business at a prompt; guest.py lets more through again.
        *(["--kopt", "loglevel=3"] if interactive else []),
        "--qemu-opts",  # takes all that follows
        *([] if options.kvm else ["-cpu", _EMULATED_CPU]),  # the last one counts
        *_share(Path("/"), guest.ROOT_TAG, readonly=True),
        *_share(run, guest.RUN_TAG, readonly=False),
        *_share(out, guest.OUT_TAG, readonly=False),
        *([] if interactive else _ports(run, stdin)),
        *devices,
    ]  # fmt: skip


# The GPU has to be in slot 2, and QEMU places devices that are given in JSON after all others.
_MOVE_DEVICES: Final = """\
arguments=() previous='' slot=16
for word; do
	case $previous:${word%%,*} in
	-device:*-pci | -device:i6300esb)
		[[ ,$word, == *,addr=* ]] || printf -v word '%s,addr=%#x' "$word" $((slot++))
		;;
	esac
	arguments+=("$word") previous=$word
done
set -- "${arguments[@]}"
"""


def write_scripts(options: Options, run: Path, what: Guest) -> None:
    """Fill the run directory."""
    (run / "entry.sh").write_bytes(guest.entry_script(what))
    (run / "command.sh").write_bytes(guest.command_script(what))
    # QEMU is a child of virtme-run, which is ours: each dies with its parent, however that ends.
    qemu = run / "qemu"
    moves = "" if options.gpu is None else _MOVE_DEVICES
    qemu.write_text(f'#!/bin/bash\n{moves}exec setpriv --pdeathsig KILL -- {options.qemu.shell_words()} "$@"\n')
    shell = run / "shell"
    shell.write_text(f"#!/bin/bash\n{guest.BOOTSTRAP}\n")
    for script in (qemu, shell):
        script.chmod(0o755)
    for name in (guest.STDOUT, guest.STDERR, CONSOLE):
        (run / name).touch()


class _Follower:
    """Passes on what is appended to a file."""

    def __init__(self, path: Path, sink: BinaryIO) -> None:
        self._file = path.open("rb", buffering=0)
        self._sink = sink

    def close(self) -> None:
        self._file.close()

    def pump(self) -> None:
        """Pass on everything that is there now."""
        while data := self._file.read(_CHUNK):
            self._sink.write(data)
            self._sink.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End virtme-run and, through its parent-death signal, QEMU; wait for the first."""
    if process.poll() is None:
        process.kill()
    process.wait()


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a running VM has to do with."""

    followers: Sequence[_Follower]
    feeder: Feeder | None
    gpu: gvt.Gpu | None
    cable: Sequence[str] = ()  # QEMU's arguments for it

    def devices(self, memory: str) -> list[str]:
        """Return QEMU's arguments for the GPU and the cable."""
        return [*(() if self.gpu is None else self.gpu.qemu_arguments(memory)), *self.cable]

    def pump(self, seconds: float) -> None:
        """Pass output, and input if any, on for *seconds*; RunnerError when the GPU has failed."""
        if self.gpu is not None:
            self.gpu.check()
        for follower in self.followers:
            follower.pump()
        if self.feeder is None:
            time.sleep(seconds)
        else:
            self.feeder.pump(seconds)


def _watch(process: subprocess.Popen[bytes], around: _Surroundings, deadline: float) -> bool:
    """Wait until QEMU ends; return whether the time ran out first."""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return True
        around.pump(_POLL_SECONDS)
    return False


def _read(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.exists() else None


def outcome_of(run: Path, *, timed_out: bool) -> Outcome:
    """Judge a run by what it left in its directory."""
    status = _read(run / guest.STATUS)
    # The console alone is left after a panic; dmesg is complete otherwise.
    log = _read(run / guest.DMESG) or _read(run / CONSOLE) or ""
    failure = _read(run / guest.FAILURE)
    complaints = faults(log)
    return Outcome(
        status=int(status) if status is not None and failure is None else None,
        failure=failure.strip() if failure is not None else None,
        faults=complaints,
        timed_out=timed_out and status is None,
        leaks=_read(run / guest.LEAKS) or "" if complaints else "",
    )


def died_at_boot(run: Path, outcome: Outcome) -> bool:
    """Say whether a run ended as the kernel died before anything that is under test was there."""
    if outcome.timed_out or outcome.status is not None or outcome.failure is not None or (run / guest.BOOTED).exists():
        return False
    # A QEMU that does not start leaves no kernel's log.
    return re.search(r"^\[ *\d+\.\d+\]", _read(run / CONSOLE) or "", re.MULTILINE) is not None


def run(options: Options, what: Guest, directory: Path, say: Callable[[str], None]) -> Outcome:
    """Run COMMAND in a VM; its output appears on our stdout and stderr as it is written.

    A kernel that dies at boot, before the drivers under test are loaded, is started once more, in what is left of the
    time; *say* is told, and both logs are kept.

    :param directory: empty; holds the run's scripts and logs afterwards.
    :raises Interrupted: a signal came; the VM has been ended.
    """
    feeder = Feeder(directory / guest.STDIN_CLOSED) if what.stdin else None
    deadline = time.monotonic() + options.timeout
    try:
        outcome = _run_once(options, what, directory, feeder, deadline)
        if options.second_start and died_at_boot(directory, outcome):
            # Nothing of COMMAND's input is lost: QEMU takes none before the guest has opened its port.
            first = directory / FIRST_CONSOLE
            (directory / CONSOLE).replace(first)
            reason = outcome.faults[0] if outcome.faults else "without a word"
            say(f"the kernel died at boot ({reason.strip()}); starting it once more ({first} has its log)")
            outcome = _run_once(options, what, directory, feeder, deadline)
        return outcome
    finally:
        if feeder is not None:
            feeder.close()


def _run_once(options: Options, what: Guest, directory: Path, feeder: Feeder | None, deadline: float) -> Outcome:
    write_scripts(options, directory, what)
    followers = [
        _Follower(directory / guest.STDOUT, sys.stdout.buffer),
        _Follower(directory / guest.STDERR, sys.stderr.buffer),
    ]
    try:
        with _gpu(options, directory) as gpu, plugged(options.link) as cable:
            around = _Surroundings(followers, feeder, gpu, cable)
            timed_out = _run_qemu(options, what, directory, around, deadline)
            if gpu is not None:
                gpu.end()
        for follower in followers:
            follower.pump()
    finally:
        for follower in followers:
            follower.close()
    return outcome_of(directory, timed_out=timed_out)


def _gpu(options: Options, directory: Path) -> AbstractContextManager[gvt.Gpu | None]:
    return nullcontext() if options.gpu is None else gvt.gpu(options.gpu, directory, *options.gpu_args)


def _run_qemu(options: Options, what: Guest, directory: Path, around: _Surroundings, deadline: float) -> bool:
    """Run the VM and return whether the time ran out."""
    sockets = () if around.feeder is None else (around.feeder.guests.fileno(),)
    command = virtme_command(
        options, directory, what.out, interactive=False, stdin=sockets[0] if sockets else None,
        devices=around.devices(options.memory),
    )  # fmt: skip
    (directory / "virtme-command").write_text(shlex.join(command) + "\n")
    with (directory / CONSOLE).open("wb") as console, (directory / "virtme-output").open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=console,
            start_new_session=True,  # the terminal's Ctrl-C is for us, and we end QEMU
            pass_fds=sockets,
        )  # fmt: skip
        try:
            return _watch(process, around, deadline)
        finally:
            _end(process)


def shell(options: Options, what: Guest, directory: Path) -> int:
    """Give an interactive shell in a VM on this terminal; return 0 if it came up."""
    write_scripts(options, directory, what)
    with _gpu(options, directory) as gpu, plugged(options.link) as cable:
        devices = _Surroundings((), None, gpu, cable).devices(options.memory)
        command = virtme_command(options, directory, what.out, interactive=True, devices=devices)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the shell inside
        try:
            process = subprocess.Popen(command)
            try:
                process.wait()
            finally:
                _end(process)
        finally:
            signal.signal(signal.SIGINT, before)
    outcome = outcome_of(directory, timed_out=False)
    return EXIT_RUNNER if outcome.failure is not None else 0


def explain(outcome: Outcome, options: Options, directory: Path) -> str:
    """Say why a run counts as failed beyond COMMAND's own status; empty if it does not."""
    if outcome.faults:
        return "\n".join(["the kernel complained:", *outcome.faults, *outcome.leaks.splitlines()[:_MAX_LEAK_LINES]])
    if outcome.timed_out:
        return f"the time ran out after {options.timeout:g} s; the VM was ended"
    if outcome.failure is not None:
        return f"{outcome.failure}:\n{_read(directory / guest.GUEST_LOG) or ''}".rstrip()
    if outcome.status is None:
        logs = [_read(directory / "virtme-output") or "", _read(directory / CONSOLE) or ""]
        last = [line for log in logs for line in log.splitlines()[-_TAIL_LINES:]]
        return "the VM ended without a result; the end of its console:\n" + "\n".join(last)
    return ""


def environment_note(options: Options) -> str:
    """Say in one line what the machine is."""
    accelerator = "KVM" if options.kvm else "emulation (KVM is not usable here)"
    return (
        f"kernel {options.kernel.release}, {accelerator}, QEMU {dotted(options.qemu.version)}, {options.cpus} CPUs, "
        f"{options.memory}{f', GPU {options.gpu}' if options.gpu else ''}, pid {os.getpid()}"
    )
