"""What the plan says of a polish: its numbers by hand, its key, and the warning of too little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner import calibrated, polished, sizes
from compressor.planner.claims import claim_tensors
from compressor.planner.polished import PolishPlan, plan_polish, polish_key
from compressor.recipe.model import WeightsSection
from compressor.recipe.polish import PolishSection
from compressor.stages.base import Claim

from .fakes import llama_headers

CONFIG = {"model_type": "llama", "hidden_size": 128, "vocab_size": 512, "num_hidden_layers": 2}
SHOWN = CalibrationSpec((DatasetSpec("shown", Path("shown.txt")),), num_samples=32, sequence_length=256)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "has_accelerator", lambda: False)
    monkeypatch.setattr(calibrated, "has_fast_bfloat16", lambda: False)


def _plan(section: PolishSection, *, seed: int = 3) -> tuple[PolishPlan, list[Claim]]:
    section_of_weights = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    claims = claim_tensors(
        llama_headers(), CONFIG, family_for(CONFIG), section_of_weights, DIALECTS["compressed-tensors"]
    )
    walk = calibrated.plan_walk(claims, SHOWN, CONFIG)
    return plan_polish(section, walk, claims, CONFIG, seed), claims


def test_spec() -> None:
    """The recipe's numbers, and the seed where the section names none."""
    spec = _plan(PolishSection(steps=7, tokens=1000))[0].spec
    assert (spec.steps, spec.tokens, spec.learning_rate, spec.seed) == (7, 1000, 0.003, 3)
    assert (spec.dtype, spec.batch_tokens) == ("float32", 4096)
    assert _plan(PolishSection(seed=0))[0].spec.seed == 0


def test_time_by_hand() -> None:
    """Whole sequences of each step, five passes each, and both models on the held-out rows eleven times."""
    plan, claims = _plan(PolishSection(steps=7, tokens=1000))
    parameters = sum(claim.tensor.numel for claim in claims)
    tokens = 5 * 7 * 3 * 256 + 11 * 2 * 4 * 256
    assert plan.time_s == pytest.approx(2 * parameters * tokens / 8e10)


def test_memory_counts_what_must_be_there() -> None:
    """At least the source in the walk's dtype, a byte a code, and ten numbers a scale."""
    plan, claims = _plan(PolishSection())
    inside = [claim for claim in claims if claim.scheme is not None]
    codes = sum(claim.tensor.numel for claim in inside)
    least = 4 * sum(claim.tensor.numel for claim in claims) + codes + 40 * codes // 16
    assert least < plan.held_bytes
    more = _plan(PolishSection(tokens=1 << 20))[0]
    assert more.held_bytes == plan.held_bytes, "a step takes its tokens in turns"


def test_key_knows_every_number() -> None:
    """Another walk, step count or dtype is another polish."""
    plan, _ = _plan(PolishSection())
    others = [
        replace(plan, spec=replace(plan.spec, steps=1)),
        replace(plan, spec=replace(plan.spec, learning_rate=0.01)),
        replace(plan, spec=replace(plan.spec, seed=9)),
        replace(plan, spec=replace(plan.spec, dtype="bfloat16")),
        replace(plan, device="cuda"),
    ]
    keys = {polish_key(plan, "walk"), polish_key(plan, "other"), *(polish_key(o, "walk") for o in others)}
    assert len(keys) == 7


def test_too_little_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it takes and what there is."""
    plan, _ = _plan(PolishSection())
    monkeypatch.setattr(polished, "available_memory_bytes", lambda: plan.held_bytes)
    assert plan.warnings() == []
    monkeypatch.setattr(polished, "available_memory_bytes", lambda: plan.held_bytes - 1)
    assert "weights.polish" in plan.warnings()[0]
