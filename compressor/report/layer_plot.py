"""Layers as drawings: errors and bits of every matrix, and what experts were sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compressor.report.calibration import CalibrationFacts
from compressor.report.drawing import BLUE, GREY, ORANGE, Drawing, dress, map_svg, page_figure, svg_element
from compressor.report.kv import KvFacts
from compressor.report.parts import LayerMatrix, error_range
from compressor.report.words import number


def layer_drawings(layers: Sequence[LayerMatrix]) -> list[Drawing]:
    """Maps, layers across and matrices downwards, of each figure that differs between them."""
    quantized = [row for row in layers if row.relative_error > 0]
    calibrated = [row for row in layers if row.output_error is not None]
    drawings = []
    if len({round(row.bits, 1) for row in layers}) > 1:
        found = [row.bits for row in layers]
        caption = f"Scales included, {min(found):.2f} to {max(found):.2f}; the stronger the more."
        drawings.append(
            Drawing("Bits of a weight", layer_map(layers, lambda row: row.bits, "bits of a weight"), caption)
        )
    if quantized:
        caption = (
            f"Squared error over squared norm, {error_range([row.relative_error for row in quantized])}; "
        )
        svg = layer_map(quantized, lambda row: row.relative_error, "relative squared error of the weights")
        drawings.append(Drawing("Error of the weights", svg, f"{caption}the stronger the more, by decades."))
    if calibrated:
        svg = layer_map(calibrated, lambda row: row.output_error or 0.0, "error of the output")
        shown = error_range([row.output_error or 0.0 for row in calibrated])
        caption = (
            f"What rounding added on the calibration tokens, {shown}; the stronger the more, by decades."
        )
        drawings.append(Drawing("Error of the outputs", svg, caption))
    return drawings


def expert_drawing(facts: CalibrationFacts) -> Drawing | None:
    """Tokens that the experts of each layer were sent, fewest to most; None without experts."""
    if not facts.experts:
        return None
    figure, axes = page_figure(2.2)
    places = range(len(facts.experts))
    least, middle, most = zip(*(layer.tokens for layer in facts.experts), strict=True)
    axes.vlines(places, [max(count, 0.5) for count in least], most, color=GREY, lw=3, label="fewest to most")
    axes.plot(places, middle, ".", color=BLUE, label="median")
    enough = [layer.enough for layer in facts.experts]
    axes.plot(places, enough, "--", color=ORANGE, lw=1, label="enough")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    dress(axes, "layers with experts", "tokens of an expert")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    label = "Calibration tokens of an expert, fewest, median and most, layer by layer"
    starved, experts = (
        sum(found) for found in zip(*((row.starved, row.experts) for row in facts.experts), strict=True)
    )
    caption = (
        f"{starved:,} of {experts:,} experts were sent fewer tokens than an eighth of their inputs' width."
    )
    return Drawing("", svg_element(figure, "experts", label), caption)


def kv_drawings(facts: KvFacts) -> list[Drawing]:
    """A map of the cache: bits of an element, layer by layer; nothing where all layers are alike."""
    if len({layer.format for layer in facts.layers}) < 2:
        return []
    tiles = [
        (layer.bits, f"layer {layer.layer}: {layer.format}, {layer.bits:.2f} bits") for layer in facts.layers
    ]
    svg = map_svg(
        [str(layer.layer) for layer in facts.layers], [("bits", tiles)], "Bits of the KV cache by layer"
    )
    low, high = min(bits for bits, _ in tiles), max(bits for bits, _ in tiles)
    caption = f"Layers with full attention; {low:.2f} to {high:.2f} bits an element, the stronger the more."
    return [Drawing("Bits by layer", svg, caption)]


def layer_map(
    rows: Sequence[LayerMatrix],
    of: Callable[[LayerMatrix], float],
    unit: str,
    scale: Sequence[float] | None = None,
) -> str:
    """Layers across, matrices downwards; what lies outside of layers has a column of its own.

    ``scale``: values whose least and greatest are the ends of the scale, where not those of the rows.
    """
    layers = sorted({row.layer for row in rows}, key=lambda layer: (layer is None, layer or 0))
    names = list(dict.fromkeys(row.matrix for row in rows))
    at = {(row.layer, row.matrix): row for row in rows}
    columns = ["-" if layer is None else str(layer) for layer in layers]
    tiles: list[tuple[str, list[tuple[float, str] | None]]] = []
    for name in names:
        found = [at.get((layer, name)) for layer in layers]
        tiles.append((name, [None if row is None else (of(row), _told(row, of(row))) for row in found]))
    return map_svg(columns, tiles, f"Map of layers and matrices: {unit}", scale)


def _told(row: LayerMatrix, value: float) -> str:
    where = row.matrix if row.layer is None else f"layer {row.layer}, {row.matrix}"
    return f"{where}: {number(value, 5 if value < 1 else 2)} ({row.scheme}, {row.bits:.2f} bits)"
