"""Mixtures of experts that are Llama but for their MLPs: Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE.

Names are those of the published checkpoints, which transformers 5.17 also saves (``conversion_mapping.py``
fuses experts only in memory) and vLLM 0.32 loads (``mixtral.py``, ``qwen3_moe.py``, ``glm4_moe.py``).
GLM-4-MoE's prediction layer is the block behind the last (``naming.common_role``).
"""

from __future__ import annotations

import re
from typing import Any

from compressor.errors import CheckpointError
from compressor.model.families.experts import fused_experts
from compressor.model.families.named import NamedFamily
from compressor.model.families.naming import input_norm
from compressor.spec import InputNorm, Role, TensorHeader

ROUTER = "router: few rows, and it decides which experts compute"
SHARED_GATE = "gate of the shared expert: one row, which vLLM loads in 16 bit only"

_PROJECTIONS = re.compile(
    r"(?:^|\.)layers\.\d+\.(?:self_attn\.[qkvo]_proj"
    r"|mlp\.(?:shared_experts?\.|experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
)
_KEPT = (
    (re.compile(r"\.mlp\.gate\.weight$"), ROUTER),
    (re.compile(r"\.mlp\.shared_expert_gate\.weight$"), SHARED_GATE),
)


def _norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 0.0)


class MixtralFamily(NamedFamily):
    """Mixtral: ``block_sparse_moe.experts.{e}.w1`` (gate), ``w3`` (up) and ``w2`` (down)."""

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """See ``NamedFamily.role``.

        Raises:
            CheckpointError: experts are fused. transformers saves them so only where it is told to keep the
                names of its modules, and under those names no engine would find the rest of the model.
        """
        if fused_experts(header, transposed=False) is not None:
            raise CheckpointError(
                "Mixtral's experts are in one tensor, under names that engines do not load",
                where=header.name,
                fix="save the model with save_pretrained(..., save_original_format=True)",
            )
        return super().role(header, config)


MIXTRAL = MixtralFamily(
    name="mixtral",
    model_types=("mixtral",),
    projections=re.compile(
        r"(?:^|\.)layers\.\d+\.(?:self_attn\.[qkvo]_proj|block_sparse_moe\.experts\.\d+\.w[123])\.weight$"
    ),
    kept=((re.compile(r"\.block_sparse_moe\.gate\.weight$"), ROUTER),),
    norm=_norm,
)
QWEN_MOE = NamedFamily("qwen_moe", ("qwen2_moe", "qwen3_moe"), _PROJECTIONS, _KEPT, _norm)
GLM4_MOE = NamedFamily("glm4_moe", ("glm4_moe",), _PROJECTIONS, _KEPT, _norm)
