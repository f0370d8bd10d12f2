"""Rows of domains, continuations, speed and gates."""

from __future__ import annotations

import io
import json

from compressor.report.card import render_card
from compressor.report.evaluated import (
    domain_rows,
    gate_notes,
    generation_rows,
    speed_caption,
    speed_rows,
)
from compressor.report.measured import (
    DomainQuality,
    Evaluated,
    Gate,
    GenerationFacts,
    SpeedFacts,
    SpeedFigures,
    Spread,
)
from compressor.report.model import Report
from compressor.report.rows import gate_row, gate_sentence
from compressor.report.terminal import print_report, report_console
from tests.report.sample import ATTACK, sample_report

DOMAIN = DomainQuality(
    name="sotu",
    documents=5,
    scored_tokens=12_345,
    perplexity_source=20.0,
    perplexity_result=25.0,
    increase=0.25,
    increase_ci95=(0.2, 0.3),
    kl_mean=0.125,
)
GENERATION = GenerationFacts(
    prompts=16,
    prompt_tokens=64,
    new_tokens=32,
    until_divergence=9.25,
    until_divergence_ci95=(5.0, 14.5),
    agreeing=0.5,
    identical=0.125,
    lengths=(3, 9),
    dtype="float32",
)


def _figures(speed: float, peak: int | None) -> SpeedFigures:
    spread = Spread(median=speed, low=speed - 1, high=speed + 1)
    first = Spread(median=1 / speed, low=0.5 / speed, high=2 / speed)
    return SpeedFigures(
        first_token_s=first,
        tokens_per_s=spread,
        weight_bytes=2_000_000,
        cache_bytes=500_000,
        peak_device_bytes=peak,
    )


def _speed(peak: int | None = None, *, compressed: bool = False) -> SpeedFacts:
    return SpeedFacts(
        device="a CPU",
        dtype="bfloat16",
        prompt_tokens=128,
        new_tokens=64,
        batch=1,
        runs=5,
        source=_figures(40, peak),
        result=_figures(50, peak),
        speedup=Spread(median=1.25, low=1.2, high=1.3),
        runs_compressed=compressed,
    )


def test_domains_are_shown_where_there_are_several() -> None:
    """One domain is the whole text; an interval stands beside its change."""
    assert domain_rows([DOMAIN]) == []
    other = DOMAIN.model_copy(update={"name": "moby-dick", "increase_ci95": None})
    rows = domain_rows([DOMAIN, other])
    assert rows[0] == ("sotu", "5", "12,345", "20.000", "25.000", "+25.0% (95%: +20.0% to +30.0%)", "0.12500")
    assert rows[1][5] == "+25.0%"


def test_continuations_and_speed_are_told() -> None:
    """Intervals and spreads with the figures; memory of an accelerator where there is one."""
    assert generation_rows(None) == []
    assert speed_rows(None) == []
    assert [row[1] for row in generation_rows(GENERATION)] == ["9.2 (95%: 5.0 to 14.5)", "50.0%", "12.5%"]
    rows = speed_rows(_speed())
    assert rows[0] == ("tokens a second", "40.0 (39.0 to 41.0)", "50.0 (49.0 to 51.0)", "1.25 (1.20 to 1.30)")
    assert [row[3] for row in rows[1:]] == ["0.80", "1.00", "1.00"]
    assert speed_rows(_speed(3_000_000))[-1][1:3] == ("3.0 MB", "3.0 MB")
    assert "holds the result's weights decoded" in speed_caption(_speed())
    assert "decoded" not in speed_caption(_speed(compressed=True))


def test_gates_show_what_decides() -> None:
    """In the units of the quality table; the interval and its confidence; old reports by ``passed``."""
    old = Gate(metric="kl", max_increase=0.5, value=0.6, passed=False)
    assert gate_row(old) == ("kl", "0.6000", "0.5000", "FAIL")
    increase = Gate(metric="perplexity", max_increase=0.05, value=0.0149, passed=True, interval=(-0.01, 0.02))
    assert gate_row(increase) == ("perplexity", "+1.5% (95%: -1.0% to +2.0%)", "+5.0%", "PASS")
    points = Gate(metric="task:piqa", max_increase=0.02, value=-0.0167, passed=True)
    assert gate_row(points) == ("task:piqa", "-0.0167 lost", "0.0200 lost", "PASS")
    gate = Gate(
        metric="task:piqa",
        min_recovery=0.99,
        value=0.985,
        passed=True,
        confidence=0.9,
        verdict="UNCERTAIN",
        interval=(0.97, float("inf")),
        units=1500,
        unit="items",
        needed=9000,
        note="1,500 items are too few to tell; about 9,000 would",
    )
    assert gate_row(gate) == ("task:piqa", "98.5% (90%: 97.0% to infinite)", "99.0% kept", "UNCERTAIN")
    assert gate_sentence(gate).startswith("task:piqa UNCERTAIN: 98.5%")
    assert gate_notes([old, gate]) == [f"task:piqa, UNCERTAIN: {gate.note}."]
    report = sample_report().model_copy(update={"gates": (old, gate)})
    assert Report.from_json(report.to_json()) == report


def test_every_view_shows_them_escaped() -> None:
    """Terminal and card; names of domains are a stranger's, and stay text."""
    report = sample_report()
    assert report.quality is not None
    hostile = DOMAIN.model_copy(update={"name": ATTACK})
    speed = _speed().model_copy(update={"device": ATTACK})
    quality = report.quality.model_copy(
        update={"domains": (DOMAIN, hostile), "generation": GENERATION, "speed": speed}
    )
    gate = Gate(metric="kl", max_increase=0.5, value=0.4, passed=True, verdict="PASS", note=ATTACK)
    report = report.model_copy(update={"quality": quality, "gates": (gate,)})
    card = render_card(report, "name: x\n")
    assert "| sotu | 5 |" in card
    assert "<script" not in card.replace("\\<", "")
    console = report_console(io.StringIO(), 120)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "tokens a second" in shown
    assert "\x1b" not in shown


def test_the_record_is_read_from_the_measurement() -> None:
    """Infinite ends of intervals pass through JSON; what was not measured is empty."""
    figures = dict.fromkeys(("source", "result", "difference", "stderr", "recovery"), 0.5) | {
        "n": 4,
        "higher_is_better": True,
        "difference_ci95": (-0.5, 0.5),
        "recovery_ci95": (0.1, float("inf")),
        "lost": 1,
        "gained": 1,
        "p_value": 1.0,
        "seeds": 1,
    }
    measured = {
        "kl": {"mean": 0.1, "p999": 1.0, "mean_ci95": None},
        "tasks": {"piqa": {"acc": figures}},
        "interval_unit": "windows",
        "domains": [],
        "documents": [],
    }
    for found in (measured, json.loads(json.dumps(measured))):
        read = Evaluated.of(found)
        assert read.tasks["piqa"]["acc"].recovery_ci95 == (0.1, float("inf"))
        assert (read.generation, read.speed, read.kl_ci95) == (None, None, None)
