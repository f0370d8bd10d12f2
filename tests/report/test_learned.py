"""What the views say of learned blocks."""

from __future__ import annotations

from compressor.report import calibration_rows
from compressor.report.calibration import LearnedBlock
from compressor.report.card import render_card
from compressor.report.learned import learned_note
from tests.report.sample import RECIPE, sample_calibration, sample_report

BLOCKS = (
    LearnedBlock(name="model.layers.0", before=0.004, after=0.003, tokens=512, skipped=None),
    LearnedBlock(name="model.layers.1", before=0.002, after=0.002, tokens=512, skipped=None),
    LearnedBlock(name="model.layers.2", before=None, after=None, tokens=0, skipped="that would take 9.0 GB"),
)


def test_note() -> None:
    """Means over the blocks that were measured, how many came nearer, and which were left alone."""
    note = learned_note(BLOCKS)
    assert "better than before in 1 of 2 blocks" in note
    assert (
        "on 512 calibration tokens that were not trained on: 0.00300 before, 0.00250 after (-16.7%)" in note
    )
    assert note.endswith("not done in 1 of 3 blocks, since that would take 9.0 GB.")
    assert "before" not in learned_note(BLOCKS[2:])


def test_in_the_views() -> None:
    """The card has the note; without learned blocks there is none."""
    facts = sample_calibration().model_copy(update={"blocks": BLOCKS})
    report = sample_report().model_copy(update={"calibration": facts})
    assert "Block reconstruction error" in render_card(report, RECIPE)
    assert all("Learned" not in note for note in calibration_rows.calibration_notes(sample_calibration()))
