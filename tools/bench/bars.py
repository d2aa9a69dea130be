# SPDX-License-Identifier: MIT
"""The figures of :mod:`tools.bench.stopped` as a picture: for each comparison a bar for C, one for us, one for QEMU."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final, NamedTuple

from tools.bench.stopped import FRESH, MAPPED, MOVE, PHASES, TOTAL, Measured, Times, pinning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PIN: Final = "pin"
REST: Final = "rest"
QEMU: Final = "QEMU"
NAMES: Final = {
    "stop": "stop", "bitmap": "dirty bitmap", "read": "read the state", "load": "load the state",
    PIN: f"pin and map guest pages ({MAPPED})", "start": "start", REST: "not the driver's", QEMU: "QEMU, all of it",
}  # fmt: skip
_COLOURS: Final = {
    "stop": "#332288", "bitmap": "#117733", "read": "#88ccee", "load": "#ddcc77", PIN: "#cc6677", "start": "#44aa99",
    REST: "#882255", QEMU: "#999999",
}  # fmt: skip
_LEFT, _WIDTH, _ROW, _GAP, _HEAD, _MARGIN = 236, 600, 18, 12, 54, 10
_RIGHT: Final = 76
_STYLE: Final = "text { font: 12px system-ui, sans-serif; fill: #222 } .axis { fill: #666 } line { stroke: #ddd }"
_TICKS: Final = 6
_STEPS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Bar(NamedTuple):
    """One bar: what it is called, and (part, seconds) from left to right."""

    name: str
    parts: list[tuple[str, float]]

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(seconds for _, seconds in self.parts)


def _driver(one: Measured, times: Times, fresh_load: float | None) -> list[tuple[str, float]]:
    """Return the parts of the driver's time."""
    parts = []
    for phase in PHASES:
        seconds = times[phase]
        if phase == "load" and one.work == MAPPED and fresh_load is not None and fresh_load < seconds:
            parts += [(phase, fresh_load), (PIN, seconds - fresh_load)]
        else:
            parts.append((phase, seconds))
    return parts


def bars(measured: Sequence[Measured]) -> Iterator[tuple[str, list[Bar]]]:
    """Yield the bars of each comparison, and its name."""
    pinned = pinning(measured)
    loads = {one.interface: one.reference["load"] for one in measured if (one.job, one.work) == (MOVE, FRESH)}
    for one in measured:
        fresh_load = loads.get(one.interface) if one.interface in pinned else None
        driver = _driver(one, one.reference, fresh_load)
        found = [Bar("C", [*driver, (REST, max(0.0, one.reference[TOTAL] - one.driver))])]
        if one.ours:
            found.append(Bar("ours", [*_driver(one, one.our_driver, fresh_load), (REST, max(0.0, one.our_rest))]))
        if one.qemu is not None:
            found.append(Bar(QEMU, [(QEMU, one.qemu)]))
        yield one.name, found


def _step(most: float) -> int:
    """Return the ms between two lines of the axis."""
    return next((step for step in _STEPS if most * 1e3 / step <= _TICKS), _STEPS[-1])


def _legend(used: Sequence[str]) -> Iterator[str]:
    x, y = float(_MARGIN), _MARGIN
    for part in used:
        width = 22 + 6.6 * len(NAMES[part])
        if x + width > _LEFT + _WIDTH + _RIGHT:
            x, y = float(_MARGIN), y + _ROW
        yield f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{_COLOURS[part]}"/>'
        yield f'<text x="{x + 16:.0f}" y="{y + 10}">{escape(NAMES[part])}</text>'
        x += width


def _axis(most: float, bottom: int) -> Iterator[str]:
    step = _step(most)
    for tick in range(0, int(most * 1e3) + 1, step):
        x = _LEFT + tick / 1e3 / most * _WIDTH
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD}" y2="{bottom}"/>'
        yield f'<text class="axis" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick} ms</text>'


def _drawn(bar: Bar, y: int, scale: float) -> Iterator[str]:
    x = float(_LEFT)
    yield f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end">{escape(bar.name)}</text>'
    for part, seconds in bar.parts:
        if seconds > 0:
            title = f"{NAMES[part]}: {seconds * 1e3:.1f} ms"
            yield (
                f'<rect x="{x:.1f}" y="{y}" width="{seconds * scale:.1f}" height="14" fill="{_COLOURS[part]}">'
                f"<title>{escape(title)}</title></rect>"
            )
            x += seconds * scale
    yield f'<text x="{x + 5:.1f}" y="{y + 12}">{bar.seconds * 1e3:.0f} ms</text>'


def picture(measured: Sequence[Measured]) -> str:
    """Return an SVG; its text says everything that its colours do."""
    groups = list(bars(measured))
    most = max(bar.seconds for _, group in groups for bar in group)
    present = {part for _, group in groups for bar in group for part, seconds in bar.parts if seconds > 0}
    y, drawn = _HEAD + _GAP // 2, []
    for name, group in groups:
        drawn.append(f'<text x="{_MARGIN}" y="{y + 12}">{escape(name)}</text>')
        for bar in group:
            drawn += _drawn(bar, y, _WIDTH / most)
            y += _ROW
        y += _GAP
    width, height = _LEFT + _WIDTH + _RIGHT, y + 2 * _MARGIN + 4
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>How long a vGPU of kvmgt, Linux {escape(measured[0].kernel)}, stands still</title>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_legend([part for part in NAMES if part in present]),
        *_axis(most, y - _GAP // 2),
        *drawn,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
