"""Every built-in scheme with its options, and matrices to store in them."""

from __future__ import annotations

import torch

from compressor.schemes import parse_scheme
from compressor.schemes.base import Scheme

SPELLINGS: list[dict[str, object]] = [
    {"kind": "nvfp4a16"},
    {"kind": "nvfp4"},
    {"kind": "mxfp4"},
    {"kind": "mxfp4", "activations": "dynamic"},
    {"kind": "fp8_dynamic"},
    {"kind": "fp8_block"},
    {"kind": "fp8_static"},
    *(
        {"kind": "int4", "group_size": size, "symmetric": sym}
        for size in (128, 64, 32)
        for sym in (True, False)
    ),
    {"kind": "int8"},
    *({"kind": "int8", "group_size": size} for size in (128, 64, 32)),
    {"kind": "int8", "activations": "dynamic"},
]
SCHEMES: list[Scheme] = [parse_scheme(spelling) for spelling in SPELLINGS]
LABELS = [scheme.label for scheme in SCHEMES]


def matrices() -> dict[str, torch.Tensor]:
    """Name -> weights [O, I] with I a multiple of 128."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(136, 256, generator=generator) * 0.02
    mixed[3] = 0
    mixed[4] = 1.5
    mixed[5] *= 1e-4
    mixed[7, :128] = 0
    mixed[9, :6] = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 3.0, -3.0])
    mixed[11] = mixed[11].abs()
    tails = torch.randn(128, 128, generator=generator) / torch.rand(128, 128, generator=generator)
    return {
        "mixed bf16": mixed.bfloat16(),
        "tails bf16": tails.clamp(-50, 50).bfloat16(),
        "fp16": torch.randn(128, 128, generator=generator).half(),
        "fp32": torch.randn(128, 128, generator=generator),
        "transposed": torch.randn(128, 136, generator=generator).bfloat16().T,
        "tiny": (torch.randn(128, 128, generator=generator) * 1e-38).bfloat16(),
        "huge": (torch.randn(128, 128, generator=generator) * 1e36).bfloat16(),
        "largest": (torch.randn(128, 128, generator=generator) * 1e38).clamp(-3.3e38, 3.3e38).bfloat16(),
        "zero": torch.zeros(128, 128, dtype=torch.bfloat16),
    }


def applicable(scheme: Scheme, weight: torch.Tensor) -> bool:
    """Whether the scheme takes a matrix of this shape."""
    return scheme.problem(weight.shape[0], weight.shape[1], fused=False) is None
