"""The KV cache in a report, where the stage's plan lists no layer."""

from __future__ import annotations

from pathlib import Path

from compressor.kv.plan import KvPlan
from compressor.planner.kv_result import kv_facts
from compressor.planner.plan import make_plan
from compressor.recipe.load import load_recipe


def test_latent_attention_is_told_as_the_recipe_says(tmp_path: Path) -> None:
    """DeepSeek-V3 in fp8: nothing is fitted, and yet the flag is needed and a token takes half."""
    recipe = load_recipe("recipes/deepseek-v3-nvfp4.yaml", ("kv_cache={format: fp8}",))
    plan = make_plan(recipe, planning=True)
    assert plan.kv is not None
    KvPlan({}).write(tmp_path)
    facts = kv_facts(plan, tmp_path, {"folded_values": False, "folded_keys": False}, (), ())
    assert facts.flags == plan.kv.flags == "--kv-cache-dtype fp8"
    assert (facts.bytes_per_token_before, facts.bytes_per_token, facts.bits) == (70_272, 35_136, 8.0)
    assert facts.formats == {"fp8": 61}
    assert all(sizes.before == 2 * sizes.after for sizes in facts.sizes)
