# SPDX-License-Identifier: MIT
"""``python -m tools.bench NAME``: one benchmark, the table of phases, or tables and picture of stopped windows.

Exit status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Final

_VERDICTS: Final = {"startup": "measure", "imports": "report", "scale": "measure", "downtime": "report"}
"""Benchmarks that print and say whether their goals are met, and the function that does it. All but the first need the
VM, also to be imported."""
_ROWS: Final = ("native", "kernel")


def _phases(file: Path | None, *, measures: bool) -> int:
    from tools.bench import phases  # to measure, it needs the VM

    if not measures and file is None:
        sys.exit("bench: table needs --json FILE")
    figures = [phases.measure()] if measures or file is None else phases.read(file)
    if measures and file is not None:
        phases.write(figures[0], file)
    print(phases.table(figures), end="")
    return 0


def _stopped(interfaces: list[str], file: Path | None) -> int:
    from tools.bench import stopped  # to measure, it needs the VM

    if file is None:
        sys.exit("bench: stopped needs --json FILE")
    for one in stopped.measure(interfaces):
        stopped.write(one, file)
    return 0


def _windows(file: Path | None, svg: Path | None) -> int:
    from tools.bench import bars, stopped

    if file is None:
        sys.exit("bench: windows needs --json FILE")
    found = stopped.read(file)
    print(stopped.text(found), end="")
    if svg is not None:
        svg.write_text(bars.picture(found))
    return 0 if all(one.met for one in found) else 1


def _rows(name: str, file: Path | None) -> int:
    from tools.bench import table

    rows = importlib.import_module(f"tools.bench.{name}").measure()
    if file is not None:
        with file.open("a") as out:
            out.write(table.as_json(rows))
    return 1 if any(row.met is False for row in rows) else 0


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("which", choices=(*_VERDICTS, *_ROWS, "phases", "table", "stopped", "windows"))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append figures, a line each; table and windows: read them"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="windows: draw them, too")
    parser.add_argument("--interface", choices=("RFC", "v2"), action="append", help="stopped: of kvmgt; default: both")
    options = parser.parse_args()
    name = options.which
    if name in _VERDICTS:
        return 0 if getattr(importlib.import_module(f"tools.bench.{name}"), _VERDICTS[name])() else 1
    if name in _ROWS:
        return _rows(name, options.json)
    if name == "stopped":
        return _stopped(options.interface or ["RFC", "v2"], options.json)
    if name == "windows":
        return _windows(options.json, options.svg)
    return _phases(options.json, measures=name == "phases")


if __name__ == "__main__":
    sys.exit(main())
