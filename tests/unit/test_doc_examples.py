# SPDX-License-Identifier: MIT
"""No example of the documentation escapes tests/vm/test_doc_examples.py, which runs them."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.doc_examples import ELSEWHERE, PAGES, Block, blocks, examples, inputs_and_outputs, reason, script

EXAMPLES = examples()
SHELL = [one for one in EXAMPLES if one.language != "python"]


@pytest.mark.parametrize("block", SHELL, ids=[one.name for one in SHELL])
def test_what_is_made_of_an_example_is_a_script(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=script(block), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_line_that_begins_with_the_program_is_in_an_example() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        found = {line.strip() for one in blocks(page.name, text) for line in one.text.splitlines()}
        lines = {
            line.strip() for line in re.findall(r"(?m)^(?: {4}|\$ )?(vfio-mig [a-z-].*  .*|vfio-mig .*\$.*)$", text)
        }
        assert lines <= found, page.name


def test_a_new_example_is_run_without_being_named_and_a_listed_line_is_not() -> None:
    text = "Words\n\n    vfio-mig new $UUID\n    pipx install .\n\nWords\n\n```python\nprint(1)\n```\n"
    shell, python = sorted(blocks("page", text), key=lambda one: one.number)
    assert (shell.number, shell.to_run()) == (3, ["vfio-mig new $UUID"])
    assert "{ vfio-mig new $UUID; }" in script(shell)
    assert (python.number, python.language, python.text) == (8, "python", "print(1)\n")


def test_no_command_of_ours_is_listed_as_a_whole() -> None:
    assert all(why for why in ELSEWHERE.values())
    assert reason("vfio-mig save $UUID gpu.vfm") is None
    ours = [start for start in ELSEWHERE if start.startswith("vfio-mig")]
    assert all(len(start.split()) > 3 for start in ours)
    assert all(any(line.startswith(start) for one in EXAMPLES for line in one.lines()) for start in ours)


def test_a_line_that_says_its_exit_code_must_end_with_it() -> None:
    def code(command: str) -> int:
        return subprocess.run(["bash", "-c", script(Block("page", 1, "sh", command))], check=False).returncode

    assert code("(exit 1)   # 1 if they differ\n") == 0
    assert code("(exit 2)   # 1 if they differ\n") != 0
    assert code("true   # 1 if they differ\n") != 0
    assert code("false\ntrue\n") != 0
    assert code("false | true\n") != 0


def test_what_an_example_reads_is_told_from_what_it_makes() -> None:
    text = "vfio-mig diff a.vfm b.vfm\nvfio-mig save $UUID c.vfm\nvfio-mig pack parts d.vfm\nvfio-mig verify c.vfm\n"
    assert inputs_and_outputs(Block("page", 1, "sh", text)) == (["a.vfm", "b.vfm"], ["c.vfm", "d.vfm"])
