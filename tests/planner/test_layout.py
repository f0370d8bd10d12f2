"""Units and shards."""

from __future__ import annotations

from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.layout import group_units, pack_shards
from compressor.recipe.model import WeightsSection

from .fakes import LLAMA, LLAMA4, llama4_headers, llama_headers


def test_fused_matrices_share_a_unit() -> None:
    """q/k/v lie in one unit, gate/up in another; everything is in exactly one."""
    section = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    claims = claim_tensors(llama_headers(), LLAMA, family_for(LLAMA), section, DIALECTS["compressed-tensors"])
    units = group_units(claims)
    members = [sorted(claim.tensor.name for claim in unit.claims) for unit in units]
    together = [names for names in members if len(names) > 1]
    assert sorted(len(names) for names in together) == [2, 2, 3, 3]
    assert sorted(name for names in members for name in names) == sorted(llama_headers())


def test_shards_are_filled_in_order() -> None:
    """No shard exceeds the limit unless one unit alone does; nothing is lost or reordered."""
    section = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    claims = claim_tensors(
        llama4_headers(), LLAMA4, family_for(LLAMA4), section, DIALECTS["compressed-tensors"]
    )
    units = group_units(claims)
    limit = max(unit.result_bytes for unit in units) + 1
    shards = pack_shards(units, limit)
    assert len(shards) > 1
    assert all(shard.result_bytes <= limit for shard in shards)
    assert [unit for shard in shards for unit in shard.units] == units
    assert len(pack_shards(units, 1)) == len(units)
