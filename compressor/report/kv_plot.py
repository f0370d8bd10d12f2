"""Quality of KV-cache formats against their bits, as a drawing: one point for each format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (8.4, 4.8)
_LABEL_GAP = 9.0  # points between the lines of two names
_LABEL_WIDTH = 115.0  # points that the longest name takes
_TIERS = {"vllm": "#2563eb", "own": "#d97706", "research": "#059669"}
_SERVED = {"vllm": "vLLM 0.32", "own": "own cache", "research": "own cache, fitted"}
# Below this a KL is rounding: two float32 passes in another order.
_LEAST_KL = 1e-6


def quality_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """An SVG element: bits across, mean KL against a 16-bit cache upwards in decades.

    Args:
        records: of ``KvResult.to_json``, in any order; ``tier`` beside them colours the point. Formats with
            less than a millionth of a nat (16 bit itself) are left out.

    Returns:
        The text of one ``<svg>`` element, the same for the same records; empty where nothing is left to draw.
    """
    # Slow to import, and needed by few commands.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = [
        (record["bits"], record["kl"]["mean"], record["format"], record.get("tier", "vllm"))
        for record in records
        if record["kl"]["mean"] > _LEAST_KL
    ]
    if not points:
        return ""
    with rc_context({"svg.hashsalt": "kv", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for tier, colour in _TIERS.items():
            of_tier = [(bits, kl) for bits, kl, _, found in points if found == tier]
            if of_tier:
                bits, kls = zip(*of_tier, strict=True)
                axes.scatter(bits, kls, s=22, color=colour, label=_SERVED[tier], gid=f"tier-{tier}")
        axes.set_yscale("log")
        axes.set_xlim(0, max(bits for bits, *_ in points) + 2.5)
        axes.set_xlabel("bits of an element, scales and norms counted")
        axes.set_ylabel("mean KL against a 16-bit cache, nats")
        axes.grid(color="#e5e7eb")
        axes.legend(loc="lower left")
        figure.draw_without_rendering()  # names are placed by where the points lie
        _name_points(axes, points)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    # What goes before the element is not allowed inside a page.
    return drawn.getvalue()[drawn.getvalue().index("<svg") :].strip()


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Each point's name to its right, moved down where the one before it is too near."""
    scale = 72 / axes.figure.dpi
    at = [(axes.transData.transform(point[:2]) * scale, point) for point in points]
    taken: list[tuple[float, float]] = []
    for (x, y), (bits, kl, name, tier) in sorted(at, key=lambda point: -point[0][1]):
        near = [other for place, other in taken if abs(place - x) < _LABEL_WIDTH and other - _LABEL_GAP < y]
        label = min([y, *(other - _LABEL_GAP for other in near)])
        taken.append((x, label))
        written = axes.annotate(
            # A dollar sign would begin a formula.
            name.replace("$", r"\$"),
            (bits, kl),
            xytext=(6, label - y),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_TIERS.get(tier, "#374151"),
        )
        written.set_in_layout(False)  # the axes were laid out for the points
