"""Trainings as drawings, step by step: a draft head's, and that of adapters on long documents."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from compressor.report.adapters import AdapterFacts
from compressor.report.drafts import DraftFacts
from compressor.report.drawing import BLUE, GREY, ORANGE, dress, page_figure, svg_element

# Means of at most so many stretches are drawn: single steps are noise.
_POINTS = 200


def draft_svg(facts: DraftFacts) -> str:
    """An SVG element with two panels, loss and tokens a pass; empty where nothing was trained."""
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
        axes.plot(*_thinned(curve), color=GREY, lw=1.0, label="trained on")
        steps = [0, *how.held_out_steps]
        found = [value if isfinite(value) else None for value in (before, *measured)]
        axes.plot(steps, found, color=BLUE, lw=1.4, marker=".", label="held out")
        axes.set_title(name, fontsize=9)
        dress(axes, "steps", "")
    panels[0].legend(frameon=False, fontsize=8)
    return svg_element(
        figure, "draft-training", "Training of the draft head: loss and tokens a pass, by step"
    )


def adapter_svg(facts: AdapterFacts) -> str:
    """An SVG element: loss of all tokens, and of the answers to hidden facts; empty of a single step."""
    if len(facts.losses) < 2:
        return ""
    figure, axes = page_figure(2.4)
    axes.plot(*_thinned(facts.losses), color=BLUE, lw=1.4, label="all tokens")
    asked = [
        (step + 1, loss) for step, loss in enumerate(facts.answers) if loss is not None and isfinite(loss)
    ]
    if asked:
        steps, losses = zip(*asked, strict=True)
        axes.plot(
            steps, losses, color=ORANGE, lw=1.0, ls="--", marker=".", ms=3, label="answers to hidden facts"
        )
        axes.legend(frameon=False, fontsize=8)
    dress(axes, "steps", "nats a token")
    return svg_element(figure, "adapter-training", "Training on long documents: loss by step")


def _thinned(curve: Sequence[float]) -> tuple[list[float], list[float]]:
    """Steps and mean values of equal stretches."""
    count = min(_POINTS, len(curve))
    ends = [(part * len(curve) // count, (part + 1) * len(curve) // count) for part in range(count)]
    return (
        [(begin + end + 1) / 2 for begin, end in ends],
        [sum(curve[begin:end]) / (end - begin) for begin, end in ends],
    )
