"""Figures that follow the page into dark mode: colours by role, filled in by CSS.

Matplotlib draws with sentinel colours, one per role; in the SVG each becomes a CSS
variable, whose light and dark values live in style.css.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

#: Role -> sentinel. Any colours would do that no figure needs for itself.
SENTINELS = {
    "ink": "#010101",
    "muted": "#010102",
    "grid": "#010103",
    "surface": "#010104",
    **{f"s{index}": f"#0102{index:02x}" for index in range(8)},
}

#: Arms whose colour is fixed, so that they look the same in every report.
_FIXED = {"full-precision": "s0", "omega": "s1", "rtn": "s2", "omega-paper": "s3"}


def arm_colours(labels: Sequence[str]) -> dict[str, str]:
    """Arm label -> role. Arms without a fixed colour take the free ones in turn."""
    free = [role for role in ("s4", "s5", "s6", "s7") if role not in _FIXED.values()]
    others = [label for label in labels if label not in _FIXED]
    roles = {label: free[index % len(free)] for index, label in enumerate(others)}
    return {label: _FIXED.get(label) or roles[label] for label in labels}


@contextmanager
def figure(width: float, height: float, **grid: Any) -> Iterator[tuple[Any, Any]]:
    """(figure, axes[rows, cols]) of that size in inches in the page's style; closed after.

    Uses the SVG canvas directly: no display, no pyplot, no global state.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = _style()
    with matplotlib.rc_context(style):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(made)
        axes = made.subplots(squeeze=False, **grid)
        yield made, axes


def to_svg(figure: Any, prefix: str, label: str) -> str:
    """The figure as inline SVG: scalable, themed, ids made unique by `prefix`.

    Must be called inside the `figure` context, whose settings decide how text is written.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    for role, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{role})")
    # Fonts by the page, not by what the drawing machine had installed.
    svg = re.sub(r"font: (\d+)? ?([\d.]+)px [^;\"]+", r"font-weight: \1; font-size: \2px", svg)
    svg = svg.replace("font-weight: ;", "")
    opening = re.sub(r' width="[^"]+" height="[^"]+"|height="[^"]+" |width="[^"]+" ', "", svg[:600])
    svg = opening + svg[600:]
    return svg.replace("<svg ", f'<svg class="figure" role="img" aria-label="{escape(label)}" ', 1)


def _style() -> dict[str, Any]:
    ink, muted, grid = SENTINELS["ink"], SENTINELS["muted"], SENTINELS["grid"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "omega-qvla",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
    }
