"""Training on long documents in report, card, terminal, page and launch line."""

from __future__ import annotations

import io
from typing import Any

import pytest

from compressor.report.adapters import AdapterFacts, adapter_caption, adapter_notes, adapter_rows
from compressor.report.card import render_card
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.serve import serve_facts
from compressor.report.terminal import print_report, report_console

from .sample import RECIPE, sample_report

FACTS = AdapterFacts(
    rank=17,
    layers=120,
    targets=("k_proj", "q_proj"),
    norms=True,
    embeddings=False,
    trained=32_000_000,
    documents=("calibration/long/train.jsonl.xz",),
    read=40,
    sequences=300,
    joined=7,
    sequence_length=32_768,
    tokens=9_830_400,
    retrieval=0.6,
    losses=tuple(4 - 0.01 * step for step in range(100)),
    # every other step asks for facts
    answers=tuple(None if step % 2 else 6 - 0.05 * step for step in range(100)),
    seconds=195.0,
    merged=True,
    served_rank=32,
    changed=("model.norm.weight",),
)


def test_every_view_shows_it() -> None:
    """Caption, curve and notes are in the card, on the page and in the terminal, and survive the file."""
    report = sample_report().model_copy(update={"adapters": FACTS})
    assert Report.from_json(report.to_json()) == report
    stream = io.StringIO()
    print_report(report, report_console(stream, width=200))
    for view in (render_card(report, RECIPE), render_html(report), stream.getvalue()):
        assert "Training on long documents" in view
        assert "32,000,000 numbers" in view
        assert "3.0700" in view  # the last eighth: steps 88 to 100
        assert "60%" in view


def test_curve() -> None:
    """Means of equal stretches, of answers in the same steps; few steps have a row each."""
    rows = adapter_rows(FACTS)
    assert len(rows) == 8
    assert rows[0] == ("1 to 12", "3.9450", "5.7500")  # answers of steps 1, 3, ... 11
    few = FACTS.model_copy(update={"losses": (3.0, 2.0), "answers": (None, 5.0)})
    assert adapter_rows(few) == [("1", "3.0000", "-"), ("2", "2.0000", "5.0000")]


def test_one_of_a_thing() -> None:
    """A single document is one document, and no joined sequence is not told of."""
    one = FACTS.model_copy(update={"sequences": 1, "read": 1, "joined": 0, "retrieval": 0.0, "trained": 4096})
    texts = "calibration/long/train.jsonl.xz"
    assert adapter_notes(one)[0] == f"Trained on 1 different sequence of 1 document of {texts}."
    assert "7." in adapter_notes(FACTS)[0]
    assert "k_proj, q_proj, and norms: 4,096 numbers trained" in adapter_caption(one)


@pytest.mark.parametrize(
    ("path", "quoted"), [("out/m", "adapter=out/m/adapter"), ("a b", "'adapter=a b/adapter'")]
)
def test_how_adapters_beside_the_weights_are_served(path: str, quoted: str) -> None:
    """Flags as vLLM 0.32 takes them, with a rank that it allows; none for merged ones."""
    changes: dict[str, Any] = {"merged": False, "norms": False}
    beside = FACTS.model_copy(update=changes)
    served = serve_facts(path, ["NVFP4A16"], adapters=beside)
    assert served.command.endswith(f" --enable-lora --lora-modules {quoted} --max-lora-rank 32")
    assert any("without it" in note for note in served.notes)
    assert any("not merged" in note for note in adapter_notes(beside))
    assert "lora" not in serve_facts(path, ["NVFP4A16"], adapters=FACTS).command
