# SPDX-License-Identifier: MIT
"""Maps and charts: every dirty page is in the picture, and a picture is a whole file or none."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_mig.cli import pictures
from vfio_mig.dirty.bitmap import Dirty
from vfio_mig.dirty.sync import Round
from vfio_mig.errors import UsageError
from vfio_mig.pictures import charts
from vfio_mig.pictures.charts import Segment
from vfio_mig.pictures.terminal import BLOCKS, COLUMNS, ROWS, cell_pages, cells, dirty_map, joined

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNKS = st.lists(st.tuples(st.integers(0, 3), st.binary(min_size=1, max_size=300)), min_size=1, max_size=4)
ROUND = Round(False, 10, 5, 1, 4, 0, 5 * 4096, 0.001, 0.01)


def chunks_of(drawn: list[tuple[int, bytes]]) -> list[Dirty]:
    made, at = [], 16
    for gap, bitmap in drawn:
        at += gap
        made.append(Dirty(at, len(bitmap) * 8, bitmap))
        at += len(bitmap) * 8
    return made


@given(CHUNKS)
def test_every_dirty_page_is_in_some_cell_and_no_cell_has_more(drawn: list[tuple[int, bytes]]) -> None:
    chunks = chunks_of(drawn)
    for cell in (1, 4, 8, 64, cell_pages(chunks)):
        counted = 0.0
        for _, run in joined(chunks):
            shares = cells(run, cell)
            assert all(0 <= share <= 1 for share in shares)
            sizes = [min(cell, one.nr_pages - first) for one in run for first in range(0, one.nr_pages, cell)]
            counted += sum(share * size for share, size in zip(shares, sizes, strict=True))
        assert round(counted) == sum(chunk.total() for chunk in chunks)


def test_a_single_dirty_page_among_millions_is_seen() -> None:
    chunk = Dirty(0, 1 << 22, bytes(1 << 18) + b"\x01" + bytes((1 << 18) - 1))
    lines = dirty_map([chunk])
    assert len(lines) == ROWS + 2
    assert [line for line in lines[:-2] if BLOCKS[0] in line] == [f"0x0200000000 │{BLOCKS[0]:<{COLUMNS}}│"]
    assert lines[-2].startswith("one cell: 4096 pages (16 MiB)")
    assert all(line.isascii() for line in dirty_map([chunk], unicode=False))


def test_ranges_with_a_gap_between_them_begin_a_line_each() -> None:
    lines = dirty_map([Dirty(0, 8, b"\xff"), Dirty(8, 8, b"\x00"), Dirty(32, 8, b"\x01")])
    assert lines[0] == f"0x0000000000 │{'█' * 8}{' ' * 8}│"
    assert lines[1] == f"0x0000020000 │█{' ' * 7}│"


@pytest.mark.parametrize("kind", charts.FORMATS)
def test_pictures_are_what_their_name_says_and_the_same_for_the_same_numbers(kind: str) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    charts.require()
    segments = [Segment("low", 0, 1 << 27, [(0, 4096)]), Segment("high", 1 << 30, 1 << 28, [])]

    def draw() -> list[bytes]:
        files = [io.BytesIO() for _ in range(3)]
        charts.draw_dirty_map([Dirty(0, 64, bytes(8)), Dirty(100, 8, b"\x0f")], "map", files[0], kind)
        charts.draw_rounds([ROUND, ROUND._replace(stopped=True)], "rounds", files[1], kind)
        charts.draw_layout(segments, "layout", files[2], kind)
        return [file.getvalue() for file in files]

    drawn = draw()
    for content in drawn:
        if kind == "png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ET.fromstring(content).tag.endswith("svg")  # noqa: S314 -- our own
    if kind == "png":
        assert draw() == drawn


def texts(draw: Callable[[io.BytesIO], None]) -> tuple[str, list[str]]:
    """Return a picture's words, and the labels of which a part lies beyond its edges."""
    import matplotlib as mpl
    from matplotlib.text import Text

    charts.require()
    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, mpl.rc_context({"svg.fonttype": "none"}):
        patch.setattr(charts, "_save", lambda figure, _file, _kind: figures.append(figure))
        draw(io.BytesIO())
        (figure,) = figures
        figure.set_dpi(100)
        figure.draw_without_rendering()
        shown = [one for one in figure.findobj(Text) if one.get_text() and one.get_visible()]
        edges = figure.bbox.padded(1)
        boxes = {one.get_text(): one.get_window_extent() for one in shown}
        outside = [name for name, box in boxes.items() if not (edges.contains(*box.min) and edges.contains(*box.max))]
        # a number of a scale that is out of its range is there, but not drawn
        outside = [name for name in outside if not name.replace(".", "").isdigit()]
    return "\n".join(one.get_text() for one in shown), outside


HIGH: Final = [Segment("high", 0xE0000000, 1 << 28, [])]
LONG: Final = "/x" * 99
PICTURES: Final[dict[str, tuple[Callable[[io.BytesIO], None], str]]] = {
    "a map of nothing": (lambda to: charts.draw_dirty_map([Dirty(0, 64, bytes(8))], LONG, to, "png"), "no page is"),
    "a map": (lambda to: charts.draw_dirty_map([Dirty(1 << 28, 64, b"\1" * 8)], LONG, to, "png"), "+0x20000"),
    "no rounds": (lambda to: charts.draw_rounds([], LONG, to, "png"), "there was no round"),
    "rounds": (lambda to: charts.draw_rounds([ROUND] * 9, LONG, to, "png"), "time of the round"),
    "nothing mapped": (lambda to: charts.draw_layout(HIGH, LONG, to, "png"), "nothing is mapped"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_what_it_is_and_that_it_is_of_nothing_and_no_label_is_cut(name: str) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    draw, words = PICTURES[name]
    said, outside = texts(draw)
    assert words in said
    assert outside == []
    assert "MiB," not in said


def test_a_picture_has_a_place_before_the_job_begins(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        pictures.prepare(str(tmp_path / "x.jpg"))
    (tmp_path / "there.png").touch()
    with pytest.raises(UsageError, match="exists"):
        pictures.prepare(str(tmp_path / "there.png"))
    pictures.prepare(None)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


def test_a_picture_is_a_new_file_of_this_user_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    names = [str(tmp_path / name) for name in ("map.png", "rounds.svg")]
    for name in names:
        pictures.prepare(name)
    pictures.plot_dirty(names[0], "gpu", [Dirty(0, 8, b"\x01")])
    pictures.plot_rounds(names[1], "gpu", [ROUND])
    pictures.plot_rounds(None, "gpu", [ROUND])
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600] * 2
    assert len(list(tmp_path.iterdir())) == 2
