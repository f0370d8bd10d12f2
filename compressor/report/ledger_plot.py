"""A ledger as a drawing: what each step leaves, on a scale of decades."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import log10
from xml.sax.saxutils import escape, quoteattr

from compressor.report.compounding import Ledger
from compressor.report.drawing import Drawing, cut
from compressor.report.words import number, visible

_WIDTH, _NAME_LINE, _BAR, _ROW = 340.0, 13.0, 9.0, 30.0
_MOST_LETTERS = 50


def ledger_drawing(ledger: Ledger) -> list[Drawing]:
    """A bar for each step, one after the other, back where it costs; nothing where nothing changes."""
    shown = [step for step in ledger.steps if step.factor > 0 and step.factor != 1]
    if not shown:
        return []
    ends = [0.0, *accumulate(log10(step.factor) for step in shown)]
    least, scale = min(ends), _WIDTH / (max(ends) - min(ends))
    height = _ROW * len(shown)
    label = f"{ledger.title}: {number(ledger.product, 2)} times fewer, step by step"
    drawn = [
        f'<svg role="img" aria-label={quoteattr(visible(label))} class="map" '
        f'viewBox="0 0 {_WIDTH:g} {height:g}">'
    ]
    for index, (step, (begin, end)) in enumerate(zip(shown, pairwise(ends), strict=True)):
        top = _ROW * index
        kind = "model" if step.of == "model" else "claimed" if step.mark == "claimed" else "recipe"
        drawn += [
            f'<text x="0" y="{top + _NAME_LINE - 3:g}">{escape(cut(step.what, _MOST_LETTERS))}</text>',
            f'<text x="{_WIDTH:g}" y="{top + _NAME_LINE - 3:g}" text-anchor="end">'
            f"{number(step.factor, 2)}x</text>",
            f'<rect class="track" x="0" y="{top + _NAME_LINE:g}" width="{_WIDTH:g}" height="{_BAR:g}"/>',
            f'<rect class="fall {"worse" if end < begin else kind}" y="{top + _NAME_LINE:g}" '
            f'x="{scale * (min(begin, end) - least):.2f}" width="{scale * abs(end - begin):.2f}" '
            f'height="{_BAR:g}"/>',
        ]
    caption = f"{number(ledger.product, 2)} times fewer in all. Lengths: logarithms; grey: the model's own."
    return [Drawing(ledger.title.capitalize(), "".join([*drawn, "</svg>"]), caption)]
