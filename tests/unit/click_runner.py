# SPDX-License-Identifier: MIT
"""click's test runner, the same for every version of click that is supported."""

from __future__ import annotations

import inspect
from typing import Any

from click.testing import CliRunner


def runner() -> CliRunner:
    """Make a runner that keeps stderr apart; click 8.1 does so only if it is told to, and later ones cannot be told."""
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart)
