"""Quality as drawings: changes of the perplexity with their intervals, and quality against size."""

from __future__ import annotations

from math import isfinite

from compressor.report.budget import BudgetFacts, BudgetPoint
from compressor.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Drawing,
    dress,
    map_svg,
    page_figure,
    plain_name,
    svg_element,
)
from compressor.report.model import Report
from compressor.report.words import number

_KINDS = {
    "uniform": ("one scheme for all", PURPLE, "s"),
    "random": ("random mixes", GREY, "x"),
    "tried": ("met on the way", ORANGE, "."),
    "chosen": ("chosen", GREEN, "*"),
}
_MOST_DOMAINS = 12


def interval_drawing(report: Report) -> list[Drawing]:
    """The change of the perplexity, of all and by domain, with 95% intervals and the gate's limit.

    Nothing without an interval: a single number needs no drawing.
    """
    quality = report.quality
    if quality is None or quality.perplexity.increase_ci95 is None:
        return []
    whole = quality.perplexity
    told = [("all", whole.increase, whole.increase_ci95)]
    told += [
        (domain.name, domain.increase, domain.increase_ci95)
        for domain in quality.domains[:_MOST_DOMAINS]
        if len(quality.domains) > 1
    ]
    told = [row for row in told if isfinite(row[1]) and all(map(isfinite, row[2] or ()))]
    if not told:
        return []
    figure, axes = page_figure(0.75 + 0.26 * len(told))
    for place, (_, increase, interval) in enumerate(told):
        low, high = interval or (increase, increase)
        axes.plot(
            [100 * low, 100 * high], [place, place], color=BLUE, lw=4, alpha=0.35, solid_capstyle="butt"
        )
        axes.plot([100 * increase], [place], "o", color=BLUE, ms=5)
    axes.axvline(0, color=GREY, lw=1)
    limits = [gate.max_increase for gate in report.gates if gate.metric == "perplexity"]
    for limit in limits:
        if limit is not None:
            axes.axvline(100 * limit, color=RED, lw=1, ls="--", label="the gate's limit")
            axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set_yticks(range(len(told)), [plain_name(name) for name, *_ in told])
    axes.set_ylim(len(told) - 0.5, -0.5)
    dress(axes, "change of the perplexity, %", "")
    svg = svg_element(figure, "intervals", "Change of the perplexity with 95% intervals")
    return [
        Drawing(
            "Change of the perplexity", svg, "Dots with 95% intervals; left of 0 is better than the source."
        )
    ]


def frontier_drawing(facts: BudgetFacts) -> list[Drawing]:
    """Loss against bits: the predicted frontier, and every mix that was measured."""
    line = [
        (point.bits_per_target_weight, point.predicted_kl)
        for point in facts.frontier
        if point.predicted_kl > 0
    ]
    points = [point for point in facts.points if _kl(point) > 0]
    if not line and not points:
        return []
    figure, axes = page_figure(3.1)
    if line:
        axes.plot(*zip(*line, strict=True), color=BLUE, lw=1.2, label="best mixes, predicted")
    for kind, (label, colour, marker) in _KINDS.items():
        found = [point for point in points if point.kind == kind]
        if found:
            bits, losses = [point.bits_per_target_weight for point in found], list(map(_kl, found))
            axes.plot(bits, losses, marker, color=colour, ms=10 if kind == "chosen" else 6, label=label)
        if kind == "uniform":
            for point in found:
                axes.annotate(
                    plain_name(point.label),
                    (point.bits_per_target_weight, _kl(point)),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
    axes.set_yscale("log")
    axes.margins(x=0.2)
    axes.legend(frameon=False, fontsize=8)
    dress(axes, "bits of a target weight", "KL from the source, nats a token")
    svg = svg_element(figure, "frontier", "Loss against bits: predicted frontier and measured mixes")
    caption = "Points are measured, or predicted where they were not; down and to the left is better."
    return [Drawing("Quality against size", svg, caption)]


def sensitivity_drawing(facts: BudgetFacts) -> list[Drawing]:
    """A map of the groups: what each would lose in its smallest scheme, layer by layer."""
    from compressor.report.parts import place

    told = {
        place(group.name): (
            least.cost,
            f"{group.name}: {number(least.cost, 6)} nats in {least.scheme}, {group.chosen} chosen",
        )
        for group in facts.groups
        if (least := min(group.options, key=lambda option: option.bytes, default=None)) is not None
        and least.cost is not None
    }
    if not told:
        return []
    layers = sorted({layer for layer, _ in told}, key=lambda layer: (layer is None, layer or 0))
    names = list(dict.fromkeys(name for _, name in told))
    rows = [(name, [told.get((layer, name)) for layer in layers]) for name in names]
    columns = ["-" if layer is None else str(layer) for layer in layers]
    svg = map_svg(columns, rows, "Map of sensitivities: nats a token in the smallest scheme")
    caption = (
        "Nats a token that a group adds in its smallest scheme, alone; the stronger the more, by decades."
    )
    return [Drawing("Sensitivity", svg, caption)]


def _kl(point: BudgetPoint) -> float:
    return point.predicted_kl if point.kl is None else point.kl
