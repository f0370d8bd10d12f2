"""Several runs side by side as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import isfinite

from compressor.report.drawing import BLUE, SERIES, Drawing, dress, page_figure, plain_name, svg_element
from compressor.report.html import environment
from compressor.report.layer_plot import layer_map
from compressor.report.side_by_side import LAYER_HEADS, Run, SideBySide
from compressor.report.words import percent

_GROUPS = {
    "size": "Size",
    "quality": "Quality",
    "tasks": "Tasks",
    "reach": "Context and cache",
    "speed": "Speed",
    "cost": "Cost",
}


def render_side_by_side(runs: Sequence[Run], compared: SideBySide) -> str:
    """The page: warnings, tables by kind of measure, quality against size, and maps of the layers' errors."""
    groups = [
        (_GROUPS[group], list(rows)) for group, rows in groupby(compared.rows, key=lambda row: row.group)
    ]
    return (
        environment()
        .get_template("side_by_side.html.j2")
        .render(
            names=compared.names,
            reports=[run.report for run in runs],
            groups=groups,
            warnings=compared.warnings,
            drawings_of_all=_size_drawing(runs),
            maps=_maps(runs),
            layer_heads=(*LAYER_HEADS, *compared.names),
            layers=compared.layers,
        )
    )


def _size_drawing(runs: Sequence[Run]) -> list[Drawing]:
    """Change of the perplexity against size: a point for each run that has both."""
    points = [
        (run.report.result.bytes / 1e6, 100 * run.report.quality.perplexity.increase, run.name)
        for run in runs
        if run.report.quality is not None and isfinite(run.report.quality.perplexity.increase)
    ]
    if len(points) < 2:
        return []
    figure, axes = page_figure(2.8)
    for index, (megabytes, increase, name) in enumerate(points):
        colour = SERIES[index % len(SERIES)]
        axes.plot([megabytes], [increase], "o", color=colour, ms=7)
        axes.annotate(
            plain_name(name), (megabytes, increase), xytext=(7, 4), textcoords="offset points", fontsize=8
        )
    axes.margins(x=0.3, y=0.2)
    axes.axhline(0, color=BLUE, lw=0.8, ls=":")
    dress(axes, "MB", "change of the perplexity, %")
    told = "; ".join(f"{name}: {x:,.1f} MB, {percent(y / 100, signed=True)}" for x, y, name in points)
    svg = svg_element(figure, "sizes", f"Change of the perplexity against size: {told}")
    return [Drawing("Quality against size", svg, "Down and to the left is better.")]


def _maps(runs: Sequence[Run]) -> list[Drawing]:
    """Errors of the weights, one map for each run, all on one scale."""
    lossy = [[row for row in run.report.weights.layers if row.relative_error > 0] for run in runs]
    scale = [row.relative_error for rows in lossy for row in rows]
    return [
        Drawing(run.name, layer_map(rows, lambda row: row.relative_error, f"errors of {run.name}", scale), "")
        for run, rows in zip(runs, lossy, strict=True)
        if rows
    ]
