"""Groups follow what engines fuse, options what shapes allow, and goals the bits that the recipe names."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.dialects import DIALECTS
from compressor.errors import UserError
from compressor.model.families import family_for
from compressor.planner.budget_goal import plan_goal
from compressor.planner.budget_groups import group_claims
from compressor.planner.claims import claim_tensors
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader
from compressor.stages.base import Claim
from compressor.stages.budget_spec import Goal, Group

from .fakes import LLAMA, LLAMA4, llama4_headers, llama_headers

BYTES = {"bytes": "1GB"}


def _planned(
    headers: dict[str, TensorHeader], config: dict[str, Any], budget: dict[str, Any] = BYTES, **more: object
) -> tuple[list[Claim], tuple[Group, ...], WeightsSection]:
    """Claims with nothing chosen, and the groups."""
    weights = WeightsSection.model_validate({"scheme": "auto", "budget": budget, **more})
    dialect = DIALECTS["compressed-tensors"]
    claims = claim_tensors(headers, config, family_for(config), weights, dialect, may_copy_all=True)
    return claims, group_claims(claims, weights.auto_candidates, config, dialect), weights


def _goal(
    budget: dict[str, Any], config: dict[str, Any] = LLAMA, **more: object
) -> tuple[Goal | None, list[UserError], list[Claim], tuple[Group, ...]]:
    claims, groups, weights = _planned(llama_headers(), config, budget, **more)
    assert weights.budget is not None
    faults: list[UserError] = []
    return plan_goal(weights.budget, claims, groups, config, None, faults), faults, claims, groups


def test_groups_of_a_dense_model() -> None:
    """q/k/v and gate/up together, the others alone; norms, embedding and head in none."""
    claims, groups, _ = _planned(llama_headers(), LLAMA)
    assert [group.name for group in groups][:4] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [group.block for group in groups] == [0] * 4 + [1] * 4
    assert [len(group.claims) for group in groups] == [3, 1, 2, 1] * 2
    assert all(claim.action == "copy" for claim in claims)
    # 128 x 256 values of 4 bits, an E4M3 scale for 16 and an fp32 scale; rows of 8 bits with a 16-bit scale.
    down = {option.name: option.nbytes for option in groups[3].options}
    assert down == {
        "nvfp4a16": 128 * 256 // 2 + 128 * 256 // 16 + 4,
        "fp8_dynamic": 128 * 256 + 128 * 2,
        "int8": down["int8"],
        "copy": 128 * 256 * 2,
    }
    assert [option.nbytes for option in groups[3].options] == sorted(down.values())


def test_groups_of_fused_experts() -> None:
    """All experts of a layer are one group, whichever tensor holds them; the shared expert is apart."""
    _, groups, _ = _planned(llama4_headers(), LLAMA4)
    layer = [group for group in groups if group.block == 0]
    (experts,) = [group for group in layer if "experts" in group.name]
    assert {claim.tensor.name for claim in experts.claims} == {
        "model.layers.0.feed_forward.experts.gate_up_proj",
        "model.layers.0.feed_forward.experts.down_proj",
    }
    assert len(layer) == 3


def test_rules_decide_before_auto() -> None:
    """What a rule or ignore claims is in no group."""
    rules = [{"match": "*down_proj", "scheme": "int8"}]
    _, groups, _ = _planned(llama_headers(), LLAMA, rules=rules, ignore=["model.layers.1.*"])
    assert [group.name.rpartition(".")[2] for group in groups] == ["qkv_proj", "o_proj", "gate_up_proj"]


def test_shapes_decide_what_is_an_option() -> None:
    """A scheme that cannot hold a group is left out there only; 16 bit where none is left."""
    candidates = ["nvfp4a16", {"kind": "int4", "group_size": 128}]
    _, groups, _ = _planned(llama_headers(hidden=136, wide=256), LLAMA, candidates=candidates)
    names = {group.name.rpartition(".")[2]: [option.name for option in group.options] for group in groups}
    assert names == {
        "qkv_proj": ["copy"],
        "o_proj": ["copy"],
        "gate_up_proj": ["copy"],
        "down_proj": ["int4", "nvfp4a16"],
    }


def test_bits_are_those_that_the_key_names() -> None:
    """Bits of a target weight leave out embeddings; bits of a weight and bytes count everything."""
    goal, faults, claims, groups = _goal({"bits_per_target_weight": 6})
    assert goal is not None
    assert not faults
    targets = sum(group.parameters for group in groups)
    assert goal.group_bytes == 6 * targets // 8
    assert goal.bits(goal.group_bytes) == pytest.approx(6)
    everything = sum(claim.tensor.numel for claim in claims)
    others = 2 * (everything - targets)
    goal, _, _, _ = _goal({"bits_per_weight": 10})
    assert goal is not None
    assert goal.fixed_bytes == others
    assert goal.group_bytes == 10 * everything // 8 - others
    goal, _, _, _ = _goal({"bytes": others + 400_000})
    assert goal is not None
    assert goal.group_bytes == 400_000


def test_what_rules_quantize_counts_as_target() -> None:
    """Its bytes leave less for the groups, and its weights are among those that the bits are of."""
    goal, _, claims, groups = _goal(
        {"bits_per_target_weight": 6}, rules=[{"match": "*down_proj", "scheme": "int8"}]
    )
    assert goal is not None
    assert goal.group_bytes is not None
    ruled = [claim for claim in claims if claim.scheme is not None]
    weights = sum(claim.tensor.numel for claim in ruled) + sum(group.parameters for group in groups)
    assert goal.target_parameters == weights
    assert goal.group_bytes + sum(claim.result_bytes for claim in ruled) == 6 * weights // 8


def test_a_budget_below_the_smallest_choice_is_a_fault() -> None:
    """With the bits that the smallest choice has."""
    goal, faults, _, _ = _goal({"bits_per_target_weight": 4.4})
    assert goal is None
    assert "4.5" in faults[0].what
    assert faults[0].where == "weights.budget.bits_per_target_weight"


CACHED = {
    **LLAMA,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_size": 128,
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
}


def test_weights_and_cache_share_the_memory() -> None:
    """90% of it, less what is not chosen for; each format has its own bytes."""
    asked = {"gpu_memory": "100MB", "context": 4096, "users": 16}
    goal, faults, _, _ = _goal(asked, CACHED)
    assert faults == []
    assert goal is not None
    assert goal.group_bytes is not None
    assert goal.caches == ()
    # Keys and values of 2 layers, a head of 64, 2 bytes each.
    cache = 16 * 4096 * 2 * 2 * 64 * 2
    assert goal.group_bytes == 90_000_000 - goal.fixed_bytes - cache
    goal, _, _, _ = _goal({**asked, "kv_formats": ["bf16", "fp8"]}, CACHED)
    assert goal is not None
    assert goal.group_bytes == 90_000_000 - goal.fixed_bytes
    assert [(cache_.format, cache_.nbytes) for cache_ in goal.caches] == [
        ("bf16", cache),
        ("fp8", cache // 2),
    ]
    assert [option.layers for option in goal.caches] == [(), (0, 1)]
