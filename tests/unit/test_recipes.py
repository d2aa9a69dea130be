# SPDX-License-Identifier: MIT
"""CONTRIBUTING.md's recipes work as they are written: each is followed in a copy, whose own tests then judge.

A recipe names every file that it takes; what is changed here beyond that fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
COPIED: Final = ("vfio_mig", "tools", "tests", "docs", "man", "completions", "cdefs", "scripts")
JUDGES: Final = (
    "test_api.py",
    "test_columns.py",
    "test_conform.py",
    "test_detect.py",
    "test_doc_paths.py",
    "test_docs.py",
    "test_imports.py",
    "test_man.py",
    "test_schemas.py",
)
DECODER: Final = """\
def _made_up(stream: ByteSource, _: PageReader) -> Decoded:
    return Decoded("made_up", [Section("header", 0, 8, {"size": stream.size})], [])


"""
CHECK: Final = """\
@FEATURE.add("made-up", "a feature that nobody has is refused", "ENOTTY")
def _made_up(rig: Rig) -> str:
    return refusal(lambda: rig.v2.feature(PROBE | GET | 0x7FFF), errno.ENOTTY)


"""
COMMAND: Final = '''\
# SPDX-License-Identifier: MIT
"""``count``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vfio_mig.cli.output import print_json, put

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options


@click.command("count", short_help="Count VFIO devices.")
@click.pass_obj
def count_command(options: Options) -> None:
    """Count VFIO devices.

    \\b
    Example: vfio-mig count
    """
    from vfio_mig.jobs.queries.count import count_devices

    report = count_devices()
    if options.as_json:
        print_json(report.as_dict())
    else:
        put(f"{report.devices} devices")
'''
JOB: Final = '''\
# SPDX-License-Identifier: MIT
"""Count devices."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_mig.jobs.engine.session import survey
from vfio_mig.report import Report


@dataclass(frozen=True, kw_only=True)
class CountReport(Report):
    """How many devices there are."""

    devices: int


def count_devices() -> CountReport:
    """Count the VFIO devices of this host."""
    return CountReport(devices=len(survey().devices))
'''


class Tree:
    """A copy of the checkout, in which a recipe of CONTRIBUTING.md is followed."""

    def __init__(self, root: Path) -> None:
        self.root: Final = root
        self._text: Final = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## How to add …")[2]
        self._section = ""

    def begin(self, title: str) -> None:
        """Follow a recipe from now on."""
        self._section = self._text.partition(f"### {title}")[2].partition("\n### ")[0].partition("\n## ")[0]
        assert self._section, title

    def _named(self, path: str) -> None:
        names = re.findall(r"`((?:vfio_mig|tools|tests|docs)/[\w./]*)`", self._section)
        assert any(path == name or (name.endswith("/") and path.startswith(name)) for name in names), path

    def write(self, path: str, text: str) -> None:
        """Write a new file."""
        self._named(path)
        assert not (self.root / path).exists()
        (self.root / path).write_text(text, "utf-8")

    def insert(self, path: str, before: str, text: str) -> None:
        """Insert a text into a file, before a line of it."""
        self._named(path)
        whole = (self.root / path).read_text("utf-8")
        assert before in whole, f"{path}: {before}"
        (self.root / path).write_text(whole.replace(before, text + before, 1), "utf-8")

    def insert_behind(self, path: str, *marks: str) -> None:
        """Insert a text, the last of *marks*, before the last but one of them, which is behind all others."""
        self._named(path)
        whole, at = (self.root / path).read_text("utf-8"), 0
        *before, text = marks
        for mark in before:
            at = whole.index(mark, at)
        (self.root / path).write_text(whole[:at] + text + whole[at:], "utf-8")

    def run(self, *words: str, wanted: str = "") -> None:
        """Run Python in there; *wanted*: what the recipe calls it."""
        assert wanted in self._section
        env = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *words], cwd=self.root, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    def make(self, module: str) -> None:
        """Make a generated file, as the recipe says."""
        self.run("-m", module, wanted=f"`python -m {module}`")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    for name in COPIED:
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.ko", "*.o")
        )
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return Tree(tmp_path)


def a_protocol(tree: Tree) -> None:
    tree.begin("a protocol")
    text = (ROOT / "tests/unit/made_up_protocol.py").read_text("utf-8")
    tree.write("vfio_mig/protocols/made_up.py", text)
    tree.insert("vfio_mig/protocols/__init__.py", "``none`` stands", "``made_up`` is made up.\n")
    line = '    "made-up": "vfio_mig.protocols.made_up",\n'
    tree.insert("vfio_mig/protocols/registry.py", '    "gvt-rfc": "vfio_mig', line)
    tree.make("tools.man")


def a_check(tree: Tree) -> None:
    tree.begin("a check")
    tree.insert("vfio_mig/conform/v2/feature.py", "CHECKS: Final", CHECK)
    tree.make("tools.conform_table")
    line = "pass  v2.feature.made-up                ENOTTY\n"
    for driver in ("The sample driver, v2", "`mtty`"):
        tree.insert_behind("docs/conform.md", "## As printed", f"### {driver}", "pass  v2.state.after-reset", line)


def a_decoder(tree: Tree) -> None:
    tree.begin("a decoder")
    tree.insert("vfio_mig/decode/streams.py", "def _unknown(", DECODER)
    tree.insert(
        "vfio_mig/decode/streams.py",
        "    Layout(_magic(QAT_MAGIC), _qat),",
        '    Layout(_magic(b"made up\\n"), _made_up),\n',
    )
    tree.insert("docs/inspect.md", "| `gvt_sample` |", "| `made_up` | `header` |\n")


def a_command(tree: Tree) -> None:
    tree.begin("a command")
    tree.write("vfio_mig/cli/count.py", COMMAND)
    tree.insert("vfio_mig/cli/__init__.py", "``doctor``     ``doctor``", "``count``      ``count``\n")
    tree.insert("vfio_mig/cli/main.py", '    "diff": "inspect",', '    "count": "count",\n')
    tree.write("vfio_mig/jobs/queries/count.py", JOB)
    tree.insert("vfio_mig/jobs/queries/__init__.py", "``devices``", "``count``, ")
    home = "    from vfio_mig.jobs.queries.devices import DeviceInfo as DeviceInfo"
    for name in ("CountReport", "count_devices"):
        tree.insert("vfio_mig/__init__.py", home, f"    from vfio_mig.jobs.queries.count import {name} as {name}\n")
    names = '    "jobs.queries.count": ("CountReport", "count_devices"),\n'
    tree.insert("vfio_mig/__init__.py", '    "jobs.queries.devices": (', names)
    tree.insert("tests/unit/test_api.py", '    "diff": "diff_images",', '    "count": "count_devices",\n')
    tree.insert("tools/man.py", '    "diff": f"1 {_FILE}",', '    "count": _HOST,\n')
    tree.insert(
        "tools/schemas.py",
        "from vfio_mig.jobs.queries.devices import",
        "from vfio_mig.jobs.queries.count import CountReport\n",
    )
    tree.insert("tools/schemas.py", '    "diff": Shown((DiffReport,)),', '    "count": Shown((CountReport,)),\n')
    tree.insert("docs/usage.md", "| `info DEV` |", "| `count` | how many devices there are |\n")
    tree.make("tools.man")
    tree.make("tools.schemas")


def test_the_recipes_of_contributing_work_as_they_are_written(tree: Tree) -> None:
    for follow in (a_protocol, a_check, a_decoder, a_command):
        follow(tree)
    changed = ["vfio_mig", "tools", "tests/unit/test_api.py"]
    tree.run("-m", "ruff", "check", "--no-cache", "--ignore", "I001,D102,D105", *changed)
    judges = [f"tests/unit/{name}" for name in JUDGES]
    tree.run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", *judges)
    for words in (["conform", "--list", "--check", "v2.feature.made-up"], ["count"]):
        tree.run("-c", f"import sys; sys.argv[1:] = {words}; from vfio_mig.cli.main import main; main()")
    (tree.root / "x.state").write_bytes(b"made up\nand more")
    tree.run("-c", "import vfio_mig; assert vfio_mig.inspect_image('x.state').layout == 'made_up'")
