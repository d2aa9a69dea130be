# SPDX-License-Identifier: MIT
"""What the demonstrations have in common: claims that are checked, and commands that are shown."""

from __future__ import annotations

import json
import subprocess
from typing import Any


class Report:
    """Says what is done and what was found; counts what does not hold."""

    def __init__(self) -> None:
        self.failures = 0

    def step(self, text: str) -> None:
        """Announce a step."""
        print(f"\n{text}", flush=True)

    def check(self, text: str, holds: bool) -> None:
        """Print one claim and whether it holds."""
        print(f"  {'ok  ' if holds else 'FAIL'}  {text}", flush=True)
        self.failures += not holds

    def end(self) -> int:
        """Print the outcome and return the exit status."""
        print("\nAll checks hold." if not self.failures else f"\n{self.failures} checks FAILED.")
        return 1 if self.failures else 0


def run(*arguments: str) -> bytes:
    """Run the command as a user would, and return what it prints; a test may do it otherwise."""
    return subprocess.run(["vfio-mig", *arguments], stdout=subprocess.PIPE, check=True).stdout


def vfio_mig(*arguments: str) -> dict[str, Any]:
    """Show a command, run it, and return its JSON."""
    print(f"  $ vfio-mig {' '.join(arguments)}", flush=True)
    result: dict[str, Any] = json.loads(run("--json", *arguments))
    return result
