# SPDX-License-Identifier: MIT
"""The fuzzers' seeds, a second of chance, and that a fuzzer notices what it is to notice. scripts/fuzz runs longer."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.fuzz import __main__ as program
from tools.fuzz import engine, limits, targets
from tools.fuzz.corpus import Choices, good_archive, good_image
from tools.fuzz.limits import BrokenPromiseError, Watch, bounded, require_line
from tools.fuzz.targets import TARGETS, Target
from vfio_mig.decode.gvt_image import parse
from vfio_mig.errors import ImageError
from vfio_mig.host.discover import Host

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[2]


def target_of(run: Callable[[bytes], None], *seeds: bytes) -> Target:
    return Target("injected", run, lambda: list(seeds or (b"seed",)), 64)


def look_up(data: bytes) -> None:
    if data[:1] != b"s":
        raise KeyError(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_and_what_chance_makes_of_them(name: str, tmp_path: Path) -> None:
    seeds = TARGETS[name].seeds()
    assert max(map(len, seeds)) <= TARGETS[name].max_len
    watch, crash = engine.run_plainly(TARGETS[name], 1 / len(TARGETS), tmp_path)
    assert crash is None
    assert watch.runs > len(seeds)


def test_a_target_that_raises_another_error_is_a_crash_that_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(look_up)
    watch, crash = engine.run_plainly(target, 10, tmp_path / "crashes")
    assert crash is not None
    assert crash.read_bytes()[:1] != b"s"
    assert "KeyError" in capsys.readouterr().err

    outcome = program.Outcome("injected", watch.runs, 1.0, None, 1, 0, [crash], failed=True)
    assert program.report([outcome]) == 1
    printed = capsys.readouterr().out
    assert "CRASH" in printed
    assert printed.endswith(f"scripts/fuzz --repeat injected {crash}\n")

    monkeypatch.setitem(TARGETS, "injected", target)
    assert program.main(["--repeat", "injected", str(crash)]) == 1
    crash.write_bytes(b"seed")
    assert program.main(["--repeat", "injected", str(crash)]) == 0


def test_a_seed_that_crashes_is_found_however_short_the_time(tmp_path: Path) -> None:
    watch, crash = engine.run_plainly(target_of(look_up, b"s", b"s", b"x"), 0, tmp_path)
    assert (watch.runs, crash) == (3, engine.crash_path(tmp_path, b"x"))


def test_a_crash_fails_the_whole_program(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tools.fuzz import __main__ as program, engine, targets\n"
        "def look_up(data): {}[data]\n"
        "target = targets.TARGETS['syntax']._replace(run=look_up); targets.TARGETS['syntax'] = target\n"
        "sys.exit(program.main(sys.argv[1:]))\n"
    )
    arguments = ["--work", "syntax", "--seconds", "1", "--crashes", str(tmp_path), "--status", str(tmp_path / "status")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert engine.read_status(tmp_path / "status")["runs"] == 1
    assert [path.name[:6] for path in tmp_path.glob("crash-*")] == ["crash-"]


def test_chance_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []

        def keep(data: bytes) -> None:
            seen.append(data)
            if len(seen) == 50:
                raise KeyError

        engine.run_plainly(target_of(keep, b"a seed", b"another"), 10, tmp_path, seed)
        return seen

    assert inputs(1) == inputs(1) != inputs(2)


def test_an_input_that_takes_too_much_memory_is_a_crash() -> None:
    def greedy(data: bytes) -> None:
        with bounded(len(data)):
            bytes(limits.INPUT_CONSTANT + (1 << 20))

    def greedier(data: bytes) -> None:
        with bounded(len(data)):
            bytes(1 << 30)

    watch = Watch()
    with pytest.raises(BrokenPromiseError, match="allocated"):
        watch.run(greedy, b"x")
    watch.runs = limits.TRACED_FIRST
    with pytest.raises(MemoryError):
        watch.run(greedier, b"x")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_process_that_grows_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(limits, "GROWTH_MAX", 8 << 20)
    kept: list[bytes] = []
    watch = Watch()

    def run_often() -> None:
        while watch.runs < 10_000:
            watch.run(lambda data: kept.append(data * 10_000), b"x")

    with pytest.raises(BrokenPromiseError, match="has grown"):
        run_often()
    assert watch.growth > 8 << 20
    assert watch.runs > limits.WARM_UP_RUNS


def refuse(problem: str) -> None:
    with bounded(1):
        raise ImageError(problem)


def test_our_own_error_is_no_crash_unless_it_is_too_long_for_a_line() -> None:
    refuse("bytes\nand more bytes")
    with pytest.raises(BrokenPromiseError, match="characters"):
        refuse("x" * 5000)


@pytest.mark.parametrize("text", ["", "a\nb", "\x1b[2J", "\udcff"])
def test_what_is_no_clean_line_is_noticed(text: str) -> None:
    with pytest.raises(BrokenPromiseError, match="line"):
        require_line(text)


@pytest.mark.parametrize(
    "archive", [good_archive(), targets._archive_of(b"\x03{}"), targets._archive_of(TARGETS["manifest"].seeds()[0])]
)
def test_archives_to_begin_with_are_good(archive: bytes) -> None:
    assert targets._read_all(io.BytesIO(archive), len(archive))


def test_the_image_to_begin_with_is_good() -> None:
    parsed = parse(memoryview(good_image()))
    assert (parsed.dialect, len(parsed.records), len(parsed.workloads)) == ("rfc", 7, 1)
    assert targets._image_of(b"\0") == good_image()


def test_the_sysfs_to_begin_with_has_two_devices() -> None:
    TARGETS["sysfs"].run(TARGETS["sysfs"].seeds()[2])
    found = Host(targets._TREE.root).devices()
    assert [(one.kind, one.type, one.group) for one in found] == [
        ("mdev", "i915-GVTg_V5_8", 7),
        ("pci", "8086:1912", 7),
    ]


def test_choices_run_out_quietly() -> None:
    choices = Choices(b"\x02ab\x05c")
    assert (choices.text(), choices.text(), choices.number(8), bool(choices)) == (b"ab", b"c", 0, False)


def test_the_table_has_a_line_for_each_target() -> None:
    outcomes = [
        program.Outcome("archive", 1_234_567, 60.0, 173, 20, 3 << 20, [], failed=False),
        program.Outcome("x", 0, 0.0, None, 1, 0, [], failed=True),
    ]
    assert program.table(outcomes) == (
        "| target  |      runs | seconds | runs/s | edges | corpus |  growth | outcome |\n"
        "|---------|----------:|--------:|-------:|------:|-------:|--------:|--------:|\n"
        "| archive | 1,234,567 |      60 | 20,576 |   173 |     20 | 3.0 MiB |   clean |\n"
        "| x       |         0 |       0 |      - |     - |      1 | 0.0 MiB |   CRASH |"
    )


def test_an_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["nonsense"])
    assert "no target: nonsense; there are archive, " in capsys.readouterr().err
