"""Quality of KV-cache formats against their bits, as a drawing: one point for each format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 170, 16, 44
_LABEL_GAP = 12
_TIERS = {"vllm": "#2563eb", "own": "#d97706", "research": "#059669"}
# Below this a KL is rounding: two float32 passes in another order.
_LEAST_KL = 1e-6


def quality_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """An SVG element: bits across, mean KL against a 16-bit cache upwards in decades.

    Args:
        records: of ``KvResult.to_json``, in any order; ``tier`` beside them colours the point. Formats with
            less than a millionth of a nat (16 bit itself) are left out.

    Returns:
        The text of one ``<svg>`` element, with every label escaped; empty where nothing is left to draw.
    """
    points = [
        (
            float(record["bits"]),
            float(record["kl"]["mean"]),
            str(record["format"]),
            str(record.get("tier", "")),
        )
        for record in records
        if record["kl"]["mean"] > _LEAST_KL
    ]
    if not points:
        return ""
    most_bits = ceil(max(bits for bits, *_ in points))
    low, high = floor(log10(min(kl for _, kl, *_ in points))), ceil(log10(max(kl for _, kl, *_ in points)))
    high += high == low

    def across(bits: float) -> float:
        return _LEFT + bits / most_bits * (_WIDTH - _LEFT - _RIGHT)

    def down(kl: float) -> float:
        return _TOP + (high - log10(kl)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="mean KL against bits of each KV-cache format" font-family="sans-serif" font-size="11">'
    ]
    for bits in range(most_bits + 1):
        parts.append(_line(across(bits), _TOP, across(bits), _HEIGHT - _BOTTOM))
        parts.append(_text(across(bits), _HEIGHT - _BOTTOM + 16, str(bits), anchor="middle"))
    for decade in range(low, high + 1):
        parts.append(_line(_LEFT, down(10.0**decade), _WIDTH - _RIGHT, down(10.0**decade)))
        parts.append(_text(_LEFT - 6, down(10.0**decade) + 4, f"{10.0**decade:g}", anchor="end"))
    parts.append(
        _text(across(most_bits / 2), _HEIGHT - 8, "bits of an element, everything counted", anchor="middle")
    )
    parts.append(_text(4, _TOP - 4, "mean KL, nats"))
    parts += _points([(across(bits), down(kl), name, tier) for bits, kl, name, tier in points])
    return "\n".join([*parts, "</svg>"])


def _points(points: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """Dots, each with its name to the right, moved down where the name before it is too near."""
    parts, taken = [], []
    for x, y, name, tier in sorted(points, key=lambda point: point[1]):
        label = y + 4
        near = [
            other for place, other in taken if abs(place - x) < _RIGHT - 20 and other + _LABEL_GAP > label
        ]
        label = max([label, *(other + _LABEL_GAP for other in near)])
        taken.append((x, label))
        colour = _TIERS.get(tier, "#374151")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(x + 8, label, name, colour=colour))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e5e7eb"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#374151") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
