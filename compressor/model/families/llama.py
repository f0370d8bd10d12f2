"""Dense decoders that name their layers as Llama: ``self_attn.{q,k,v,o}_proj``, ``mlp.{gate,up,down}_proj``.

Tensor names are those of the checkpoints that transformers 5.17 saves (``modeling_llama.py`` and the
architectures listed); Phi-3 stores ``qkv_proj`` and ``gate_up_proj`` fused: one matrix, one scale, which the
engine splits into its members.
"""

from __future__ import annotations

import re
from typing import Any

from compressor.model.families.naming import common_role, input_norm, text_config, whole
from compressor.spec import InputNorm, Role, TensorHeader

_LINEAR = re.compile(
    r"(?:^|\.)layers\.\d+\.(?:self_attn\.(?:q|k|v|o|qkv)_proj|mlp\.(?:gate|up|gate_up|down)_proj)\.weight$"
)


# model_type -> norms before attention and before the MLP, and what the model adds to their weights
# (transformers 5.17 modeling_*.py). OLMo 2 normalizes outputs instead.
_PRE_NORM = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3"),
            *("phi3", "granite"),
            *("qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text"),
        ),
        ("input_layernorm", "post_attention_layernorm", 0.0),
    ),
    "gemma": ("input_layernorm", "post_attention_layernorm", 1.0),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", 1.0),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm", 1.0),
}


class LlamaFamily:
    """Llama and the dense architectures with its tensor names."""

    name = "llama"
    model_types: tuple[str, ...] = (
        "llama",
        "mistral",
        "ministral",
        "ministral3",
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
    renamed = False

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Attention and MLP projections are ``linear``; norms, biases and towers ``other``."""
        common = common_role(header, config)
        if common is not None:
            return common
        if _LINEAR.search(header.name) and len(header.shape) == 2:
            norm = _input_norm(header.name, str(text_config(config).get("model_type")))
            return Role("linear", (whole(header, header.name.removesuffix(".weight")),), input_norm=norm)
        return Role("other", reason="not a projection of attention or MLP")


def _input_norm(name: str, model_type: str) -> InputNorm | None:
    if model_type not in _PRE_NORM:
        return None
    attention, mlp, offset = _PRE_NORM[model_type]
    return input_norm(name, attention, mlp, offset)
