# SPDX-License-Identifier: MIT
"""Programs that tests and tools have as text: no checker reads them, so what they import is looked up here."""

from __future__ import annotations

import ast
import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
FILES: Final = [path for room in ("tests", "tools") for path in sorted((ROOT / room).rglob("*.py"))]
_IMPORT: Final = re.compile(
    r"(?:^|[;\n])\s*(?:from ((?:tests|tools|vfio_mig)[\w.]*) import ([\w, ]+)|import ((?:tests|tools|vfio_mig)[\w.]*))"
)
_DOTTED: Final = re.compile(r"(?:tests|tools|vfio_mig)(?:\.[a-z_]\w*)+")


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Yield the module and the name, empty for none, of each import in the texts of a program."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in told:
            continue
        for module, names, whole in _IMPORT.findall(node.value):
            for name in names.split(",") if module else [""]:
                yield module or whole, name.split(" as ")[0].strip()


def modules_run(source: str) -> Iterator[str]:
    """Yield the modules behind each "-m" in a list of words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple):
            words = [one.value if isinstance(one, ast.Constant) else None for one in node.elts]
            for flag, module in pairwise(words):
                if flag == "-m" and isinstance(module, str) and _DOTTED.fullmatch(module):
                    yield module


def is_there(module: str, name: str = "") -> bool:
    """Tell whether there is such a module of ours, and in it such a name; a module that is in it will do."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if path.is_dir() and not file.exists():
        return not name or is_there(f"{module}.{name}")
    if not file.exists():
        return False
    if not name or (path.is_dir() and (path / name).with_suffix(".py").exists()) or (path / name).is_dir():
        return True
    return re.search(rf"\b{name}\b", file.read_text("utf-8")) is not None


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_what_a_program_in_a_text_imports_is_there(path: Path) -> None:
    if path == Path(__file__) or path.name in {"test_imports.py", "test_recipes.py"}:  # which have what is not there
        return
    source = path.read_text("utf-8")
    assert [found for found in imports(source) if not is_there(*found)] == []
    assert [module for module in modules_run(source) if not is_there(module)] == []


def test_a_module_or_name_that_is_gone_would_be_noticed() -> None:
    source = (
        'CODE = "import sys; from tests.vm import host\\nfrom vfio_mig.device import Device, gone\\nimport tools.none"'
    )
    found = list(imports(source))
    assert found == [
        ("tests.vm", "host"),
        ("vfio_mig.device", "Device"),
        ("vfio_mig.device", "gone"),
        ("tools.none", ""),
    ]
    assert [is_there(*one) for one in found] == [False, True, False, False]
    assert list(modules_run('run([python, "-m", "tools.none", "x"])')) == ["tools.none"]
    assert importlib.util.find_spec("tools.lab") is not None
    assert is_there("tools.lab")
