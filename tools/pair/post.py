# SPDX-License-Identifier: MIT
"""Words between the two VMs that are none of what is tested: JSON files in the results directory, which both share."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SECONDS: Final = 500.0
_POLL: Final = 0.1


def directory() -> Path:
    """Return the results directory."""
    return Path(os.environ["VFIO_MIG_VM_OUT"])


def put(name: str, value: Any) -> None:
    """Leave something, whole or not at all."""
    new = directory() / f"{name}.new"
    new.write_text(json.dumps(value))
    new.rename(directory() / name)


def take(name: str, seconds: float = SECONDS) -> Any:
    """Wait for something and take it away.

    :raises TimeoutError: it does not come.
    """
    path, end = directory() / name, time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"the other VM has left no {name!r} within {seconds:g} s")
        time.sleep(_POLL)
    value = json.loads(path.read_text())
    path.unlink()
    return value


def ask(what: str, value: Any = None, seconds: float = SECONDS) -> Any:
    """Have the other VM do something, and return its answer."""
    put(f"ask-{what}", value)
    return take(f"answer-{what}", seconds)


def asking_script(what: str, into: Path) -> Path:
    """Make a program that does the same, without the seconds that a Python takes to start in here."""
    where, path = directory(), into / f"ask-{what}"
    path.write_text(
        f"#!/bin/bash\necho null >'{where}/ask-{what}'\n"
        f"until [[ -e '{where}/answer-{what}' ]]; do sleep 0.1; done\nrm '{where}/answer-{what}'\n"
    )
    path.chmod(0o700)
    return path


def serve(answers: Mapping[str, Callable[[Any], Any]], seconds: float = SECONDS) -> None:
    """Answer what is asked, until it is ``end``.

    :raises TimeoutError: nothing is asked for so long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in sorted(directory().glob("ask-*")):
            what = path.name.removeprefix("ask-")
            if what.endswith(".new") or not path.stat().st_size:
                continue
            value = take(path.name)
            put(f"answer-{what}", None if what == "end" else answers[what](value))
            if what == "end":
                return
            end = time.monotonic() + seconds
        time.sleep(_POLL)
    raise TimeoutError(f"the other VM has asked nothing for {seconds:g} s")
