"""Fitting and rounding of matrices whose groups have a scale each. Imported only where arithmetic is done.

Legend: O out_features, I in_features, N groups of G values, K candidate scales, B x C the groups as a grid.
"""

from __future__ import annotations

from math import frexp
from typing import TYPE_CHECKING

import torch

from compressor.kernels import best_candidate
from compressor.numerics.groups import from_groups, importance_groups, row_chunks, to_groups
from compressor.schemes.base import Scales
from compressor.schemes.grouped import Ratios
from compressor.schemes.ranges import group_ranges, range_scales, storage_dtype

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from compressor.numerics.scale_search import Grid

# Zero points tried around the one that centres the clipped range.
NEAR_ZERO_POINTS = (-1.0, 0.0, 1.0)


def fit_matrix(
    weight_OI: torch.Tensor,
    args: QuantizationArgs,
    group: tuple[int, int],
    grid: Grid,
    ratios: Ratios | None,
    importance_I: torch.Tensor | None,
) -> Scales:
    """Scales [B, C] of one matrix: of the range, or the best near it where ``ratios`` says which to try.

    Power-of-two scales (E2M1 grid) are fp32, others of the dtype in which they are stored.
    """
    low_BC, high_BC = group_ranges(weight_OI, *group)
    dtype = torch.float32 if grid.kind == "e2m1" else storage_dtype(weight_OI)
    if dtype == torch.float32:
        # A power of two far from 1 is no fp16 number.
        low_BC, high_BC = low_BC.float(), high_BC.float()
    start = range_scales(low_BC, high_BC, args, dtype=dtype)
    if ratios is None:
        return start
    return _search(weight_OI, start, low_BC.float(), high_BC.float(), group, grid, ratios, importance_I)


def _search(
    weight_OI: torch.Tensor,
    start: Scales,
    low_BC: torch.Tensor,
    high_BC: torch.Tensor,
    group: tuple[int, int],
    grid: Grid,
    ratios: Ratios,
    importance_I: torch.Tensor | None,
) -> Scales:
    rows, columns = group
    in_features = weight_OI.shape[1]
    if importance_I is None:
        importance_I = torch.ones(in_features, device=weight_OI.device)
    h_CG = importance_groups(importance_I.float() / importance_I.max(), rows, columns)
    unit = _unit(low_BC, high_BC)
    scale_BC = torch.empty_like(start.scale)
    zero_BC = None if start.zero_point is None else torch.empty_like(start.zero_point)
    for chunk in row_chunks(*weight_OI.shape, multiple=rows):
        part = slice(chunk.start // rows, -(-chunk.stop // rows))
        w_NG = to_groups(weight_OI[chunk].float() * unit, rows, columns)
        first_N = start.scale[part].flatten()
        zero_N = None if start.zero_point is None else start.zero_point[part].flatten().float()
        span = (low_BC[part].flatten(), high_BC[part].flatten())
        ratio_K = torch.tensor((1.0, *ratios.coarse), device=w_NG.device)
        found = _Candidates(first_N, ratio_K.expand(len(first_N), -1), zero_N, span, (0.0,))
        chosen_N = best_candidate(w_NG, h_CG, found.scale_NK * unit, found.zero_NK, grid)
        if ratios.fine:
            nearest_N1 = found.ratio_of(chosen_N)
            fine_K = torch.tensor(ratios.fine, device=w_NG.device)
    return Scales(scale_BC, zero_BC)


def _unit(low_BC: torch.Tensor, high_BC: torch.Tensor) -> float:
    """A power of two that brings the largest value to about 1, so that squares neither overflow nor vanish."""
    largest = max(-float(low_BC.min()), float(high_BC.max()))
    return 2.0 ** max(min(-frexp(largest)[1], 126), -126) if largest > 0 else 1.0
