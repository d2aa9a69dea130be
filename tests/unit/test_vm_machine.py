# SPDX-License-Identifier: MIT
import dataclasses
import doctest
import importlib
import os
from pathlib import Path

import pytest

from tools import vm_cli
from tools.vm import guest, machine, module
from tools.vm.errors import RunnerError
from tools.vm.feed import Feeder
from tools.vm.kernels import Kernel
from tools.vm.machine import Options, Outcome, explain, outcome_of, virtme_command
from tools.vm_cli import main

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
    "name",
    [
        "tools.vm_cli",
        *(
            f"tools.vm.{name}"
            for name in ["apt", "custom", "gvt", "kernels", "module", "mtty", "newest", "qemu", "suites"]
        ),
    ],
)
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


# The build


@pytest.mark.parametrize(
    ("line", "is_warning"),
    [
        ("/w/tools/kmod/hw/gtt.c:12:6: warning: no previous prototype for 'f' [-Wmissing-prototypes]", True),
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


# The second start

INT3 = "[    1.9] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\n[    2.0] Kernel panic - not syncing: Fatal exception\n"


@pytest.mark.parametrize(
    ("files", "timed_out", "died"),
    [
        ({"console": INT3}, False, True),
        ({"console": "[    0.000000] Linux version 6.12\n"}, False, True),  # a triple fault says nothing
        ({"console": INT3, "booted": ""}, False, False),  # what is under test was there: its fault, perhaps
        ({"console": INT3, "booted": "", "status": "0\n"}, False, False),
        ({"console": INT3, "status": "1\n", "failure": "no root\n"}, False, False),
        ({"console": INT3}, True, False),  # it hangs; a second start would not end sooner
        ({"console": "qemu: could not open kernel file\n"}, False, False),
        ({"console": ""}, False, False),
    ],
)
def test_a_death_at_boot_is_one_before_anything_under_test_was_there(
    tmp_path: Path, files: dict[str, str], timed_out: bool, died: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.died_at_boot(tmp_path, outcome_of(tmp_path, timed_out=timed_out)) is died


def test_the_guest_tells_that_the_kernel_is_up_before_it_loads_what_is_under_test() -> None:
    lines = guest.entry_script(make_guest(Path("/x"))).decode().splitlines()
    marker = next(number for number, line in enumerate(lines) if line.strip() == ": >$run/booted")
    loads = [number for number, line in enumerate(lines) if "insmod" in line or "/command.sh" in line]
    assert loads
    assert all(marker < number for number in loads)


def make_guest(path: Path, *, stdin: bool = False) -> guest.Guest:
    return guest.Guest(
        tree=path, module=Path("/x.ko"), module_args=[], out=path, cwd=path, environment={}, command=["true"],
        stdin=stdin,
    )  # fmt: skip


# Stands in for virtme-run and QEMU: writes what a guest would, as the script of this start says.
PLAYER = """
cd "$1"
n=$(($(cat starts 2>/dev/null || echo 0) + 1))
echo $n >starts
. ./start-$n
"""
DIES = "cat oops >&2\n"
RUNS = "echo '[    0.0] fine' >&2; : >booted; echo out >>stdout; echo 0 >status\n"


def play(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *starts: str, second_start: bool = True, stdin: bool = False
) -> tuple[Outcome, list[str], int]:
    """Run a VM that does at each start what *starts* says; return its outcome, what was said, the number of starts."""
    (directory / "oops").write_text(INT3)
    for number, start in enumerate(starts, 1):
        (directory / f"start-{number}").write_text(start)

    def command(*_arguments: object, stdin: int | None = None, **_options: object) -> list[str]:
        return ["bash", "-c", f"exec 5<&{stdin}\n{PLAYER}" if stdin is not None else PLAYER, "sh", str(directory)]

    monkeypatch.setattr(machine, "virtme_command", command)
    said: list[str] = []
    options = dataclasses.replace(make_options(directory), second_start=second_start)
    outcome = machine.run(options, make_guest(directory, stdin=stdin), directory, said.append)
    return outcome, said, int((directory / "starts").read_text())


def test_a_kernel_that_dies_at_boot_is_started_once_more_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    outcome, said, starts = play(monkeypatch, tmp_path, DIES, RUNS)
    assert (outcome.exit_code(), starts) == (0, 2)
    reason = "[    1.9] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"
    log = tmp_path / "console.first"
    assert said == [f"the kernel died at boot ({reason}); starting it once more ({log} has its log)"]
    assert (tmp_path / "console.first").read_text() == INT3
    assert (tmp_path / "console").read_text() == "[    0.0] fine\n"
    assert capfdbinary.readouterr().out == b"out\n"


def test_a_second_death_is_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, said, starts = play(monkeypatch, tmp_path, DIES, DIES, RUNS)
    assert (outcome.exit_code(), machine.died_at_boot(tmp_path, outcome), starts) == (99, True, 2)
    assert len(said) == 1


def test_a_driver_that_kills_the_kernel_gets_no_second_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, said, starts = play(monkeypatch, tmp_path, ": >booted\n" + DIES, RUNS)
    assert (outcome.exit_code(), said, starts) == (99, [], 1)


def test_deaths_are_counted_and_not_tried_again_by_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, said, starts = play(monkeypatch, tmp_path, DIES, RUNS, second_start=False)
    assert (machine.died_at_boot(tmp_path, outcome), said, starts) == (True, [], 1)


def test_the_input_is_whole_for_the_second_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"the input")
    os.close(theirs)
    monkeypatch.setattr(machine, "Feeder", lambda closed: Feeder(closed, ours))
    # As QEMU does: it takes nothing before the guest has opened its port.
    takes = 'head -c 10 <&5 >stdout; : >booted; echo 0 >status; echo "[ 0.0] fine" >&2\n'
    outcome, _said, starts = play(monkeypatch, tmp_path, "sleep 0.3\n" + DIES, takes, stdin=True)
    os.close(ours)
    assert (outcome.exit_code(), starts) == (0, 2)
    assert (tmp_path / "stdout").read_bytes() == b"!the input"


def test_repeat_says_how_many_kernels_died_and_returns_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [Outcome(0, None, [], timed_out=False), Outcome(None, None, ["Oops: int3"], timed_out=False)]
    runs += [Outcome(7, None, [], timed_out=False), Outcome(0, None, [], timed_out=False)]

    def run(_options: Options, _what: guest.Guest, directory: Path, _say: object) -> Outcome:
        outcome = runs.pop(0)
        (directory / machine.CONSOLE).write_text("[    0.0] Linux version\n")
        return outcome

    monkeypatch.setattr(machine, "run", run)
    assert vm_cli._repeat(4, make_options(tmp_path), make_guest(tmp_path), tmp_path, keep=False) == 99
    assert "4 of 4 runs: 2 failed, 1 of them as the kernel died at boot" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--repeat", "3"], ["--repeat", "0", "true"], ["--repeat", "2", "--stdin", "x"]])
def test_a_repeat_that_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        vm_cli.parse(arguments)
    assert caught.value.code == 2
