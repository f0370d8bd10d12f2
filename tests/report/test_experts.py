"""What the views say of the tokens that experts were calibrated on."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.report import calibration_rows
from compressor.report.calibration import CalibrationFacts, ExpertCoverage
from compressor.report.card import render_card
from compressor.report.experts import EXPERT_HEADS, expert_notes, expert_rows
from compressor.report.html import render_html
from compressor.summary import _coverage
from tests.report.sample import RECIPE, sample_calibration, sample_report
from tests.report.test_calibration import printed

# As a receipt has it: four experts, of which one was sent nothing and one too little.
RECEIPT: dict[str, Any] = {
    "name": "model.layers.2.mlp.experts",
    "enough": 512,
    "tokens": [413, 0, 90_000, 2_000],
    "topped_up": [99, 512, 0, 0],
    "scored": True,
    "shared_range": True,
}


def _facts(**change: object) -> CalibrationFacts:
    """The sample with two layers of experts, the second changed so."""
    layers = (_coverage(RECEIPT), _coverage({**RECEIPT, "name": "model.layers.3.mlp.experts", **change}))
    return sample_calibration().model_copy(update={"experts": layers, "matrices": ()})


def test_coverage_of_a_receipt() -> None:
    """Counts, and fewest, median and most."""
    layer = _coverage(RECEIPT)
    assert layer.tokens == (0, 1206.5, 90_000)
    assert (layer.experts, layer.starved, layer.never_reached) == (4, 2, 1)
    assert (layer.topped_up, layer.topped_up_tokens) == (2, 611)
    assert ExpertCoverage.model_validate_json(layer.model_dump_json()) == layer


def test_rows_have_a_layer_each() -> None:
    """As many cells as heads."""
    found = expert_rows(_facts(tokens=[600, 700, 800, 900], topped_up=[0, 0, 0, 0]))
    assert found == [
        ("model.layers.2.mlp.experts", "4", "0 / 1,206 / 90,000", "2", "2", "1"),
        ("model.layers.3.mlp.experts", "4", "600 / 750 / 900", "0", "0", "0"),
    ]
    assert {len(row) for row in found} == {len(EXPERT_HEADS)}
    assert expert_rows(sample_calibration()) == []


def test_notes() -> None:
    """How many were starved, and what was done about it; whose ranges they have."""
    assert list(expert_notes(_facts())) == [
        "Starved experts, sent fewer than 512 tokens (an eighth of their inputs' width): 4 of 8; 2 were sent "
        "none. 4 were solved on 1,222 tokens more, which the router sent elsewhere, those with the highest "
        "scores for them; their output errors count these.",
        "Static input scales of experts are of what all experts of their layer were sent, the starved ones' "
        "too.",
    ]


@pytest.mark.parametrize("topped_up", [[99, 512, 0, 0], [0, 0, 0, 0]])
def test_scores_that_were_not_heard_are_told(topped_up: list[int]) -> None:
    """Then nothing is said of the highest."""
    told = list(expert_notes(_facts(scored=False, topped_up=topped_up)))
    assert "highest" not in told[0]
    assert told[1].startswith("What the router chooses by could not be heard in model.layers.3.mlp.experts: ")


def test_nobody_starved() -> None:
    """Then there is nothing to say, but for the ranges."""
    plenty = {"tokens": [600] * 4, "topped_up": [0] * 4}
    layer = _coverage(RECEIPT | plenty)
    facts = sample_calibration().model_copy(update={"experts": (layer,), "matrices": ()})
    text = "Static input scales of experts are of what all experts of their layer were sent."
    assert list(expert_notes(facts)) == [text]


def test_every_view_has_the_table() -> None:
    """Terminal and page; the card has the notes."""
    report = sample_report().model_copy(update={"calibration": _facts()})
    for view in (render_html(report), printed(report, 120)):
        assert "0 / 1,206 / 90,000" in view
        assert "never reached" in view
    assert "Starved experts" in render_card(report, RECIPE)
    assert calibration_rows.calibration_notes(_facts())[-2:] == list(expert_notes(_facts()))
