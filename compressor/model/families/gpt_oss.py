"""gpt-oss: attention with biases and sinks is quantized; routers and experts stay in 16 bit.

Experts are 3-D tensors with gate and up in alternate columns, and biases (transformers 5.17
modeling_gpt_oss.py). vLLM 0.32 ``gpt_oss.py`` loads these as they are, or in OpenAI's own MXFP4
(``gate_up_proj_blocks``). Of compressed-tensors it has no NVFP4 experts with biases
(compressed_tensors_moe_w4a4_nvfp4.py), and integers by names of its own (``experts.0.w13_weight_packed``).
"""

from __future__ import annotations

import re

from compressor.model.families.named import NamedFamily
from compressor.model.families.naming import input_norm
from compressor.spec import InputNorm

_EXPERTS = (
    "experts with biases, gate and up in alternate columns: vLLM 0.32 loads them in 16 bit or in OpenAI's "
    "own MXFP4, not as compressed-tensors or ModelOpt store experts"
)


def _norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 0.0)


GPT_OSS = NamedFamily(
    name="gpt_oss",
    model_types=("gpt_oss",),
    projections=re.compile(r"(?:^|\.)layers\.\d+\.self_attn\.[qkvo]_proj\.weight$"),
    kept=(
        (re.compile(r"\.mlp\.experts\.\w+_bias$"), "bias"),
        (re.compile(r"\.mlp\.experts\."), _EXPERTS),
        (re.compile(r"\.router\.weight$"), "router"),
    ),
    norm=_norm,
    fused="kept",
    renamed=True,
)
