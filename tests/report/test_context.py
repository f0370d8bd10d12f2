"""Scaled positions in report, card, terminal, page and launch line."""

from __future__ import annotations

import io
from typing import Any

import pytest

from compressor.planner.context_result import written_fields
from compressor.report.card import render_card
from compressor.report.context import (
    ContextFacts,
    FactorSearch,
    ScalingCost,
    SearchGeneration,
    WrittenField,
    context_notes,
)
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.serve import serve_facts
from compressor.report.terminal import print_report, report_console

from .sample import RECIPE, sample_report

COST = ScalingCost(
    source=10.0,
    scaled=10.25,
    increase=0.025,
    increase_ci95=(0.02, 0.03),
    tokens=16_384,
    context=1024,
    text="calibration/heldout.jsonl",
    is_all=False,
)
FACTS = ContextFacts(
    method="yarn",
    factor=4.0,
    original_length=8192,
    target_length=32_768,
    length=32_768,
    fields=(WrittenField(name="max_position_embeddings", before="8192", after="32768"),),
    notes=("layers with a sliding window keep their frequencies",),
    cost=COST,
)
SEARCH = FactorSearch(
    objective="needle",
    tried=40,
    documents=(32_768, 32_768),
    yarn=SearchGeneration(long=3.1234, short=2.9, origin="YaRN"),
    generations=(SearchGeneration(long=3.0012, short=2.9, origin="child"),),
    held_out=(32_768,) * 4,
    difference=-0.05,
    short_difference=0.0,
    accepted=True,
)


def with_context(facts: ContextFacts) -> Report:
    """The sample with a longer context."""
    serve = serve_facts("out", ["NVFP4A16"], max_length=facts.length)
    return sample_report().model_copy(update={"context": facts, "serve": serve})


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_view_says_it(width: int) -> None:
    """Lengths, method, fields, what short prompts lose, the launch line in one piece."""
    report = with_context(FACTS.model_copy(update={"search": SEARCH}))
    stream = io.StringIO()
    print_report(report, report_console(stream, width))
    for text in (stream.getvalue(), render_card(report, RECIPE), render_html(report)):
        words = " ".join(text.replace("\\", "").split())
        assert ", reads 32,768 tokens instead of 8,192, perplexity" in words
        assert "Reads 32,768 tokens instead of 8,192: yarn, factor 4" in words
        assert "max_position_embeddings" in words
        assert "+2.5%" in words
        assert "3.0012" in words
        assert "compared with YaRN on 4 others, together 131,072 tokens" in words
        assert "vllm serve out --max-model-len 32768" in words
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "the quality table holds what quantization and other changes cost as well"),
        ({"cost": COST.model_copy(update={"is_all": True})}, "nothing else was changed"),
        ({"cost": None}, "was not measured"),
        ({"cost": COST.model_copy(update={"context": 16_384})}, "no figure of what short prompts lose"),
    ],
)
def test_the_cost_is_said_as_what_it_is(changed: dict[str, Any], said: str) -> None:
    """Scaling alone, all there is, nothing, or something else."""
    assert said in context_notes(FACTS.model_copy(update=changed))[-1]


def test_fields_that_differ() -> None:
    """Nested ones by their path; those that are gone, or new, too."""
    before = {"a": 1, "rope_theta": 1e4, "text": {"length": 5, "same": [1]}}
    after = {"a": 1, "rope": {"type": "yarn", "factor": 4.0}, "text": {"length": 9, "same": [1]}}
    found = [(field.name, field.before, field.after) for field in written_fields(before, after)]
    assert found == [
        ("rope.factor", "-", "4.0"),
        ("rope.type", "-", '"yarn"'),
        ("rope_theta", "10000.0", "-"),
        ("text.length", "5", "9"),
    ]
