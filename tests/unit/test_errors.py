# SPDX-License-Identifier: MIT
from __future__ import annotations

import errno
import inspect
import os
import re
from pathlib import Path
from typing import Final

import pytest

from vfio_mig import errors
from vfio_mig.errors import (
    DeviceBusyError,
    DeviceError,
    DeviceNotFoundError,
    HostError,
    ImageError,
    InterruptedJobError,
    MismatchError,
    OpenError,
    UnsupportedError,
    UsageError,
    VfioMigError,
    errno_text,
    right_hint,
)

CATALOGUE: Final = Path(__file__).parents[2] / "docs/errors.md"
# What docs/scripting.md's "Exit codes" promises to scripts
EXIT_CODES: Final[dict[type[VfioMigError], int]] = {
    UsageError: 2,
    OpenError: 3,
    DeviceNotFoundError: 3,
    DeviceBusyError: 3,
    UnsupportedError: 4,
    DeviceError: 5,
    ImageError: 6,
    MismatchError: 6,
    HostError: 7,
    InterruptedJobError: 130,
}
PARENTS: Final[dict[type[VfioMigError], type[VfioMigError]]] = {
    DeviceNotFoundError: OpenError,
    DeviceBusyError: OpenError,
    MismatchError: ImageError,
}
CLASSES: Final = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, VfioMigError) and value is not VfioMigError
]


def test_every_class_has_the_promised_exit_code() -> None:
    assert {one: one.exit_code for one in CLASSES} == EXIT_CODES


def test_an_excerpt_is_short_whatever_the_value() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert errors.excerpt("6.12.0-rc1-with-a-name-of-its-own") == "'6.12.0-rc1-with-a-name-of-its-own'"
    for value in (deep, "x" * 100_000, {"x" * 1000: ["y" * 1000] * 1000}, 10**4000):
        assert len(errors.excerpt(value)) < 1000


def test_the_base_has_none_as_it_is_never_raised() -> None:
    assert not hasattr(VfioMigError, "exit_code")


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tree_is_flat_but_for_three(kind: type[VfioMigError]) -> None:
    assert kind.__base__ is PARENTS.get(kind, VfioMigError)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_device_problem_and_hint_in_one_line(kind: type[VfioMigError]) -> None:
    assert str(kind("it failed")) == "it failed"
    assert str(kind("it failed", device="vgpu")) == "vgpu: it failed"
    assert str(kind("it failed", hint="try again")) == "it failed; try again"
    error = kind("it failed", device="vgpu", hint="try again")
    assert str(error) == "vgpu: it failed; try again"
    assert (error.problem, error.device, error.hint) == ("it failed", "vgpu", "try again")
    assert error.args == ("it failed",)


def test_what_failed_while_rolling_back_stands_between_problem_and_hint() -> None:
    error = HostError("disk full", device="vgpu", hint="free some")
    error.undo_errors += [DeviceError("START failed", device="vgpu", hint="reset it"), OSError("gone")]
    assert str(error) == (
        "vgpu: disk full; while rolling back: vgpu: START failed; reset it; while rolling back: gone; free some"
    )


def test_two_errors_do_not_share_what_failed_while_rolling_back() -> None:
    one, other = HostError("a"), HostError("b")
    one.undo_errors.append(ValueError("c"))
    assert other.undo_errors == []


def test_a_device_error_keeps_the_errno() -> None:
    assert DeviceError("no").errno == 0
    assert DeviceError("no", errno=errno.EBUSY).errno == errno.EBUSY


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EBUSY, "EBUSY (Device or resource busy)"),
        (errno.ENOENT, "ENOENT (No such file or directory)"),
        (524, "errno 524 (Unknown error 524)"),
        (0, "errno 0 (Success)"),
    ],
)
def test_an_errno_is_told_by_name_and_in_words(number: int, text: str) -> None:
    assert errno_text(number) == text


def test_an_error_is_one_line_whatever_a_file_is_called() -> None:
    assert str(HostError("/tmp/a\nb\x1b[31m: gone", hint="x\r")) == "/tmp/a\\nb\\x1b[31m: gone; x\\r"
    assert str(HostError("/tmp/\u00fc")) == "/tmp/\u00fc"


def test_the_catalogue_has_every_class_with_its_exit_code() -> None:
    rows = re.findall(r"^\| (\w+Error) \| (\d+) \|", CATALOGUE.read_text("utf-8"), re.MULTILINE)
    assert {name: int(code) for name, code in rows} == {one.__name__: one.exit_code for one in CLASSES}


@pytest.mark.parametrize(
    ("problem", "cause", "number", "expected"),
    [
        ("STOP failed", None, 5, "EIO"),
        ("cannot open", OSError(13, "no"), 0, "EACCES"),
        ("cannot open: ENOENT (No such file or directory)", None, 0, "ENOENT"),
        ("it is EVERYTHING (and more)", None, 0, None),
        ("nothing", None, 0, None),
    ],
)
def test_the_document_of_an_error_names_the_errno(
    problem: str, cause: OSError | None, number: int, expected: str | None
) -> None:
    error = DeviceError(problem, errno=number)
    error.__cause__ = cause
    assert error.as_dict()["errno"] == expected


@pytest.mark.parametrize(
    ("user", "otherwise", "expected"),
    [
        (1000, "", "run as root"),
        (1000, "give this user /dev/kvm", "run as root, or give this user /dev/kvm"),
        (0, "give this user /dev/kvm", "root lacks the right here: a container's device cgroup, a user namespace or"),
    ],
)
def test_root_is_not_told_to_become_root(
    monkeypatch: pytest.MonkeyPatch, user: int, otherwise: str, expected: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert right_hint(otherwise).startswith(expected)
    assert ("run as root" in right_hint(otherwise)) is (user != 0)
