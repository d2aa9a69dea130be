# SPDX-License-Identifier: MIT
"""The program, and which modules it imports between two of its steps, in JSON: ``FILE FROM TO COMMAND…``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.cli import main
from vfio_mig.jobs.engine.events import Events

if TYPE_CHECKING:
    from collections.abc import Callable


_SECONDS: Final = 120


def stopped_window(directory: Path, source: str, target: str, *options: str) -> tuple[list[str], list[str]]:
    """Migrate, and return what each side imports from the source's stop on until the target runs.

    :param directory: for what this needs; nothing else uses it.
    """
    files = directory / "source.json", directory / "target.json"
    rsh = directory / "rsh"
    this = f"exec {sys.executable} -m tools.lab.imports {files[1]} waiting after-start"
    # What it is called with is a host and one line, whose first word is the program
    rsh.write_text(f'#!/bin/bash\ncase "$2" in *" restore "*) eval "{this} ${{2#* }}" ;; *) eval "exec $2" ;; esac\n')
    rsh.chmod(0o700)
    program = [sys.executable, "-m", "tools.lab.imports", str(files[0]), "before-stop", "sent"]
    events = ["--events", str(directory / "events")]
    command = [*program, *events, "migrate", source, f"ssh://here/{target}", "--rsh", str(rsh), *options]
    subprocess.run(command, check=True, timeout=_SECONDS)
    one, other = (json.loads(file.read_text()) for file in files)
    return one, other


def _watch(file: Path, begin: str, end: str) -> None:
    """See which modules there are at the two steps."""
    told: Callable[..., None] = Events.emit
    before: set[str] = set()

    def emit(self: Events, step: str, **more: Any) -> None:
        if step == end:
            file.write_text(json.dumps(sorted(set(sys.modules) - before)))
        told(self, step, **more)
        if step == begin:
            before.update(sys.modules)

    Events.emit = emit  # type: ignore[method-assign]


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), *sys.argv[2:4])
    sys.argv[1:4] = []
    main()
