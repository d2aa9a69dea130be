# SPDX-License-Identifier: MIT
"""docs/schemas says what --json prints; tests/vm/test_schemas.py has the commands that need a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import jsonschema
import pytest

from tests.schemas import SCHEMAS, validate
from tests.unit.saved_images import run, write
from tests.unit.test_image_gvt import BODY, image
from tools import schemas
from vfio_mig.cli.main import cli

if TYPE_CHECKING:
    from pathlib import Path


def test_the_files_are_those_that_are_made() -> None:
    found = {path.name: path.read_text("utf-8") for path in SCHEMAS.iterdir()}
    assert found == schemas.files(), "run python -m tools.schemas"


@pytest.mark.parametrize("name", sorted(schemas.DOCUMENTS))
def test_each_is_a_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas.document(name))
    jsonschema.Draft202012Validator.check_schema(schemas.events())


def test_every_command_that_prints_a_document_has_one() -> None:
    context = click.Context(cli)
    names = set(cli.list_commands(context))
    for name in tuple(names):
        group = cli.get_command(context, name)
        if isinstance(group, click.Group):
            names = names - {name} | {f"{name}-{one}" for one in group.commands}
    assert names - {"mdev-remove"} == schemas.DOCUMENTS.keys()  # which prints nothing


@pytest.mark.parametrize(
    ("command", "document"),
    [("status", {"device": "x"}), ("list", {}), ("pages", {"file": "a", "pages_written": 1, "more": 1}), ("state", [])],
)
def test_what_is_something_else_is_not_valid(command: str, document: Any) -> None:
    assert not jsonschema.Draft202012Validator(schemas.document(command)).is_valid(document)


def test_what_needs_no_device_is_valid(tmp_path: Path) -> None:
    one = write(tmp_path / "one.vfm", image(), [(0, bytes(4096)), (8192, 4096)], (0, 8, b"\3"))
    other = write(tmp_path / "other.vfm", image(BODY[1:]))
    for name, *arguments in (
        ("verify", "verify", one),
        ("inspect", "inspect", one),
        ("diff", "diff", one, other),
        ("extract", "extract", one, tmp_path / "parts"),
        ("pack", "pack", tmp_path / "parts", tmp_path / "again.vfm"),
        ("doctor", "doctor"),
        ("doctor", "doctor", "--report"),
        ("conform", "conform", "--list"),
        ("list", "list"),
    ):
        result = run("--json", *arguments)
        assert result.stdout, (name, result.exception)
        validate(name, result.stdout)
