"""Heatmaps as hand-written SVG: theme-aware colour classes, exact values on hover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

#: Number of colour classes .h0 ... in style.css, and the log10 range they span.
CLASSES = 9
_LOW, _HIGH = -3.0, 0.0


@dataclass(frozen=True)
class Panel:
    """title, and cells {(row, column): value}, value > 0."""

    title: str
    cells: Mapping[tuple[int, int], float]


def heat_class(value: float) -> int:
    """Colour class of an NMSE: logarithmic from 1e-3 to 1."""
    position = (math.log10(max(value, 1e-12)) - _LOW) / (_HIGH - _LOW)
    return min(CLASSES - 1, max(0, int(position * CLASSES)))


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Sequence[Panel],
    label: str,
    *,
    separators: Sequence[int] = (),
) -> str:
    """Panels side by side over the same rows; `separators` are rows with a gap before them."""
    height = 15 if len(rows) <= 80 else 9
    gap, left, top = 7, 8 + 6.1 * max(map(len, rows), default=0), 42
    cell = min(44.0, max(13.0, (960 - left) / max(1, len(panels) * (len(columns) + 1))))
    panel_width = cell * len(columns) + 22
    offsets = [top + i * height + gap * sum(s <= i for s in separators) for i in range(len(rows))]
    total_height = (offsets[-1] if offsets else top) + height + 8
    parts = []
    for y, text in zip(offsets, rows, strict=True):
        parts.append(_text(left - 8, y + height - 4, text, "end", "row"))
    for index, panel in enumerate(panels):
        x0 = left + index * panel_width
        parts.append(_text(x0, 14, panel.title, "start", "title"))
        tilted = max(map(len, columns), default=0) > 3
        for column, text in enumerate(columns):
            x = x0 + (column + 0.5) * cell
            parts.append(_text(x, 34, _fit(text, cell) if tilted else text, "middle", "column"))
        for (row, column), value in panel.cells.items():
            hint = f"{panel.title}: {rows[row]}, {columns[column]}: {value:.2e}"
            parts.append(
                f'<rect class="h{heat_class(value)}" x="{x0 + column * cell:.1f}" '
                f'y="{offsets[row]}" width="{cell - 1:.1f}" height="{height - 1}">'
                f"<title>{escape(hint)}</title></rect>"
            )
    width = left + panel_width * len(panels)
    return (
        f'<svg class="figure heatmap" role="img" aria-label="{escape(label)}" '
        f'style="max-width: {width:.0f}px" viewBox="0 0 {width:.0f} {total_height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def legend() -> str:
    """The colour scale, as HTML."""
    swatches = "".join(f'<i class="swatch h{index}"></i>' for index in range(CLASSES))
    return f'<p class="scale">error / signal energy: 10⁻³ {swatches} 1</p>'


def _fit(text: str, width: float) -> str:
    room = max(3, int(width / 5.4))
    return text if len(text) <= room else text[: room - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
