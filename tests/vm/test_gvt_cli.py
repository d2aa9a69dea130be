# SPDX-License-Identifier: MIT
"""The installed `vfio-mig` on the kernel's own kvmgt, which cannot migrate: what it says, holds, borrows, refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from tools.lab import cli
from tools.lab.borrowing import borrowed_fd
from tools.lab.gvt import kvmgt
from tools.lab.gvt.kvmgt import MEMORY, RESULT, Vgpu
from tools.lab.vfio import raw
from tools.lab.vfio.raw import PAGE, Device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.kernel.log import KernelLog

pytestmark = pytest.mark.gvt

KVM: Final = Path("/dev/kvm")
PAGES: Final = 256
PINNED: Final = (0, 1, 2, 3, 100, 101, 255)
"""Pages of guest memory that the test's driver maps: 7, with gaps, the first and the last among them."""
STOCK: Final = ("a GVT-g vGPU of a driver without migration", "migratable: flag 0x20 in 0x3", "scripts/kvmgt builds")


class Held(NamedTuple):
    """A vGPU that a `vfio-mig hold` keeps open, with a file as its guest's memory."""

    name: str
    pid: int
    memory: Path
    stderr: Path

    @property
    def memory_option(self) -> str:
        return f"{self.memory}@{MEMORY}"


def slow(words: tuple[str, ...]) -> Any:
    """Leave out of CI what differs little from its neighbours; `scripts/test --gvt` has it."""
    return pytest.param(words, marks=pytest.mark.slow)


@contextlib.contextmanager
def hold(name: str, directory: Path, *options: str) -> Iterator[Held]:
    """Start `vfio-mig hold` as users do, and wait until it says that it is ready."""
    memory, errors = directory / "guest", directory / "stderr"
    memory.write_bytes(bytes(PAGES * PAGE))
    ready, theirs = os.pipe()
    command = [cli.PROGRAM, "hold", name, "--memory", f"{memory}@{MEMORY}", "--ready-fd", str(theirs), *options]
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=[theirs]) as process,
    ):
        os.close(theirs)
        try:
            with os.fdopen(ready) as told:
                assert told.read() == f"{name}: held open by PID {process.pid}\n", errors.read_text()
            yield Held(name, process.pid, memory, errors)
            process.send_signal(signal.SIGTERM)
            assert process.wait(cli.SECONDS) == 0
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def name() -> Iterator[str]:
    with kvmgt.instance() as made:
        yield made


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with kvmgt.instance() as made, hold(made, tmp_path_factory.mktemp("held")) as process:
        yield process


@pytest.fixture(autouse=True)
def quiet_kernel(kernel_log: KernelLog) -> Iterator[None]:
    """As everywhere, but the one that is held stays for the next test."""
    kernel_log.new()
    yield
    assert kernel_log.complaints() == []


@contextlib.contextmanager
def guest_of(held: Held) -> Iterator[Device]:
    """Play the guest's driver; only what kvmgt does not have to read the guest's memory for."""
    device = Device(borrowed_fd(held.name), held.name)
    try:
        yield device
    finally:
        device.close()


def js(*words: str | Path, warm: bool = True, rc: int = 0) -> Any:
    return json.loads(cli.run("--json", *words, warm=warm, rc=rc).stdout)


def lines(*words: str | Path) -> list[str]:
    return cli.run(*words).stdout.decode().splitlines()


# Without anybody who has it open


def test_a_closed_vgpu_is_described_without_opening_it(name: str) -> None:
    (line,) = [one for one in lines("list") if one.startswith(name)]
    group = (kvmgt.DEVICES / name / "iommu_group").readlink().name
    assert line.split()[1:7] == ["mdev", kvmgt.SMALL, "intel_vgpu_mdev", f"/dev/vfio/{group}", "-", "?"]
    info = js("info", name, warm=False)
    assert (info["how"], info["regions"], info["migratable"], info["type"]) == ("closed", [], None, kvmgt.SMALL)
    status = js("status", name, warm=False)
    assert (status["state"], status["holder_pid"], status["protocol"]) == ("closed", None, None)


def test_the_host_is_fit_for_it() -> None:
    report = js("doctor", warm=False)
    told = {one["name"]: (one["result"], one["text"]) for one in report["checks"]}
    assert told["kvm"] == ("ok", "/dev/kvm")
    generation = {"skl": "Skylake", "kbl": "Kaby Lake"}[os.environ["VFIO_MIG_GPU"]]
    assert told["gvt"] == ("ok", f"vGPUs on {kvmgt.PARENT.name} ({generation})")
    assert told["kvmgt"][0] == "note"
    assert "the distribution's: no vGPU can be migrated" in told["kvmgt"][1]
    assert {told[name][0] for name in ("guc", "types", "secure-boot")} == {"ok"}
    assert report["problems"] == 0


def test_a_report_says_what_the_host_is_and_nothing_private(name: str) -> None:
    text = cli.run("doctor", "--report").stdout.decode()
    assert max(map(len, text.splitlines())) <= 80
    platform = {"skl": "Skylake", "kbl": "Kaby Lake"}[os.environ["VFIO_MIG_GPU"]]
    for line in (
        f"  generation of GVT-g: {platform}", "  driver: i915", "  /dev/kvm: there",
        f"  release: {os.uname().release}", "  whose kvmgt: not vfio_mig's: it has no parameter of that name",
    ):  # fmt: skip
        assert line in text.splitlines(), text
    assert "  i915-GVTg_V5_" in text
    assert "1 made" in text
    for private in (name, "0000:00:02.0", os.uname().nodename, "/root/"):
        assert private not in text, private
    report = js("doctor", "--report")
    assert report["left_out"]["PCI address"] > 0
    found = {(one["section"], one["name"]): one["value"] for one in report["facts"]}
    assert found["GPU 1", "PCI IDs"].startswith("0x8086 0x")
    assert found["GPU 1", "BARs"].startswith("0: 16384 KiB, 2: ")
    assert found["modules", "kvmgt"].startswith("loaded")


def test_info_opens_it_with_a_kvm_of_its_own_when_told_to(name: str) -> None:
    info = js("info", "--open", name, warm=False)
    assert (info["how"], info["flags"], info["protocol"], info["migratable"]) == ("group", 3, None, False)
    assert js("status", name)["state"] == "closed"


@pytest.mark.parametrize(
    "words", [("hold",), ("info", "--open"), *map(slow, [("hold", "--kvm"), ("save", "--open"), ("conform",)])]
)
def test_without_a_kvm_it_is_one_line_that_says_so(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    rest = [tmp_path / "image"] if words[0] == "save" else []
    away = KVM.with_name("kvm.away")
    KVM.rename(away)
    try:
        said = (name, "only for a process with a KVM", "/dev/kvm cannot be opened: ENOENT", "load the module")
        cli.refused(words[0], name, *rest, *words[1:], code=3, words=said, warm=words[0] != "hold")
        (problem,) = [one for one in js("doctor", rc=7)["checks"] if one["result"] == "problem"]
        assert problem["name"] == "kvm"
        assert "load kvm_intel or kvm_amd" in problem["text"]
    finally:
        away.rename(KVM)
    assert not (tmp_path / "image").exists()


# Held


@pytest.mark.parametrize("options", [(), ("--kvm",)], ids=["by itself", "--kvm"])
def test_hold_keeps_it_open_and_says_that_it_cannot_be_migrated(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    with hold(name, tmp_path, *options) as held:
        (warning,) = held.stderr.read_text().splitlines()
        assert all(words in warning for words in (*STOCK, name, "held all the same")), warning
        status = js("status", name)
        assert (status["holder_pid"], status["holder"]) == (held.pid, "vfio-mig")
        assert (status["state"], status["protocol"], status["migratable"]) == ("unknown", None, False)
        assert lines("status", name)[-1] == "protocol: none, it cannot be migrated; 'vfio-mig info' says why"
        (line,) = [one for one in lines("list") if one.startswith(name)]
        assert line.split()[5] == f"{held.pid}:vfio-mig"
    assert js("status", name)["state"] == "closed"


def test_info_borrows_it_and_names_its_regions(held: Held) -> None:
    told = lines("info", held.name)
    assert "reached   borrowed" in told
    assert told[-1] == "protocol  none"
    regions = {line.split()[1]: line for line in told if line.startswith("region ")}
    assert regions["9"].endswith("type 0x80008086 subtype 1, OpRegion")
    assert regions["10"].endswith("type 0x1 subtype 1, EDID")
    assert next(line for line in told if line.startswith("NO ")) == "NO  migratable: flag 0x20 in 0x3"


def test_its_container_tells_the_pages_that_it_may_write(held: Held) -> None:
    with guest_of(held) as device:
        low = device.reg(raw.PV_MAPPABLE_BASE)
        for number, page in enumerate(PINNED):
            device.set_pte(low + number * PAGE, MEMORY + page * PAGE | 1)
        for words in (("--memory", held.memory_option), ()):
            report = js("dirty", held.name, "--for", "0", "--list", *words, warm=not words)
            assert report["pages_dirty"] == len(PINNED)
            assert [start + at for start, size in report["ranges"] for at in range(0, size, PAGE)] == [
                MEMORY + page * PAGE for page in PINNED
            ]
        device.set_pte(low, 0)
        assert js("dirty", held.name, "--for", "0", "--range", f"{MEMORY}+{4 * PAGE}")["pages_dirty"] == 3
        js("reset", held.name)
        assert js("dirty", held.name, "--for", "0")["pages_dirty"] == 0


def test_a_reset_lets_go_what_the_guest_has_mapped(held: Held) -> None:
    with guest_of(held) as device, kvmgt.gpu() as gpu:
        low = device.reg(raw.PV_MAPPABLE_BASE)
        device.set_pte(low, MEMORY | 1)
        at = gpu.translate(low)
        assert js("reset", held.name, warm=False)["action"] == "reset"
        assert gpu.translate(low) != at  # kvmgt's scratch page


@pytest.mark.parametrize(
    "words",
    [
        ("save", "{name}", "{file}"),
        slow(("save", "{name}", "{file}", "--raw")),
        ("restore", "{name}", "{image}", "--raw"),
        slow(("check", "{image}", "{name}", "--raw")),
        ("stop", "{name}"),
        slow(("start", "{name}")),
        slow(("state", "{name}")),
        slow(("sync", "{name}", "{file}", "--memory", "{memory}")),
        ("migrate", "{name}", "{other}"),
        ("conform", "{name}", "--force"),
        slow(("--abi", "mainline-v2", "hold", "{other}")),
    ],
    ids=lambda words: "_".join(word for word in words if "{" not in word),
)
def test_what_takes_a_migration_is_refused_with_what_it_is(
    held: Held, name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"state" * 100)
    names = {
        "name": held.name, "other": name, "file": str(tmp_path / "new"), "image": str(image),
        "memory": held.memory_option,
    }  # fmt: skip
    said = STOCK[:1] if words[0] == "--abi" else STOCK
    cli.refused(*(word.format(**names) for word in words), code=4, words=said, warm=words[0] not in {"save", "stop"})
    assert js("status", held.name)["holder_pid"] == held.pid
    assert not (tmp_path / "new").exists()


def test_what_an_earlier_holder_has_left_is_gone(name: str, tmp_path: Path) -> None:
    with kvmgt.gpu() as gpu:
        with Vgpu.opened(name) as vgpu:
            vgpu.map_ggtt()
            at, left = vgpu.low + RESULT, vgpu.at(RESULT)
            assert gpu.translate(at) == left
        assert gpu.translate(at) == left  # kvmgt leaves it in hardware
        with hold(name, tmp_path) as held:
            assert gpu.translate(at) != left
            assert js("dirty", name, "--for", "0", "--memory", held.memory_option)["pages_dirty"] == 0


def test_a_held_one_is_not_removed_and_not_held_twice(held: Held) -> None:
    who = f"PID {held.pid} (vfio-mig)"
    cli.refused("mdev", "remove", held.name, code=3, words=(who,), warm=True)
    cli.refused("hold", held.name, code=3, words=(who,), warm=True)
