# SPDX-License-Identifier: MIT
"""How long a device stands still while it moves: by ``vfio-mig migrate``, and by QEMU, in the same VM and in turn.

The devices are the kernel's own mtty and, with the emulated GPU, a vGPU of our kvmgt without work; both speak protocol
v2. QEMU's figure is its own, of a guest whose CPU halts and whose 64 MiB of memory are zeros but for a few
pages, so next to nothing but the device is in it. Ours is what ``migrate`` reports: from the STOP request until the
target says that it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tools.bench.table import RUNS
from tools.demo.report import run
from tools.l2 import moves
from tools.lab.gvt import kvmgt
from tools.lab.gvt.held import side
from tools.lab.mtty import TWO_PORTS, held_mtty
from tools.lab.mtty import instance as mtty_instance
from tools.lab.qemu import QemuVm, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICES: Final = Path("/sys/bus/mdev/devices")
MTTY: Final = "mtty"
KVMGT: Final = "kvmgt"
PHASES: Final = ("stop_time", "bitmap_time", "state_read_time", "transfer_time", "start_time")
# mtty logs its dirty pages, but Debian's kernels lack what QEMU would read the log by (IOMMUFD)
PROPERTIES: Final = {MTTY: f"{moves.DEVICE},x-device-dirty-page-tracking=off", KVMGT: moves.DEVICE}


class Figures(NamedTuple):
    """Medians of one device's moves, in seconds, and the bytes of its state.

    :param phases: of our own downtime, in the order of :data:`PHASES`.
    """

    device: str
    state_bytes: int
    qemu_bytes: int
    ours: float
    qemu: float
    phases: list[float]


def _migrate(source: str, target: str) -> dict[str, Any]:
    """Move a state, with processes of their own, as a user does."""
    report: dict[str, Any] = json.loads(run("--json", "migrate", source, target))
    return report


@contextmanager
def _qemu(device: str, name: str, paths: Path, *more: str) -> Iterator[QemuVm]:
    program = shlex.split(os.environ["VFIO_MIG_QEMU"])
    with running(DEVICES / name, paths, accel="kvm", program=program, device=PROPERTIES[device], behind=more) as (
        process,
        qtest,
    ):
        vm = QemuVm(name, process, qtest, paths)
        with vm.qmp:
            yield vm
            vm.quit()


def by_qemu(device: str, source: str, target: str, directory: Path) -> moves.Move:
    """Have two QEMUs move a device that nobody has open to another one.

    :param device: MTTY or KVMGT.
    :param directory: for their sockets; a short path.
    """
    uri = f"unix:{directory / 'migration'}"
    with (
        _qemu(device, source, directory / "a") as one,
        _qemu(device, target, directory / "b", *moves.INCOMING) as other,
    ):
        moves.receive(other.qmp, uri)
        done = moves.migrate(one.qmp, uri)
        moves.await_running(other.qmp)
    return done


def _measured(device: str, pair: Callable[[ExitStack], tuple[str, str]], closed: Callable[[ExitStack], str]) -> Figures:
    """Move a state some times by each; the first time is not counted.

    :param pair: makes two devices that are held.
    :param closed: makes one that nobody has open.
    """
    ours, qemu = [], []
    for _ in range(RUNS + 1):
        with ExitStack() as stack:
            ours.append(_migrate(*pair(stack)))
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="q", dir="/run")))
            qemu.append(by_qemu(device, closed(stack), closed(stack), directory))
    counted = ours[1:]
    return Figures(
        device,
        int(counted[0]["state_bytes"]),
        qemu[0].vfio_bytes,
        statistics.median(one["downtime"] for one in counted),
        statistics.median(one.downtime_ms for one in qemu[1:]) / 1e3,
        [statistics.median(one[phase] for one in counted) for phase in PHASES],
    )


def measure() -> list[Figures]:
    """Measure with the devices that this VM has."""
    found = []
    if Path("/sys/class/mdev_bus/mtty").exists():
        found.append(
            _measured(
                MTTY,
                lambda stack: (stack.enter_context(held_mtty()), stack.enter_context(held_mtty())),
                lambda stack: stack.enter_context(mtty_instance(TWO_PORTS)),
            )
        )
    if kvmgt.available():
        found.append(_measured(KVMGT, _vgpus, lambda stack: stack.enter_context(kvmgt.instance())))
    return found


def _vgpus(stack: ExitStack) -> tuple[str, str]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
    one, other = (stack.enter_context(side(directory / name)).name for name in ("source", "target"))
    return one, other


def report() -> bool:
    """Print a table in Markdown; returns whether no device stands still for longer than by QEMU."""
    figures = measure()
    head = [
        "",
        "state",
        "ours",
        "stop",
        "bitmap",
        "read",
        "transfer, load",
        "start",
        "QEMU",
        "its state",
        "ours / QEMU",
    ]
    rows = [head, ["---"] * len(head)]
    rows += [
        [
            one.device,
            f"{one.state_bytes:,}",
            *(f"{seconds * 1e3:.1f} ms" for seconds in (one.ours, *one.phases)),
            f"{one.qemu * 1e3:.0f} ms",
            f"{one.qemu_bytes:,}",
            f"{one.ours / one.qemu:.2f}" if one.qemu else "-",
        ]
        for one in figures
    ]
    print("".join(f"| {' | '.join(row)} |\n" for row in rows), end="")
    return all(one.ours <= one.qemu for one in figures)
