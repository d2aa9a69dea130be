# SPDX-License-Identifier: MIT
from __future__ import annotations

import doctest
import re
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from tools.demo import picture
from tools.demo.picture import COLUMNS, ROWS, Line, svg

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "{http://www.w3.org/2000/svg}text"


def test_every_line_is_in_the_picture_escaped_and_no_wider_than_the_terminal() -> None:
    texts = ["A & B", "  $ run <it>", "  ok    " + "word " * 30, ""]
    lines = [Line(number * 3.0, text) for number, text in enumerate(texts)]
    drawn = [one.text or "" for one in ET.fromstring(svg(lines)).iter(TEXT)]  # noqa: S314 -- our own
    assert " ".join(drawn).split() == " ".join(texts).split()
    assert COLUMNS - 5 < max(map(len, drawn)) <= COLUMNS


def test_lines_come_in_their_order_and_what_does_not_fit_moves_up() -> None:
    text = svg([Line(number * 0.5, f"line {number}") for number in range(ROWS + 3)])
    starts = [float(one) for one in re.findall(r"@keyframes l\d+ \{ 0% \{ opacity: 0 \} ([\d.]+)%", text)]
    assert starts == sorted(starts)
    assert (len(starts), starts[0]) == (ROWS + 3, 0.0)
    assert len(re.findall(r"translateY\(-\d+px\)", text)) == 3
    assert svg([]).startswith("<svg")


def test_it_is_made_of_a_run_that_ends_well_only(tmp_path: Path) -> None:
    for code in (3, 0):
        file = tmp_path / f"{code}.svg"
        words = [sys.executable, "-c", f"print('  ok    done'); raise SystemExit({code})"]
        assert picture.main([str(file), *words]) == code
        assert file.exists() == (code == 0)
    assert 'class="ok"' in (tmp_path / "0.svg").read_text("utf-8")


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(picture)
    assert result.attempted > 0
    assert result.failed == 0
