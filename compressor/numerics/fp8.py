"""FP8 E4M3 (the finite variant, ``torch.float8_e4m3fn``): largest 448, least normal 2**-6, least 2**-9."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
# Positive finite codes run from 1 (2**-9) to 126 (448); 127 is NaN.
E4M3_CODES = 126


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 value, ties to even, saturating at +-448 (a bare cast makes NaN of what overflows)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_ladder(device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [127]: the value of each code 0 to 126, ascending."""
    codes = torch.arange(E4M3_CODES + 1, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).float()
