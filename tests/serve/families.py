"""Tiny random models of the families that vLLM serves, in widths that every format and kernel divides.

Head size 64 and linear-attention head size 128 are the smallest that vLLM's CPU kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.model.published import PUBLISHED, WIDE
from tests.tiny import tiny_llama, tiny_llama4, tiny_model, tokens_of_bytes

_SHARED: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}


def _llama(folder: Path) -> Path:
    return tiny_llama(folder, hidden=256, intermediate=512)


def _llama4(folder: Path) -> Path:
    return tiny_llama4(folder, hidden=256, intermediate=256, intermediate_dense=512, moe_step=2)


def _of(class_name: str, config_name: str, **more: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        import transformers

        config = getattr(transformers, config_name)(**tokens_of_bytes(), **_SHARED, **more)
        return tiny_model(folder, getattr(transformers, class_name), config, torch.bfloat16)

    return build


FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "llama": _llama,
    "llama4": _llama4,
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma3": _of("Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=64, query_pre_attn_scalar=64),
    "gpt_oss": _of("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, num_experts_per_tok=2),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    "qwen3_moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, **_EXPERTS),
    "qwen3_next": _of(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        num_experts=4,
        shared_expert_intermediate_size=256,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        **_EXPERTS,
    ),
}
# With a prediction layer, which the engine leaves out unless it is asked to draft.
PREDICTING: Mapping[str, Callable[[Path], Path]] = {
    name: partial(PUBLISHED[name], widths=WIDE) for name in ("qwen3_next_fused", "glm4_moe", "deepseek_v3")
}
