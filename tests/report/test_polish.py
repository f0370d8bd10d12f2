"""What the views say of a polish."""

from __future__ import annotations

from compressor.report import calibration_rows
from compressor.report.calibration import CalibrationFacts, PolishFacts
from compressor.report.card import render_card
from compressor.report.html import render_html
from tests.report.sample import RECIPE, sample_calibration, sample_report


def _facts(*, kept: bool) -> CalibrationFacts:
    polish = PolishFacts(
        steps=300,
        kept=kept,
        kl_before=0.2,
        kl_after=0.15 if kept else 0.2,
        held_out_tokens=16384,
        scales=6_670_656,
        changed_16bit=("model.norm.weight",) if kept else (),
        seconds=90.6,
    )
    return sample_calibration().model_copy(update={"polish": polish})


def test_note() -> None:
    """Steps, seconds, both divergences and what they were measured on; that other errors are of before."""
    note = calibration_rows.calibration_notes(_facts(kept=True))[0]
    assert note.startswith("Polish: 300 steps in 91 s over 6,670,656 scales, norms and biases; ")
    assert "on 16,384 calibration tokens that it was not trained on: 0.20000 before, 0.15000 (-25.0%)" in note
    assert "before the polish" in note


def test_note_where_it_did_not_help() -> None:
    """That nothing of it is stored."""
    note = calibration_rows.calibration_notes(_facts(kept=False))[0]
    assert "no nearer" in note
    assert note.endswith("not kept.")


def test_in_every_view() -> None:
    """Card and page have the note; a report from before there was a polish has none."""
    report = sample_report().model_copy(update={"calibration": _facts(kept=True)})
    for text in (render_card(report, RECIPE), render_html(report)):
        assert "Polish: 300 steps" in text
    assert all("Polish" not in note for note in calibration_rows.calibration_notes(sample_calibration()))
    dumped = sample_calibration().model_dump(exclude={"polish"})
    assert CalibrationFacts.model_validate_json(CalibrationFacts(**dumped).model_dump_json()).polish is None
