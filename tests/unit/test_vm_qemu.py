# SPDX-License-Identifier: MIT
"""Which QEMU runs the VM."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.vm import qemu
from tools.vm.errors import RunnerError
from tools.vm.qemu import EMULATION, KVM, Need, Qemu, find, of_host, package_version, program_version
from tools.vm.suites import Suite

GPU = Need("gpu", (10, 1), "vfio-user-pci")
DEVICES = "vfio-user-pci options:\n  addr=<str>\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022\n", (7, 2)),
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\n", (11, 1)),
        ("QEMU emulator version 8.1.0\n", (8, 1)),
        ("QEMU emulator version 9.0.50 (v9.0.0-1-gabc)\n", (9, 0)),
        ("warning: something\nQEMU emulator version 10.0.2\n", (10, 0)),
        ("sh: 1: not found", None),
        ("", None),
    ],
)
def test_the_program_says_its_version(text: str, expected: tuple[int, int] | None) -> None:
    assert program_version(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:7.2+dfsg-7+deb12u18", (7, 2)),
        ("1:10.0.2+ds-2+deb13u1~bpo12+1", (10, 0)),
        ("1:11.1.3+ds-1~bpo13+1", (11, 1)),
        ("9.1.0-1", (9, 1)),
        ("unknown", None),
    ],
)
def test_a_package_s_version_is_read_without_its_epoch(text: str, expected: tuple[int, int] | None) -> None:
    assert package_version(text) == expected


def test_8_1_is_the_first_to_emulate_and_10_is_more_than_8() -> None:
    assert [Qemu(version).suits(EMULATION) for version in ((7, 2), (8, 0), (8, 1), (9, 0), (10, 0))] == [
        False, False, True, True, True,
    ]  # fmt: skip
    assert Qemu((6, 0)).suits(KVM)


def program(path: Path, version: str, devices: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\nfor word; do case $word in\n--version) echo "QEMU emulator version {version}" ;;\n'
        f"vfio-user-pci,help) cat <<'END'\n{devices}END\n;;\n"
        'help) echo "this would end in an assertion" >&2; kill -ABRT $$ ;;\nesac; done\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the host's QEMU would be."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(qemu, "PROGRAM", "qemu-system-test")
    return tmp_path / "bin" / "qemu-system-test"


def test_the_host_s_is_the_one_on_path(host: Path) -> None:
    assert of_host() is None
    program(host, "8.2.1")
    assert of_host() == on_host(8, 2)
    host.write_text("#!/bin/sh\nexit 127\n")  # its libraries are missing
    assert of_host() is None


def tree_with(tree: Path, version: str, devices: str = "") -> Path:
    """Make a tree as the packages have it; the loader is one that only drops its own arguments."""
    program(tree / "usr/bin" / qemu.PROGRAM, version, devices)
    loader = tree / "usr/lib64/ld-linux-x86-64.so.2"
    loader.parent.mkdir(parents=True)
    loader.write_text('#!/bin/sh\necho "$QEMU_MODULE_DIR" >>"${0%/*}/asked"\nshift 2\nexec "$@"\n')
    loader.chmod(0o755)
    for name in ("usr/lib/x86_64-linux-gnu", "usr/share/qemu", "usr/share/seabios"):
        (tree / name).mkdir(parents=True)
    return tree


@pytest.mark.usefixtures("host")
def test_an_unpacked_one_runs_by_its_own_loader_with_its_own_libraries_firmware_and_modules(tmp_path: Path) -> None:
    tree = tree_with(tmp_path / "a tree", "11.1.3", DEVICES)
    found = qemu.unpacked(tree)
    assert found is not None
    assert found.version == (11, 1)
    assert found.command == (
        f"{tree}/usr/lib64/ld-linux-x86-64.so.2",
        "--library-path", f"{tree}/usr/lib/x86_64-linux-gnu:{tree}/usr/lib",
        f"{tree}/usr/bin/qemu-system-test",
        "-L", f"{tree}/usr/share/qemu", "-L", f"{tree}/usr/share/seabios",
    )  # fmt: skip
    assert found.suits(GPU)
    assert set((tree / "usr/lib64/asked").read_text().splitlines()) == {f"{tree}/usr/lib/x86_64-linux-gnu/qemu"}
    shown = subprocess.run(["sh", "-c", f"exec {found.shell_words()} --version"], capture_output=True, check=True)
    assert b"11.1.3" in shown.stdout


@pytest.mark.usefixtures("host")
def test_a_tree_without_a_loader_or_a_program_is_none(tmp_path: Path) -> None:
    assert qemu.unpacked(tmp_path) is None
    tree = tree_with(tmp_path / "tree", "11.1.3")
    (tree / "usr/bin/qemu-system-test").unlink()
    assert qemu.unpacked(tree) is None


class FakeSuite:
    """A suite with one version of QEMU."""

    def __init__(self, name: str, version: str | None, devices: str = DEVICES) -> None:
        self.suite = Suite(name, name)
        self.version = version
        self.devices = devices
        self.downloads: list[str] = []

    def candidate(self, package: str) -> str | None:
        assert package == "qemu-system-x86"
        return self.version

    def download_with_dependencies(self, packages: list[str], directory: Path) -> None:
        assert directory.is_dir()
        self.downloads += packages


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> list[FakeSuite]:
    """Return the list of suites that can be had; unpacking makes the tree of the last one asked."""
    result: list[FakeSuite] = []
    asked: list[FakeSuite] = []

    def available(_cache: Path, failures: list[str]) -> Iterator[FakeSuite]:
        failures.append("trixie: no such suite")
        for suite in result:
            asked.append(suite)
            yield suite

    def unpack(_packages: Path, tree: Path) -> None:
        version = asked[-1].version or ""
        tree_with(tree, version.removeprefix("1:").partition("+")[0], asked[-1].devices)

    monkeypatch.setattr(qemu, "available", available)
    monkeypatch.setattr(qemu, "unpack", unpack)
    return result


def on_host(*version: int) -> Qemu:
    major, minor = version
    return Qemu((major, minor), (qemu.PROGRAM,))


def never(*what: object) -> None:
    raise AssertionError(what)


def test_a_host_s_that_is_new_enough_is_taken_and_nobody_asked(
    tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "available", never)
    program(host, "8.1.0")
    assert find(EMULATION, tmp_path, never, never) == on_host(8, 1)
    program(host, "7.2.22")
    assert find(KVM, tmp_path, never, never) == on_host(7, 2)
    program(host, "10.1.0", DEVICES)
    assert find(GPU, tmp_path, never, never) == on_host(10, 1)


def test_an_old_one_is_replaced_once_and_remembered(
    tmp_path: Path, host: Path, offers: list[FakeSuite], monkeypatch: pytest.MonkeyPatch
) -> None:
    program(host, "7.2.22")
    suite = FakeSuite("trixie-backports", "1:11.1.3+ds-1~bpo13+1")
    offers += [FakeSuite("sarge-backports", None), FakeSuite("bookworm", "1:7.2+dfsg-7"), suite]
    told: list[str] = []
    found = find(EMULATION, tmp_path, told.append, never)
    tree = tmp_path / "qemu" / "trixie-backports_1_11.1.3+ds-1~bpo13+1"
    assert found.version == (11, 1)
    assert found.command[0].startswith(f"{tree}/")
    assert suite.downloads == ["qemu-system-x86=1:11.1.3+ds-1~bpo13+1"]
    assert told == ["fetching QEMU 1:11.1.3+ds-1~bpo13+1 of trixie-backports, 40 MB"]
    assert not (tree / "packages").exists()
    monkeypatch.setattr(qemu, "available", never)
    assert find(EMULATION, tmp_path, never, never) == found


def test_one_that_is_there_serves_another_need_without_a_second_download(
    tmp_path: Path, host: Path, offers: list[FakeSuite]
) -> None:
    program(host, "7.2.22")
    suite = FakeSuite("trixie-backports", "1:11.1.3+ds-1")
    offers.append(suite)
    first = find(EMULATION, tmp_path, lambda _message: None, never)
    assert find(GPU, tmp_path, never, never) == first
    assert len(suite.downloads) == 1


def test_a_device_that_is_needed_decides(tmp_path: Path, host: Path, offers: list[FakeSuite]) -> None:
    program(host, "10.1.0")
    offers += [
        FakeSuite("a", "1:10.0.2+ds-2"),
        FakeSuite("b", "1:10.2.0+ds-2", devices=""),
        FakeSuite("c", "1:11.1.3+ds-1"),
    ]
    found = find(GPU, tmp_path, lambda _message: None, never)
    assert found.command[0].startswith(f"{tmp_path}/qemu/c_1_11.1.3+ds-1/")


def test_what_is_remembered_and_gone_is_fetched_again(tmp_path: Path, host: Path, offers: list[FakeSuite]) -> None:
    program(host, "7.2.22")
    offers.append(FakeSuite("c", "1:11.1.3+ds-1"))
    (tmp_path / "qemu").mkdir()
    (tmp_path / "qemu" / "emulation.directory").write_text("c_of_last_year\n")
    assert find(EMULATION, tmp_path, lambda _message: None, never).version == (11, 1)
    assert (tmp_path / "qemu" / "emulation.directory").read_text() == "c_1_11.1.3+ds-1\n"


@pytest.mark.usefixtures("offers")
def test_without_a_newer_one_emulation_goes_on_with_the_old_and_says_what_may_happen(
    tmp_path: Path, host: Path
) -> None:
    program(host, "7.2.22")
    warned: list[str] = []
    assert find(EMULATION, tmp_path, never, warned.append) == on_host(7, 2)
    assert len(warned) == 1
    assert "this host's QEMU is 7.2: before 8.1 an emulated kernel may die at boot" in warned[0]
    assert "no QEMU 8.1 or newer could be fetched: trixie: no such suite" in warned[0]


@pytest.mark.usefixtures("offers")
def test_what_cannot_be_done_without_is_an_error(tmp_path: Path, host: Path) -> None:
    with pytest.raises(RunnerError, match=r"QEMU 8\.1 or newer is needed and this host has none; install one"):
        find(EMULATION, tmp_path, never, never)
    program(host, "10.0.2")
    with pytest.raises(RunnerError, match=r"QEMU 10\.1 or newer with the device vfio-user-pci .* this host has 10\.0"):
        find(GPU, tmp_path, never, never)


def test_the_qemu_of_one_suite_is_fetched_however_old_it_is(tmp_path: Path, offers: list[FakeSuite]) -> None:
    offers += [FakeSuite("new", "1:11.1.3"), FakeSuite("old", "1:7.2.1"), FakeSuite("older", "1:5.2")]
    assert qemu.of_suite("old", tmp_path, lambda _: None).version == (7, 2)
    assert [len(suite.downloads) for suite in offers] == [0, 1, 0]
    with pytest.raises(RunnerError, match="no suite sid; there are: new, old, older; trixie: no such suite"):
        qemu.of_suite("sid", tmp_path, never)
