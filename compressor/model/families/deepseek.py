"""DeepSeek-V2 and V3: latent attention, shared and routed experts, the first layers dense.

Names: the published checkpoints and transformers 5.17 ``modeling_deepseek_v3.py``. vLLM 0.32
``deepseek_v2.py`` fuses ``q_a_proj`` and ``kv_a_proj_with_mqa``. The prediction layer is the block behind the
last (``naming.common_role``).
"""

from __future__ import annotations

import re

from compressor.model.families.mixtures import ROUTER
from compressor.model.families.named import NamedFamily
from compressor.model.families.naming import FOLDED, input_norm
from compressor.spec import InputNorm

# A latent's norm feeds the matrix that unfolds it.
_UNFOLDED = re.compile(r"(?P<latent>(?:.*\.)?layers\.\d+\.self_attn\.(?:q|kv)_)b_proj\.weight$")


def _norm(name: str) -> InputNorm | None:
    unfolded = _UNFOLDED.match(name)
    if unfolded:
        return InputNorm(f"{unfolded['latent']}a_layernorm.weight")
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 0.0)


DEEPSEEK = NamedFamily(
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3"),
    projections=re.compile(
        r"(?:^|\.)layers\.\d+\.(?:self_attn\.(?:q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
        r"|mlp\.(?:shared_experts\.|experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
    ),
    kept=((re.compile(r"\.mlp\.gate\.weight$"), ROUTER),),
    norm=_norm,
    by_rule_only=((re.compile(r"\.self_attn\.kv_b_proj\.weight$"), FOLDED),),
)
