# SPDX-License-Identifier: MIT
"""``--gvt``: the emulated GPU that a run has, and the host driver's modules, made ready.

The GPU is a process of its own (``python -m tools.gpu``) that QEMU talks to over a socket. It is our child and ends
with us, and it ends when its one client, QEMU, does. The modules are unpacked here, as the guest would need seconds for
that.
"""

import hashlib
import json
import lzma
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from tools.vm.cache import populated
from tools.vm.errors import RunnerError
from tools.vm.guest import GPU_CONTROL
from tools.vm.kernels import Kernel, make_dependencies
from tools.vm.qemu import Need

MODELS: Final = ("skl", "kbl")
NEED: Final = Need("gvt", (10, 1), "vfio-user-pci")
MODULES: Final = ("kvm_amd", "kvm_intel", "i915", "vfio_iommu_type1", "mdev", "kvmgt")

_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_SOCKET: Final = "gpu.socket"
_CONTROL: Final = "gpu.control"
_LOG: Final = "gpu.log"
_SOCKET_PATH_MAX: Final = 107  # bytes: struct sockaddr_un
_START_SECONDS: Final = 30.0
_END_SECONDS: Final = 2.0
_KEPT_LINES: Final = 15
_METADATA: Final = ("modules.builtin", "modules.builtin.modinfo", "modules.order")


class Gpu:
    """An emulated GPU that waits for QEMU, or serves it."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._process: Final = process
        self._directory: Final = directory

    def check(self) -> None:
        """Raise RunnerError if it has ended by itself, and not well: then the driver talks to nobody."""
        if status := self._process.poll():
            raise RunnerError(f"the emulated GPU ended with status {status}:\n{_tail(self._directory / _LOG)}")

    def end(self) -> None:
        """Wait for its end, as QEMU has gone; RunnerError if that was no good one."""
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # it is busy with a batch, and nobody waits for that any more
            self._process.kill()
            self._process.wait()
        else:
            self.check()

    def qemu_arguments(self, memory: str) -> list[str]:
        """Return what QEMU needs to have it; the guest's memory is shared with it."""
        socket = {"type": "unix", "path": str(self._directory / _SOCKET)}
        return [
            "-object", f"memory-backend-memfd,id=vm_memory,size={memory},share=on",
            "-machine", "memory-backend=vm_memory",
            "-device", json.dumps({"driver": "vfio-user-pci", "addr": "2.0", "socket": socket}),
            "-device", "virtio-serial-pci,id=vm_gpu_ports",
            "-chardev", f"socket,id=vm_gpu_control,path={str(self._directory / _CONTROL).replace(',', ',,')}",
            "-device", f"virtserialport,bus=vm_gpu_ports.0,name={GPU_CONTROL},chardev=vm_gpu_control",
        ]  # fmt: skip


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_KEPT_LINES:])


@contextmanager
def gpu(model: str, directory: Path, *arguments: str) -> Iterator[Gpu]:
    """Have an emulated GPU; it has gone when the block is left.

    :param directory: gets its sockets and its log.
    :param arguments: more of them, for ``python -m tools.gpu``.
    :raises RunnerError: it does not start.
    """
    if len(os.fsencode(directory / _CONTROL)) > _SOCKET_PATH_MAX:
        raise RunnerError(f"{directory} is too long a path for a socket; VFIO_MIG_CACHE chooses a shorter one")
    command = [sys.executable, "-m", "tools.gpu", "--gpu", model, *arguments]
    command += ["--socket", str(directory / _SOCKET), "--control", str(directory / _CONTROL)]
    with (directory / _LOG).open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            cwd=_CHECKOUT, start_new_session=True,  # the terminal's Ctrl-C is for us
        )  # fmt: skip
    with process:
        try:
            _await_ready(process, directory)
            yield Gpu(process, directory)
        finally:
            process.kill()
            process.wait()
            for name in (_SOCKET, _CONTROL):
                (directory / name).unlink(missing_ok=True)


def _await_ready(process: subprocess.Popen[bytes], directory: Path) -> None:
    if process.stdout is None or not _line(process.stdout, time.monotonic() + _START_SECONDS):
        raise RunnerError(f"the emulated GPU did not start:\n{_tail(directory / _LOG)}")


def _line(stream: IO[bytes], deadline: float) -> bytes:
    """Read a line; empty when the stream ends or the time runs out before one is there."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return b""
        if not (data := os.read(stream.fileno(), 1)):
            return b""
        line += data
    return line


# Modules -----------------------------------------------------------------------------------------------------------


def _dependencies(modules: Path) -> dict[str, list[str]]:
    """Read modules.dep: each module's file and all that it needs, relative to its directory, by the module's name."""
    result = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        result[module_name(path)] = [path, *needs.split()]
    return result


def module_name(path: str) -> str:
    """Return the name of a module's file as modprobe has it.

    >>> module_name("kernel/drivers/vfio/vfio-pci.ko.xz")
    'vfio_pci'
    """
    return Path(path).name.partition(".")[0].replace("-", "_")


def _expand(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".xz":
        target = target.with_suffix("")
    target.write_bytes(expanded(source))


def expanded(module: Path) -> bytes:
    """Return a module's file, uncompressed."""
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content


def load_order(kernel: Kernel, name: str) -> list[Path]:
    """Return the files of a module and of all that it needs, as they are loaded one by one.

    :raises RunnerError: the kernel has no such module.
    """
    source = kernel.tree / "lib" / "modules" / kernel.release
    known = _dependencies(source)
    if name not in known:
        raise RunnerError(f"kernel {kernel.release} has no module {name}")
    return [source / path for path in reversed(known[name])]


def modules(kernel: Kernel, cache: Path, log: Callable[[str], None]) -> Path:
    """Return a tree like the kernel's with the modules of ``--gvt`` alone, uncompressed."""
    source = kernel.tree / "lib" / "modules" / kernel.release
    known = _dependencies(source)
    if missing := [name for name in ("i915", "kvmgt") if name not in known]:
        raise RunnerError(f"--gvt: kernel {kernel.release} has no module {' and no '.join(missing)}")
    files = sorted({path for name in MODULES for path in known.get(name, [])})
    stamps = [f"{path} {(source / path).stat().st_mtime_ns} {(source / path).stat().st_size}" for path in files]
    digest = hashlib.sha256("\0".join([str(source), *stamps]).encode()).hexdigest()[:16]
    directory = cache / "modules" / f"gvt-{digest}"
    with populated(directory) as work:
        if work is not None:
            log(f"unpacking {len(files)} modules of kernel {kernel.release}")
            target = work / "lib" / "modules" / kernel.release
            for path in files:
                _expand(source / path, target / path)
            for name in _METADATA:
                if (source / name).exists():
                    shutil.copyfile(source / name, target / name)
            make_dependencies(Kernel(work, kernel.release))
    return directory
