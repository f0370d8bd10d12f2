"""E8M0 scales: a power of two from 2**-127 to 2**127 in a byte, biased by 127 (Microscaling formats 1.0)."""

from __future__ import annotations

import torch

BIAS = 127


def e8m0_codes(scale: torch.Tensor) -> torch.Tensor:
    """uint8 codes of positive fp32 powers of two; other values are rounded down to one."""
    _, exponent = torch.frexp(scale.float())
    return (exponent - 1 + BIAS).clamp(0, 254).to(torch.uint8)


def e8m0_values(codes: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two of uint8 codes; exact, the subnormal 2**-127 included."""
    half = (codes.to(torch.int32) - BIAS).clamp(min=-126)
    return torch.where(codes == 0, 2.0**-127, torch.exp2(half.double())).float()
