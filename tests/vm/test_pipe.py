# SPDX-License-Identifier: MIT
"""`vfio-mig save SOURCE - | vfio-mig restore TARGET -` where the connection breaks."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tools.lab import cli
from tools.lab.sample import gpu
from tools.lab.sample.held import Side, guest_view, run_some_work, side

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # what is sent when is the program's, not the kernel's

PIPE = 1 << 16  # what a pipe holds when nobody reads
BLOCK = 512


@pytest.fixture
def source() -> Iterator[Side]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, side(Path(name) / "source.mem") as made:
        yield made


@pytest.fixture
def target(source: Side) -> Iterator[Side]:  # noqa: ARG001  # made after it
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, side(Path(name) / "target.mem") as made:
        yield made


class Outcome(NamedTuple):
    save: cli.Done
    restore: cli.Done


def pipeline(source: Side, target: Side, cutter: list[str], *options: str, raw: bool = False) -> Outcome:
    """Run save | cutter | restore."""
    from_memory, to_memory = ([] if raw else ["--memory", one.memory_option] for one in (source, target))
    with contextlib.ExitStack() as ends:
        fds = [*os.pipe(), *os.pipe()]
        for fd in fds:
            ends.callback(os.close, fd)
        save = cli.Forked("-q", "save", source.name, "-", *from_memory, *options, stdout=fds[1])
        with subprocess.Popen(cutter, stdin=fds[0], stdout=fds[3], start_new_session=True):
            restore = cli.Forked("-q", "restore", target.name, "-", *to_memory, *options, stdin=fds[2])
            ends.close()
            return Outcome(save.wait(), restore.wait())


def image_of(source: Side, *options: str) -> bytes:
    """Save it as it will be saved again; it runs afterwards."""
    memory = [] if "--raw" in options else ["--memory", source.memory_option]
    image = cli.run("-q", "save", source.name, "-", "--leave-running", *memory, *options, warm=True).stdout
    assert image is not None
    return image


def spread(image: bytes) -> list[int]:
    """Give the ends of the stream, and for every member a point in its header, the content's start, middle, and end."""
    points = {0, 1, len(image) - 1}
    with tarfile.open(fileobj=io.BytesIO(image)) as archive:
        for member in archive:
            at = member.offset_data
            points |= {at - BLOCK // 2, at, at + member.size // 2, at + member.size}
    return sorted(points)


class Untouched:
    """What a refused restore must leave as it was."""

    def __init__(self, target: Side) -> None:
        self._target = target
        self._before = self._look()

    def _look(self) -> tuple[object, ...]:
        instance, memory = self._target.instance, self._target.memory
        view = guest_view(self._target.guest.device)
        counters = {key: value for key, value in instance.counters().items() if key != "other_ioctl"}  # asks only
        return counters, instance.run_state(), view, memory.read(memory.iova, memory.size)

    def check(self) -> None:
        assert self._look() == self._before
        assert self._target.instance.run_state() == "running"


def assert_refused(done: cli.Done) -> None:
    said = done.stderr.decode()
    assert done.returncode == 6, said
    assert len(said.splitlines()) == 1, said
    assert done.stdout == b""


def assert_rolled_back(done: cli.Done, source: Side) -> None:
    said = done.stderr.decode()
    assert done.returncode == 7, said
    assert "standard output: cannot write: EPIPE" in said
    assert len(said.splitlines()) == 1, said
    assert source.instance.run_state() == "running"


def assert_saved(done: cli.Done, source: Side) -> None:
    assert (done.returncode, done.stderr) == (0, b"")
    assert source.instance.run_state() == "stopped"


def start_again(source: Side) -> None:
    cli.run("-q", "start", source.name, warm=True)
    assert source.instance.run_state() == "running"


@pytest.mark.parametrize("raw", [False, True], ids=["image", "raw"])
def test_wherever_a_reader_goes_away_the_target_is_untouched_and_the_source_runs_if_save_can_know(
    source: Side, target: Side, raw: bool
) -> None:
    options = ["--raw"] if raw else []
    run_some_work(source.guest, gpu.Engine(source.guest))
    image = image_of(source, *options)
    points = [0, 1, 4096, len(image) // 2, len(image) - 1] if raw else spread(image)
    assert raw or len(points) >= 20
    untouched = Untouched(target)
    noticed = 0
    for at in points:
        outcome = pipeline(source, target, ["head", "-c", str(at)], *options, raw=raw)
        assert_refused(outcome.restore)
        untouched.check()
        # What the reader leaves must be more than the pipe can hold, or the last write may well succeed.
        # 4096: the statistics in the manifest differ in length from save to save.
        if len(image) - at > PIPE + 4096 or outcome.save.returncode:
            assert_rolled_back(outcome.save, source)
            noticed += 1
        else:
            assert_saved(outcome.save, source)
            start_again(source)
    assert noticed >= len(points) // 2
    engine = gpu.Engine(source.guest)
    assert run_some_work(source.guest, engine, 1).done_in(source.memory) == 1


@pytest.mark.parametrize("raw", [False, True], ids=["image", "raw"])
def test_a_stream_that_loses_its_last_bytes_behind_save_s_back_is_refused(
    source: Side, target: Side, raw: bool
) -> None:
    """As on a network: whoever reads from save reads all of it."""
    options = ["--raw"] if raw else []
    untouched = Untouched(target)
    for lost in (1, BLOCK, 2 * BLOCK, 3 * BLOCK, 1 << 20):
        outcome = pipeline(source, target, ["head", "-c", f"-{lost}"], *options, raw=raw)
        assert_refused(outcome.restore)
        untouched.check()
        assert_saved(outcome.save, source)
        start_again(source)
    outcome = pipeline(source, target, ["cat"], *options, raw=raw)
    assert_saved(outcome.save, source)
    assert outcome.restore.returncode == 0
    assert target.instance.run_state() == "stopped"


def test_a_restore_that_ends_early_makes_save_fail(source: Side, target: Side) -> None:
    outcome = pipeline(source, target, ["sh", "-c", "printf 'no archive'; exec cat"])
    assert_refused(outcome.restore)
    assert_rolled_back(outcome.save, source)
