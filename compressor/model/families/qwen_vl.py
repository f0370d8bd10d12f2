"""Qwen2.5-VL and Qwen3-VL: dense decoders that name their layers as Llama, beside a vision tower ``visual``.

The tower stays in 16 bit, with the mergers that feed its features to the decoder (transformers 5.17
modeling_qwen2_5_vl.py, modeling_qwen3_vl.py). The first checkpoints of Qwen2.5-VL have one flat config.
"""

from __future__ import annotations

from compressor.model.families.llama import LlamaFamily


class QwenVlFamily(LlamaFamily):
    """The language model's layers are Llama's."""

    name = "qwen_vl"
    model_types: tuple[str, ...] = ("qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text")
