# SPDX-License-Identifier: MIT
import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.vm import guest
from tools.vm.module import MUTATIONS
from tools.vm_cli import parse

# What a command line can carry: any bytes but NUL, as Python decodes them.
ARGUMENT = st.binary(max_size=40).filter(lambda raw: b"\0" not in raw).map(os.fsdecode)


def make(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> guest.Guest:
    return guest.Guest(
        tree=Path("/cache/kernels/6.12"),
        module=Path("/cache/modules/x/gvt_sample.ko"),
        module_args=["a=1", "b=x y"],
        out=Path("/cache/out"),
        cwd=cwd,
        environment={"PATH": os.environ["PATH"], **(environment or {})},
        command=command,
    )


def run_script(what: guest.Guest, directory: Path) -> bytes:
    script = directory / "command.sh"
    script.write_bytes(guest.command_script(what))
    return subprocess.run(["bash", script], stdout=subprocess.PIPE, check=True).stdout


@settings(max_examples=30, deadline=None)
@given(st.lists(ARGUMENT, max_size=5))
def test_arguments_arrive_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> None:
    tmp_path = tmp_path_factory.mktemp("run")
    printed = run_script(make(["printf", r"%s\0", *arguments], tmp_path), tmp_path)
    expected = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    assert printed == (expected or b"\0")  # printf without arguments uses its format once


def test_directory_and_variables_arrive_whatever_is_in_them(tmp_path: Path) -> None:
    cwd = tmp_path / 'it\'s a "dir" $HOME'
    cwd.mkdir()
    value = "line 1\nline '2' $(false)"
    printed = run_script(make(["sh", "-c", 'pwd; printf "%s" "$VFIO_MIG_X"'], cwd, {"VFIO_MIG_X": value}), tmp_path)
    assert printed.decode() == f"{cwd}\n{value}"


def test_the_command_keeps_its_status(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_script(make(["sh", "-c", "exit 7"], tmp_path), tmp_path)
    assert caught.value.returncode == 7


def test_the_entry_script_is_bash_and_quotes_module_parameters(tmp_path: Path) -> None:
    script = guest.entry_script(make(["true"], tmp_path))
    subprocess.run(["bash", "-n"], input=script, check=True)
    assert b"module_args=(a=1 'b=x y')\n" in script
    assert b"interactive=0\n" in script
    assert b"mtty=''\n" in script
    assert b"interactive=1\n" in guest.entry_script(make([], tmp_path))


def test_mtty_is_loaded_beside_the_driver_or_alone(tmp_path: Path) -> None:
    both = dataclasses.replace(make(["true"], tmp_path), mtty=Path("/cache/my modules/mtty.ko"))
    assert b"mtty='/cache/my modules/mtty.ko'\n" in guest.entry_script(both)
    assert b"module=/cache/modules/x/gvt_sample.ko\n" in guest.entry_script(both)
    assert b"module=''\n" in guest.entry_script(dataclasses.replace(both, module=None))


def test_only_our_variables_and_pytest_s_cross_over() -> None:
    host = {"VFIO_MIG_SEED": "1", "PYTEST_ADDOPTS": "-x", "SECRET": "s", "LD_PRELOAD": "evil.so", "PATH": "/host"}
    seen = guest.environment(host, venv=Path("/v"), modules=Path("/m"), out=Path("/o"), release="6.12")
    assert seen["VFIO_MIG_SEED"] == "1"
    assert seen["PYTEST_ADDOPTS"] == "-x"
    assert seen["PATH"].startswith("/v/bin:/usr/local/sbin:")
    assert seen["VFIO_MIG_KMOD_DIR"] == "/m"
    assert seen["VFIO_MIG_VM_OUT"] == "/o"
    assert not {"SECRET", "LD_PRELOAD"} & seen.keys()


def test_without_the_module_there_is_no_module_directory() -> None:
    seen = guest.environment({}, venv=Path("/v"), modules=None, out=Path("/o"), release="6.12")
    assert "VFIO_MIG_KMOD_DIR" not in seen


def test_the_bootstrap_fits_the_kernel_command_line() -> None:
    assert len(guest.BOOTSTRAP) < 300  # base64 of it shares 2048 bytes with virtme's and our options


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--", "sh", "-c", "exit 7"], ["sh", "-c", "exit 7"]),
        (["--kernel", "6.1", "ls", "--color", "--kernel", "x"], ["ls", "--color", "--kernel", "x"]),
        (["-v", "--", "--odd"], ["--odd"]),
        (["ls", "--", "-l"], ["ls", "--", "-l"]),
        ([], []),
    ],
)
def test_options_end_where_the_command_begins(arguments: list[str], command: list[str]) -> None:
    assert parse(arguments).command == command


def test_every_mutation_can_be_asked_for_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse(["--break", name]).mutation for name in MUTATIONS] == list(MUTATIONS)
    with pytest.raises(SystemExit) as caught:
        parse(["--break", "everything"])
    assert caught.value.code == 2
    assert "everything" in capsys.readouterr().err
