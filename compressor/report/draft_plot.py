"""The training of a draft head as a drawing: what is trained for, and tokens a pass, step by step."""

from __future__ import annotations

from math import isfinite

from compressor.report.drafts import DraftFacts
from compressor.report.long_plot import page_figure, svg_element

_TRAINED, _HELD_OUT = "#9ca3af", "#2563eb"
# Means of at most so many stretches are drawn: single steps are noise.
_POINTS = 200


def training_svg(facts: DraftFacts) -> str:
    """An SVG element with two panels; empty where nothing was trained."""
    how = facts.training
    if how is None or how.steps < 2:
        return ""
    figure, *_ = page_figure(2.4, panels=0)
    panels = figure.subplots(1, 2)
    told = (
        ("loss, nats", how.losses, how.before.loss, how.held_out_losses),
        ("tokens a pass", how.lengths, how.before.length, how.held_out_lengths),
    )
    for axes, (name, curve, before, measured) in zip(panels, told, strict=True):
        axes.plot(*_thinned(curve), color=_TRAINED, lw=1.0, label="trained on")
        steps = [0, *how.held_out_steps]
        found = [value if isfinite(value) else None for value in (before, *measured)]
        axes.plot(steps, found, color=_HELD_OUT, lw=1.4, marker=".", label="held out")
        axes.set_xlabel("steps")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e5e7eb")
    panels[0].legend(frameon=False, fontsize=8)
    return svg_element(figure, "draft-training")


def _thinned(curve: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """Steps and mean values of equal stretches."""
    count = min(_POINTS, len(curve))
    ends = [(part * len(curve) // count, (part + 1) * len(curve) // count) for part in range(count)]
    return (
        [(begin + end + 1) / 2 for begin, end in ends],
        [sum(curve[begin:end]) / (end - begin) for begin, end in ends],
    )
