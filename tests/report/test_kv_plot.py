"""The drawing of quality against bits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from compressor.report.kv_plot import quality_svg

SVG = "{http://www.w3.org/2000/svg}"


def _record(name: str, bits: float, kl: float, tier: str = "vllm") -> dict[str, Any]:
    return {"format": name, "bits": bits, "kl": {"mean": kl}, "tier": tier}


def _points(drawn: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the dots lie, from the top."""
    found = [
        (float(use.get("x", "")), float(use.get("y", "")))
        for group in drawn.iter(f"{SVG}g")
        if (group.get("id") or "").startswith("tier-")
        for use in group.iter(f"{SVG}use")
    ]
    return sorted(found, key=lambda point: point[1])


def test_points_lie_where_their_numbers_say() -> None:
    """Fewer bits further left, more KL further up, decades alike; names escaped; 16 bit left out."""
    records = [
        _record("a<b$c$", 4, 0.01),
        _record("c", 2, 0.1, "own"),
        _record("d", 6, 0.001, "research"),
        _record("bf16", 16, 0),
    ]
    text = quality_svg(records)
    drawn = ElementTree.fromstring(text)
    dots = _points(drawn)
    assert len(dots) == 3
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(dots)]
    assert steps[0] == pytest.approx(steps[1], abs=0.01)
    assert min(steps[0]) > 0
    width, height = map(float, drawn.get("viewBox", "").split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in dots)
    words = {text.text for text in drawn.iter(f"{SVG}text")}
    assert {"a<b$c$", "c", "d"} <= words
    assert "bf16" not in words
    assert quality_svg(records) == text


def test_names_of_near_points_do_not_cover_each_other() -> None:
    """Equal points: names below each other."""
    drawn = ElementTree.fromstring(quality_svg([_record(f"format {name}", 4, 0.01) for name in "abc"]))
    heights = sorted(
        float(text.get("y") or text.get("transform", "").rsplit(" ", 1)[1].rstrip(")").split(",")[-1])
        for text in drawn.iter(f"{SVG}text")
        if (text.text or "").startswith("format ")
    )
    assert len(heights) == 3
    assert all(after - before >= 8.9 for before, after in pairwise(heights))


def test_nothing_to_draw() -> None:
    """16 bit alone has no point."""
    assert quality_svg([_record("bf16", 16, 0.0)]) == ""
    assert quality_svg([]) == ""
