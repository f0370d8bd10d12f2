"""Blocks of 16 that are hard for a scale search, and the slow search over every code."""

from __future__ import annotations

import torch

from compressor.numerics.fp8 import e4m3_ladder
from compressor.numerics.nvfp4_search import ZERO_BLOCK_CODE, block_error


def hard_blocks() -> dict[str, torch.Tensor]:
    """Name -> fp32 [N, 16], in units of the tensor-level scale (largest sensible value 448 * 6)."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(600, 16, generator=generator)
    size = torch.rand(600, 1, generator=generator)
    outlier = normal.clone()
    outlier[:, 3] *= 30
    ladder = e4m3_ladder()[1:, None]
    levels = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    few = torch.zeros(64, 16)
    few[:, 5] = torch.rand(64, generator=generator) * 100
    return {
        "normal": normal * 80,
        "any size": normal * torch.exp(size * 20 - 13),
        "bf16": (normal * 40).bfloat16().float(),
        "outliers": outlier * 20,
        "heavy tails": (normal / size.clamp(min=1e-3)).clamp(-2600, 2600),
        "above the range": normal * 2000,
        "subnormal scales": normal * 0.02,
        "too small": normal * 1e-4,
        "vanishing": normal * 1e-38,
        "exact levels and ties": levels * ladder,
        "constant": ladder.expand(-1, 16) * 0.9,
        "one value": few,
        "zero": torch.zeros(5, 16),
    }


def importances() -> torch.Tensor:
    """[1, 16] importance of a row of one block, over four decades."""
    return torch.logspace(-4, 0, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(1))][None]


def search_every_code(u_N16: torch.Tensor, h_C16: torch.Tensor) -> torch.Tensor:
    """uint8 [N]: the smallest of the 126 codes that have the least error; 0.125 for blocks of zeros."""
    h_N16 = h_C16.repeat(len(u_N16) // len(h_C16), 1)
    ladder = e4m3_ladder()
    errors = [block_error(u_N16.abs(), h_N16, ladder[c].expand(len(u_N16))) for c in range(1, 127)]
    stacked_NK = torch.stack(errors, dim=1)
    least = stacked_NK == stacked_NK.amin(dim=1, keepdim=True)
    first = (least.cumsum(1) == 0).sum(1) + 1
    return torch.where(u_N16.abs().amax(1) > 0, first, ZERO_BLOCK_CODE).to(torch.uint8)
