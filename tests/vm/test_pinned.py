# SPDX-License-Identifier: MIT
"""`--pinned`: the container of a QEMU that has a v2 device without a log is asked, and QEMU takes no harm.

The device is the sample driver's, whose debugfs says which pages it has pinned; Debian's 6.12 has no log of a device's
writes. QEMU is the one that runs this VM, as it must speak the protocol to migrate.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import vfio_mig
from tools.l2 import moves
from tools.lab import cli
from tools.lab.qemu import Qemu, running
from tools.lab.sample import gpu, host
from tools.lab.sample.held import guest_view, run_some_work
from tools.lab.vfio.raw import PAGE
from tools.lab.vfio.v2 import HAS_PRE_COPY
from vfio_mig.host.tracking import OwnersTracker
from vfio_mig.vm.memory import find_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_PRE_COPY, reason="on 6.1 the device has a log, which is asked instead"),
]


PROPERTIES: Final = f"{moves.DEVICE},x-pci-vendor-id=0x1234,x-pci-device-id=0x1111"
"""Other IDs: of Intel's graphics QEMU 11.1 expects more than the sample driver has, and crashes."""


@pytest.fixture(scope="module", autouse=True)
def v2_driver() -> Iterator[None]:
    if not host.module_loaded():  # not in the VM: every test says so
        yield
        return
    with host.loaded(v2=3, migratable=0):
        yield


def js(*words: str | Path) -> Any:
    return json.loads(cli.run("--json", *words, warm=True).stdout)


@contextlib.contextmanager
def qemu(directory: Path, name: str, *behind: str) -> Iterator[Qemu]:
    paths = directory / name
    with (
        host.instance() as vgpu,
        running(
            vgpu.sysfs, paths, program=shlex.split(os.environ["VFIO_MIG_QEMU"]), device=PROPERTIES, behind=behind
        ) as (process, qtest),
    ):
        vm = Qemu(vgpu, process, qtest, paths)
        with vm.qmp:
            yield vm
            vm.quit()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="p", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def source(directory: Path) -> Iterator[Qemu]:
    with qemu(directory, "source") as vm:
        run_some_work(vm.guest, gpu.Engine(vm.guest), 4)
        yield vm


def told(vm: Qemu) -> list[int]:
    """Return the pages that `dirty --pinned` tells."""
    ranges = js("dirty", vm.name, "--pinned", "--list")["ranges"]
    return [at for start, size in ranges for at in range(start, start + size, PAGE)]


def goes_on(vm: Qemu, directory: Path) -> None:
    """See to it that QEMU can move its guest, and the target has all of it."""
    stream = directory / "stream"
    stream.unlink(missing_ok=True)
    pages = {at: vm.guest.memory.read(at, PAGE) for at in vm.instance.pinned()}
    view = guest_view(vm.guest.device)
    moves.migrate(vm.qmp, f"file:{stream}")
    arrived(vm, directory, view, pages)


def arrived(vm: Qemu, directory: Path, view: Any, pages: dict[int, bytes]) -> None:
    with qemu(directory, "target", *moves.INCOMING) as target:
        moves.receive(target.qmp, f"file:{directory / 'stream'}")
        moves.await_running(target.qmp)
        assert guest_view(target.guest.device) == view
        assert {at: target.guest.memory.read(at, PAGE) for at in pages} == pages
        assert target.instance.pinned() == vm.instance.pinned()


def test_the_pinned_pages_are_told_and_the_owner_migrates_right_afterwards(source: Qemu, directory: Path) -> None:
    cli.refused("dirty", source.name, code=4, words=("keeps no log", "--pinned"), warm=True)
    pinned = source.instance.pinned()
    assert len(pinned) > 4
    assert told(source) == pinned
    source.guest.bind(5)  # more
    more = source.instance.pinned()
    assert len(more) == len(pinned) + 5
    for _ in range(3):
        assert told(source) == more
    assert source.status() == "running"
    goes_on(source, directory)


def test_a_paused_guest_s_pinned_pages_are_in_an_image(source: Qemu, directory: Path) -> None:
    memory = [word for piece in find_memory(source.qmp, source.pid) for word in ("--memory", piece)]
    image = directory / "gpu.vfm"
    source.pause()
    cli.refused("save", source.name, image, *memory, code=4, words=("--pinned",), warm=True)
    saved = js("save", source.name, image, *memory, "--pinned")
    pinned = source.instance.pinned()
    assert (saved["pages_dirty"], saved["pages_written"] + saved["pages_zero"]) == (len(pinned), len(pinned))
    assert saved["bitmap_time"] < 1
    source.cont()
    run_some_work(source.guest, gpu.Engine(source.guest), 1)
    goes_on(source, directory)


def test_an_owner_that_migrates_is_left_alone(source: Qemu, directory: Path) -> None:
    wanted = [{"capability": "pause-before-switchover", "state": True}]
    source.qmp.execute("migrate-set-capabilities", capabilities=wanted)
    view = guest_view(source.guest.device)
    pages = {at: source.guest.memory.read(at, PAGE) for at in source.instance.pinned()}
    source.qmp.execute("migrate", uri=f"file:{directory / 'stream'}")
    await_status(source, "pre-switchover")
    cli.refused("dirty", source.name, "--pinned", code=3, words=("has a log of its own",), warm=True)
    source.qmp.execute("migrate-continue", state="pre-switchover")
    await_status(source, "completed")
    arrived(source, directory, view, pages)


def await_status(vm: Qemu, wanted: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while (status := vm.qmp.execute("query-migrate").get("status")) != wanted:
        assert status != "failed"
        assert time.monotonic() < end, status
        time.sleep(0.05)


def test_a_migration_that_is_asked_for_meanwhile_begins_afterwards(
    source: Qemu, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU stands still between its container's log's begin and end, so it finds the container as it was."""
    with socket.socket(socket.AF_UNIX) as asks:
        asks.connect(str(source.socket))
        answers = asks.makefile("r")
        answers.readline()
        asks.sendall(b'{"execute": "qmp_capabilities"}')
        answers.readline()
        command = json.dumps({"execute": "migrate", "arguments": {"uri": f"file:{directory / 'stream'}"}})
        find = OwnersTracker._find_reach
        states: list[set[str]] = []

        def find_slowly(self: OwnersTracker, end: int) -> None:
            asks.sendall(command.encode())
            time.sleep(0.5)
            tasks = Path(f"/proc/{source.pid}/task")
            states.append({one.joinpath("stat").read_text().rpartition(")")[2].split()[0] for one in tasks.iterdir()})
            find(self, end)

        monkeypatch.setattr(OwnersTracker, "_find_reach", find_slowly)
        view = guest_view(source.guest.device)
        pinned = source.instance.pinned()
        pages = {at: source.guest.memory.read(at, PAGE) for at in pinned}
        with pytest.warns(vfio_mig.VfioMigWarning, match="are pinned now"):
            report = vfio_mig.fetch_dirty(source.name, pinned=True)
        assert report.pages_dirty == len(pinned)
        assert states == [{"t"}]  # every thread, traced
        await_status(source, "completed")
        arrived(source, directory, view, pages)


KILLED: Final = """
import os, signal, sys
from vfio_mig.host.tracking import OwnersTracker
OwnersTracker._find_reach = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
import vfio_mig
vfio_mig.fetch_dirty(sys.argv[1], pinned=True)
"""


def test_an_owner_goes_on_when_the_one_who_asks_is_killed(source: Qemu, directory: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, source.name], check=False)
    assert done.returncode == -signal.SIGKILL
    assert source.status() == "running"
    # The container's log goes on, and nobody can tell whose it is, until the owner itself has ended one
    cli.refused("dirty", source.name, "--pinned", code=3, words=("has a log of its own",), warm=True)
    goes_on(source, directory)


def test_an_owner_that_a_debugger_has_is_left_alone(source: Qemu) -> None:
    debugger = (
        "import sys\nfrom vfio_mig.host import frozen\nfrozen._ptrace(frozen._SEIZE, int(sys.argv[1]))\n"
        "print(flush=True)\nsys.stdin.read()\n"
    )
    words = [sys.executable, "-c", debugger, str(source.pid)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        tracer.stdout.readline()
        cli.refused(
            "dirty", source.name, "--pinned", code=3, words=("cannot be made to stand still", "EPERM"), warm=True
        )
        tracer.communicate()
    assert told(source) == source.instance.pinned()
