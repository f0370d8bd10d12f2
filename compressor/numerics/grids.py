"""The value grids of the formats: E2M1, E4M3 and integers, with their codes.

Legend: N groups of G values with a scale each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from compressor.numerics.fp4 import E2M1_MAX, e2m1_codes, e2m1_values, round_e2m1
from compressor.numerics.fp8 import E4M3_MAX, to_e4m3

GridKind = Literal["e2m1", "e4m3", "int"]


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for: E2M1, E4M3, or the integers from ``low`` to ``high``.

    Codes are uint8 0 to 15 (E2M1), float8_e4m3fn (E4M3) or int8 (integers).
    """

    kind: GridKind
    low: float
    high: float

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 -> the nearest value of the grid, ties to even, saturating."""
        if self.kind == "e2m1":
            return round_e2m1(x)
        if self.kind == "e4m3":
            return to_e4m3(x).float()
        return x.clamp(self.low, self.high).round()

    def encode(self, w_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor) -> torch.Tensor:
        """Codes [N, G] of round(w / scale + zero point), in fp32, as ``compressed_tensors``' ``quantize``.

        A zero point of -0 leaves negative zeros alone, as the library does where there is none.
        """
        values_NG = self.round(w_NG / scale_N[:, None] + zero_N[:, None])
        return e2m1_codes(values_NG) if self.kind == "e2m1" else values_NG.to(self.dtype)

    def decode(self, codes_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor) -> torch.Tensor:
        """fp32 [N, G]: (value of the code - zero point) * scale."""
        values_NG = e2m1_values(codes_NG) if self.kind == "e2m1" else codes_NG.float()
        return (values_NG - zero_N[:, None]) * scale_N[:, None]

    def gap(self, x: torch.Tensor) -> torch.Tensor:
        """fp32: how far apart the two values of the grid are that ``x`` lies between.

        At a value, the gap above it in magnitude; outside of the grid, the last one.
        """
        if self.kind == "int":
            return torch.ones_like(x)
        magnitude = x.abs()
        if self.kind == "e2m1":
            return 0.5 * (1.0 + (magnitude >= 2.0).float() + 2.0 * (magnitude >= 4.0).float())
        # three bits of mantissa below a power of two from 2**-6 to 2**8
        exponent = torch.frexp(magnitude.clamp(min=2.0**-9))[1].clamp(-5, 9)
        return torch.ldexp(torch.ones_like(x), exponent - 4)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "int": torch.int8}[self.kind]

    def byte_values(self) -> torch.Tensor:
        """fp32 [256]: the value of each byte read as a code (E2M1 repeats every 16)."""
        as_bytes = torch.arange(256, dtype=torch.uint8)
        return e2m1_values(as_bytes & 0xF) if self.kind == "e2m1" else as_bytes.view(self.dtype).float()


E2M1 = Grid("e2m1", -E2M1_MAX, E2M1_MAX)
E4M3 = Grid("e4m3", -E4M3_MAX, E4M3_MAX)
INT4 = Grid("int", -8.0, 7.0)
INT8 = Grid("int", -128.0, 127.0)
