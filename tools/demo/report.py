# SPDX-License-Identifier: MIT
"""What the demonstrations have in common: claims that are checked, and commands that are shown with their replies.

Nothing that is printed is wider than a terminal of 80 columns. Devices are $A, $B and so on, as nobody reads UUIDs.
"""

from __future__ import annotations

import json
import subprocess
import textwrap
from typing import Any, Final

COLUMNS: Final = 80
_COMMAND: Final = "  $ "
_REPLY: Final = "    "


class Report:
    """Says what is done and what was found; counts what does not hold."""

    def __init__(self) -> None:
        self.failures = 0
        self._names: Final[dict[str, str]] = {}

    def name(self, device: str) -> str:
        """Return what a device is called here, the next letter if it is new."""
        known = sum(1 for one in self._names.values() if one)
        return self._names.setdefault(device, f"${chr(ord('A') + known)}")

    def leave_out(self, text: str) -> None:
        """Do not print a text that nobody reads, as that of a temporary directory."""
        self._names[text] = ""

    def begin(self, title: str, *lines: str) -> None:
        """Say what is shown, on which bench, and what could not be done without it."""
        self._put("", title)
        for line in lines:
            self._put("  ", line)

    def step(self, text: str) -> None:
        """Announce a step."""
        print(flush=True)
        self._put("", text)

    def note(self, text: str) -> None:
        """Say something that is no claim."""
        self._put("  ", text)

    def check(self, text: str, holds: bool) -> None:
        """Print one claim and whether it holds."""
        self._put(f"  {'ok  ' if holds else 'FAIL'}  ", text)
        self.failures += not holds

    def command(self, *words: str) -> None:
        """Show a command as a user types it, in lines that a shell would join."""
        shown = " ".join(map(self._short, words))
        lines = textwrap.wrap(
            shown, COLUMNS - len(_COMMAND) - 2, break_long_words=False, break_on_hyphens=False
        )  # room for the backslash
        for number, line in enumerate(lines):
            before = " " * len(_COMMAND) if number else _COMMAND
            print(before + line + (" \\" if number < len(lines) - 1 else ""), flush=True)

    def reply(self, text: str) -> None:
        """Show what a command replied."""
        for line in text.splitlines():
            self._put(_REPLY, line)

    def vfio_mig(self, *words: str) -> str:
        """Show a command, run it, show its reply, and return that."""
        self.command("vfio-mig", *words)
        said = reply_of(*words)
        self.reply(said)
        return said

    def end(self) -> int:
        """Print the outcome and return the exit status."""
        print("\nAll checks hold." if not self.failures else f"\n{self.failures} checks FAILED.")
        return 1 if self.failures else 0

    def _short(self, text: str) -> str:
        for device, name in self._names.items():
            text = text.replace(device, name)
        return text

    def _put(self, first: str, text: str) -> None:
        lines = textwrap.wrap(
            self._short(text), COLUMNS, initial_indent=first, subsequent_indent=" " * len(first),
            break_on_hyphens=False,
        )  # fmt: skip
        print("\n".join(lines), flush=True)


def run(*arguments: str) -> bytes:
    """Run the command as a user would, and return what it prints; a test may do it otherwise."""
    return subprocess.run(["vfio-mig", *arguments], stdout=subprocess.PIPE, check=True).stdout


def reply_of(*arguments: str) -> str:
    """Run the command, and return all that it says, on both its outputs; a test may do it otherwise."""
    done = subprocess.run(
        ["vfio-mig", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True
    )
    return done.stdout


def asked(*arguments: str) -> Any:
    """Ask without showing it, and return the JSON."""
    return json.loads(run("--json", *arguments))
