# SPDX-License-Identifier: MIT
"""A picture that moves, of what a command prints: ``python -m tools.demo.picture FILE.svg COMMAND…``.

COMMAND is run, and its output goes to stderr meanwhile. FILE is an SVG in which the lines come as they came, pauses cut
short, on a terminal of 80 columns; it repeats. UUIDs are $A, $B and so on there, as nobody reads them, and temporary
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
AT_END: Final = 6.0
"""Seconds for which the last lines stay."""
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
    """Draw the lines: each appears in its second, and all move up where there are more than ROWS."""
    shown = on_terminal(shortened(lines))
    total = (shown[-1].at if shown else 0.0) + AT_END
    width, height = COLUMNS * _WIDTH + 2 * _MARGIN, ROWS * _HEIGHT + 2 * _MARGIN
    styles, texts, moves = [_STYLE], [], ["0% { transform: translateY(0px) }"]
    for number, line in enumerate(shown):
        percent = line.at / total * 100
        styles.append(f"@keyframes l{number} {{ 0% {{ opacity: 0 }} {percent:.2f}%, 100% {{ opacity: 1 }} }}")
        styles.append(f"#l{number} {{ animation: l{number} {total:.2f}s step-end infinite }}")
        y = _MARGIN + (number + 1) * _HEIGHT - 4
        texts.append(f'<text id="l{number}" class="{line.style}" x="{_MARGIN}" y="{y}">{escape(line.text)}</text>')
        if number >= ROWS:
            moves.append(f"{percent:.2f}% {{ transform: translateY(-{(number - ROWS + 1) * _HEIGHT}px) }}")
    styles.append(f"@keyframes up {{ {' '.join(moves)} }}")
    box = f'viewBox="0 0 {width:.0f} {height}"'
    styles.append(f"#all {{ animation: up {total:.2f}s step-end infinite }}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" {box} role="img">',
            "<title>What the demonstration prints</title>",
            f"<style>\n{chr(10).join(styles)}\n</style>",
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
