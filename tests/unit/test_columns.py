# SPDX-License-Identifier: MIT
"""What people read fits into eighty columns."""

from __future__ import annotations

import doctest
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import pytest

from tests.unit.click_runner import runner
from tests.unit.saved_images import gvt_state, write
from vfio_mig.cli import columns, devices, qemu, render
from vfio_mig.cli.copying import tell_round
from vfio_mig.cli.main import COLUMNS, COMMANDS, PROGRAM, cli
from vfio_mig.cli.options import Options
from vfio_mig.conform.registry import select
from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.sync import Round
from vfio_mig.jobs.queries.devices import DeviceRow
from vfio_mig.pictures.terminal import dirty_map

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICE = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
_FULL = "mdev sample-GVTg_V4_8 sample /dev/vfio/12 12345:qemu-system-x86 yes stop-copy /dev/vfio/devices/vfio12 -"
ROWS = [
    [DEVICE, *_FULL.split()],
    ["0000:3b:00.1", "pci", "8086:56c0", "vfio-pci", "/dev/vfio/noiommu-0", "-", "no", "-", "-", "save:after-stop"],
]


def helps() -> Iterator[tuple[str, str]]:
    """Yield the help of every command, as it is on a terminal that is much wider."""

    def of(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
        context = click.Context(command, parent=parent, info_name=name, terminal_width=None, **command.context_settings)
        context.max_content_width = COLUMNS
        yield context.command_path.removeprefix(f"{PROGRAM} "), command.get_help(context)
        if isinstance(command, click.Group):
            for one in command.list_commands(context):
                below = command.get_command(context, one)
                assert below is not None
                yield from of(below, context, one)

    yield from of(cli, None, PROGRAM)
    for name, command in qemu.COMMANDS.items():
        yield from of(command, None, name)


def test_the_help_of_every_command_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = dict(helps())
    assert shown.keys() > COMMANDS.keys()
    assert [(name, line) for name, text in shown.items() for line in text.splitlines() if len(line) > COLUMNS] == []


def test_the_list_of_checks_hangs_below_the_rules_on_a_terminal_and_has_a_line_for_each_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = select(())
    assert len(runner().invoke(cli, ["conform", "--list"]).stdout.splitlines()) == len(checks)
    monkeypatch.setattr(columns, "terminal_width", lambda: COLUMNS)
    lines = runner().invoke(cli, ["conform", "--list"]).stdout.splitlines()
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [check.id for check in checks]
    assert " ".join(" ".join(lines).split()) == " ".join(
        f"{check.id} {check.rule}{' (--dangerous)' if check.danger else ''}" for check in checks
    )


def test_a_map_of_pages_below_a_tebibyte_fits() -> None:
    chunks = [Dirty((1 << 28) - 4096, 4096, bytes(512)), Dirty(0, 1 << 20, b"\xff" * (1 << 17))]
    lines = [*dirty_map(chunks[:1]), *dirty_map(chunks[1:]), *dirty_map(chunks[1:], unicode=False)]
    assert max(map(len, lines)) <= COLUMNS


def test_what_is_in_an_image_fits_a_terminal_and_elsewhere_has_a_line_for_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "image", gvt_state(), [(0x10000, bytes(4096))], (0, 8, b"\5"))
    plain = runner().invoke(cli, ["inspect", str(path)]).stdout
    assert max(map(len, plain.splitlines())) > COLUMNS
    monkeypatch.setattr(columns, "terminal_width", lambda: COLUMNS)
    shown = runner().invoke(cli, ["inspect", str(path)]).stdout
    assert [line for line in shown.splitlines() if len(line) > COLUMNS] == []
    assert "".join(shown.split()) == "".join(plain.split())


def table(width: int | None, *, chosen: list[int] | None = None, header: bool = False) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "terminal_width", lambda: width)
        return devices._table(ROWS, chosen, header=header)


def test_a_list_has_the_columns_that_fit_on_a_terminal() -> None:
    assert table(80) == [
        "NAME                                 HOLDER                STATE",
        f"{DEVICE} 12345:qemu-system-x86 stop-copy",
        "0000:3b:00.1                         -                     -",
    ]
    assert table(40)[0] == "NAME"
    assert table(90)[0].split() == ["NAME", "HOLDER", "STATE", "JOB"]
    assert table(400)[0].split() == list(devices.COLUMNS)


def test_a_list_for_scripts_has_every_column_and_no_header_unless_it_is_asked_for() -> None:
    assert table(None) == [" ".join(row[:9]) for row in ROWS]
    assert table(None, header=True) == [" ".join(devices.FOR_SCRIPTS), *(" ".join(row[:9]) for row in ROWS)]
    assert table(None, chosen=[9]) == ["-", "save:after-stop"]
    assert table(None, chosen=[5, 0]) == [f"12345:qemu-system-x86 {DEVICE}", "- 0000:3b:00.1"]


@pytest.mark.parametrize("words", [("list", "--watch"), ("watch",), ("-q", "watch")])
def test_a_list_is_shown_again_until_a_signal_with_the_job_that_is_at_work(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    row = DeviceRow(
        device="one", kind="mdev", type="t", parent="p", driver="d", node=None, holder_pid=7, holder="a",
        migratable=True, state=None, cdev=None,
    )  # fmt: skip
    rows = iter([[row], [replace(row, job="save", job_pid=9, job_step="after-stop")], [replace(row, job="")]])
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("vfio_mig.jobs.queries.devices.list_devices", lambda: next(rows))
    monkeypatch.setattr("time.sleep", wait)
    done = runner().invoke(cli, [*words, "-o", "name,job"])
    assert (done.exit_code, done.stdout) == (0, "one -\none save:after-stop\none ?\n")
    assert waits == [devices.WATCH_SECONDS] * 3


@pytest.mark.parametrize(
    ("words", "source", "says"),
    [
        (["list"], "vfio_mig.jobs.queries.devices.list_devices", "no VFIO device here; 'vfio-mig doctor' says more"),
        (["mdev", "types"], "vfio_mig.host.mdev.types", "no device here offers mdevs; 'vfio-mig doctor' says more"),
        (["vm", "list"], "vfio_mig.vm.survey.list_vms", "no process here has a VFIO device open"),
        (["vm", "list", "--connect", "test:///"], "vfio_mig.vm.survey.list_vms", "libvirt has no domain"),
    ],
)
def test_a_user_at_a_terminal_is_told_that_there_is_nothing_and_a_script_reads_no_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], source: str, says: str
) -> None:
    monkeypatch.setattr(source, lambda *_, **__: [])
    assert runner().invoke(cli, words).output == ""
    monkeypatch.setattr(columns, "terminal_width", lambda: COLUMNS)
    done = runner().invoke(cli, words)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.startswith("vfio-mig: ")
    assert done.stderr.endswith(f"{says}\n")
    assert runner().invoke(cli, ["--json", *words]).output == "[]\n"
    assert runner().invoke(cli, ["-q", *words]).output == ""


@pytest.mark.parametrize(
    ("given", "rounds", "said"),
    [
        ({"terminal": True}, [True], []),
        ({"terminal": True}, [False, True], ["running", "stopped"]),
        ({}, [False, True], []),
        ({"terminal": True, "quiet": True}, [False, True], []),
        ({"verbose": True}, [True], ["stopped"]),
    ],
    ids=["one", "two", "no terminal", "quiet", "verbose"],
)
def test_rounds_are_told_where_there_are_some_and_the_last_does_not_guess_what_a_stop_would_take(
    given: dict[str, bool],
    rounds: list[bool],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: "terminal" in given)
    options = Options()
    options.quiet, options.verbose = "quiet" in given, "verbose" in given
    tell = tell_round(options)
    for one in rounds:
        tell(Round(one, 10, 5, 1, 4, 0, 5 * 4096, 0.001, 0.01))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("(")[1].split(")")[0] for line in lines] == said
    assert ["a stop now: " in line for line in lines] == [one == "running" for one in said]


def test_a_column_that_there_is_not_is_wrong_usage() -> None:
    done = runner().invoke(cli, ["list", "-o", "name,nothing"])
    assert done.exit_code == 2
    assert "there is no column 'NOTHING'; there are NAME, KIND" in done.stderr


@pytest.mark.parametrize("module", [columns, render])
def test_the_examples_in_docstrings_are_true(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0
