# SPDX-License-Identifier: MIT
"""``python -m tools.bench startup|imports``: one benchmark; exit status 1 when its limit is not kept."""

from __future__ import annotations

import argparse
import sys

from tools.bench import startup


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("which", choices=("startup", "imports"))
    options = parser.parse_args()
    if options.which == "startup":
        return 0 if startup.measure() else 1
    from tools.bench import imports  # needs the VM

    return 0 if imports.report() else 1


if __name__ == "__main__":
    sys.exit(main())
