"""The compounding table in words: marks, units, gains; in every view; from a run's own measurements."""

from __future__ import annotations

import io

import pytest

from compressor.planner.compounding import compounding_facts
from compressor.planner.compounding_result import with_compounding
from compressor.planner.plan import make_plan
from compressor.recipe.load import load_recipe
from compressor.report.card import render_card
from compressor.report.compounding import (
    Cell,
    CompoundingFacts,
    CompoundingRow,
    Unit,
    amount,
    cell_number,
    cell_text,
    claim_rows,
    compounding_caption,
    compounding_rows,
    ledger_rows,
)
from compressor.report.drafts import DecodedDomain, DecodedDraft, DraftDecoding, DraftFacts, measured_passes
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.terminal import print_report, report_console
from tests.report.sample import RECIPE, sample_report


@pytest.fixture(scope="module")
def facts() -> CompoundingFacts:
    """Qwen3-32B's, with its claims."""
    found, reason = compounding_facts(make_plan(load_recipe("recipes/qwen3-32b-nvfp4.yaml"), planning=True))
    assert found is not None, reason
    return found


@pytest.mark.parametrize(
    ("unit", "value", "said"),
    [
        ("bytes", 141_107_412_992.0, "141.1 GB"),
        ("tokens", 131072.0, "131,072"),
        ("tokens/s", 1234.5, "1,234"),
        ("tokens/s", 47.31, "47.3"),
        ("tokens/s", 0.0123, "0.0123"),
        ("s", 0.0241, "24.1 ms"),
        ("s", 13.61, "13.6 s"),
        ("change", 0.0123, "+1.2%"),
        ("price", 0.0353, "0.0353"),
        ("price", float("nan"), "not a number"),
    ],
)
def test_amounts(unit: Unit, value: float, said: str) -> None:
    """Three digits at least, in units that people use."""
    assert amount(unit, value) == said


def test_cells_say_where_numbers_come_from() -> None:
    """With a mark, or the reason that there is none."""
    assert cell_text("users", Cell(value=6.0, mark="computed")) == "6 (computed)"
    assert cell_text("users", Cell(value=None, mark="computed", note="does not fit")) == "does not fit"
    assert cell_text("change", Cell(value=None, mark="not measured")) == "not measured"


def test_gains_point_the_right_way() -> None:
    """Fewer bytes and more tokens are gains; changes are none, nor is what is missing."""

    def row(unit: Unit, before: float | None, after: float | None) -> CompoundingRow:
        cells = [Cell(value=value, mark="computed") for value in (before, after)]
        return CompoundingRow(key="users", title="", unit=unit, baseline=cells[0], optimized=cells[1])

    assert row("bytes", 8.0, 2.0).gain == 4
    assert row("tokens/s", 8.0, 2.0).gain == 0.25
    assert row("users", 0.0, 2.0).gain is None
    assert row("tokens/s", None, 2.0).gain is None
    assert row("change", 1.0, 2.0).gain is None


def test_words_of_a_plan(facts: CompoundingFacts) -> None:
    """Every number is marked; claims stand beside what is computed; ledgers end with their product."""
    for _, before, after, _ in compounding_rows(facts):
        assert before == "reference" or before.endswith("(computed)")
        assert after.endswith("(computed)") or after == "not measured"
    assert claim_rows(facts)[0][1:] == ("4 to 6 -> 12 to 16", "6 -> 95", "not measured")
    assert "1 user of 4,096 tokens on h100-80gb (80.0 GB, 3350.0 GB/s)" in compounding_caption(facts)
    for ledger in facts.ledgers:
        if ledger.steps:
            assert ledger_rows(ledger)[-1][2] == f"{ledger.before / ledger.after:,.2f}x"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_view_has_the_table(facts: CompoundingFacts, width: int) -> None:
    """Terminal and card show what the facts hold; a report with them reads back; the page is made."""
    report = sample_report().model_copy(update={"compounding": facts})
    assert Report.from_json(report.to_json()) == report
    file = io.StringIO()
    print_report(report, report_console(file, width))
    shown = "".join(file.getvalue().split())
    card = render_card(report, RECIPE)
    # Where columns are narrow, a number and its mark are on lines of their own.
    for expected in (
        "20.7",
        "(computed)",
        "15.83x",
        *(["20.7GB(computed)", "4to6->12to16"] if width > 60 else []),
    ):
        assert expected in shown
    for expected in ("20.7 GB (computed)", "15.83x", "GPUs are a lower bound"):
        assert expected in card
    assert render_html(report)
    assert "Worth" not in render_card(sample_report(), RECIPE)


def decoded(name: str, batch: int, accepted: tuple[int, ...], drafts: int = 100) -> DecodedDomain:
    """A domain with one drafter."""
    draft = DecodedDraft(
        name=name,
        length=1 + sum(accepted) / drafts,
        rates=tuple(count / drafts for count in accepted),
        drafts=drafts,
        accepted_at=accepted,
        looping=0,
        divergences=None,
        wall_s=1.0,
        speedup=1.0,
        tokens=100,
        passes=50,
    )
    return DecodedDomain(domain="prose", batch=batch, prompts=1, looping=0, plain_wall_s=1.0, drafts=(draft,))


def test_measured_passes_count_all_proposals_of_the_smallest_batch() -> None:
    """Not the control's; weighted by proposals, so that a short domain counts little."""
    domains = (
        decoded("draft", 1, (80, 40)),
        decoded("draft", 1, (20, 0), drafts=20),
        decoded("repeat", 1, (0, 0)),
        decoded("draft", 8, (1, 0)),
    )
    decoding = DraftDecoding(
        tokens=2, new_tokens=8, temperature=0.0, runs=1, dtype="float32", device="cpu", identical=True,
        rounded=False, domains=domains,
    )  # fmt: skip
    plain = DraftFacts(kind="eagle3", tokens=2, bytes=1, model=None, training=None, decoding=decoding)
    assert measured_passes(plain) == pytest.approx(1 + 140 / 120)
    assert measured_passes(plain.model_copy(update={"decoding": None})) is None


def test_a_run_marks_what_it_measured() -> None:
    """Bytes of the result, perplexity and accuracy; the source's bytes too where they lie in files."""
    plan = make_plan(load_recipe("recipes/qwen3-32b-nvfp4.yaml"), planning=True)
    report = with_compounding(sample_report(), plan, None)
    assert report.compounding is not None
    rows = {row.key: row for row in report.compounding.rows}
    assert (rows["weights"].baseline.mark, rows["weights"].optimized.mark) == ("computed", "measured")
    assert sample_report().quality is not None
    assert rows["perplexity"].optimized.value == sample_report().quality.perplexity.increase
    assert rows["perplexity"].optimized.mark == "measured"
    assert rows["accuracy"].title == "piqa acc"
    # As in the table of quality: a difference, which no percentage of the source's figure is taken for.
    assert cell_number(rows["accuracy"].unit, rows["accuracy"].optimized) == "-0.0196"
    assert rows["accuracy"].gain is None
