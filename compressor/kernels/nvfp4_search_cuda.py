"""Triton twin of ``compressor.numerics.nvfp4_search``: same codes, bit for bit; see ``grid_codes_cuda``.

A lane has whole blocks and adds their terms in order. A tile of blocks tries codes until none of its own can
win: the codes that it leaves out lose, as the proof in ``numerics.nvfp4_search`` says.

Legend: N blocks, T blocks of one tile, C blocks of one row of the matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compressor.kernels.grid_codes_cuda import round_e2m1
from compressor.numerics import nvfp4_search
from compressor.numerics.fp8 import E4M3_CODES, e4m3_ladder

TILE = 32
BLOCK = tl.constexpr(nvfp4_search.BLOCK)
ZERO_BLOCK_CODE = tl.constexpr(nvfp4_search.ZERO_BLOCK_CODE)
LAST_CODE = tl.constexpr(E4M3_CODES)


@triton.jit
def _errors(u_T, h_T, blocks, rows, inside, scale):
    """E of each block and what it is at least: the terms of the values that the scale does not reach.

    u and h are the addresses of a block's first values, the next ones so many further on.
    """
    error, clipped = tl.zeros_like(scale), tl.zeros_like(scale)
    for i in tl.static_range(BLOCK):
        u = tl.load(u_T + i * blocks, mask=inside, other=0.0)
        h = tl.load(h_T + i * rows)
        miss = u - scale * round_e2m1(tl.minimum(tl.div_rn(u, scale), 6.0))
        over = tl.maximum(u - 6.0 * scale, 0.0)
        error += h * (miss * miss)
        clipped += h * (over * over)
    return error, clipped


@triton.jit(do_not_specialize=["blocks", "rows"])
def _search(u_16N, h_16C, ladder, amax_N, base_N, last_N, codes_N, blocks, rows, T: tl.constexpr):
    """Goes up from each block's first code, then down; one loop, since every copy of E compiles for long."""
    n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside = n < blocks
    u_T, h_T = u_16N + n, h_16C + n % rows
    base = tl.load(base_N + n, mask=inside, other=1)
    span = tl.max(tl.load(last_N + n, mask=inside, other=0) - base, axis=0)
    some = inside & (tl.load(amax_N + n, mask=inside, other=0.0) > 0.0)
    best = base
    least = tl.full([T], float("inf"), tl.float32)
    step = 0
    alive = 1
    while alive > 0:
        code = tl.minimum(tl.maximum(base + step, 1), LAST_CODE)
        error, clipped = _errors(u_T, h_T, blocks, rows, inside, tl.load(ladder + code))
        better = (error < least) | ((error == least) & (step < 0))  # of equals the smallest code wins
        best = tl.where(better, code, best)
        least = tl.where(better, error, least)
        reached = (step >= 0) | (clipped <= least)
        if step < 0:
            step -= 1
        elif step < span:
            step += 1
        else:
            step = -1
        left = tl.max((some & (base + step > 0) & reached).to(tl.int32), axis=0)
        alive = tl.where(step > 0, 1, left)
    tl.store(codes_N + n, tl.where(some, best, ZERO_BLOCK_CODE).to(tl.uint8), mask=inside)


def search_codes(u_N16: torch.Tensor, h_C16: torch.Tensor) -> torch.Tensor:
    """uint8 [N]: see ``numerics.nvfp4_search.search_codes``."""
    u_16N = u_N16.T.abs().contiguous()
    ladder = e4m3_ladder(u_N16.device)
    amax_N = u_16N.amax(dim=0)
    base_N = nvfp4_search.first_code(amax_N, ladder)
    last_N = (torch.searchsorted(ladder * nvfp4_search.REACH, amax_N) - 1).clamp(min=nvfp4_search.LOW_CODES)
    codes_N = torch.empty(len(u_N16), dtype=torch.uint8, device=u_N16.device)
    _search[(triton.cdiv(len(u_N16), TILE),)](
        u_16N,
        h_C16.T.contiguous(),
        ladder,
        amax_N,
        base_N.to(torch.int32),
        last_N.to(torch.int32),
        codes_N,
        len(u_N16),
        len(h_C16),
        TILE,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return codes_N
