"""gpt-oss: attention with biases and sinks is quantized; routers and experts stay in 16 bit.

Experts are 3-D tensors with gate and up in alternate columns, and biases (transformers 5.17
modeling_gpt_oss.py). vLLM 0.32 ``gpt_oss.py`` loads these as they are, or in OpenAI's own MXFP4
(``gate_up_proj_blocks``). Of compressed-tensors it has no NVFP4 experts with biases
(compressed_tensors_moe_w4a4_nvfp4.py), and integers by names of its own (``experts.0.w13_weight_packed``).
"""

from __future__ import annotations

import re
from typing import Any

from compressor.model.families.naming import common_role, input_norm, whole
from compressor.spec import Role, TensorHeader

_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\.self_attn\.[qkvo]_proj\.weight$")
_EXPERTS = (
    "experts with biases, gate and up in alternate columns: vLLM 0.32 loads them in 16 bit or in OpenAI's "
    "own MXFP4, not as compressed-tensors or ModelOpt store experts"
)


class GptOssFamily:
    """gpt-oss-20b and 120b, as transformers saves them unquantized."""

    name = "gpt_oss"
    model_types: tuple[str, ...] = ("gpt_oss",)
    inferred = ""
    renamed = True

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Attention projections are ``linear``; experts, routers and norms ``other``."""
        common = common_role(header, config)
        if common is not None:
            return common
        if ".mlp.experts." in header.name:
            return Role("other", reason="bias" if header.name.endswith("_bias") else _EXPERTS)
        if _LINEAR.search(header.name) and len(header.shape) == 2:
            norm = input_norm(header.name, "input_layernorm", "post_attention_layernorm", 0.0)
            part = whole(header, header.name.removesuffix(".weight"))
            return Role("linear", (part,), input_norm=norm)
        if header.name.endswith(".router.weight"):
            return Role("other", reason="router")
        return Role("other", reason="not a projection of attention")
