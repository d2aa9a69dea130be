# SPDX-License-Identifier: MIT
"""QEMU's own streams in ``tests/data/qemu``."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from typing import Final

DATA: Final = Path(__file__).parents[1] / "data" / "qemu"
NAMES: Final = sorted(path.name.removesuffix(".mig.xz") for path in DATA.glob("*.mig.xz"))


@cache
def stream(name: str) -> bytes:
    """Return a stream as QEMU wrote it."""
    return lzma.decompress((DATA / f"{name}.mig.xz").read_bytes())
