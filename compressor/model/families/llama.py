"""Dense decoders that name their layers as Llama: ``self_attn.{q,k,v,o}_proj``, ``mlp.{gate,up,down}_proj``.

Tensor names are those of the checkpoints that transformers 5.17 saves (``modeling_llama.py`` and the
architectures listed); Phi-3 stores ``qkv_proj`` and ``gate_up_proj`` fused: one matrix, one scale.
"""

from __future__ import annotations

import re
from typing import Any

from compressor.model.families.naming import common_role, whole
from compressor.spec import Role, TensorHeader

_LINEAR = re.compile(
    r"(?:^|\.)layers\.\d+\.(?:self_attn\.(?:q|k|v|o|qkv)_proj|mlp\.(?:gate|up|gate_up|down)_proj)\.weight$"
)


class LlamaFamily:
    """Llama and the dense architectures with its tensor names."""

    name = "llama"
    model_types: tuple[str, ...] = (
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "smollm3",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "olmo2",
    )
    inferred = ""

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Attention and MLP projections are ``linear``; norms, biases and towers ``other``."""
        common = common_role(header, config)
        if common is not None:
            return common
        if _LINEAR.search(header.name) and len(header.shape) == 2:
            return Role("linear", (whole(header, header.name.removesuffix(".weight")),))
        return Role("other", reason="not a projection of attention or MLP")
