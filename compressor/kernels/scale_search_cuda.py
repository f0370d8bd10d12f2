"""Triton twin of ``compressor.numerics.scale_search``: same candidates, bit for bit; see ``grid_codes_cuda``.

The sum's tree halves what is left, rounding up. Padded to a power of two by zeros, and its terms put where
halves meet what the tree adds, it becomes a plain sum of halves.

Legend: N groups of G values, P = G padded, T groups of one tile, K candidates of a group, C groups in one
row.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from compressor.kernels.grid_codes_cuda import nearest
from compressor.numerics.grids import Grid

# Longer groups than these do not fit a tile.
LARGEST_GROUP = 1 << 15
TILE_VALUES = 1024
MOST_GROUPS = 64
VALUES_PER_WARP = 1024
# Tiles of so many groups and more have them side by side: lanes read neighbours.
BESIDE = tl.constexpr(8)


@triton.jit(do_not_specialize=["groups", "rows", "candidates", "w_stride", "h_stride"])
def _best(
    w_NG,
    h_CG,
    scale_NK,
    zero_NK,
    order_P,
    best_N,
    groups,
    rows,
    candidates,
    w_stride,
    h_stride,
    low,
    high,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    T: tl.constexpr,
):
    """Groups come first in ``w``: so Triton gives lanes to them, and short ones are summed within a lane."""
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside = n < groups
    place = tl.load(order_P + tl.arange(0, 1 << LEVELS))
    mask = inside[:, None] & (place >= 0)[None, :]
    i, c = place[None, :].to(tl.int64), (n % rows)[:, None]
    if T >= BESIDE:
        w_place, h_place = n[:, None] + i * w_stride, c + i * h_stride
    else:
        w_place, h_place = n[:, None] * w_stride + i, c * h_stride + i
    w = tl.load(w_NG + w_place, mask=mask, other=0.0)
    h = tl.load(h_CG + h_place, mask=mask, other=0.0)
    best = tl.zeros([T], tl.int64)
    least = tl.zeros([T], tl.float32)
    for k in range(candidates):
        scale = tl.load(scale_NK + n * candidates + k, mask=inside, other=1.0)
        zero = tl.load(zero_NK + n * candidates + k, mask=inside, other=0.0)
        miss = w - nearest(w, scale[:, None], zero[:, None], low, high, KIND)
        terms = tl.where(mask, h * (miss * miss), 0.0)
        for level in tl.static_range(LEVELS):
            terms = tl.sum(tl.reshape(terms, [T, 2, 1 << (LEVELS - 1 - level)]), axis=1)
        error = tl.reshape(terms, [T])
        better = (error < least) | (k == 0)
        best = tl.where(better, k, best)
        least = tl.where(better, error, least)
    tl.store(best_N + n, best, mask=inside)


def tree_order(length: int) -> list[int]:
    """[P]: which of ``length`` terms goes where, so that sums of halves are the tree; -1 for a zero."""
    if length == 1:
        return [0]
    half = length - length // 2
    first = tree_order(half)
    return first + [half + i if i >= 0 and half + i < length else -1 for i in first]


@cache
def _order(length: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(tree_order(length), dtype=torch.int32, device=device)


def best_candidate(
    w_NG: torch.Tensor, h_CG: torch.Tensor, scale_NK: torch.Tensor, zero_NK: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """int64 [N]: see ``numerics.scale_search.best_candidate``; G is at most ``LARGEST_GROUP``."""
    groups, size = w_NG.shape
    rows = len(h_CG)
    order_P = _order(size, w_NG.device)
    padded = len(order_P)
    tile = max(min(TILE_VALUES // padded, MOST_GROUPS), 1)
    if tile >= BESIDE.value:
        w_NG, h_CG = w_NG.T.contiguous(), h_CG.T.contiguous()
    else:
        w_NG, h_CG = w_NG.contiguous(), h_CG.contiguous()
    best_N = torch.empty(groups, dtype=torch.int64, device=w_NG.device)
    _best[(triton.cdiv(groups, tile),)](
        w_NG,
        h_CG,
        scale_NK.contiguous(),
        zero_NK.contiguous(),
        order_P,
        best_N,
        groups,
        rows,
        scale_NK.shape[1],
        w_NG.stride(0),
        h_CG.stride(0),
        grid.low,
        grid.high,
        grid.kind,
        padded.bit_length() - 1,
        tile,
        num_warps=max(min(padded * tile // VALUES_PER_WARP, 16), 1),
        enable_fp_fusion=False,
    )
    return best_N
