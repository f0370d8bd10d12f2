"""Llama 4, text-only and with vision: experts are stored as 3-D tensors and written one by one.

Layout: transformers 5.17 ``modeling_llama4.py`` Llama4TextExperts, ``x @ gate_up_proj`` with the gate in the
first half of the columns. Output names: vLLM 0.32 ``llama4.py`` load_moe_expert_weights, not fused
(``experts.{e}.gate_proj``), which is also what llm-compressor writes.
"""

from __future__ import annotations

import re
from typing import Any

from compressor.model.families.experts import fused_experts
from compressor.model.families.naming import common_role, input_norm, whole
from compressor.spec import InputNorm, Role, TensorHeader

_LINEAR = re.compile(
    r"(?:^|\.)layers\.\d+\."
    r"(?:self_attn\.[qkvo]_proj|feed_forward\.(?:shared_expert\.|experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
)


class Llama4Family:
    """Llama 4 Scout, Maverick and their text-only forms."""

    name = "llama4"
    model_types: tuple[str, ...] = ("llama4", "llama4_text")
    inferred = ""
    renamed = False

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Projections and experts are ``linear``; routers, norms, vision tower and projector ``other``.

        Raises:
            CheckpointError: experts that do not split into matrices.
        """
        common = common_role(header, config)
        if common is not None:
            return common
        experts = fused_experts(header, transposed=True)
        if experts is not None:
            return Role("linear", experts, input_norm=_input_norm(header.name))
        if _LINEAR.search(header.name) and len(header.shape) == 2:
            part = whole(header, header.name.removesuffix(".weight"))
            return Role("linear", (part,), input_norm=_input_norm(header.name))
        if header.name.endswith(".router.weight"):
            return Role("other", reason="router")
        return Role("other", reason="not a projection of attention, MLP or experts")


def _input_norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 0.0)
