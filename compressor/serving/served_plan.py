"""Which plan of the KV cache a served model has, and whether the plug-in can follow it."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from compressor.errors import UserError
from compressor.kv.formats import FORMATS
from compressor.kv.plan import JSON_NAME, KvPlan

PLAN_VARIABLE = "COMPRESSOR_KV_PLAN"
"""Names a folder with a plan, for a model whose own folder has none; empty: no plan is followed."""

_UNQUANTIZED = {"auto", "bfloat16", "float16", "float32"}


def served_plan(model: str, cache_dtype: str) -> KvPlan | None:
    """The plan to follow, or None where the model is none of ours.

    A plan of one format that vLLM has itself is left to vLLM's launch flags, unless ``COMPRESSOR_KV_PLAN``
    names it.

    Args:
        model: as the engine was told; only a folder can have a plan of its own.
        cache_dtype: the engine's ``--kv-cache-dtype``.

    Raises:
        UserError: a plan that this plug-in cannot follow, or that contradicts the flags.
    """
    named = os.environ.get(PLAN_VARIABLE)
    if named == "":
        return None
    folder = Path(named if named is not None else model)
    if named is None and not (folder / JSON_NAME).is_file():
        return None
    plan = _read(folder)
    formats = {layer.format for layer in plan.layers.values() if layer.keys is not None}
    if not formats:
        return None
    only = FORMATS.get(next(iter(formats))) if len(formats) == 1 else None
    if named is None and only is not None and only.tier == "vllm":
        return None
    where = str(folder / JSON_NAME)
    if plan.sink_tokens or plan.recent_tokens:
        raise UserError(
            f"{plan.sink_tokens} sink and {plan.recent_tokens} recent tokens in 16 bit: a layer of vLLM's "
            "cache has slots of one size, so the plug-in cannot keep some tokens otherwise",
            where=where,
            fix="make a plan with sink_tokens: 0 and recent_tokens: 0, or use the package's own cache",
        )
    if cache_dtype not in _UNQUANTIZED:
        raise UserError(
            f"the model's plan of its KV cache and --kv-cache-dtype {cache_dtype} cannot both be followed",
            where=where,
            fix=f"leave --kv-cache-dtype away, or set {PLAN_VARIABLE}= to ignore the plan",
        )
    return plan


@lru_cache(maxsize=4)
def _read(folder: Path) -> KvPlan:
    return KvPlan.read(folder)
