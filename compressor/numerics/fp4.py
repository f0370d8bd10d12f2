"""FP4 E2M1: values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; two codes in a byte, the first low.

Codes are sign (bit 3), exponent and mantissa, as the Open Compute Project's Microscaling specification 1.0,
section 5.3.3 lists them. Legend: O rows, I columns.
"""

from __future__ import annotations

import torch

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Adding and subtracting 1.5 * 2**23 * step rounds a small fp32 to a multiple of step, ties to even.
ROUND_MAGIC = 12582912.0


def round_e2m1_magnitude(magnitude: torch.Tensor) -> torch.Tensor:
    """fp32 values >= 0 -> the nearest E2M1 value, ties to the even code, saturating at 6.

    Same ties as ``compressed_tensors``' ``cast_to_fp4``: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2,
    2.5 -> 2, 3.5 -> 4, 5 -> 4.
    """
    clamped = magnitude.clamp(max=E2M1_MAX)
    step = torch.where(clamped < 2.0, 0.5, torch.where(clamped < 4.0, 1.0, 2.0))
    magic = step * ROUND_MAGIC
    return (clamped + magic) - magic


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> the nearest E2M1 value; a negative value that rounds to zero becomes -0, and -0 becomes 0."""
    return round_e2m1_magnitude(x.abs()) * x.sign()


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0 to 15 of fp32 values that ``round_e2m1`` gave.

    The code of a magnitude v is 2v up to 2, v + 2 up to 4, and 7 for 6: twice the value, bent twice.
    """
    size = values.abs()
    code = torch.where(size < 2.0, 2.0 * size, torch.where(size < 6.0, size + 2.0, 7.0))
    return code.to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of uint8 codes 0 to 15 (any shape)."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return table[codes.to(torch.int32)]


def pack_nibbles(codes_OI: torch.Tensor) -> torch.Tensor:
    """uint8 codes [O, I] -> bytes [O, I / 2]; the even column is the low nibble. I must be even."""
    assert codes_OI.shape[-1] % 2 == 0, "an odd number of columns cannot be packed two to a byte"
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [O, I / 2] -> uint8 codes [O, I], the inverse of ``pack_nibbles``."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
