# SPDX-License-Identifier: MIT
from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tools.demo import picture
from tools.demo.picture import AT_BEGIN, AT_END, COLUMNS, ROWS, Line, svg

TEXT = "{http://www.w3.org/2000/svg}text"


def test_every_line_is_in_the_picture_escaped_and_no_wider_than_the_terminal() -> None:
    texts = ["A & B", "  $ run <it>", "  ok    " + "word " * 30, ""]
    lines = [Line(number * 3.0, text) for number, text in enumerate(texts)]
    drawn = [one.text or "" for one in ET.fromstring(svg(lines)).iter(TEXT)]  # noqa: S314 -- our own
    assert " ".join(drawn).split() == " ".join(texts).split()
    assert COLUMNS - 5 < max(map(len, drawn)) <= COLUMNS


def test_the_first_screen_is_there_at_once_and_each_further_line_moves_all_up() -> None:
    text = svg([Line(number * 0.5, f"line {number}") for number in range(ROWS + 3)])
    moves = re.findall(r"([\d.]+)% { transform: translateY\((-?\d+)px\) }", text)
    shares, places = [float(share) for share, _ in moves], [int(place) for _, place in moves]
    assert shares == sorted(shares)
    assert places == [0, -18, -36, -54]
    whole = AT_BEGIN + 3 * 0.5 + AT_END
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx((AT_BEGIN + 0.5) / whole * 100, abs=0.01)
    assert "opacity" not in text


@pytest.mark.parametrize("number", [0, 1, ROWS])
def test_what_fits_one_screen_stands_still(number: int) -> None:
    text = svg([Line(one, f"line {one}") for one in range(number)])
    assert text.count("translateY") == 1
    assert ET.fromstring(text).get("height") == "456"  # noqa: S314 -- our own


def test_it_is_made_of_a_run_that_ends_well_only(tmp_path: Path) -> None:
    for code in (3, 0):
        file = tmp_path / f"{code}.svg"
        words = [sys.executable, "-c", f"print('  ok    done'); raise SystemExit({code})"]
        assert picture.main([str(file), *words]) == code
        assert file.exists() == (code == 0)
    assert 'class="ok"' in (tmp_path / "0.svg").read_text("utf-8")


def test_the_lines_that_readme_shows_are_those_of_the_picture() -> None:
    root = Path(__file__).parents[2]
    drawn = [one.text for one in ET.fromstring((root / "docs/demo.svg").read_text("utf-8")).iter(TEXT)]  # noqa: S314 -- our own
    shown = re.findall(r"(?m)^ {4}(  ok    .*)$", (root / "README.md").read_text("utf-8"))
    assert len(shown) == 4
    assert set(shown) <= set(drawn)


def test_the_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(picture)
    assert result.attempted > 0
    assert result.failed == 0
