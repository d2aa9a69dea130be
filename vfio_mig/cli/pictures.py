# SPDX-License-Identifier: MIT
"""``--plot``: what a command has found, as a picture in a new file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.sync import Round

rounds_plot_option = click.option(
    "--plot", "plot", metavar="FILE", help="Draw the rounds of copying memory to FILE (.png or .svg; needs matplotlib)."
)


def prepare(path: str | None) -> None:
    """Make sure, before a job begins, that its picture can be drawn and has a place.

    :raises UsageError: it exists, or is neither PNG nor SVG.
    :raises HostError: matplotlib is not installed.
    """
    if path is None:
        return
    from vfio_mig.image.files import check_target
    from vfio_mig.pictures.charts import format_of, require

    format_of(path)
    check_target(path, force=False)
    require()


def _write(path: str, draw: Callable[[BinaryIO, str], None]) -> None:
    from vfio_mig.image.files import committed
    from vfio_mig.pictures.charts import format_of

    target = committed(path)
    with target as file:
        draw(file, format_of(path))
        target.commit()


def plot_dirty(path: str | None, device: str, chunks: Sequence[Dirty]) -> None:
    """Draw a dirty map, if that was asked for."""
    if path is None:
        return
    from vfio_mig.pictures.charts import draw_dirty_map

    dirty, pages = sum(chunk.total() for chunk in chunks), sum(chunk.nr_pages for chunk in chunks)
    title = f"{device}: {dirty} of {pages} pages dirty"
    _write(path, lambda file, kind: draw_dirty_map(chunks, title, file, kind))


def plot_layout(path: str, name: str, parts: Sequence[dict[str, Any]]) -> None:
    """Draw the parts of a vGPU's graphics memory: ``part base size runs`` each, as a GVT-g state's section has them."""
    from vfio_mig.errors import printable
    from vfio_mig.pictures.charts import Segment, draw_layout

    segments = [
        Segment(one["part"], one["base"], one["size"], [(run["gma"], run["size"]) for run in one["runs"]["listed"]])
        for one in parts
    ]
    title = f"{printable(name)}: the guest's graphics memory"
    _write(path, lambda file, kind: draw_layout(segments, title, file, kind))


def plot_rounds(path: str | None, device: str, rounds: Sequence[Round]) -> None:
    """Draw rounds, if that was asked for."""
    if path is None:
        return
    from vfio_mig.pictures.charts import draw_rounds

    _write(path, lambda file, kind: draw_rounds(rounds, f"{device}: rounds of copying guest memory", file, kind))
