"""Drawings: where things lie, how strong they are, and that names stay names."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from compressor.report.compounding import Ledger, Multiplier
from compressor.report.drawing import cut, map_svg, page_figure, plain_name, svg_element
from compressor.report.layer_plot import expert_drawing, kv_drawings, layer_drawings
from compressor.report.ledger_plot import ledger_drawing
from compressor.report.quality_plot import frontier_drawing, interval_drawing, sensitivity_drawing
from compressor.report.training_plot import adapter_svg, draft_svg
from tests.report.full import BUDGET, COMPOUNDING, LAYERS, MATRICES, full_report, layer_matrices
from tests.report.sample import ATTACK, sample_report

SVG = "{http://www.w3.org/2000/svg}"


def _parsed(svg: str) -> ElementTree.Element:
    """As XML; inside a page the namespaces are the page's."""
    return ElementTree.fromstring(
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) if "xmlns=" not in svg else svg
    )


def _shades(svg: str) -> list[float]:
    return [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', svg)]


def test_tiles_of_a_map_are_as_strong_as_their_logarithm() -> None:
    """The least is faint, the greatest full, a decade is a decade, and what is missing has no tile."""
    svg = map_svg(["0", "1", "2", "3"], [("a", [(0.001, "low"), (0.01, "middle"), (0.1, "high"), None])], "x")
    assert _shades(svg) == [0.08, 0.54, 1.0]
    assert [title.text for title in _parsed(svg).iter(f"{SVG}title")] == ["low", "middle", "high"]
    # zero and what is no number have an end of the scale each
    assert _shades(map_svg(["0", "1"], [("a", [(0.0, ""), (math.inf, "")])], "x")) == [0.08, 0.08]
    assert _shades(map_svg(["0", "1"], [("a", [(1.0, ""), (math.inf, "")])], "x")) == [0.54, 1.0]


def test_maps_of_several_runs_share_a_scale() -> None:
    """A map all of whose values are small is faint."""
    svg = map_svg(["0"], [("a", [(0.001, "")])], "x", [0.001, 1.0])
    assert _shades(svg) == [0.08]


def test_names_in_drawings_are_text() -> None:
    """Escaped, cut, and without what a font lacks or a formula begins with."""
    svg = map_svg([ATTACK], [(ATTACK, [(1.0, ATTACK)])], ATTACK)
    root = _parsed(svg)
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "text", "rect", "title")
    }
    name = plain_name(f"$x_{ATTACK}")
    assert name.isascii()
    assert name.startswith(r"\$x_<script>")
    assert len(name) <= 30
    assert cut("model.layers.10.mlp.down_proj", 12) == "...down_proj"


def test_a_matplotlib_drawing_takes_the_pages_colours() -> None:
    """Variables with what they are where the element stands alone; a label; no metadata; unique ids."""
    figure, axes = page_figure(2.0)
    axes.plot([0, 1], [0, 1], color="#2563eb")
    axes.set_title("a < b")
    svg = svg_element(figure, "salt", 'a "label"')
    assert 'role="img"' in svg
    assert "stroke: var(--codes, #2563eb)" in svg
    assert "<metadata>" not in svg
    assert "DejaVu" not in svg
    assert "a &lt; b" in svg
    assert _parsed(svg).get("aria-label") == 'a "label"'
    ids = [element.get("id") for element in _parsed(svg).iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    other = svg_element(figure, "other", "")
    assert not set(ids).intersection(re.findall(r'id="([^"]+)"', other))


def test_maps_of_layers() -> None:
    """Bits of all matrices, errors of those that have any, and nothing of a model that was left alone."""
    bits, weights, outputs = layer_drawings(layer_matrices())
    assert bits.svg.count('class="tile"') == LAYERS * len(MATRICES)
    assert weights.svg.count('class="tile"') == (LAYERS - 1) * len(MATRICES)
    assert outputs.svg.count('class="tile"') == LAYERS * (len(MATRICES) - 1)
    assert "4.50 to 16.00" in bits.caption
    assert "layer 23, mlp.down_proj: 0.03220 (NVFP4A16, 4.50 bits)" in weights.svg
    assert (
        layer_drawings([row for row in layer_matrices() if row.layer == 0])[0].title == "Error of the outputs"
    )
    assert layer_drawings(()) == []


def test_bars_of_a_ledger_follow_each_other() -> None:
    """In logarithms: what costs goes back, and the ends are the product's."""
    ledger = COMPOUNDING.ledgers[0]
    drawing = ledger_drawing(ledger)[0]
    bars = [
        (float(bar.get("x", "0")), float(bar.get("width", "0")), bar.get("class"))
        for bar in _parsed(drawing.svg).iter(f"{SVG}rect")
        if "fall" in str(bar.get("class"))
    ]
    scale = 340 / math.log(9)
    assert bars[0] == pytest.approx((0, scale * math.log(2), 0), abs=0.01) or bars[0][:2] == pytest.approx(
        (0, scale * math.log(2)), abs=0.01
    )
    assert bars[1][0] == pytest.approx(bars[0][1], abs=0.02)
    assert bars[1][0] + bars[1][1] == pytest.approx(340, abs=0.02)
    assert bars[2][0] == pytest.approx(scale * math.log(ledger.product), abs=0.02)
    assert [kind for *_, kind in bars] == ["fall model", "fall recipe", "fall worse"]
    assert "8.00 times fewer in all" in drawing.caption
    nothing = Multiplier(what="nothing", of="recipe", alone=1.0, factor=1.0, mark="computed")
    assert ledger_drawing(Ledger(resource="memory", title="x", before=1, after=1, steps=(nothing,))) == []


def test_drawings_where_there_is_something_to_draw() -> None:
    """Intervals, frontier, sensitivities, experts, cache, trainings: and nothing of nothing."""
    report = full_report()
    assert report.calibration is not None
    assert report.kv is not None
    assert report.adapters is not None
    assert report.drafts is not None
    drawn = [
        *(drawing.svg for drawing in interval_drawing(report)),
        *(drawing.svg for drawing in frontier_drawing(BUDGET)),
        *(drawing.svg for drawing in sensitivity_drawing(BUDGET)),
        *(drawing.svg for drawing in kv_drawings(report.kv)),
        expert_drawing(report.calibration).svg,  # type: ignore[union-attr]
        adapter_svg(report.adapters),
        draft_svg(report.drafts),
    ]
    assert len(drawn) == 7
    for svg in drawn:
        assert _parsed(svg).tag == f"{SVG}svg"
    assert "the gate's limit" in drawn[0]
    assert drawn[2].count('class="tile"') == len(BUDGET.groups)
    bare = sample_report(quality=False)
    assert interval_drawing(bare) == []
    assert bare.calibration is not None
    assert expert_drawing(bare.calibration) is None
    assert frontier_drawing(BUDGET.model_copy(update={"points": (), "frontier": ()})) == []
    assert sensitivity_drawing(BUDGET.model_copy(update={"groups": ()})) == []
    alike = report.kv.model_copy(update={"layers": report.kv.layers[1:2]})
    assert kv_drawings(alike) == []
