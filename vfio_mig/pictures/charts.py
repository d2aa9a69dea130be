# SPDX-License-Identifier: MIT
"""PNG and SVG files, by matplotlib (the extra ``plot``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.errors import HostError, UsageError
from vfio_mig.pictures.terminal import cells, joined, size_text
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.sync import Round

FORMATS: Final = ("png", "svg")
_CELLS: Final = 128 * 64
_COLUMNS: Final = 128
_TITLE_MAX: Final = 90
"""Characters of a title that fit above the narrowest picture."""


class Segment(NamedTuple):
    """A piece of an address space: [start, start + size) in bytes, and how many bytes of it are mapped.

    :param mapped: (start, bytes) of what is mapped in it.
    """

    name: str
    start: int
    size: int
    mapped: Sequence[tuple[int, int]]


def format_of(path: str) -> str:
    """Return ``png`` or ``svg`` by a file's name.

    :raises UsageError: it is neither.
    """
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in FORMATS:
        raise UsageError(f"{path}: a picture is a .png or .svg file")
    return ending


def require() -> None:
    """Make sure that pictures can be drawn, before anything is done for one.

    :raises HostError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise HostError(
            "pictures need matplotlib", hint="pip install 'vfio_mig[plot]', or Debian's python3-matplotlib"
        ) from None
    mpl.use("agg")


def _new(width: float, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(short_title(title), fontsize=11)
    return figure, axes


def short_title(title: str) -> str:
    """Return a title that fits: of a longer one the end, behind an ellipsis.

    >>> short_title("/a" * 100)[:5], len(short_title("/a" * 100))
    ('…a/a/', 90)
    """
    return title if len(title) <= _TITLE_MAX else "…" + title[1 - _TITLE_MAX :]


def _say_nothing(axes: Any, text: str) -> None:
    """Say in the middle of a picture that there is nothing in it."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=12, color="#555555")


def _save(figure: Any, file: BinaryIO, kind: str) -> None:
    # No date in the file: the same numbers are the same picture
    figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})


def draw_dirty_map(chunks: Sequence[Dirty], title: str, file: BinaryIO, kind: str) -> None:
    """Draw the share of dirty pages over the guest's addresses, row by row; darker is more.

    :param chunks: in order of address; gaps between them are not drawn, the rows' labels tell.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    cell = 1
    while cell * _CELLS < sum(chunk.nr_pages for chunk in chunks):
        cell *= 2
    rows, labels = [], []
    for first, run in joined(chunks):
        shares = cells(run, cell)
        for at in range(0, len(shares), _COLUMNS):
            row = shares[at : at + _COLUMNS]
            rows.append(row + [float("nan")] * (_COLUMNS - len(row)))
            labels.append(f"{(first + at * cell) * PAGE:#x}")
    figure, axes = _new(10, max(2.2, min(0.12 * len(rows) + 1.6, 8)), title)
    percent = np.ma.masked_less_equal(np.array(rows) * 100, 0)  # also what is not there
    shades = LinearSegmentedColormap.from_list("dirty", ["#fb8861", "#b5367a", "#50127b", "#000004"])
    axes.imshow(np.isnan(rows), aspect="auto", cmap=ListedColormap(["#ffffff", "#dddddd"]), vmin=0, vmax=1)
    image = axes.imshow(percent, aspect="auto", cmap=shades, vmin=0, vmax=100, interpolation="nearest")
    step = max(1, len(rows) // 16)
    axes.set_yticks(range(0, len(rows), step), labels[::step], family="monospace", fontsize=8)
    axes.set_ylabel("guest-physical address")
    marks = range(0, _COLUMNS, _COLUMNS // 4)
    axes.set_xticks(marks, [f"+{at * cell * PAGE:#x}" for at in marks], family="monospace", fontsize=8)
    pages = "page" if cell == 1 else "pages"
    axes.set_xlabel(f"within the row; a cell is {size_text(cell * PAGE)} ({cell} {pages}), white if none is dirty")
    if not any(share > 0 for row in rows for share in row):
        _say_nothing(axes, "no page is dirty")
    figure.colorbar(image, ax=axes, label="dirty, %")
    _save(figure, file, kind)


def draw_rounds(rounds: Sequence[Round], title: str, file: BinaryIO, kind: str) -> None:
    """Draw what each round of copying dealt with, and what a stop would have cost after it."""
    figure, axes = _new(9, 4.5, title)
    numbers = list(range(1, len(rounds) + 1))
    bottom = [0] * len(rounds)
    for label, colour, values in (
        ("written", "#b5367a", [one.pages_written for one in rounds]),
        ("zero", "#fb8861", [one.pages_zero for one in rounds]),
        ("unchanged", "#cccccc", [one.pages_unchanged for one in rounds]),
    ):
        axes.bar(numbers, values, bottom=bottom, label=f"{label} pages", color=colour)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_xticks(
        numbers, [f"{number}\nstopped" if one.stopped else str(number) for number, one in enumerate(rounds, 1)]
    )
    axes.set_xlabel("round")
    axes.set_ylabel("dirty pages (4096 bytes each)")
    times = axes.twinx()
    times.plot(
        numbers, [one.estimated_downtime * 1e3 for one in rounds], "o-", color="#1f3b73", label="time of the round"
    )
    times.set_ylabel("ms")
    times.set_ylim(bottom=0)
    if not rounds:
        _say_nothing(axes, "there was no round")
    lines = [handle for one in (axes, times) for handle in one.get_legend_handles_labels()[0]]
    # below the axis' label; matplotlib 3.6 has no loc="outside …"
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
    axes.legend(lines, [line.get_label() for line in lines], ncols=4, fontsize=9, **place)
    _save(figure, file, kind)


def draw_layout(segments: Sequence[Segment], title: str, file: BinaryIO, kind: str) -> None:
    """Draw pieces of an address space, a line for each, with what is mapped in them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 1.3 * max(len(segments), 1)), layout="constrained")
    figure.suptitle(short_title(title), fontsize=11)
    for axes, one in zip(figure.subplots(len(segments), 1, squeeze=False)[:, 0], segments, strict=True):
        axes.set_facecolor("#eeeeee")
        axes.broken_barh(
            one.mapped, (0, 1), facecolors="#b5367a", edgecolors="#b5367a", linewidth=0.7
        )  # one page is seen
        axes.set_xlim(one.start, one.start + one.size)
        marks = [one.start + one.size * eighth // 8 for eighth in range(0, 9, 2)]
        axes.set_xticks(marks, [f"{mark:#x}" for mark in marks], family="monospace", fontsize=8)
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        total = size_text(sum(size for _, size in one.mapped))
        runs = "1 run" if len(one.mapped) == 1 else f"{len(one.mapped)} runs"
        axes.set_title(f"{one.name}: {size_text(one.size)} from {one.start:#x}; {total} mapped, {runs}", fontsize=9)
        axes.set_xlabel("graphics address", fontsize=9)
        if not one.mapped:
            _say_nothing(axes, "nothing is mapped")
    _save(figure, file, kind)
