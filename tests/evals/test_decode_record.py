"""Counts of proposals, what a loop is, and the JSON of results."""

from __future__ import annotations

import json

import pytest

from compressor.evals.decode_record import (
    Acceptance,
    DecodingResult,
    Divergence,
    DomainFigures,
    DraftFigures,
)


def observed(kept: list[int], tokens: int) -> tuple[int, list[int], float]:
    """vLLM 0.32 v1/spec_decode/metrics.py, by hand: drafts, accepted per position, mean length."""
    per_position, accepted = [0] * tokens, 0
    for count in kept:
        accepted += count
        for place in range(count):
            per_position[place] += 1
    return len(kept), per_position, 1 + accepted / len(kept)


def test_acceptance_is_counted_as_vllm_does() -> None:
    """Rates are of all drafts, not of those that came so far; the length is 1 + accepted / drafts."""
    kept = [3, 0, 1, 1, 2, 3, 0]
    drafts, per_position, length = observed(kept, 3)
    found = Acceptance.of(kept, 3)
    assert (found.drafts, list(found.accepted_at)) == (drafts, per_position)
    assert found.rates == pytest.approx([5 / 7, 3 / 7, 2 / 7])
    assert found.length == pytest.approx(length)
    assert Acceptance.sum([Acceptance.of(kept[:2], 3), Acceptance.of(kept[2:], 3)], 3) == found
    assert Acceptance.sum([], 3) == Acceptance(0, (0, 0, 0))
    assert Acceptance(0, (0, 0, 0)).length == 1


def test_json_says_how_it_was_measured() -> None:
    """Plain values by name; identical only where greedy."""
    draft = DraftFigures(
        "repeat", Acceptance.of([1, 0], 3), 1, (Divergence(2, 7, 0.125),), 2.0, 1.25, tokens=40, passes=30
    )
    domain = DomainFigures("code", 1, 2, 0, 2.5, (draft,))
    result = DecodingResult(3, 20, 0.0, 5, "bfloat16", "a machine", False, (domain,))
    found = json.loads(json.dumps(result.to_json()))
    assert found["identical"] is False
    assert found["domains"][0]["drafts"][0]["rates"] == [0.5, 0.0, 0.0]
    assert found["domains"][0]["drafts"][0]["length"] == 1.5
    assert found["domains"][0]["drafts"][0]["divergences"] == [{"prompt": 2, "at": 7, "gap": 0.125}]
    assert (found["domains"][0]["domain"], found["runs"], found["dtype"]) == ("code", 5, "bfloat16")
    sampled = DecodingResult(3, 20, 0.8, 5, "float32", "a machine", False, ())
    assert sampled.to_json()["identical"] is None
