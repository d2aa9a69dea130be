# SPDX-License-Identifier: MIT
"""Write the table of checks into docs/conform.md: ``python -m tools.conform_table``; a unit test compares."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.registry import all_checks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.conform.kit.check import Check

DOCS: Final = Path(__file__).parents[1] / "docs/conform.md"
BEGIN: Final = "<!-- checks: python -m tools.conform_table -->"
END: Final = "<!-- end of checks -->"


def _group(check: Check) -> str:
    return ".".join(check.id.split(".")[:2])


def table() -> str:
    """Return one table per group of checks."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for name, checks in groupby(all_checks(), _group):
        yield f"### {name}\n\n| check | rule | expected | source |\n| --- | --- | --- | --- |"
        for check in checks:
            yield f"| `{check.id}` | {check.rule} | {check.expected} | {check.source} |"
        yield ""


def main() -> None:
    """Replace what stands between the two marks."""
    head, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    DOCS.write_text(f"{head}{BEGIN}\n\n{table()}\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    main()
