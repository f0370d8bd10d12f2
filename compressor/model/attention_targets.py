"""Which matrices adapters change: the projections of attention, told by their names. For plans: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compressor.model.families.naming import leaf

# Parents under which transformers 5.17 keeps the projections of softmax attention, linear attention apart.
_PARENTS = frozenset({"self_attn", "attn", "attention", "self_attention"})
# Queries, keys, values and outputs, alone, fused, or low-rank (MLA).
_LEAVES = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_a_proj", "o_b_proj"),
        *("query_key_value", "dense", "c_attn", "c_proj", "Wqkv", "Wo", "W_pack", "wq", "wk", "wv", "wo"),
    }
)


def attention_targets(modules: Iterable[str], chosen: Sequence[str] = ()) -> list[str]:
    """Those of the modules that adapters change, in their order.

    Args:
        modules: names of linear layers inside the blocks: of a model, or of a checkpoint.
        chosen: leaf names (``q_proj``) in the place of the projections of attention.
    """
    if chosen:
        return [module for module in modules if leaf(module) in chosen]
    return [module for module in modules if leaf(module) in _LEAVES and _in_attention(module)]


def _in_attention(module: str) -> bool:
    return any(part in _PARENTS for part in module.split(".")[:-1])
