"""What the views show of a report."""

from __future__ import annotations

import pytest

from compressor.report import rows
from compressor.report.model import Perplexity
from tests.report.sample import sample_report


def test_headline_says_how_much_smaller_at_what_loss() -> None:
    """One sentence for the three states of a run."""
    expected = "2.31x smaller (269.0 MB -> 116.4 MB), perplexity +20.1% (22.32 -> 26.81)"
    assert rows.headline(sample_report()) == expected
    assert rows.headline(sample_report(passed=False)) == f"{expected}; 1 of 1 gates FAILED"
    assert rows.headline(sample_report(quality=False)).endswith("116.4 MB), quality not measured")


def test_headline_of_a_broken_result() -> None:
    """An infinite perplexity is said, not formatted away."""
    report = sample_report()
    assert report.quality is not None
    broken = Perplexity(source=22.3, result=float("inf"), increase=float("inf"), increase_ci95=None)
    quality = report.quality.model_copy(update={"perplexity": broken})
    shown = report.model_copy(update={"quality": quality})
    assert rows.headline(shown).endswith("perplexity infinite (22.30 -> infinite)")
    assert rows.quality_rows(quality)[0].change == "infinite"


def test_segments_add_up_to_the_bytes() -> None:
    """The bars show every byte once."""
    report = sample_report()
    before, after = rows.segments(report)
    assert sum(part.bytes for part in before) == report.source.bytes
    assert sum(part.bytes for part in after) == report.result.bytes
    assert [part.kind for part in after] == ["codes", "scales", "rest"]
    assert after[1].bytes == report.result.schemes["NVFP4A16"].scale_bytes


def test_task_rows_compare_with_their_error() -> None:
    """Difference, standard error, number of items; recovery only where higher is better."""
    quality = sample_report().quality
    assert quality is not None
    row = rows.quality_rows(quality)[-1]
    assert (row.measure, row.change) == ("piqa acc (n=1,838)", "-0.0196 (standard error 0.0081)")
    assert row.recovery == "97.1%"
    lower = quality.tasks["piqa"]["acc"].model_copy(update={"higher_is_better": False})
    assert rows.quality_rows(quality.model_copy(update={"tasks": {"t": {"ppl": lower}}}))[-1].recovery == "-"


def test_source_note_stands_in_the_captions() -> None:
    """No table of a dequantized source goes without saying so; an ordinary source says nothing."""
    report = sample_report()
    assert rows.size_caption(report).endswith("Source: dequantized from GGUF Q4_1.")
    assert rows.quality_caption(report).endswith("Source: dequantized from GGUF Q4_1.")
    plain = report.model_copy(update={"source": report.source.model_copy(update={"note": ""})})
    assert "Source:" not in rows.size_caption(plain) + rows.quality_caption(plain)


def test_cost_totals() -> None:
    """Times add up, memory peaks do not."""
    total = rows.stage_rows(sample_report())[-1]
    assert total == ("all", "3 min 5 s", "1.90 GB", "-", "")


def test_rows_of_an_empty_result() -> None:
    """Nothing quantized and no tensors: still no division by zero."""
    report = sample_report()
    empty = report.model_copy(
        update={
            "result": report.result.model_copy(update={"bytes": 0, "target_parameters": 0, "schemes": {}}),
            "stages": (),
        }
    )
    assert rows.headline(empty).startswith("no tensors (269.0 MB -> 0 bytes)")
    assert [row[0] for row in rows.gained_rows(empty)] == ["tensors", "bits per weight"]
    assert rows.stage_rows(empty) == [("all", "0.0 s", "0 bytes", "-", "")]


@pytest.mark.parametrize("quality", [True, False])
def test_quality_caption_names_text_and_tokens(quality: bool) -> None:
    """What was measured on what; or that nothing was."""
    caption = rows.quality_caption(sample_report(quality=quality))
    expected = "16,368 tokens of held-out prose, windows of 1,024" if quality else "evaluation was skipped"
    assert expected in caption


def test_caption_says_how_the_result_was_read() -> None:
    """Decoding done here, and activations left alone, are limits that a reader must see."""
    report = sample_report()
    assert report.quality is not None
    plain = rows.quality_caption(report)
    assert "by transformers" in plain
    assert "float32 on the text, in bfloat16 on the tasks" in plain
    assert "unquantized" not in plain
    limited = report.quality.model_copy(update={"loaded_via": "decoded", "activations_simulated": False})
    caption = rows.quality_caption(report.model_copy(update={"quality": limited}))
    assert "decoded by this program" in caption
    assert "Activations stayed unquantized" in caption
