"""Drawings of a report: SVG elements in the page's own colours, light and dark, narrow enough for a phone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from math import isfinite, log10
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from compressor.report.words import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What lines and points are drawn in; the page has a colour for each, in light and in dark.
GREY, BLUE, ORANGE, GREEN, PURPLE, RED = "#9ca3af", "#2563eb", "#d97706", "#15803d", "#7c3aed", "#b91c1c"
GRID = "#e5e7eb"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_VARIABLES = {
    "#000000": "ink",
    "#ffffff": "card",
    GRID: "line",
    GREY: "soft",
    BLUE: "codes",
    ORANGE: "scales",
    GREEN: "good",
    PURPLE: "purple",
    RED: "bad",
}
_WIDTH_INCHES = 4.2
_LONGEST_NAME = 28
# Text on a tile keeps its colour: tiles are the same in light and in dark.
_COLOURED = re.compile(r"(fill|stroke): (#[0-9a-f]{6})(?=[;\"])")
_FONT = re.compile(r"'DejaVu Sans'[^;\"]*")
# Names that matplotlib gives in every drawing alike, and refers to in none.
_GROUP = re.compile(r'<g id="[A-Za-z0-9.]+_\d+">')
# What a page has already, or has no use for.
_NEEDLESS = re.compile(
    r"\s*(?:<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->)", re.DOTALL
)

# Of a map: units of a drawing that is as wide as a phone.
_MAP_WIDTH, _MAP_NAMES, _MAP_ROW, _MAP_FOOT = 340.0, 112.0, 15.0, 17.0
_MAP_LETTERS = 20
_LEAST_SHADE = 0.08


@dataclass(frozen=True)
class Drawing:
    """An ``<svg>`` element in which every name is escaped, what it is called, and a line below it."""

    title: str
    svg: str
    caption: str


def page_figure(height: float, *, panels: int = 1) -> Any:
    """A figure of the page's width, and its axes where it has one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    return (figure, figure.add_subplot()) if panels else (figure,)


def dress(axes: Axes, across: str, upwards: str) -> None:
    """Names of the axes, a grid, and sizes that a phone shows."""
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(upwards, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def svg_element(figure: Figure, salt: str, label: str) -> str:
    """The text of one ``<svg>`` element, the same for the same drawing.

    Args:
        figure: with no background of its own that matters: the page's shows through.
        salt: of the names within the element, which must not be those of another on the page.
        label: what it shows, for people who do not see it.
    """
    from matplotlib import rc_context

    drawn = StringIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "svg.id": salt}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = _NEEDLESS.sub("", drawn.getvalue())
    text = _GROUP.sub("<g>", text)
    text = _COLOURED.sub(_themed, _FONT.sub("system-ui, sans-serif", text[text.index("<svg") :].strip()))
    return text.replace("<svg", f"<svg role={quoteattr('img')} aria-label={quoteattr(visible(label))}", 1)


def plain_name(name: str) -> str:
    """A stranger's name for a drawing: short, in letters that every font has, and no formula."""
    shown = visible(name).encode("ascii", "backslashreplace").decode()
    if len(shown) > _LONGEST_NAME:
        shown = f"{shown[: _LONGEST_NAME - 3]}..."
    return shown.replace("$", r"\$")


def map_svg(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[float, str] | None]]],
    label: str,
    scale: Sequence[float] | None = None,
) -> str:
    """An SVG element: a tile for every value, the stronger the greater, on a scale of decades.

    Args:
        columns: their names; as many are written as there is room for.
        rows: name, and for each column the value and what it is in words, or None for no tile.
        label: what it shows, for people who do not see it.
        scale: values whose least and greatest are the ends of the scale; those of the rows where None.
    """
    values = scale or [tile[0] for _, tiles in rows for tile in tiles if tile is not None]
    height = _MAP_ROW * len(rows) + _MAP_FOOT
    width = (_MAP_WIDTH - _MAP_NAMES) / max(len(columns), 1)
    gap = min(1.0, width / 6)
    drawn = [
        f'<svg role="img" aria-label={quoteattr(visible(label))} class="map" '
        f'viewBox="0 0 {_MAP_WIDTH:g} {height:g}">'
    ]
    for index, (name, tiles) in enumerate(rows):
        top = _MAP_ROW * index
        drawn.append(
            f'<text x="{_MAP_NAMES - 5:g}" y="{top + 10.5:g}" text-anchor="end">'
            f"{escape(cut(name, _MAP_LETTERS))}</text>"
        )
        for column, tile in enumerate(tiles):
            if tile is not None:
                drawn.append(
                    f'<rect class="tile" x="{_MAP_NAMES + column * width:.2f}" y="{top:g}" '
                    f'width="{width - gap:.2f}" height="{_MAP_ROW - 1:g}" '
                    f'fill-opacity="{_shade(tile[0], values):.2f}">'
                    f"<title>{escape(visible(tile[1]))}</title></rect>"
                )
    step = max(1, -(-len(columns) // 8))
    drawn += [
        f'<text x="{_MAP_NAMES + (index + 0.5) * width:.2f}" y="{height - 4:g}" text-anchor="middle">'
        f"{escape(visible(columns[index]))}</text>"
        for index in range(0, len(columns), step)
    ]
    return "".join([*drawn, "</svg>"])


def _shade(value: float, values: Sequence[float]) -> float:
    """Where a value lies between the least and the greatest, by its logarithm."""
    positive = [other for other in values if other > 0 and isfinite(other)]
    if not positive or value <= 0:
        return _LEAST_SHADE
    low, high = log10(min(positive)), log10(max(positive))
    where = 1.0 if not isfinite(value) else (log10(value) - low) / (high - low) if high > low else 0.5
    return _LEAST_SHADE + (1 - _LEAST_SHADE) * where


def cut(name: str, letters: int) -> str:
    """``visible(name)``; of a longer one the end, which tells matrices apart."""
    shown = visible(name)
    return shown if len(shown) <= letters else f"...{shown[3 - letters :]}"


def _themed(found: re.Match[str]) -> str:
    """A colour of the page's, which itself is used where the element stands alone."""
    where, colour = found.groups()
    variable = "soft" if (where, colour) == ("stroke", "#000000") else _VARIABLES.get(colour)
    if variable is None or (where, colour) == ("fill", "#ffffff"):
        return found[0]
    return f"{where}: var(--{variable}, {colour})"
