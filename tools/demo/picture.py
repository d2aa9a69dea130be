# SPDX-License-Identifier: MIT
"""A picture that moves, of what a command prints: ``python -m tools.demo.picture FILE.svg COMMAND…``.

COMMAND is run, and its output goes to stderr meanwhile. FILE is an SVG of a terminal of 80 columns. The first screen is
there at once, so that whoever looks once, or sees no animation, has something to read; the other lines then come as
they came, pauses cut short; it repeats. UUIDs are $A, $B and so on there, as nobody reads them, and temporary
directories are left out. docs/demo.svg is made so, of ``scripts/demo --gvt``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

COLUMNS: Final = 80
ROWS: Final = 24
PAUSE_MAX: Final = 1.0
"""Seconds between two lines, at most, and at least *PAUSE_MIN*."""
PAUSE_MIN: Final = 0.4
AT_BEGIN: Final = 6.0
"""Seconds for which the first screen stays."""
AT_END: Final = 6.0
"""Seconds for which the last one stays."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TEMPORARY: Final = re.compile(r"/(?:dev/shm|tmp)/tmp\w+/")
_WIDTH, _HEIGHT, _MARGIN = 8.4, 18, 12
_STYLE: Final = """\
text { font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #d8dee9; white-space: pre }
.command { fill: #88c0d0 } .ok { fill: #a3be8c } .bad { fill: #bf616a } .step { fill: #eceff4; font-weight: bold }"""


class Line(NamedTuple):
    """A line of a terminal, the second in which it came, and the style that it is drawn in."""

    at: float
    text: str
    style: str = ""


def record(command: list[str]) -> tuple[list[Line], int]:
    """Run a command; returns what it printed to stdout, and its exit code."""
    began, lines = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # noqa: S101 -- for the type checker
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(Line(time.monotonic() - began, line.rstrip("\n")))
    return lines, process.returncode


def shortened(lines: list[Line]) -> list[Line]:
    """Give UUIDs names of one letter, in the order in which they come, and leave temporary directories out.

    >>> one, two = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
    >>> [line.text for line in shortened([Line(0, f"{one} /dev/shm/tmp_x1/a"), Line(1, f"{two} {one}")])]
    ['$A a', '$B $A']
    """
    names: dict[str, str] = {}

    def name(found: re.Match[str]) -> str:
        return names.setdefault(found[0], f"${chr(ord('A') + len(names))}")

    return [line._replace(text=_UUID.sub(name, _TEMPORARY.sub("", line.text))) for line in lines]


def on_terminal(lines: list[Line]) -> list[Line]:
    """Return the lines in COLUMNS, with pauses in which one can read and which nobody minds.

    >>> on_terminal([Line(0, "  ok    " + "word " * 16), Line(90, "b")])[1:]
    [Line(at=0.0, text='        word word', style='ok'), Line(at=1.0, text='b', style='step')]
    """
    shown: list[Line] = []
    at = 0.0
    for before, line in pairwise([Line(lines[0].at, ""), *lines] if lines else []):
        if shown:
            at += min(max(line.at - before.at, PAUSE_MIN), PAUSE_MAX)
        indent = " " * 8 if line.text.startswith(" ") else ""
        pieces = textwrap.wrap(line.text, COLUMNS, subsequent_indent=indent) or [""]
        shown += [Line(round(at, 2), piece, _style(line.text)) for piece in pieces]
    return shown


def _style(text: str) -> str:
    begin = text.split(" ", 4)
    if text.startswith("  $ "):
        return "command"
    if "ok" in begin[:3]:
        return "ok"
    if "FAIL" in begin[:3]:
        return "bad"
    return "step" if text and not text.startswith(" ") else ""


def svg(lines: list[Line]) -> str:
    """Draw the lines: a screen of ROWS at once, each further one in its second, when all move up."""
    shown = on_terminal(shortened(lines))
    rest = shown[ROWS:]
    begin = shown[ROWS - 1].at - AT_BEGIN if rest else 0.0
    total = (rest[-1].at - begin if rest else 0.0) + AT_END
    width, height = COLUMNS * _WIDTH + 2 * _MARGIN, ROWS * _HEIGHT + 2 * _MARGIN
    moves = ["0% { transform: translateY(0px) }"]
    moves += [
        f"{(line.at - begin) / total * 100:.2f}% {{ transform: translateY(-{number * _HEIGHT}px) }}"
        for number, line in enumerate(rest, 1)
    ]
    texts = [
        f'<text class="{line.style}" x="{_MARGIN}" y="{_MARGIN + number * _HEIGHT - 4}">{escape(line.text)}</text>'
        for number, line in enumerate(shown, 1)
    ]
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" {size} role="img">',
            "<title>What the demonstration prints</title>",
            f"<style>\n{_STYLE}\n@keyframes up {{ {' '.join(moves)} }}",
            f"#all {{ animation: up {total:.2f}s step-end infinite }}",
            "@media (prefers-reduced-motion) { #all { animation: none } }",
            "</style>",
            f'<clipPath id="screen"><rect y="{_MARGIN}" width="100%" height="{ROWS * _HEIGHT}"/></clipPath>',
            '<rect width="100%" height="100%" rx="6" fill="#2e3440"/>',
            '<g clip-path="url(#screen)"><g id="all">',
            *texts,
            "</g></g>",
            "</svg>",
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Run the command, and draw what it printed if it ends with 0."""
    file, *command = arguments
    lines, code = record(command)
    if code == 0:
        Path(file).write_text(svg(lines), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
