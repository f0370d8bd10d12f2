"""What a choice of schemes must keep to: the recipe's budget in bytes of what is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compressor.errors import UserError
from compressor.kv.formats import FORMATS
from compressor.kv.spec import AUTO as KV_AUTO
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.kv_choice import BF16, cache_bytes, format_map, format_problem
from compressor.planner.predict import GPU_USABLE, tied_once
from compressor.recipe.budget import WeightBudgetSection
from compressor.recipe.kv_cache import KvCacheSection
from compressor.stages.base import Claim
from compressor.stages.budget_spec import CacheOption, Goal, Group


def plan_goal(
    section: WeightBudgetSection,
    claims: Sequence[Claim],
    groups: Sequence[Group],
    config: dict[str, Any],
    kv: KvCacheSection | None,
    faults: list[UserError],
) -> Goal | None:
    """The section's goal in bytes of the groups; None after adding to ``faults`` why it cannot be met."""
    names = {claim.tensor.name for group in groups for claim in group.claims}
    others = [claim for claim in claims if claim.tensor.name not in names]
    targets = [claim for claim in others if claim.scheme is not None]
    fixed = sum(claim.result_bytes for claim in others)
    target_parameters = sum(claim.tensor.numel for claim in targets) + sum(g.parameters for g in groups)
    target_bytes = sum(claim.result_bytes for claim in targets)
    goal = Goal("", None, None, target_parameters, target_bytes, fixed)
    if section.max_perplexity_increase is not None:
        said = f"max_perplexity_increase: {100 * section.max_perplexity_increase:g}%"
        return replace(goal, said=said, max_increase=section.max_perplexity_increase)
    if section.bits_per_target_weight is not None:
        key, said = "bits_per_target_weight", f"bits_per_target_weight: {section.bits_per_target_weight:g}"
        left = int(section.bits_per_target_weight * target_parameters / 8) - target_bytes
    elif section.bits_per_weight is not None:
        key, said = "bits_per_weight", f"bits_per_weight: {section.bits_per_weight:g}"
        parameters = sum(claim.tensor.numel for claim in tied_once(claims, config))
        left = int(section.bits_per_weight * parameters / 8) - fixed
    elif section.bytes is not None:
        key, said = "bytes", f"bytes: {section.bytes:,}"
        left = section.bytes - fixed
    else:
        return _shared_goal(section, goal, groups, config, kv, faults)
    return _within(replace(goal, said=said, group_bytes=left), key, groups, faults)


def _shared_goal(
    section: WeightBudgetSection,
    goal: Goal,
    groups: Sequence[Group],
    config: dict[str, Any],
    kv: KvCacheSection | None,
    faults: list[UserError],
) -> Goal | None:
    """The goal of weights and KV cache on one GPU."""
    assert section.gpu_memory is not None
    assert section.context is not None
    users = section.users or 1
    layers, reason = kv_layers(config)
    if not layers:
        faults.append(UserError(reason, where="weights.budget.gpu_memory", fix="name bytes instead"))
        return None
    if kv is not None and (section.kv_formats or kv.format == KV_AUTO):
        what = "the format of the KV cache is chosen with the weights or in kv_cache, not in both"
        fix = "list formats here and leave out kv_cache, or name one format there"
        faults.append(UserError(what, where="weights.budget.kv_formats", fix=fix))
        return None
    caches = []
    for name in section.kv_formats or (BF16 if kv is None else kv.format,):
        form = FORMATS[name]
        problem = format_problem(layers, form)
        formats = format_map(layers, config, form)
        size = cache_bytes(layers, formats, section.context, engine=form.tier == "vllm")
        if problem or size is None:
            what = problem or f"vLLM 0.32 finds no common page size for its layers with {form.name}"
            faults.append(UserError(what, where="weights.budget.kv_formats", fix=f"leave out {form.name}"))
            continue
        caches.append(CacheOption(form.name, users * size, tuple(formats)))
    if not caches:
        return None
    said = f"gpu_memory: {section.gpu_memory:,} bytes at {section.context:,} tokens x {users}"
    left = int(GPU_USABLE * section.gpu_memory) - goal.fixed_bytes
    if not section.kv_formats:
        left, caches = left - caches[0].nbytes, []
    least = min((cache.nbytes for cache in caches), default=0)
    found = replace(goal, said=said, group_bytes=left - least)
    checked = _within(found, "gpu_memory", groups, faults)
    return None if checked is None else replace(found, group_bytes=left, caches=tuple(caches))


def _within(goal: Goal, key: str, groups: Sequence[Group], faults: list[UserError]) -> Goal | None:
    """The goal, if the smallest options keep to it."""
    assert goal.group_bytes is not None
    least = sum(group.options[0].nbytes for group in groups)
    if least <= goal.group_bytes:
        return goal
    what = (
        f"{goal.said} leaves {max(0, goal.group_bytes):,} bytes for what is chosen, and the smallest "
        f"candidates take {least:,} ({goal.bits(least):.3f} bits per target weight)"
    )
    where = f"weights.budget.{key}"
    faults.append(UserError(what, where=where, fix="raise the budget, or add a smaller candidate"))
    return None
