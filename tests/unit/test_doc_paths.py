# SPDX-License-Identifier: MIT
"""What README.md and docs/ say is where: files that are there, with the names in them that stand behind a file's."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

from vfio_mig.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ROOMS: Final = "vfio_mig|cdefs|tools|tests|scripts|docs|man"
_PATH: Final = re.compile(rf"(?<![\w./-])(?:{ROOMS})/[\w./*@-]*\w")
_NAMES: Final = re.compile(rf"`((?:{ROOMS})/[\w./-]+\.(?:py|c|h))`\s+\(((?:`\w+`(?:,\s)?)+)")


def paths(text: str) -> Iterator[str]:
    """Yield what looks like a path of this project; a pattern may match several files."""
    yield from (found.group() for found in _PATH.finditer(text))


def names(text: str) -> Iterator[tuple[str, str]]:
    """Yield a file and a name for each name in parentheses behind a file."""
    for found in _NAMES.finditer(text):
        yield from ((found[1], name) for name in re.findall(r"\w+", found[2]))


def is_there(path: str) -> bool:
    """Tell whether a path, or what a pattern matches, is in this checkout."""
    return any(True for _ in ROOT.glob(path))


def defines(path: str, name: str) -> bool:
    """Tell whether a file has a function, class or method of a name, or a C function."""
    text = (ROOT / path).read_text("utf-8")
    form = rf"^\s*(?:def|class) {name}\b" if path.endswith(".py") else rf"^[\w *]*\b{name}\("
    return re.search(form, text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    assert [path for path in paths(text) if not is_there(path)] == []
    assert [(path, name) for path, name in names(text) if not (is_there(path) and defines(path, name))] == []


def test_a_file_or_name_that_is_gone_would_be_noticed() -> None:
    assert list(paths("see vfio_mig/no_such.py, tools/kmod/vfio/mig*.c")) == [
        "vfio_mig/no_such.py",
        "tools/kmod/vfio/mig*.c",
    ]
    assert not is_there("vfio_mig/no_such.py")
    assert is_there("tools/kmod/vfio/mig*.c")
    named = list(names("`vfio_mig/dirty/sync.py` (`LiveCopy`,\n`nothing`, and more) `tools/kmod/hw/gtt.c` (`gvt_g2h`)"))
    assert named == [
        ("vfio_mig/dirty/sync.py", "LiveCopy"),
        ("vfio_mig/dirty/sync.py", "nothing"),
        ("tools/kmod/hw/gtt.c", "gvt_g2h"),
    ]
    assert [defines(path, name) for path, name in named] == [True, False, True]


# Papers that were never in this repository: what they say is said here, or is not cited
ELSEWHERE: Final = re.compile(r"\bfacts(?:/| [0-9])|\bDESIGN\.md|\bstyle\.md")


def test_nothing_is_cited_that_a_reader_cannot_open() -> None:
    suffixes = {".py", ".md", ".c", ".h", ".sh", ".toml", ".yml", ""}
    tops = ("vfio_mig", "tools", "tests", "scripts", "docs", "cdefs", "README.md", "CHANGELOG.md")
    files = [path for top in tops for path in ((ROOT / top).rglob("*") if (ROOT / top).is_dir() else [ROOT / top])]
    citing = [
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and path.suffix in suffixes and path != Path(__file__)
        if ELSEWHERE.search(path.read_text("utf-8", "replace"))
    ]
    assert citing == []


INITS: Final = [
    init
    for top in ("vfio_mig", "tools")
    for init in sorted((ROOT / top).rglob("__init__.py"))
    if len(list(init.parent.glob("*.py"))) > 2 and init.parent.name != "uapi"  # which has a docstring of its own kind
]


@pytest.mark.parametrize("init", INITS, ids=[str(one.parent.relative_to(ROOT)) for one in INITS])
def test_a_room_says_what_is_in_it_and_nothing_else(init: Path) -> None:
    told = set(re.findall(r"``([a-z]\w*)``", ast.get_docstring(ast.parse(init.read_text("utf-8"))) or ""))
    inside = {one.stem for one in init.parent.glob("[a-z]*.py")}
    inside |= {one.parent.name for one in init.parent.glob("*/*") if one.name in ("__init__.py", "Makefile")}
    commands = set(cli.list_commands(click.Context(cli)))
    assert inside - told == set(), "name them in the room's docstring"
    assert told - inside - commands == set()
