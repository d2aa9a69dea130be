# SPDX-License-Identifier: MIT
"""What the command line would print, for a look at it."""

from __future__ import annotations

import io
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_PRINTED: Final = io.BytesIO()
_OUTPUT: Final = io.TextIOWrapper(_PRINTED, "utf-8")
"""One for all runs: click keeps every standard output that it has seen."""


@contextmanager
def printed() -> Iterator[list[str]]:
    """Take standard output away from a block; the list has its lines behind the block."""
    _PRINTED.seek(0)
    _PRINTED.truncate()
    lines: list[str] = []
    with redirect_stdout(_OUTPUT):
        yield lines
        _OUTPUT.flush()
    # Not splitlines(), which knows more ends of lines than a terminal does
    lines += _PRINTED.getvalue().decode().removesuffix("\n").split("\n")
