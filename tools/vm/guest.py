# SPDX-License-Identifier: MIT
"""What runs inside the VM: a bootstrap line, the entry script, and COMMAND's own script.

The guest sees the host's root directory read-only. virtme's own mount of it has no cache, which makes starting a
Python five times slower under emulation, so the entry script mounts it once more with a cache, puts one writable
overlay over all of it (writes are lost at the end), and runs COMMAND in there. Two directories are really shared: the
run directory, through which status and logs travel, and the results directory. What COMMAND reads and writes goes
through virtio-serial ports: a shared directory without a cache is several times slower, most of all on 6.12.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.vm.link import Link

ROOT_TAG: Final = "vm_root"
RUN_TAG: Final = "vm_run"
OUT_TAG: Final = "vm_out"

STDOUT: Final = "stdout"
STDERR: Final = "stderr"
STATUS: Final = "status"  # appears last, when everything else is written
DMESG: Final = "dmesg"
LEAKS: Final = "leaks"  # what kmemleak reports at the end; there only with a kernel that has it
BOOTED: Final = "booted"  # a file: the kernel is up, and what is under test comes next
FAILURE: Final = "failure"  # why COMMAND was not started
GUEST_LOG: Final = "guest.log"

STDIN: Final = "stdin"  # a port, as STDOUT and STDERR are; the host's side of those is files of the same names
STDIN_CLOSED: Final = "stdin.closed"  # a file: nobody reads it any more
STDIN_GREETING: Final = b"!"  # a port that the host has not opened yet reads as if at its end

GPU_CONTROL: Final = "gpu.control"  # a port, too: what the emulated GPU is asked and told through

_RUN: Final = "/run/vm/run"
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_9P: Final = "trans=virtio,version=9p2000.L,msize=512000"

# The one line that goes through the kernel's command line, which is short: fetch the rest from the run directory.
BOOTSTRAP: Final = (
    f"busybox mkdir -p {_RUN} && busybox mount -t 9p -o {_9P} {RUN_TAG} {_RUN} && exec /bin/bash {_RUN}/entry.sh"
)

# Variables in front of it: tree, gvt, kvmgt, kvmgt_args (array), module, module_args (array), mtty, link, out,
# interactive, input.
_ENTRY: Final = f"""
export PATH={_PATH}
run={_RUN}
lower=/run/vm/lower
root=/run/vm/root

finish() {{
	inside dmesg >$run/{DMESG}
	printf '%s\\n' "$1" >$run/{STATUS}.new
	busybox mv $run/{STATUS}.new $run/{STATUS}
	busybox sync
	exec >/dev/null 2>&1 # the files that this reads may go first
	echo o >/proc/sysrq-trigger  # power off at once; there is nothing here to shut down
	busybox sleep 60
}}

fail() {{
	printf '%s\\n' "$1" >$run/{FAILURE}
	finish 1
}}

# env finds the real program; busybox would prefer its own smaller one of the same name.
inside() {{ busybox chroot $root /usr/bin/env "$@"; }}

# One static program: starting the dynamic ones from the uncached root takes a third of a second each.
mount_root() {{
	busybox mkdir -p $lower $root /run/vm/upper /run/vm/work &&
		busybox mount -t 9p -o ro,cache=loose,{_9P} {ROOT_TAG} $lower &&
		busybox mount -t overlay -o lowerdir=$lower,upperdir=/run/vm/upper,workdir=/run/vm/work vm $root &&
		busybox mount -o rbind /proc $root/proc &&
		busybox mount -o rbind /sys $root/sys &&
		busybox mount -o rbind /dev $root/dev &&
		busybox mount -o bind /run $root/run &&
		busybox mount -o bind $run $root$run &&
		busybox mkdir -p "$root$out" &&
		busybox mount -t 9p -o {_9P} {OUT_TAG} "$root$out"
}}

mount_debugfs() {{
	[[ -d /sys/kernel/debug/bdi ]] || busybox mount -t debugfs debugfs $root/sys/kernel/debug
}}

load_modules() {{
	[[ -z $module$mtty ]] || inside modprobe -d "${{gvt:-$tree}}" -a mdev vfio vfio_iommu_type1 || return
	: >$run/{BOOTED}
	[[ -z $module ]] || inside insmod "$module" "${{module_args[@]}}" || return
	[[ -z $mtty ]] || inside insmod "$mtty"
}}

load_kvmgt() {{
	if [[ -n $kvmgt ]]; then
		inside insmod "$kvmgt" "${{kvmgt_args[@]}}"
	else
		inside modprobe -d "$gvt" kvmgt
	fi
}}

# The host driver of GVT-g. kvmgt does nothing for a process without a KVM, and nothing at all without enable_gvt.
load_gvt() {{
	local kvm=kvm_amd
	! busybox grep -qw vmx /proc/cpuinfo || kvm=kvm_intel
	inside modprobe -d "$gvt" $kvm &&
		inside modprobe -d "$gvt" i915 enable_gvt=1 &&
		inside modprobe -d "$gvt" -a mdev vfio_iommu_type1 &&
		load_kvmgt || return
	[[ -d /sys/class/mdev_bus/0000:00:02.0 ]] || {{ echo 'kvmgt has registered no types of vGPUs'; return 1; }}
	# There is no udev here to name it.
	find_port {GPU_CONTROL}
	busybox mkdir -p /dev/virtio-ports
	busybox ln -sf "$port" /dev/virtio-ports/{GPU_CONTROL}
}}

# The one network device there is, and whatever a udev has made of its name.
connect() {{
	local device name=''
	inside modprobe -d "$tree" virtio_net || return
	for device in /sys/class/net/*; do
		[[ ${{device##*/}} == lo ]] || name=${{device##*/}}
	done
	busybox ip link set lo up && busybox ip link set "$name" up && busybox ip addr add "$link/24" dev "$name"
}}

# Waits for the host's end of this name.
find_port() {{
	local try name
	for ((try = 0; try < 100; try++)); do
		for port in /sys/class/virtio-ports/*; do
			read -r name <$port/name && [[ $name == "$1" ]] || continue
			port=/dev/${{port##*/}}
			return
		done 2>/dev/null
		busybox sleep 0.1
	done
	fail "there is no port $1"
}}

feed() {{
	local greeting
	until read -r -N {len(STDIN_GREETING)} -u 7 greeting; do
		busybox sleep 0.1
	done
	inside cat <&7
	: >$run/{STDIN_CLOSED}
}}

run_command() {{
	local out_fifo=/run/vm/stdout out_cat err_fifo=/run/vm/stderr err_cat in_fifo=/dev/null port status try
	# Pipes, as a shell would give: a command may reopen, truncate or poll its output.
	busybox mkfifo $out_fifo $err_fifo
	find_port vm.{STDOUT}
	busybox cat $out_fifo >$port &
	out_cat=$!
	find_port vm.{STDERR}
	busybox cat $err_fifo >$port &
	err_cat=$!
	if ((input)); then
		in_fifo=/run/vm/stdin
		busybox mkfifo $in_fifo
		find_port vm.{STDIN}
		feed 7<$port >$in_fifo &
	fi
	busybox chroot $root /bin/bash {_RUN}/command.sh <$in_fifo >$out_fifo 2>$err_fifo
	status=$?
	# Whatever COMMAND left running may hold the pipes for ever; its output does not count any more.
	for ((try = 0; try < 20; try++)); do
		kill -0 $out_cat 2>/dev/null || kill -0 $err_cat 2>/dev/null || break
		busybox sleep 0.1
	done
	return $status
}}

# Twice: the first scan only notes the contents of what nothing points to, the second reports what has not changed
# since. What is younger than five seconds is not reported.
find_leaks() {{
	local file=$root/sys/kernel/debug/kmemleak
	[[ -e $file ]] || return 0
	SECONDS=0
	echo scan >$file || return 0  # it is off; if that was because it failed, the log tells
	while ((SECONDS < 6)); do
		busybox sleep 0.2
	done
	echo scan >$file
	busybox cat $file >$run/{LEAKS}
}}

if ((!interactive)); then
	exec </dev/null >$run/{GUEST_LOG} 2>&1
fi
mount_root || fail 'the guest could not mount its root directory'
mount_debugfs || fail 'the guest could not mount debugfs'
load_modules || fail 'the sample driver could not be loaded'
[[ -z $gvt ]] || load_gvt || fail 'the host driver of GVT-g could not be loaded'
[[ -z $link ]] || connect || fail 'the network of --link could not be set up'
if ((interactive)); then
	echo 5 >/proc/sys/kernel/printk # warnings, and what is worse
	printf '%s\n' '' 'You are root in the VM, and vfio-mig is installed. exit ends it; what you write is lost,' \
		"except below $out"
	inside /bin/bash {_RUN}/command.sh
	finish $?
fi
run_command
status=$?
find_leaks
finish $status
"""

_PASSED_ON: Final = ("VFIO_MIG_", "PYTEST_")


@dataclass(frozen=True, slots=True)
class Guest:
    """What the guest is to do. All paths are the host's, which are the same inside."""

    tree: Path
    module: Path | None
    module_args: Sequence[str]
    out: Path
    cwd: Path
    environment: Mapping[str, str]
    command: Sequence[str]  # empty: an interactive shell
    stdin: bool = False  # COMMAND has the runner's, not /dev/null
    mtty: Path | None = None
    gvt: Path | None = None  # a tree with the modules of GVT-g's host driver
    kvmgt: Path | None = None  # another kvmgt than the one in there
    kvmgt_args: Sequence[str] = ()
    link: Link | None = None


def environment(
    host: Mapping[str, str], *, venv: Path, modules: Path | None, out: Path, release: str,
    gpu: str | None = None, gvt: Path | None = None, uapi: Path | None = None, l2: Path | None = None,
    qemu: str | None = None, link: Link | None = None, libvirt: Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """Return the variables that COMMAND sees."""
    guest = {key: value for key, value in host.items() if key.startswith(_PASSED_ON)}
    guest |= {
        "PATH": f"{venv / 'bin'}:{_PATH}",
        "VIRTUAL_ENV": str(venv),
        "HOME": host.get("HOME", "/root"),
        "LANG": "C.UTF-8",
        "TERM": host.get("TERM", "dumb"),
        "VFIO_MIG_VM": release,  # how a program knows that it runs in here
        "VFIO_MIG_VM_OUT": str(out),
    }
    if_there = {
        "VFIO_MIG_KMOD_DIR": modules, "VFIO_MIG_GPU": gpu, "VFIO_MIG_GVT_MODULES": gvt, "VFIO_MIG_KERNEL_UAPI": uapi,
        "VFIO_MIG_L2": l2, "VFIO_MIG_QEMU": qemu, "VFIO_MIG_LIBVIRT": libvirt,
        "VFIO_MIG_LINK": link and link.address, "VFIO_MIG_LINK_PEER": link and link.peer,
    }  # fmt: skip
    return guest | {name: str(value) for name, value in if_there.items() if value is not None}


def _assignment(name: str, value: str | Path) -> bytes:
    # Bytes: a path or an argument need not be UTF-8.
    return os.fsencode(f"{name}={shlex.quote(str(value))}\n")


def _array(name: str, values: Sequence[str]) -> bytes:
    return os.fsencode(f"{name}=({' '.join(shlex.quote(value) for value in values)})\n")


def entry_script(guest: Guest) -> bytes:
    """Return the script that prepares the guest, runs COMMAND and turns the machine off."""
    head = [
        _assignment("tree", guest.tree),
        _assignment("gvt", guest.gvt or ""),
        _assignment("kvmgt", guest.kvmgt or ""),
        _array("kvmgt_args", guest.kvmgt_args),
        _assignment("module", guest.module or ""),
        _array("module_args", guest.module_args),
        _assignment("mtty", guest.mtty or ""),
        _assignment("link", guest.link.address if guest.link else ""),
        _assignment("out", guest.out),
        _assignment("interactive", "0" if guest.command else "1"),
        _assignment("input", "1" if guest.stdin else "0"),
    ]
    return b"".join(head) + _ENTRY.encode()


def command_script(guest: Guest) -> bytes:
    """Return the script that becomes COMMAND: its directory, its variables, its arguments, each exactly as given."""
    lines = [b"export " + _assignment(name, value) for name, value in guest.environment.items()]
    lines.append(os.fsencode(f"cd -- {shlex.quote(str(guest.cwd))} || exit 125\n"))
    command = guest.command or ("bash", "-i")
    lines.append(os.fsencode(f"exec {' '.join(shlex.quote(word) for word in command)}\n"))
    return b"".join(lines)
