"""Triton twins of ``Grid.encode`` and ``Grid.decode``, and the rounding that the other twins share.

Same results as torch, bit for bit: division rounds to nearest, and kernels whose bits matter are launched
with ``enable_fp_fusion=False``, so that no product and sum become one. Importing this module imports triton;
a kernel compiles on its first call. As all twins: 64-bit offsets between matrices, no ``torch.cuda``.

Legend: N groups of G values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compressor.numerics.grids import Grid

VALUES = tl.constexpr(1024)
# adding and subtracting 1.5 * 2**23 * step rounds to multiples of step, ties to even
MAGIC_HALF = tl.constexpr(12582912.0 * 0.5)
MAGIC_ONE = tl.constexpr(12582912.0)
MAGIC_TWO = tl.constexpr(12582912.0 * 2.0)
MAGIC_SUBNORMAL = tl.constexpr(12582912.0 * 2.0**-9)
E4M3_NORMAL = tl.constexpr(2.0**-6)
E4M3_STEPS = tl.constexpr(2.0**9)
# rounds the bits of an fp32 to three bits of mantissa, ties to even
KEEP_3_BITS = tl.constexpr(-(1 << 20))
BELOW_HALF = tl.constexpr((1 << 19) - 1)
MANTISSA_SHIFT = tl.constexpr(20)
# fp32's exponent bias less that of E4M3, above three bits of mantissa
REBIAS = tl.constexpr(120 << 3)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def clipped(x, low, high):
    """``x`` within ``low`` and ``high``."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def round_e2m1(x):
    """The nearest E2M1 value, ties to even, of values within +-6; zeros are positive."""
    size = tl.abs(x)
    magic = tl.where(size < 2.0, MAGIC_HALF, tl.where(size < 4.0, MAGIC_ONE, MAGIC_TWO))
    return (x + magic) - magic


@triton.jit
def round_clipped(x, KIND: tl.constexpr):
    """The nearest value of the grid, ties to even, of values within its bounds."""
    if KIND == "e2m1":
        rounded = round_e2m1(x)
    elif KIND == "e4m3":
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + BELOW_HALF + ((bits >> MANTISSA_SHIFT) & 1)) & KEEP_3_BITS
        subnormal = (x + MAGIC_SUBNORMAL) - MAGIC_SUBNORMAL
        rounded = tl.where(tl.abs(x) < E4M3_NORMAL, subnormal, bits.to(tl.float32, bitcast=True))
    else:
        rounded = (x + MAGIC_ONE) - MAGIC_ONE
    return rounded


@triton.jit
def nearest(x, scale, zero, low, high, KIND: tl.constexpr):
    """The lattice value nearest to ``x``: (R(x / scale + zero) - zero) * scale."""
    rounded = round_clipped(clipped(tl.div_rn(x, scale) + zero, low, high), KIND)
    return (rounded - zero) * scale


@triton.jit
def _groups(first, size, within):
    """int64 group of each value from ``first`` on; ``within`` are offsets below 2**30."""
    start = first // size
    return start + ((first - start * size).to(tl.int32) + within) // size


@triton.jit(do_not_specialize=["size"])
def _encode(w_NG, scale_N, zero_N, codes_NG, values, size, low, high, KIND: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * VALUES
    within = tl.arange(0, VALUES)
    n, inside = _groups(first, size, within), first + within < values
    w = tl.load(w_NG + first + within, mask=inside, other=0.0)
    scale = tl.load(scale_N + n, mask=inside, other=1.0)
    zero = tl.load(zero_N + n, mask=inside, other=0.0)
    x = clipped(tl.div_rn(w, scale) + zero, low, high)
    rounded = round_clipped(x, KIND)
    magnitude = tl.abs(rounded)
    if KIND == "e2m1":
        code = tl.where(magnitude < 2.0, 2.0 * magnitude, tl.where(magnitude < 6.0, magnitude + 2.0, 7.0))
        codes = code.to(tl.int32) | tl.where(x < 0.0, 8, 0)
    elif KIND == "e4m3":
        normal = ((rounded.to(tl.int32, bitcast=True) & MAGNITUDE) >> MANTISSA_SHIFT) - REBIAS
        sign = tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)
        below = magnitude < E4M3_NORMAL
        codes = tl.where(below, (magnitude * E4M3_STEPS).to(tl.int32), normal) | sign
    else:
        codes = rounded.to(tl.int32)
    tl.store(codes_NG + first + within, codes.to(codes_NG.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _decode(codes_NG, table, scale_N, zero_N, weight_NG, values, size):
    first = tl.program_id(0).to(tl.int64) * VALUES
    within = tl.arange(0, VALUES)
    n, inside = _groups(first, size, within), first + within < values
    code = tl.load(codes_NG + first + within, mask=inside, other=0)
    value = tl.load(table + code.to(tl.int32))
    scale = tl.load(scale_N + n, mask=inside, other=1.0)
    zero = tl.load(zero_N + n, mask=inside, other=0.0)
    tl.store(weight_NG + first + within, (value - zero) * scale, mask=inside)


def encode(w_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [N, G]; arguments as ``Grid.encode``."""
    stored = torch.int8 if grid.kind == "int" else torch.uint8
    codes_NG = torch.empty(w_NG.shape, dtype=stored, device=w_NG.device)
    values = w_NG.numel()
    arguments = (w_NG.contiguous(), scale_N.contiguous(), zero_N.contiguous(), codes_NG)
    if values:
        _encode[(triton.cdiv(values, VALUES.value),)](
            *arguments, values, w_NG.shape[1], grid.low, grid.high, grid.kind, enable_fp_fusion=False
        )
    return codes_NG.view(grid.dtype)


def decode(codes_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor, grid: Grid) -> torch.Tensor:
    """fp32 [N, G]; arguments as ``Grid.decode``."""
    weight_NG = torch.empty(codes_NG.shape, device=codes_NG.device)
    values, table = codes_NG.numel(), grid.byte_values().to(codes_NG.device)
    arguments = (codes_NG.contiguous().view(torch.uint8), table, scale_N.contiguous(), zero_N.contiguous())
    if values:
        _decode[(triton.cdiv(values, VALUES.value),)](
            *arguments, weight_NG, values, codes_NG.shape[1], enable_fp_fusion=False
        )
    return weight_NG
