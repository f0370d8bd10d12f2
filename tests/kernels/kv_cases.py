"""vLLM's formats as the kernels are told them, from the codecs' own constants."""

from __future__ import annotations

from compressor.kernels.kv_packed import Packed
from compressor.kv.integer import _signs
from compressor.kv.vllm_turboquant import vllm_levels

NAMES = [
    "turboquant_4bit_nc",
    "turboquant_k3v4_nc",
    "turboquant_3bit_nc",
    "turboquant_k8v4",
    "int4_per_token_head",
]


def packed(name: str, head_dim: int) -> tuple[Packed, Packed]:
    """Keys and values of a format."""
    if name == "int4_per_token_head":
        side = Packed("zero_point", 4, rotated=True, signs=tuple(_signs(head_dim).tolist()))
        return side, side
    keys, values = {
        "turboquant_4bit_nc": (4, 4),
        "turboquant_k3v4_nc": (3, 4),
        "turboquant_3bit_nc": (3, 3),
        "turboquant_k8v4": (8, 4),
    }[name]
    if keys == 8:
        return Packed("e4m3", 8), Packed("affine", values)
    levels = tuple(vllm_levels(head_dim, keys).tolist())
    return Packed("codebook", keys, levels, rotated=True, factor=head_dim**-0.5), Packed("affine", values)
