# SPDX-License-Identifier: MIT
"""The core of the VM tests, which a plain `scripts/test` runs, has every command and each of the seed's patches."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

from vfio_mig.cli import qemu
from vfio_mig.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS: Final = Path(__file__).parents[1] / "vm"
SEED: Final = "test_seed_patches.py"
HELD: Final = frozenset({"held", "hold_started", "side"})
"""Helpers that run `hold`."""
SCRIPT: Final = "script"
"""The helper that runs `qemu-save` or `qemu-restore`, of which it is given the last part of the name."""


def is_core(node: ast.AST) -> bool:
    """Tell whether pytest.mark.core is in a decorator, or in what pytestmark is."""
    return any(isinstance(one, ast.Attribute) and one.attr == "core" for one in ast.walk(node))


def core_tests(source: str) -> list[ast.FunctionDef]:
    """Return a file's tests that are marked, each by itself or all of them."""
    tree = ast.parse(source)
    all_of_it = any(
        is_core(one.value)
        for one in tree.body
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "pytestmark"
    )
    return [
        one
        for one in tree.body
        if isinstance(one, ast.FunctionDef)
        and one.name.startswith("test_")
        and (all_of_it or any(map(is_core, one.decorator_list)))
        and not any("variant" in ast.unparse(mark) for mark in one.decorator_list)
    ]


def commands_of(test: ast.FunctionDef) -> Iterator[str]:
    """Yield the commands that a test runs: the first word of a call that is no option; of two, both."""
    for call in (one for one in ast.walk(test) if isinstance(one, ast.Call)):
        yield from ("hold" for name in HELD if ast.unparse(call.func).endswith(name))
        words = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        words = [one for one in words if not one.startswith("-")]
        yield from words[:2]
        yield " ".join(words[:2])
        if ast.unparse(call.func) == "said":  # the schema's name comes first
            yield " ".join(words[1:3])
        yield from (f"qemu-{word}" for word in words[:1] if ast.unparse(call.func) == SCRIPT)
    names = (one.value for one in ast.walk(test) if isinstance(one, ast.Constant) and isinstance(one.value, str))
    yield from (name.rpartition("/")[2] for name in names if name.startswith("scripts/"))


def every_command() -> set[str]:
    context = click.Context(cli)
    names = {*qemu.COMMANDS}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        names |= {f"{name} {one}" for one in command.commands} if isinstance(command, click.Group) else {name}
    return names


def in_core() -> dict[str, list[ast.FunctionDef]]:
    return {path.name: core_tests(path.read_text("utf-8")) for path in sorted(TESTS.glob("test_*.py"))}


def test_every_command_is_run_by_a_test_of_the_core() -> None:
    run = {command for tests in in_core().values() for test in tests for command in commands_of(test)}
    assert every_command() - run == set(), "mark a test of theirs with pytest.mark.core"


def test_every_one_of_the_seed_s_patches_has_a_test_in_the_core() -> None:
    numbers = [re.match(r"test_patch_(\d)_", test.name) for test in in_core()[SEED]]
    assert sorted(int(one[1]) for one in numbers if one) == [*range(1, 10)]


def test_the_runner_finds_every_file_that_has_one() -> None:
    files = {name for name, tests in in_core().items() if tests}
    found = {path.name for path in TESTS.glob("test_*.py") if "pytest.mark.core" in path.read_text("utf-8")}
    assert files == found
    assert len(files) > 5


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("@pytest.mark.core\ndef test_a(): pass\ndef test_b(): pass", ["test_a"]),
        ("pytestmark = [pytest.mark.core, pytest.mark.slow]\ndef test_a(): pass\ndef b(): pass", ["test_a"]),
        ("pytestmark = pytest.mark.core\n@pytest.mark.variant\ndef test_a(): pass", []),
        ("pytestmark = pytest.mark.gvt\ndef test_a(): pass", []),
    ],
)
def test_a_mark_is_seen_where_it_can_stand(source: str, names: list[str]) -> None:
    assert [one.name for one in core_tests(source)] == names


def test_a_command_that_is_only_spoken_of_does_not_count() -> None:
    (test,) = core_tests(
        "@pytest.mark.core\ndef test_a():\n  '''stop'''\n  x = 'start'\n  js('-q', 'save', 1)\n  cli.held(2)\n"
        "  said('mdev-types', 'mdev', 'types')\n"
    )
    assert {"save", "hold", "mdev types"} <= {*commands_of(test)}
    assert not {"stop", "start"} & {*commands_of(test)}
