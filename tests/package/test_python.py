# SPDX-License-Identifier: MIT
"""sdist, wheel and pipx, each in an environment of its own that knows nothing of this checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.package.conftest import ROOT, clean_environment, environment, run
from vfio_mig import __version__
from vfio_mig.cli.main import COMMANDS
from vfio_mig.cli.qemu import COMMANDS as QEMU_PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Sequence

# pyproject.toml's; pyparsing is Debian 12's, as newer ones warn of what matplotlib 3.6 does.
FLOORS: Final = [
    "cffi==1.15.1",
    "click==8.1.3",
    "numpy==1.24.2",
    "tqdm==4.64.1",
    "matplotlib==3.6.3",
    "pyparsing==3.0.9",
]
TEST_NEEDS: Final = ["pytest>=8", "hypothesis", "jsonschema", "pycparser", "qemu.qmp"]
SHARED: Final = {
    *(f"man/man1/vfio-mig-{name}.1" for name in COMMANDS),
    "man/man1/vfio-mig.1",
    *(f"man/man1/{name}.1" for name in QEMU_PROGRAMS),
    "bash-completion/completions/vfio-mig",
    "zsh/site-functions/_vfio-mig",
    "fish/vendor_completions.d/vfio-mig.fish",
}


def started(program: Path, cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an installed program, whatever becomes of it."""
    return subprocess.run(
        [program, *arguments], cwd=cwd, env=clean_environment(cwd), capture_output=True, text=True, check=False
    )


def check_program(program: Path, cwd: Path, image: Path) -> None:
    """Run what needs no device."""
    assert run([program, "--version"], cwd).stdout == f"vfio-mig {__version__}\n"
    assert run([program, "list"], cwd).stderr == ""
    doctor = started(program, cwd, "doctor")
    assert doctor.returncode in {0, 7}, doctor.stderr
    assert {line.split()[0] for line in doctor.stdout.splitlines()} <= {"ok", "note", "problem"}
    assert "Traceback" not in doctor.stderr
    assert f"{image}: good: gvt-rfc image" in run([program, "verify", image], cwd).stdout
    assert "workload" in run([program, "inspect", image], cwd).stdout
    image.with_name("cut.vfm").write_bytes(image.read_bytes()[:-2048])
    assert started(program, cwd, "verify", image.with_name("cut.vfm")).returncode == 6


def shared(prefix: Path) -> set[str]:
    """Name our files below a prefix's share/."""
    ours = [*(prefix / "share").rglob("*vfio-mig*"), *(prefix / "share/man").rglob("qemu-*")]
    return {str(path.relative_to(prefix / "share")) for path in ours}


def check_qemu_programs(directory: Path, cwd: Path, *, is_whole: bool) -> None:
    """Run qemu-save and qemu-restore as far as that goes without a QEMU.

    :param is_whole: they were installed with what they need besides: the extra called qemu.
    """
    for name in QEMU_PROGRAMS:
        assert f"Usage: {name} [OPTIONS] QMP-SOCKET DEVICE FILE" in run([directory / name, "--help"], cwd).stdout
        assert run([directory / name, "--version"], cwd).stdout == f"{name} {__version__}\n"
        done = started(directory / name, cwd, cwd / "nobody.qmp", "device", "gpu.vfm")
        if is_whole:
            assert done.returncode == 3, done.stderr
            assert "nobody.qmp: cannot connect to QMP: ENOENT" in done.stderr
        else:
            assert done.returncode == 7, done.stderr
            assert done.stderr == f"{name}: the Python package qemu.qmp is missing; pip install 'vfio_mig[qemu]'\n"


def names(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        return [one.name.partition("/")[2] for one in archive if not one.isdir()]


def test_the_sdist_has_the_source_its_documents_licenses_and_tests(source: Path, sdist: Path) -> None:
    packed = set(names(sdist))
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert there - packed == {".ci/run", ".gitattributes", ".gitignore"}
    about = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
    assert packed - there == {"PKG-INFO", "setup.cfg", *(f"vfio_mig.egg-info/{name}" for name in about)}


def test_nothing_packed_knows_where_it_was_made(sdist: Path, wheel: Path) -> None:
    places = [str(place).encode() for place in (ROOT, sdist.parent, wheel.parent)]
    with tarfile.open(sdist) as archive:
        contents = [(one.name, archive.extractfile(one)) for one in archive if one.isfile()]
        read = {name: file.read() for name, file in contents if file is not None}
    with zipfile.ZipFile(wheel) as packed:
        read |= {name: packed.read(name) for name in packed.namelist()}
    assert len(read) > 300
    assert [name for name, content in read.items() for place in places if place + b"/" in content] == []


def test_the_wheel_is_for_every_machine_and_has_the_package_alone(wheel: Path) -> None:
    assert wheel.name == f"vfio_mig-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        assert "vfio_mig/py.typed" in archive.namelist()
    stem = f"vfio_mig-{__version__}"
    assert tops == {"vfio_mig", f"{stem}.data", f"{stem}.dist-info"}


def test_the_wheel_brings_the_program_and_only_what_it_needs(wheel: Path, image: Path, tmp_path: Path) -> None:
    bare = environment(tmp_path / "venv", wheel)
    check_program(bare / "vfio-mig", tmp_path, image)
    check_qemu_programs(bare, tmp_path, is_whole=False)
    assert shared(bare.parent) == SHARED
    listed = run([bare / "pip", "list", "--format=freeze"], tmp_path).stdout
    installed = set(re.findall(r"^[\w.-]+", listed.lower().replace("_", "-"), re.MULTILINE))
    assert installed - {"pip", "setuptools"} == {"vfio-mig", "cffi", "pycparser", "click", "ioctl-opt", "numpy", "tqdm"}
    use = "import vfio_mig; print(vfio_mig.__file__, vfio_mig.verify_image, vfio_mig.list_devices)"
    assert run([bare / "python", "-W", "error", "-c", use], tmp_path).stdout.startswith(str(bare.parent / "lib"))
    run([bare / "pip", "uninstall", "-q", "-y", "vfio_mig"], tmp_path)
    assert list(bare.parent.rglob("*vfio*mig*")) == []
    assert [path for name in QEMU_PROGRAMS for path in bare.parent.rglob(f"{name}*")] == []


def test_the_extra_called_qemu_brings_its_programs_what_they_need(wheel: Path, tmp_path: Path) -> None:
    check_qemu_programs(environment(tmp_path / "venv", f"{wheel}[qemu]"), tmp_path, is_whole=True)


def test_pipx_installs_it_with_its_man_pages_and_removes_it(wheel: Path, image: Path, tmp_path: Path) -> None:
    pipx = environment(tmp_path / "venv", "pipx") / "pipx"
    places = {name: str(tmp_path / name) for name in ("PIPX_HOME", "PIPX_BIN_DIR", "PIPX_MAN_DIR")}
    run([pipx, "install", wheel], tmp_path, **places)
    check_program(tmp_path / "PIPX_BIN_DIR/vfio-mig", tmp_path, image)
    pages = {path.name for path in (tmp_path / "PIPX_MAN_DIR/man1").iterdir()}
    assert pages == {Path(name).name for name in SHARED if name.startswith("man/")}
    assert shared(tmp_path / "PIPX_HOME/venvs/vfio-mig") == SHARED
    run([pipx, "uninstall", "vfio_mig"], tmp_path, **places)
    assert list((tmp_path / "PIPX_BIN_DIR").iterdir()) == []
    assert list((tmp_path / "PIPX_MAN_DIR").rglob("*.1")) == []


def unit_tests(bin_directory: Path, unpacked: Path, arguments: Sequence[str]) -> str:
    """Run the unpacked sdist's tests with what is installed; returns pytest's last line."""
    command: list[str | Path] = [bin_directory / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    path = f"{bin_directory}{':'}{clean_environment(unpacked)['PATH']}"
    return run(command, unpacked, PATH=path, PYTHONDONTWRITEBYTECODE="1").stdout.splitlines()[-1]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Debian 12's numpy and cffi cannot be had for this Python")
def test_the_unit_tests_of_the_sdist_pass_on_the_oldest_libraries(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    old = environment(tmp_path / "venv", wheel, *FLOORS, *TEST_NEEDS)
    last = unit_tests(
        old,
        unpacked,
        # The linters are not there, and the completions are those that today's click makes.
        ["tests/unit", "--ignore=tests/unit/test_lint.py", "-k", "not committed_script_is_the_one_that_click_makes"],
    )
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None, last
    assert int(passed[1]) > 2000


def test_the_unit_tests_of_the_sdist_can_be_run(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    new = environment(tmp_path / "venv", f"{wheel}[plot]", *TEST_NEEDS)
    assert re.match(r"2\d{3} tests collected", unit_tests(new, unpacked, ["tests/unit", "--collect-only"]))
    assert " passed" in unit_tests(new, unpacked, ["tests/unit/test_docs.py", "tests/unit/test_cli_parse.py"])


def test_the_floors_are_those_of_the_project() -> None:
    wanted = re.findall(r'"(\w+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8").partition("[dependency")[0])
    assert {f"{name}=={version}" for name, version in wanted if name != "setuptools"} <= set(FLOORS)
