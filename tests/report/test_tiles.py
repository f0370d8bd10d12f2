"""The headline figures."""

from __future__ import annotations

import pytest

from compressor.report.card import render_card
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.tiles import tiles
from tests.report.full import UNCERTAIN, full_report
from tests.report.sample import RECIPE, sample_report


def test_every_figure_that_there_is() -> None:
    """In a fixed order, each once."""
    found = {tile.label: (tile.value, tile.detail, tile.tone) for tile in tiles(full_report())}
    assert found["Weights, times smaller"] == ("2.31x", "269.0 MB → 116.4 MB", "")
    assert found["Bits of a weight"] == ("4.50", "of those targeted; 6.92 of all", "")
    assert found["Perplexity"] == ("+20.1%", "22.32 → 26.81; 95%: +18.1% to +22.1%", "")
    assert found["Same next token"] == ("77.3%", "KL divergence 0.1834 nats a token", "")
    assert found["Tasks kept"] == ("97.1%", "of the source's piqa acc", "")
    assert found["Context"] == ("32K", "tokens instead of 8K", "")
    assert found["Tokens a pass"] == ("1.75", "1.25x as fast on code", "")
    assert found["Gates"] == ("1 of 2 passed", "1 uncertain", "")
    assert found["Verified"] == ("passed", "vllm 0.32.0: agrees", "good")
    assert found["Time"][0] == "3 min 5 s"
    assert len(found) == len(tiles(full_report()))


@pytest.mark.parametrize(
    "report, label, value, tone",
    [
        (sample_report(), "Gates", "1 passed", "good"),
        (sample_report(passed=False), "Gates", "1 FAILED", "bad"),
        (sample_report(quality=False), "Quality", "not measured", "bad"),
    ],
)
def test_verdicts_have_a_tone(report: Report, label: str, value: str, tone: str) -> None:
    """A failure is red on every view."""
    tile = next(tile for tile in tiles(report) if tile.label == label)
    assert (tile.value, tile.tone) == (value, tone)


def test_a_gate_that_says_neither_is_not_green() -> None:
    """UNCERTAIN is exported, but is no good news, and is not counted among those that passed."""
    report = sample_report().model_copy(update={"gates": (UNCERTAIN,)})
    tile = next(tile for tile in tiles(report) if tile.label == "Gates")
    assert (tile.value, tile.detail, tile.tone) == ("0 of 1 passed", "1 uncertain", "")


def test_tokens_a_pass_without_decoding_are_an_estimate() -> None:
    """As held-out texts foretell them; and of decoding, all domains count together."""
    report = full_report()
    assert report.drafts is not None
    assert report.drafts.decoding is not None
    estimated = report.drafts.model_copy(update={"decoding": None})
    both = report.drafts.decoding.domains[0].model_copy(update={"domain": "prose"})
    decoding = report.drafts.decoding.model_copy(update={"domains": (*report.drafts.decoding.domains, both)})
    measured = report.drafts.model_copy(update={"decoding": decoding})
    for drafts, said in (
        (estimated, ("1.90", "estimated on held-out texts")),
        (measured, ("1.75", "1.25x as fast on code, the fastest text")),
    ):
        found = tiles(report.model_copy(update={"drafts": drafts}))
        tile = next(tile for tile in found if tile.label == "Tokens a pass")
        assert (tile.value, tile.detail) == said


def test_page_and_card_show_the_same_figures() -> None:
    """One source of rows."""
    report = full_report()
    page, card = render_html(report), render_card(report, RECIPE)
    for tile in tiles(report):
        assert f"<strong>{tile.value}</strong>" in page
        assert f"| {tile.label} | {tile.value} |" in card
