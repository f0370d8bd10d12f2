"""Llama 4, text-only and with vision: experts are stored as 3-D tensors and written one by one.

Layout: transformers 5.17 ``modeling_llama4.py`` Llama4TextExperts, ``x @ gate_up_proj`` with the gate in the
first half of the columns. Output names: vLLM 0.32 ``llama4.py`` load_moe_expert_weights, not fused
(``experts.{e}.gate_proj``), which is also what llm-compressor writes.
"""

from __future__ import annotations

import re

from compressor.model.families.named import NamedFamily
from compressor.model.families.naming import input_norm
from compressor.spec import InputNorm


def _norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 0.0)


LLAMA4 = NamedFamily(
    name="llama4",
    model_types=("llama4", "llama4_text"),
    projections=re.compile(
        r"(?:^|\.)layers\.\d+\.(?:self_attn\.[qkvo]_proj"
        r"|feed_forward\.(?:shared_expert\.|experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
    ),
    kept=((re.compile(r"\.router\.weight$"), "router"),),
    norm=_norm,
    fused="columns",
)
