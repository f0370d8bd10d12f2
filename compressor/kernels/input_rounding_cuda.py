"""Triton twin of ``schemes.inputs.round_rows``: inputs rounded in one launch, bit for bit as torch does.

Rules as in ``grid_codes_cuda``. What is not finite comes out as torch's arithmetic has it, so that a pass
that went wrong is not hidden.

Legend: N groups of G values that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compressor.kernels.grid_codes_cuda import MAGNITUDE, VALUES, clipped, round_clipped
from compressor.kernels.input_rounding import ScaleKind
from compressor.numerics.grids import Grid

SIGN = tl.constexpr(-(1 << 31))
E4M3_LARGEST = tl.constexpr(448.0)


@triton.jit
def _passing(x, bounded):
    """``bounded``, but NaN where ``x`` is."""
    return tl.where(x == x, bounded, x)


@triton.jit(do_not_specialize=["values"])
def _round(
    x_NG,
    given,
    rounded_NG,
    values,
    half_range,
    smallest,
    low,
    high,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    KIND: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    where = group[:, None] * SIZE + column[None, :]
    inside = (column < SIZE)[None, :] & (where < values)
    x = tl.load(x_NG + where, mask=inside, other=0.0).to(tl.float32)
    if SCALE == "stored":
        scale = tl.load(given)
        ratio = tl.div_rn(x, tl.zeros_like(x) + scale)
    else:
        # the bits of magnitudes order as the magnitudes do, NaN last
        peak = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(peak, tl.zeros_like(peak) + half_range)
        if SCALE == "e4m3":
            shared = tl.load(given)
            wanted = scale * shared
            scale = _passing(wanted, round_clipped(tl.minimum(wanted, E4M3_LARGEST), "e4m3"))
        scale = tl.where(scale == 0.0, smallest, scale)
        if SCALE == "e4m3":
            scale = tl.div_rn(scale, tl.zeros_like(scale) + shared)
        scale = scale[:, None]
        ratio = tl.div_rn(x, tl.zeros_like(x) + scale)
    size = round_clipped(tl.abs(clipped(ratio, low, high)), KIND)
    if SCALE == "stored":
        negative = ratio.to(tl.int32, bitcast=True) < 0
    else:
        # the library adds a zero point of 0 to such ratios, which makes 0 of -0
        negative = ratio < 0.0
    # Triton's -x is 0 - x, which makes 0 of 0
    signed = (size.to(tl.int32, bitcast=True) | tl.where(negative, SIGN, 0)).to(tl.float32, bitcast=True)
    rounded = _passing(ratio, signed) * scale
    tl.store(rounded_NG + where, rounded.to(rounded_NG.dtype.element_ty), mask=inside)


def round_groups(
    x_NI: torch.Tensor,
    size: int,
    grid: Grid,
    kind: ScaleKind,
    given: torch.Tensor | None,
    *,
    half_range: float,
    smallest: float,
) -> torch.Tensor:
    """The inputs [N, I] rounded, in their own dtype.

    Args:
        x_NI: in any float dtype of at most 32 bits.
        size: how many values of a row share a scale; divides I.
        grid: of the values.
        kind: where scales come from.
        given: fp32 [1], the stored scale or the tensor-level one; None for ``own``.
        half_range: what the largest magnitude of a group is divided by.
        smallest: the scale of a group of zeros (before it is divided by the tensor-level one).
    """
    x_NI = x_NI.contiguous()
    rounded_NI = torch.empty_like(x_NI)
    values = x_NI.numel()
    if values == 0:
        return rounded_NI
    if kind == "stored":  # every value by itself
        size = VALUES.value
    width = triton.next_power_of_2(size)
    together = max(VALUES.value // width, 1)
    _round[(triton.cdiv(values, size * together),)](
        x_NI,
        x_NI if given is None else given,
        rounded_NI,
        values,
        half_range,
        smallest,
        grid.low,
        grid.high,
        SIZE=size,
        GROUPS=together,
        WIDTH=width,
        SCALE=kind,
        KIND=grid.kind,
        num_warps=min(max(width // 512, 4), 16),
        enable_fp_fusion=False,
    )
    return rounded_NI
