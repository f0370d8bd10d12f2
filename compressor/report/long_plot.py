"""Long context as drawings, narrow enough for a phone: likelihood by position, and what was found where."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from compressor.report.drawing import BLUE, GREY, ORANGE, dress, page_figure, svg_element
from compressor.report.long import LongFacts, cells_at, kilo, places

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "source": ("source", GREY, "-"),
    "sliding": ("source, sliding window", ORANGE, "--"),
    "result": ("result", BLUE, "-"),
}
# Nats above the result that a source which falls apart is still drawn at.
_ABOVE = 1.0
# From none found to all; none is a colour of the page's, since what is written on a tile keeps its own.
_COLOURS = ("#b81c1c", "#f59e0b", "#fde68a", "#86efac", "#14803d")
_DARK = (0.2, 0.9)  # shares beyond which the text on a colour is white


def nll_svg(facts: LongFacts) -> str:
    """An SVG element: tokens before across, mean negative log-likelihood upwards; empty without a text.

    A line that leaves the frame at its upper edge is the source's, beyond what it was trained at.
    """
    text = facts.text
    if text is None or len(text.curve.position) < 2:
        return ""
    drawn = {name: [value for value in means if isfinite(value)] for name, means in text.curve.nll.items()}
    everything = [value for values in drawn.values() for value in values]
    calm = [value for name, values in drawn.items() if name != "source" for value in values]
    if not everything:
        return ""
    figure, axes = page_figure(3.1)
    for name, means in text.curve.nll.items():
        label, colour, dashes = _NAMES[name]
        axes.plot(text.curve.position, means, dashes, color=colour, label=label, lw=1.4, gid=f"nll-{name}")
    low, top = min(everything), min(max(everything), max(calm or everything) + _ABOVE)
    axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
    axes.set_xlim(0, text.tokens)
    if text.window is not None:
        axes.axvline(text.window, color=GREY, lw=0.8, ls=":")
        axes.annotate(
            f" trained: {kilo(text.window)}",
            (text.window, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -10),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )
    step = max(1, text.tokens // 4)
    axes.set_xticks(ticks := list(range(0, text.tokens + 1, step)), [kilo(tick) for tick in ticks])
    dress(axes, "tokens before", "nats a token")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3, frameon=False, fontsize=8)
    return svg_element(figure, "long-nll", "Mean negative log-likelihood by tokens before, of each model")


def found_svg(facts: LongFacts, kind: str) -> str:
    """An SVG element: lengths across, depths downwards, for each model; empty where none was hidden."""
    lengths = [tokens for of, tokens in places(facts) if of == kind]
    if not lengths:
        return ""
    names = list(facts.needles)
    depths = sorted({cell.depth for cells in facts.needles.values() for cell in cells if cell.kind == kind})
    figure, *_ = page_figure(0.75 + 0.26 * len(depths), panels=0)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for column, tokens in enumerate(lengths):
            for cell in cells_at(facts, name, kind, tokens):
                _tile(axes, column, depths.index(cell.depth), cell.found, cell.trials, len(lengths))
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xticks(range(len(lengths)), [kilo(tokens) for tokens in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(f"{kind}, {name}", fontsize=9)
        axes.set_xlabel("tokens", fontsize=9)
    panels[0].set_ylabel("depth", fontsize=9)
    return svg_element(figure, f"long-{kind}", f"Share of every hidden {kind} found, by length and depth")


def _tile(axes: Axes, column: int, row: int, found: int, trials: int, columns: int) -> None:
    """A coloured cell; with how many were found where there is room."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    share = min(1.0, found / trials)
    colour = LinearSegmentedColormap.from_list("found", _COLOURS)(share)
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1)
    )
    written = f"{found}/{trials}" if columns <= 5 else f"{found}"
    white = not _DARK[0] <= share <= _DARK[1]
    axes.text(
        column, row, written, ha="center", va="center", fontsize=8, color="white" if white else "#111827"
    )
