"""Drafts in report, card, terminal, page and launch line."""

from __future__ import annotations

import io
import json
import shlex

import pytest

from compressor.drafts.spec import Kind
from compressor.report.card import render_card
from compressor.report.drafts import (
    DecodedDivergence,
    DecodedDomain,
    DecodedDraft,
    DraftDecoding,
    DraftFacts,
    DraftMeasure,
    DraftTraining,
    decoded_rows,
    draft_caption,
    draft_notes,
    draft_rows,
    held_out_rows,
)
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.serve import serve_facts
from compressor.report.terminal import print_report, report_console
from compressor.report.training_plot import draft_svg

from .sample import RECIPE, sample_report


def _measure(first: float) -> DraftMeasure:
    return DraftMeasure(
        loss=2.0, losses=(1.0, 1.2), accepted=(first, first / 2), places=400, length=1 + 1.5 * first
    )


TRAINING = DraftTraining(
    texts=("prose.jsonl", "code.jsonl"),
    rows=90,
    held_out_rows=8,
    sequence_length=128,
    written=6_272,
    temperature=0.8,
    looping=2,
    parameters=9_800_000,
    planned_steps=40,
    steps=32,
    best_step=16,
    batch=4,
    before=_measure(0.1),
    after=_measure(0.6),
    by_text={"prose.jsonl": _measure(0.5), "code.jsonl": _measure(0.7)},
    losses=tuple(3 - 0.05 * step for step in range(32)),
    lengths=tuple(1 + 0.02 * step for step in range(32)),
    held_out_steps=(8, 16, 24, 32),
    held_out_losses=(2.5, 2.0, 2.1, 2.2),
    held_out_lengths=(1.5, 1.9, 1.88, 1.85),
    seconds=61.0,
)


def _decoded(name: str, length: float, differing: int = 0) -> DecodedDraft:
    return DecodedDraft(
        name=name,
        length=length,
        rates=(0.5, 0.25),
        drafts=100,
        accepted_at=(50, 25),
        looping=0,
        divergences=(DecodedDivergence(prompt=0, at=3, gap=0.01),) * differing,
        wall_s=1.0,
        speedup=1.25,
        tokens=128,
        passes=70,
    )


def _domain(batch: int, *drafts: DecodedDraft) -> DecodedDomain:
    return DecodedDomain(domain="code", batch=batch, prompts=7, looping=1, plain_wall_s=1.25, drafts=drafts)


DECODING = DraftDecoding(
    tokens=2,
    new_tokens=128,
    temperature=0.0,
    runs=3,
    dtype="bfloat16",
    device="a machine",
    rounded=False,
    identical=False,
    domains=(
        _domain(1, _decoded("draft", 1.75), _decoded("repeat", 1.05)),
        _domain(8, _decoded("draft", 1.7, 2)),
    ),
)
FACTS = DraftFacts(
    kind="eagle3", tokens=2, bytes=19_600_000, model=None, training=TRAINING, decoding=DECODING
)


def test_every_view_shows_it() -> None:
    """Caption, tables and notes are in the card, on the page and in the terminal, and survive the file."""
    report = sample_report().model_copy(update={"drafts": FACTS})
    assert Report.from_json(report.to_json()) == report
    stream = io.StringIO()
    print_report(report, report_console(stream, width=200))
    for view in (render_card(report, RECIPE), render_html(report), stream.getvalue()):
        assert "9.8M numbers" in view
        assert "60.0% / 30.0%" in view
        assert "1.75" in view
        assert "32 of 40 steps" in view
        assert "6,272 tokens" in view
    assert "<svg" in render_html(report).partition("Drafts")[2]


def test_rows() -> None:
    """Held-out texts together and apart, before and after; means of equal stretches of the training."""
    assert held_out_rows(FACTS) == [
        ("all", "1.15", "1.90", "60.0% / 30.0%"),
        ("prose.jsonl", "-", "1.75", "50.0% / 25.0%"),
        ("code.jsonl", "-", "2.05", "70.0% / 35.0%"),
    ]
    assert len(draft_rows(FACTS)) == 8
    assert draft_rows(FACTS)[0] == ("1 to 4", "2.9250", "1.03")
    assert decoded_rows(FACTS) == [
        ("code", "1", "draft", "1.75", "50% 25%", "1.25x", "7 of 7"),
        ("code", "1", "repeat", "1.05", "50% 25%", "1.25x", "7 of 7"),
        ("code", "8", "draft", "1.70", "50% 25%", "1.25x", "5 of 7"),
    ]
    assert any("2 continuations differ" in note for note in draft_notes(FACTS))
    assert any("after step 16" in note for note in draft_notes(FACTS))


def test_a_layer_as_the_source_has_it() -> None:
    """Nothing was trained: no curve, and no figures from before."""
    how = TRAINING.model_copy(
        update={"planned_steps": 0, "steps": 0, "losses": (), "lengths": (), "by_text": {}, "written": 0}
    )
    facts = FACTS.model_copy(update={"kind": "native", "bytes": 0, "training": how, "decoding": None})
    assert held_out_rows(facts) == [("all", "-", "1.90", "60.0% / 30.0%")]
    assert (draft_rows(facts), decoded_rows(facts), draft_svg(facts)) == ([], [], "")
    assert draft_caption(facts).endswith("9.8M numbers, as the source has them")
    assert not any("kept" in note for note in draft_notes(facts))


def test_a_smaller_model() -> None:
    """It has no training, and is named."""
    facts = FACTS.model_copy(
        update={"kind": "draft_model", "model": "org/small", "training": None, "decoding": None}
    )
    assert "org/small, proposes 2 tokens" in draft_caption(facts)
    assert (held_out_rows(facts), draft_rows(facts)) == ([], [])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("eagle3", {"method": "eagle3", "model": "out/it's/draft"}),
        ("draft_model", {"method": "draft_model", "model": "out/it's/draft"}),
        ("native", {"method": "mtp"}),
    ],
)
def test_how_it_is_served(kind: Kind, told: dict[str, str]) -> None:
    """vLLM 0.32's option, as one word of the shell."""
    served = serve_facts("out/it's", ["NVFP4A16"], drafts=FACTS.model_copy(update={"kind": kind}))
    words = shlex.split(served.command)
    assert words[:3] == ["vllm", "serve", "out/it's"]
    assert json.loads(words[words.index("--speculative-config") + 1]) == {**told, "num_speculative_tokens": 2}
    assert any("few requests" in note for note in served.notes)
