# SPDX-License-Identifier: MIT
"""Images made for tests, and the command line on them."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from tests.unit.click_runner import runner
from tests.unit.test_image_gvt import CFG, GTT, ROOT, SREG, VREG, WORKLOAD, image
from vfio_mig.cli.main import cli
from vfio_mig.image.writer import ArchiveWriter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from click.testing import Result

HEADER: dict[str, Any] = {
    "protocol": "gvt-rfc",
    "device": {"name": "one", "kind": "mdev", "type": "GVTg_V4_8", "driver": "gvt"},
    "time": 1,
}
Memory = list[tuple[int, bytes | int]]


def write(
    path: Path,
    state: bytes | Sequence[bytes] = b"",
    memory: Memory | None = None,
    dirty: tuple[int, int, bytes] | None = None,
    header: dict[str, Any] | None = None,
) -> Path:
    """Write an image; a size in *memory* stands for zero pages."""
    with path.open("wb") as file:
        writer = ArchiveWriter(file, HEADER if header is None else header)
        if dirty is not None:
            writer.add_dirty(*dirty)
        for gpa, content in memory or []:
            if isinstance(content, int):
                writer.add_zero([(gpa, content)])
            else:
                writer.add_pages([(gpa, content)])
        for piece in [state] if isinstance(state, bytes) else state:
            writer.add_state(piece)
        writer.finish({"stop_time": 0.5})
    return path


def run(*arguments: str | Path) -> Result:
    return runner().invoke(cli, list(map(str, arguments)))


def text(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exception is None, result.exception
    return result.stdout


def js(*arguments: str | Path) -> Any:
    return json.loads(text("--json", *arguments))


def gvt_state(**payloads: bytes) -> bytes:
    kinds = {"cfg": 2, "sreg": 4, "vreg": 3, "gtt": 5, "ppgtt": 6, "workload": 7}
    whole = {"cfg": CFG, "sreg": SREG, "vreg": VREG, "gtt": GTT, "ppgtt": ROOT, "workload": WORKLOAD, **payloads}
    return image([(kinds[name], payload) for name, payload in whole.items()])


def patched(payload: bytes, **words: int) -> bytes:
    """Return a payload with 32-bit words at offsets, named ``at_HEX``."""
    changed = bytearray(payload)
    for name, value in words.items():
        struct.pack_into("<I", changed, int(name.removeprefix("at_"), 16), value)
    return bytes(changed)
