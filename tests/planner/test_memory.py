"""How a walk's blocks are held within the memory that there is."""

from __future__ import annotations

import pytest

from compressor.calibration.spec import CalibrationSpec
from compressor.dialects import DIALECTS
from compressor.errors import UserError
from compressor.model.families import family_for
from compressor.planner import calibrated
from compressor.planner.calibrated import plan_walk
from compressor.planner.claims import claim_tensors
from compressor.planner.memory import activation_bytes, hold_blocks
from compressor.planner.places import check_memory
from compressor.planner.predict import BASE_RSS_BYTES
from compressor.planner.walkable import decoder_blocks
from compressor.recipe.model import WeightsSection
from compressor.stages.base import Claim

from .fakes import LLAMA4, llama4_headers

HIDDEN, WIDE, EXPERTS = 64, 128, 8
ROUTED = EXPERTS * 3 * HIDDEN * WIDE
DENSE = 3 * HIDDEN * WIDE + EXPERTS * HIDDEN
# What an expert's gate and up take: as read, and in four bytes.
EXPERT = 2 * HIDDEN * WIDE * (2 + 4)


def _claims(weights: dict[str, object]) -> list[Claim]:
    headers = llama4_headers(experts=EXPERTS, hidden=HIDDEN, wide=WIDE)
    section = WeightsSection.model_validate(weights)
    return claim_tensors(headers, LLAMA4, family_for(LLAMA4), section, DIALECTS["compressed-tensors"])


@pytest.mark.parametrize("streams", [1, 2])
def test_the_fastest_way_that_fits(streams: int) -> None:
    """The next block beside the present one; one alone; without experts, unless matrices are replaced."""
    blocks = decoder_blocks(_claims({"scheme": "fp8_static"}))
    whole = 4 * (ROUTED + DENSE)

    def held(free: float) -> tuple[int, bool, bool]:
        found = hold_blocks(blocks, 4, streams=streams, free_bytes=free)
        return found.nbytes, found.read_ahead, found.stored_experts

    two, one = (streams + 1) * whole, streams * whole
    assert held(two) == (two, True, False)
    assert held(two - 1) == held(one) == (one, False, False)
    least = (one, False, False) if streams == 2 else (2 * 4 * DENSE + EXPERT, True, True)
    assert held(one - 1) == held(0) == least


def test_activations_of_experts() -> None:
    """Llama 4 computes every token with every expert; others with those that are chosen."""
    claims = decoder_blocks(_claims({"scheme": "fp8_static"}))[0]
    config = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    some = activation_bytes(claims, 10, 4, config, stored=True)
    assert some == 4 * 10 * 2 * (3 * HIDDEN + WIDE)
    every = activation_bytes(claims, 10, 4, config | {"model_type": "llama4_text"}, stored=True)
    assert every == some * EXPERTS // 2
    assert activation_bytes(claims, 10, 4, config, stored=False) > some
    dense = [claim for claim in claims if ".experts." not in claim.tensor.name]
    assert activation_bytes(dense, 10, 4, config, stored=True) == 0


def test_the_recipe_bounds_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is free; the key does not know."""
    monkeypatch.setattr(calibrated, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(calibrated, "available_memory_bytes", lambda: 1 << 40)
    shown = CalibrationSpec(datasets=(), num_samples=2, sequence_length=8, seed=0)
    claims = _claims({"scheme": "fp8_static"})
    free = plan_walk(claims, shown, LLAMA4)
    assert (free.walk.read_ahead, free.walk.stored_experts) == (True, False)
    tight = plan_walk(claims, shown, LLAMA4, BASE_RSS_BYTES + 4 * (ROUTED + DENSE))
    assert tight.walk.stored_experts
    assert tight.held_bytes < free.held_bytes
    heard = plan_walk(
        _claims({"scheme": "fp8_static", "solver": "gptq"}), shown, LLAMA4, BASE_RSS_BYTES + 10**6
    )
    # Moments of as many experts at a time as a part of that holds.
    assert heard.walk.moment_bytes == 0.2 * 10**6
    assert not heard.walk.stored_experts
    assert calibrated.walk_key(tight, claims, "s") == calibrated.walk_key(free, claims, "s")


def test_too_little_memory_is_a_fault() -> None:
    """Of the weights; and of the evaluation, which loads two models."""
    faults: list[UserError] = []
    check_memory(10**9, _claims({"scheme": "fp8_static"}), None, None, faults)
    check_memory(10**9, _claims({"scheme": "fp8_static"}), None, 10**9, faults)
    assert faults == []
    check_memory(10**9 + 1, _claims({"scheme": "fp8_static"}), None, 10**9, faults)
    (fault,) = faults
    assert fault.where == "workspace.max_memory_bytes"
