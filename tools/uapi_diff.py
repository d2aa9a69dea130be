# SPDX-License-Identifier: MIT
"""Show how two headers differ in the numbers that matter here: ``python -m tools.uapi_diff OLD.h NEW.h``.

Prints one line per constant, ioctl or enumerator: ``- NAME VALUE`` only in OLD, ``+ NAME VALUE`` only in NEW,
``! NAME OLD NEW`` changed. Then says whether each can serve as ``vfio-mig --uapi-header``. Only
VFIO's and the RFC's names are shown, unless ``--all`` is given.

Exit status: 0 no difference, 1 a difference, 2 a header cannot be read.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import TYPE_CHECKING, Final

from vfio_mig.errors import VfioMigError
from vfio_mig.jobs.files.header import load_profile, read_header
from vfio_mig.uapi.profile import parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PREFIXES: Final = ("VFIO_", "MIGRATION_", "GVT_")


def differences(old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[str]:
    """Yield one line per name that is not the same in both, in order of name."""
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"- {name} {old[name]:#x}"
        elif name not in old:
            yield f"+ {name} {new[name]:#x}"
        elif old[name] != new[name]:
            yield f"! {name} {old[name]:#x} {new[name]:#x}"


def usable(path: str) -> str:
    """Say whether ``--uapi-header`` takes a header, and why not."""
    try:
        load_profile(path)
    except VfioMigError as error:
        return f"{path}: not for --uapi-header: {error.problem.removeprefix(f'{path} ')}"
    return f"{path}: has all that --uapi-header needs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two headers."""
    parser = argparse.ArgumentParser(prog="uapi_diff", description="Show how two VFIO headers differ in their numbers.")
    parser.add_argument("old", metavar="OLD.h")
    parser.add_argument("new", metavar="NEW.h")
    parser.add_argument("--all", action="store_true", help="show every name, not only VFIO's and the RFC's")
    options = parser.parse_args(arguments)
    try:
        old, new = (parse_header(read_header(path)) for path in (options.old, options.new))
    except VfioMigError as error:
        print(f"uapi_diff: {error}", file=sys.stderr)
        return 2
    if not options.all:
        old, new = ({name: values[name] for name in values if name.startswith(PREFIXES)} for values in (old, new))
    lines = list(differences(old, new))
    for line in lines:
        print(line)
    for path in (options.old, options.new):
        print(usable(path), file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as any filter: `| head` ends us quietly
    sys.exit(main())
