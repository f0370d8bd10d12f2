"""The drawing of quality against bits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from compressor.report.kv_plot import quality_svg

SVG = "{http://www.w3.org/2000/svg}"


def _record(name: str, bits: float, kl: float, tier: str = "vllm") -> dict[str, Any]:
    return {"format": name, "bits": bits, "kl": {"mean": kl}, "tier": tier}


def test_points_lie_where_their_numbers_say() -> None:
    """Fewer bits further left, more KL further up, decades alike; nothing outside; names escaped."""
    records = [
        _record("a<b", 4, 0.01),
        _record("c", 2, 0.1, "own"),
        _record("d", 8, 0.001),
        _record("bf16", 16, 0),
    ]
    drawn = ElementTree.fromstring(quality_svg(records))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in drawn.iter(f"{SVG}circle")]
    assert len(dots) == 3
    # From the top: the largest KL first.
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    steps = [after[1] - before[1] for before, after in pairwise(dots)]
    assert abs(steps[0] - steps[1]) < 0.2
    assert steps[0] > 0
    width, height = map(float, drawn.get("viewBox", "").split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in dots)
    words = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"a<b", "c", "d"} <= set(words)
    assert "bf16" not in words
    assert dots[1][0] - dots[0][0] == (dots[2][0] - dots[1][0]) / 2


def test_names_of_near_points_do_not_cover_each_other() -> None:
    """Equal points: names below each other."""
    drawn = ElementTree.fromstring(quality_svg([_record(name, 4, 0.01) for name in "abc"]))
    heights = [float(text.get("y", "")) for text in drawn.iter(f"{SVG}text") if text.text in ("a", "b", "c")]
    assert all(after - before >= 11 for before, after in pairwise(heights))


def test_nothing_to_draw() -> None:
    """16 bit alone has no point."""
    assert quality_svg([_record("bf16", 16, 0.0)]) == ""
    assert quality_svg([]) == ""
