"""Qwen3-Next and Qwen3.5, dense and with experts: linear attention in most layers, full in the rest.

Qwen3-Next stores the inputs of linear attention as ``in_proj_qkvz`` and ``in_proj_ba``, Qwen3.5 as
``in_proj_qkv``, ``in_proj_z``, ``in_proj_b`` and ``in_proj_a``, which vLLM 0.32 fuses (``qwen3_5.py``); its
published mixtures have their experts in 3-D tensors and lie in a wrapper with a vision tower. Norms store
their weight less one (transformers 5.17 ``modeling_qwen3_next.py`` Qwen3NextRMSNorm). Prediction layers are
``mtp.*``.
"""

from __future__ import annotations

import re

from compressor.model.families.mixtures import ROUTER, SHARED_GATE
from compressor.model.families.named import NamedFamily
from compressor.model.families.naming import input_norm
from compressor.spec import InputNorm


def _norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 1.0)


QWEN3_NEXT = NamedFamily(
    name="qwen3_next",
    model_types=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    projections=re.compile(
        r"(?:^|\.)layers\.\d+\.(?:self_attn\.[qkvo]_proj|linear_attn\.(?:in_proj_(?:qkvz|qkv|z)|out_proj)"
        r"|mlp\.(?:shared_expert\.|experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
    ),
    kept=(
        (re.compile(r"\.mlp\.gate\.weight$"), ROUTER),
        (re.compile(r"\.mlp\.shared_expert_gate\.weight$"), SHARED_GATE),
        (
            re.compile(r"\.linear_attn\.in_proj_(?:ba|b|a)\.weight$"),
            "decay and write strength of linear attention: few rows, which act on the whole state",
        ),
        (re.compile(r"\.linear_attn\.conv1d\.weight$"), "convolution"),
    ),
    norm=_norm,
)
