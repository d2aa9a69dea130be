# SPDX-License-Identifier: MIT
import doctest
import importlib
from pathlib import Path

import pytest

from tools.vm import guest, machine, module
from tools.vm.cli import main
from tools.vm.errors import RunnerError
from tools.vm.kernels import Kernel
from tools.vm.machine import Options, Outcome, explain, outcome_of, virtme_command

PANIC = "[    6.9] Kernel panic - not syncing: Fatal exception\n"


def make_options(tree: Path) -> Options:
    return Options(kernel=Kernel(tree, "6.12-test"), kvm=False, memory="1G", cpus=2, timeout=900)


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(0, None, [], timed_out=False), 0),
        (Outcome(7, None, [], timed_out=False), 7),
        (Outcome(137, None, [], timed_out=False), 137),
        (Outcome(0, None, ["BUG: x"], timed_out=False), 99),
        (Outcome(None, None, ["Oops: x"], timed_out=True), 99),
        (Outcome(None, None, [], timed_out=True), 124),
        (Outcome(None, "no driver", [], timed_out=False), 125),
        (Outcome(None, None, [], timed_out=False), 125),
    ],
)
def test_the_exit_code_says_who_failed(outcome: Outcome, code: int) -> None:
    assert outcome.exit_code() == code


@pytest.mark.parametrize(
    ("files", "timed_out", "expected"),
    [
        ({"status": "7\n", "dmesg": "", "console": ""}, False, Outcome(7, None, [], timed_out=False)),
        ({"status": "0\n", "dmesg": PANIC}, False, Outcome(0, None, [PANIC.strip()], timed_out=False)),
        ({"console": PANIC}, False, Outcome(None, None, [PANIC.strip()], timed_out=False)),
        ({"console": "fine\n"}, True, Outcome(None, None, [], timed_out=True)),
        ({"status": "0\n"}, True, Outcome(0, None, [], timed_out=False)),  # done; only the power-off was slow
        ({"status": "1\n", "failure": "no driver\n"}, False, Outcome(None, "no driver", [], timed_out=False)),
        ({}, False, Outcome(None, None, [], timed_out=False)),
    ],
)
def test_a_run_is_judged_by_what_it_left(
    tmp_path: Path, files: dict[str, str], timed_out: bool, expected: Outcome
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert outcome_of(tmp_path, timed_out=timed_out) == expected


def test_each_failure_is_explained_and_success_is_silent(tmp_path: Path) -> None:
    options = make_options(tmp_path)
    (tmp_path / guest.GUEST_LOG).write_text("insmod: ERROR: could not insert module\n")
    (tmp_path / machine.CONSOLE).write_text("the last words\n")
    assert explain(Outcome(7, None, [], timed_out=False), options, tmp_path) == ""
    assert "after 900 s" in explain(Outcome(None, None, [], timed_out=True), options, tmp_path)
    assert "could not insert" in explain(Outcome(None, "no driver", [], timed_out=False), options, tmp_path)
    assert "the last words" in explain(Outcome(None, None, [], timed_out=False), options, tmp_path)
    assert "BUG: x" in explain(Outcome(0, None, ["BUG: x"], timed_out=False), options, tmp_path)


def test_a_comma_in_a_path_does_not_become_a_qemu_option(tmp_path: Path) -> None:
    run = tmp_path / "a,readonly=on"
    command = virtme_command(make_options(tmp_path), run, tmp_path, interactive=False)
    assert f"local,id=vm_run,path={tmp_path}/a,,readonly=on,security_model=none,multidevs=remap" in command


def test_the_host_root_is_shared_read_only(tmp_path: Path) -> None:
    command = virtme_command(make_options(tmp_path), tmp_path, tmp_path, interactive=False)
    assert "local,id=vm_root,path=/,security_model=none,multidevs=remap,readonly=on" in command


def test_a_shell_without_a_terminal_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 125
    assert "needs a terminal" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["tools.vm.kernels", "tools.vm.custom", "tools.vm.module", "tools.vm.mtty", "tools.vm.cli"]
)
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


# The build


@pytest.mark.parametrize(
    ("line", "is_warning"),
    [
        ("/w/tools/kmod/gtt.c:12:6: warning: no previous prototype for 'f' [-Wmissing-prototypes]", True),
        ("WARNING: modpost: missing MODULE_DESCRIPTION() in gvt_sample.o", True),
        ("ld: warning: x.o: missing .note.GNU-stack section", True),
        ("warning: the compiler differs from the one used to build the kernel", False),
        ("  CC [M]  /w/tools/kmod/warning.o", False),
    ],
)
def test_warnings_about_our_code_are_found(line: str, is_warning: bool) -> None:
    assert module.warnings_in(f"make: Entering directory\n{line}\n") == ([line] if is_warning else [])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "tools/kmod").mkdir(parents=True)
    (root / "cdefs").mkdir()
    (root / "tools/kmod/Makefile").write_text("obj-m := gvt_sample.o\n")
    (root / "tools/kmod/main.c").write_text("int x;\n")
    (root / "cdefs/gvt.h").write_text("#define A 1\n")
    return root


def test_any_change_of_the_sources_or_the_kernel_asks_for_a_new_build(checkout: Path) -> None:
    kernel = Kernel(Path("/k"), "6.12")
    keys = [module.source_key(checkout, kernel)]
    assert module.source_key(checkout, kernel) == keys[0]
    (checkout / "tools/kmod/main.o").write_text("a product of a build by hand")
    assert module.source_key(checkout, kernel) == keys[0]
    (checkout / "cdefs/gvt.h").write_text("#define A 2\n")
    keys.append(module.source_key(checkout, kernel))
    (checkout / "tools/kmod/new.c").touch()
    keys.append(module.source_key(checkout, kernel))
    keys.append(module.source_key(checkout, Kernel(Path("/k"), "6.1")))
    assert len(set(keys)) == 4


def make_script(directory: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a `make` in front of PATH that logs its arguments and does *body* in the module's directory ($M)."""
    directory.mkdir()
    script = directory / "make"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >>{directory}/calls\n'
        'for a in "$@"; do case $a in M=*) M=${a#M=};; esac; done\n'
        f"{body}\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory / "calls"


def test_each_build_is_made_once_from_a_copy(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = make_script(tmp_path / "bin", 'cat "$M/main.c" "$M/../../cdefs/gvt.h" >"$M/gvt_sample.ko"', monkeypatch)
    kernel = Kernel(tmp_path / "k", "6.12")
    directory = module.build(checkout, kernel, tmp_path / "cache", (None, "g2h_gtt"))
    assert module.build(checkout, kernel, tmp_path / "cache", (None, "g2h_gtt")) == directory
    assert sorted(path.name for path in directory.iterdir()) == ["gvt_sample-g2h_gtt.ko", "gvt_sample.ko"]
    lines = calls.read_text().splitlines()
    assert len(lines) == 2
    assert all(f"M={checkout}" not in line and " W=1 " in line and " CC=gcc " in line for line in lines)
    assert ["BREAK=g2h_gtt" in line for line in lines] == [False, True]
    assert list((tmp_path / "cache/modules").glob(".build-*")) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("echo 'main.c:1:1: warning: odd' >&2; touch \"$M/gvt_sample.ko\"", "gave 1 warning"),
        ("echo 'main.c:1:1: error: no'; exit 2", "failed:\nmain.c:1:1: error: no"),
        ("true", "left no gvt_sample.ko"),
    ],
)
def test_a_build_that_is_not_clean_fails_with_its_log_and_is_not_kept(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, problem: str
) -> None:
    make_script(tmp_path / "bin", body, monkeypatch)
    with pytest.raises(RunnerError, match=problem):
        module.build(checkout, Kernel(tmp_path / "k", "6.12"), tmp_path / "cache", (None,))
    assert list((tmp_path / "cache").rglob("*.ko")) == []
