# SPDX-License-Identifier: MIT
"""``python -m tools.bench NAME``: one benchmark, or the table of phases.

Exit status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.bench import startup


def _phases(file: Path | None, *, measures: bool) -> int:
    from tools.bench import phases  # to measure, it needs the VM

    if not measures and file is None:
        sys.exit("bench: table needs --json FILE")
    figures = [phases.measure()] if measures or file is None else phases.read(file)
    if measures and file is not None:
        phases.write(figures[0], file)
    print(phases.table(figures), end="")
    return 0


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "which", choices=("startup", "imports", "native", "kernel", "scale", "phases", "table", "downtime")
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append figures, a line each; table: read them")
    options = parser.parse_args()
    if options.which == "startup":
        return 0 if startup.measure() else 1
    if options.which == "imports":
        from tools.bench import imports  # needs the VM

        return 0 if imports.report() else 1
    if options.which == "scale":
        from tools.bench import scale  # needs the VM

        return 0 if scale.measure() else 1
    if options.which == "downtime":
        from tools.bench import downtime  # needs the VM

        return 0 if downtime.report() else 1
    if options.which in {"phases", "table"}:
        return _phases(options.json, measures=options.which == "phases")
    from tools.bench import table

    if options.which == "native":
        from tools.bench.native import measure
    else:
        from tools.bench.kernel import measure  # needs the VM
    rows = measure()
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(table.as_json(rows))
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
