# SPDX-License-Identifier: MIT
"""Which of two words is the device, and that nothing is named twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.saved_images import run, write
from vfio_mig.cli.names import device_first, is_device, parse_pairs
from vfio_mig.errors import OpenError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
OTHER = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"


@pytest.mark.parametrize(
    "word",
    [
        UUID,
        UUID.upper(),
        "0000:3b:00.1",
        "3b:00.1",
        "/sys/bus/mdev/devices/x",
        "/dev/vfio/7",
        "/dev/vfio/devices/v0",
    ],
)
def test_a_device_is_known_by_its_form(word: str) -> None:
    assert is_device(word)
    assert device_first(word, "gpu.vfm", "") == device_first("gpu.vfm", word, "") == (word, "gpu.vfm")
    assert device_first("-", word, "") == (word, "-")


@pytest.mark.parametrize("word", ["gpu.vfm", "-", "./3b:00.1", "/tmp/x", "fsl-mc", UUID + ".vfm", ""])
def test_a_file_is_none(word: str) -> None:
    assert not is_device(word)


def test_a_file_that_is_called_like_a_device_stays_where_it_stands() -> None:
    assert device_first(UUID, OTHER, "") == (UUID, OTHER)


def test_words_that_cannot_be_told_apart_but_are_swapped_are_refused(tmp_path: Path) -> None:
    file = str(write(tmp_path / "gpu.vfm", b"state"))
    with pytest.raises(UsageError, match="and fsl-mc is none: these two are swapped; it takes DEVICE FILE"):
        device_first(file, "fsl-mc", "DEVICE FILE")
    assert device_first("fsl-mc", file, "") == ("fsl-mc", file)
    assert device_first("fsl-mc", "new.vfm", "") == ("fsl-mc", "new.vfm")


@pytest.mark.parametrize("command", ["check", "restore"])
@pytest.mark.parametrize("swapped", [False, True])
def test_commands_take_device_and_file_in_either_order(command: str, tmp_path: Path, *, swapped: bool) -> None:
    words = [str(write(tmp_path / "gpu.vfm", b"state")), UUID]
    result = run(command, *(reversed(words) if swapped else words))
    assert isinstance(result.exception, OpenError)  # the device is the one that is not there
    assert str(result.exception).startswith(f"{UUID}: there is no such mdev")


def test_check_says_that_the_two_are_swapped_where_it_cannot_tell(tmp_path: Path) -> None:
    file = write(tmp_path / "gpu.vfm", b"state")
    result = run("check", "fsl-mc", file)
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == f"{file} is a file, and fsl-mc is none: these two are swapped; it takes FILE DEVICE"
    result = run("check", tmp_path / "nothing", "fsl-mc")
    assert "cannot open: ENOENT" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([f"{UUID}=x", f"{UUID}=y"], "is named twice"),
        ([f"{UUID}=x", f"{UUID.upper()}=y"], "is named twice, first as"),
        ([f"{UUID}=x", f"y={UUID}"], "is named twice"),
        ([f"{UUID}=x", f"{OTHER}=./x"], "./x is named twice; each device needs a file of its own"),
        ([f"{UUID}=-", f"{OTHER}=-"], "- is named twice"),
    ],
)
def test_what_is_named_twice_is_refused_before_anything_is_opened(words: list[str], problem: str) -> None:
    result = run("save", *words)
    assert isinstance(result.exception, UsageError)
    assert problem in str(result.exception)


def test_one_image_may_be_restored_to_two_devices() -> None:
    assert parse_pairs([f"{UUID}=x", f"{OTHER}=x"]) == [(UUID, "x"), (OTHER, "x")]


@pytest.mark.parametrize("command", ["stop", "start"])
def test_a_device_that_is_named_twice_is_not_stopped_or_started(command: str) -> None:
    result = run(command, UUID, OTHER, UUID)
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == f"{UUID} is named twice; name each device once"
