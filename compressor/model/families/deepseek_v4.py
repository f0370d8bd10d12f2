"""DeepSeek-V4: low-rank attention over a compressed cache, experts, and hyper-connections between blocks.

Tensor names are those of its checkpoints (``attn.wq_a``, ``ffn.experts.0.w1``); transformers 5.17 renames
them while loading (``conversion_mapping.py``). vLLM 0.32 (models/deepseek_v4/attention.py) builds
compressors without a quantization and multiplies ``wo_a`` group by group, reading its weights itself.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from compressor.model.families.naming import common_role, whole
from compressor.spec import InputNorm, Role, TensorHeader

_LINEAR = re.compile(
    r"(?P<layer>(?:^|.*\.)layers\.\d+)\.(?:(?P<attention>attn\.)(?:wq_a|wkv|wq_b|wo_b)"
    r"|ffn\.(?:experts\.\d+|shared_experts)\.(?P<expert>w[123]))\.weight$"
)
_ENDS = re.compile(r"(?:^|\.)(?P<end>embed|head)\.weight$")
_LEFT = (
    (".indexer.", "sparse-attention indexer"),
    (".compressor.", "compressor of the key-value cache"),
    (".wo_a.", "output projection by groups, whose weights engines read themselves"),
    (".ffn.gate.", "router"),
    ("hc_", "hyper-connection"),
)


class DeepseekV4Family:
    """DeepSeek-V4, once its FP8 and FP4 tensors are dequantized."""

    name = "deepseek_v4"
    model_types: tuple[str, ...] = ("deepseek_v4",)
    inferred = ""
    renamed = True

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Low-rank projections, the last output projection and experts are ``linear``; the rest ``other``."""
        common = common_role(header, config)
        if common is not None:
            return common
        for words, reason in _LEFT:
            if words in header.name:
                return Role("other", reason=reason)
        if len(header.shape) != 2:
            return Role("other", reason="not a matrix")
        part = whole(header, header.name.removesuffix(".weight"))
        if end := _ENDS.search(header.name):
            if end["end"] == "embed":
                return Role("embedding", (part,), "input embedding")
            return Role("lm_head", (part,), "output head")
        found = _LINEAR.match(header.name)
        if found is None:
            return Role("other", reason="not a projection of attention or experts")
        if header.name.endswith((".wq_a.weight", ".wkv.weight")):
            part = replace(part, fuse_group=f"{found['layer']}.attn.fused_wqa_wkv")
        return Role("linear", (part,), input_norm=_input_norm(header.name, found))


def _input_norm(name: str, found: re.Match[str]) -> InputNorm | None:
    """The norm of the block or that of the low-rank queries; none before products of other matrices."""
    if name.endswith(".wq_b.weight"):
        return InputNorm(f"{found['layer']}.attn.q_norm.weight")
    if found["attention"]:
        return None if name.endswith(".wo_b.weight") else InputNorm(f"{found['layer']}.attn_norm.weight")
    return None if found["expert"] == "w2" else InputNorm(f"{found['layer']}.ffn_norm.weight")
